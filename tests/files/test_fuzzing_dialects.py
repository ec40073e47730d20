"""Whatever is in the files of an adapter of any dialect, a command reads it rightly or refuses it in a sentence."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from dialect_samples import DIALECTS, LITGPT, MEGATRON, PARTS, Sample, write_image_base
from fuzzing import (
    ADAPTER_FIELDS,
    OUT,
    Kind,
    Mutation,
    Spoil,
    check_outcome,
    header,
    json_file,
    mutations_of,
    spoilt,
)
from malformed import frame
from safetensors.torch import load, load_file
from torch import Tensor
from trainer_layouts import write_base
from workbench import snapshot, within

from loratool.adapters.formats import read_adapter
from loratool.adapters.formats.trainer import value_in
from loratool.adapters.formats.yaml_lines import settings_in
from loratool.adapters.reading import Reading
from loratool.cli import run
from loratool.errors import InputError

# of each sample; LORATOOL_MUTATIONS=5000 LORATOOL_SEED=7 pytest tests/files/test_fuzzing_dialects.py tries 500 of each
COUNT = int(os.environ.get("LORATOOL_MUTATIONS", "60")) // 10
SEED = int(os.environ.get("LORATOOL_SEED", "11"))
LONGEST = 20.0  # seconds until a command counts as hanging
SAMPLES: Mapping[str, Sample] = {**DIALECTS, **PARTS}
COMMANDS = (
    *(
        f"merge BASE LORA {OUT}",
        f"merge BASE LORA {OUT}",
        f"convert LORA {OUT} --to peft",
        "inspect LORA --check --json",
    ),
    *(f"resize LORA {OUT} --rank 1", f"rescale LORA {OUT} --scale 2", "compare LORA LORA --json"),
    *(f"merge BASE LORA {OUT} --dry-run --json", "inspect LORA --base BASE", "push LORA org/name --dry-run"),
)
FIELDS = (*ADAPTER_FIELDS, "lora_parameters", "fine_tune_type", "num_layers", "model")
# What takes the place of a part of a tensor's name.
PARTS_OF_NAMES = (
    *("", "0", "00", "1", "-1", "7" * 30, "²", "٣", "x", "X" * 300, "q_proj", "lora_A", "lora_B", "lora_a", "lora_b"),
    *("weight", "default", "bias", "alpha", "m", "magnitude", "dora_scale", "processor", "lora_up", "lora_mid", "diff"),
    *("experts", "switch_mlp", "text_model", "\u202e", "a\nb", "layers", "lora_unet_x", "diffusion_model", "unet"),
)
WORDS = (
    "true",
    "yes",
    "no",
    "~",
    "016",
    "0x10",
    "1e3",
    "1_000",
    ".5",
    "-0",
    "nan",
    ".inf",
    "9" * 400,
    "'4'",
    '"a # b"',
)
BLOCKS = (
    "|",
    ">",
    "&a 4",
    "*a",
    "!!int '4'",
    "{a: 1}",
    "[1, 2]",
    "|\n  lora_alpha: 7\n  alpha: 9",
    "\n  - alpha: 3\n    dim: 9",
)


def lines(text: bytes, chance: random.Random) -> bytes:
    """A YAML file with an odd line, or odd bytes."""
    if chance.random() < 0.2:
        return spoilt(text, chance)
    found = text.decode().splitlines()
    at = chance.randrange(len(found))
    key = found[at].partition(":")[0]
    match chance.randrange(6):
        case 0:
            found[at] = f"{key}: {chance.choice(WORDS)}"
        case 1:
            found[at] = f"{key}: {chance.choice(BLOCKS)}"
        case 2:
            del found[at]
        case 3:
            found[at] = chance.choice((" ", "\t", "- ", "# ", "? ", "---\n")) + found[at]
        case 4:
            found.insert(at, chance.choice(("note: |", "list:", "- a: 1", "  lora_alpha: 9", "    alpha: 9", "peft:")))
        case _:
            found[at] += chance.choice((" # 5", "#5", " ", ": 3", "\r"))
    return ("\n".join(found) + "\n").encode()


def names(file: bytes, chance: random.Random) -> bytes:
    """A safetensors file with an odd part in the name of a tensor, a tensor too few, or one that is of another shape."""
    length = int.from_bytes(file[:8], "little")
    table: dict[str, Any] = json.loads(file[8 : 8 + length])
    name = chance.choice([each for each in table if each != "__metadata__"])
    entry = table.pop(name)
    match chance.randrange(4):
        case 0:
            pass
        case 1:
            shape = entry["shape"]
            entry["shape"] = chance.choice(
                (shape[::-1], [1, *shape], [*shape, 1], [-1 if not shape else shape[0] * 2, 1])
            )
            table[name] = entry
        case 2:
            entry["dtype"] = chance.choice(("I32", "U32", "F32", "BOOL", "F8_E4M3"))
            table[name] = entry
        case _:
            parts = re.split(r"([._:])", name)
            for _ in range(chance.choice((1, 1, 2))):
                parts[chance.randrange(0, len(parts), 2)] = chance.choice(PARTS_OF_NAMES)
            table["".join(parts)] = entry
    return frame(json.dumps(table).encode(), file[8 + length :])


def values(file: bytes, chance: random.Random) -> bytes:
    """A safetensors file with odd bytes in its tensors."""
    raw, start = bytearray(file), 8 + int.from_bytes(file[:8], "little")
    for _ in range(chance.choice((1, 4))):
        raw[chance.randrange(start, len(raw))] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
    return bytes(raw)


def tensors(file: bytes, chance: random.Random) -> bytes:
    return chance.choice((header, names, names, values))(file, chance)


SPOILS: Mapping[str, Spoil] = {".json": json_file(*FIELDS), ".yaml": lines, ".safetensors": tensors, ".gguf": spoilt}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "llama")


def base_of(sample: Sample, llama: Path, home: Path) -> Path:
    """The model that an adapter is merged into."""
    return (
        llama
        if sample.weight.startswith("model.")
        else write_image_base(home / "painter.safetensors", sample.weight or "x.weight")
    )


def changes(base: Path, out: Path) -> dict[str, Tensor]:
    """What a merge changed, by weight."""
    before = load_file(base / "model.safetensors" if base.is_dir() else base)
    after = load_file(next(out.rglob("*.safetensors")))
    return {name: after[name].double() - tensor.double() for name, tensor in before.items() if name in after}


def same_tensors(one: bytes, other: bytes) -> bool:
    """Whether two files differ in no tensor."""
    try:
        first, second = load(one), load(other)
    except Exception:  # of the reader of the reference, whatever it raises
        return False
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def alpha_in(sample: Sample, path: str, content: bytes) -> float | None:
    """α as the trainer's own parser of its settings has it; None where there is none that is a number."""
    try:
        table = yaml.safe_load(content) if path.endswith(".yaml") else json.loads(content)
        found = table["peft"]["alpha"] if "peft" in table else table["lora_alpha"]
    except (yaml.YAMLError, ValueError, KeyError, TypeError, UnicodeDecodeError, RecursionError):
        return None
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def check_change(sample: Sample, mutation: Mutation, sound: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Settings can scale what the same tensors change, all of it alike and by their α, and do nothing else."""
    if any("magnitude" in name or name.endswith((".m", "dora_scale")) for name in sample.tensors):
        return
    size = sum(float((tensor * tensor).sum()) for tensor in sound.values())
    factor = sum(float((tensor * found[name]).sum()) for name, tensor in sound.items()) / size
    for name, tensor in sound.items():
        assert torch.allclose(found[name], factor * tensor, rtol=1e-4, atol=1e-5 * max(1, abs(factor))), (
            f"{mutation}: {name} is not what it was, scaled"
        )
    if mutation.path.endswith(".yaml"):
        alpha = alpha_in(sample, mutation.path, mutation.content)
        assert alpha is None or abs(factor - alpha) <= 1e-3 * max(1, abs(alpha)), f"{mutation}: scaled by {factor}"


def check_silence(sample: Sample, path: Path, about: str) -> None:
    """No tensor is left over without a word."""
    adapter = read_adapter(path, Reading(input_alpha=sample.alpha))
    used = {name for every in adapter.sources.values() for name in every}
    silent = [name for name in adapter.file.tensors if name not in used and name not in adapter.unused]
    assert not silent or adapter.unsupported or adapter.format == "gguf", f"{about}: {silent} left over in silence"


def words(sample: Sample, command: str, base: Path, adapter: Path, out: Path) -> list[str]:
    places = {"BASE": str(base), "LORA": str(adapter), "OUT": str(out)}
    takes_alpha = sample.alpha is not None and not command.startswith(("push", "compare"))
    alpha = ["--input-alpha", f"{sample.alpha:g}"] if takes_alpha else []
    return [*(places.get(word, word) for word in command.split()), *alpha]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_mutated_adapter_is_read_rightly_or_refused_in_a_sentence(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 with the right output or 2 to 7 with one message: never a bug, a hang, a changed input, a leftover."""
    sample, out = SAMPLES[name], tmp_path / "out" / "made"
    out.parent.mkdir()
    adapter, base = sample.write(tmp_path / "in"), base_of(sample, llama, tmp_path)
    sound = {sample.name: (tmp_path / "in" / sample.name).read_bytes()}
    sound |= {file: text.encode() for file, text in sample.texts.items()}
    merge = f"merge BASE LORA {OUT}"
    assert run(words(sample, merge, base, adapter, out)) == (0 if sample.weight else 4), capsys.readouterr().err
    right = changes(base, out) if sample.weight else {}
    shutil.rmtree(out.parent)
    failures: list[str] = []
    for mutation in mutations(name, sample, sound):
        out.parent.mkdir()
        path = tmp_path / "in" / mutation.path
        path.write_bytes(mutation.content)
        wanted = snapshot(tmp_path / "in")
        capsys.readouterr()
        try:
            with within(LONGEST):
                code = run(words(sample, mutation.command, base, adapter, out))
            if code == 0 and OUT in mutation.command:
                check_silence(sample, adapter, str(mutation))
            same = same_tensors(sound[sample.name], (tmp_path / "in" / sample.name).read_bytes())
            if code == 0 and mutation.command == merge and same:
                check_change(sample, mutation, right, changes(base, out))
            check_outcome(mutation, code, *capsys.readouterr(), tmp_path / "in", out)
            assert snapshot(tmp_path / "in") == wanted, f"{mutation}: changed an input"
        except (AssertionError, pytest.fail.Exception) as error:
            failures.append(f"{mutation.command}: {error}")
        path.write_bytes(sound[mutation.path])
        shutil.rmtree(out.parent)
    assert not failures, f"{len(failures)} failures\n" + "\n\n".join(text[:3000] for text in failures[:5])


SETTINGS = (
    f"{LITGPT}lora_query: true\nlora_dropout: 0.05\ntrain:\n  save_interval: 1000\n  lr: 1e-4\nlogger: csv\n",
    f"{MEGATRON}  target_modules:\n  - linear_qkv\n  - linear_proj\n  dropout: 0.0\n",
)


def test_settings_are_read_as_yaml_has_them_or_passed_over() -> None:
    """Lists, blocks, comments, numbers with leading zeros, lines of several documents: against PyYAML."""
    chance = random.Random(SEED)
    for _ in range(COUNT * 60):
        text = lines(chance.choice(SETTINGS).encode(), chance).decode(errors="replace")
        try:
            wanted = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # of numbers of thousands of digits
            continue
        with suppress(InputError):
            for path, value in numbers_in(settings_in(text, "x")):
                there = value_in(wanted, *path)
                assert value == (float(there) if isinstance(there, str) else there), f"{text!r}: {path}"


def numbers_in(table: Mapping[str, Any], start: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number, and every true or false, with the names that lead to it."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, (*start, name))
        elif isinstance(value, (int, float)):
            yield (*start, name), value


def mutations(name: str, sample: Sample, sound: Mapping[str, bytes]) -> list[Mutation]:
    """Of each file of a sample as many."""
    return [
        mutation
        for file, content in sound.items()
        for mutation in mutations_of(
            Kind(file, SPOILS[Path(file).suffix], COMMANDS), f"{name} {file}", COUNT // len(sound), SEED, content
        )
    ]
