"""The command that `loratool.json` and the card of an output hold makes the same bytes again, whatever options were given.

Values are drawn from the options' own descriptions, so that a new option is tried as it is described. Run where the
inputs lie: a record tells nobody's folders.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf_bytes
import numpy as np
import pytest
import torch
from malformed import f32, safetensors_bytes, write_json
from oracle import files_of
from packed_models import save_packed
from paths import ROOT
from quantised_models import FAMILIES

import loratool
from loratool import cli
from loratool.commands.makers import MAKERS
from loratool.commands.merge import MergeAndPushOptions
from loratool.options.described import Choice, Flag, Number, Option, Options, Size, described_by
from loratool.reworking.combine_options import CombineOptions
from loratool.reworking.compressing.options import CompressOptions, ExpandOptions
from loratool.reworking.converting.convert import ConvertOptions
from loratool.reworking.extracting.options import ExtractOptions
from loratool.reworking.rebasing.rebase import RebaseOptions
from loratool.reworking.rescale import RescaleOptions
from loratool.reworking.resize import ResizeOptions

# Names with what a shell, a parser of options and an encoding may trip over.
BASE, TUNED = "-a base's “ü” $HOME", "tuned `ls`; \\n & *"
ADAPTERS = (f"it's one{'!' * 220}", '--two "b" \u00e9')
WITH_MORE, WITH_HEAD, WITHOUT_ALPHA, SEVERAL = "with more", "{head}", "~α", "[both]"
SIBLING, SHARED, MEMBER = "sibling of 'it'; #2", "--shared (all)", "mine & yours"
PACKED, IN_GGUF = "=8 bits", "~model?.gguf"
PIPELINE, OF_PIPELINE = "pipe | line", "<of it>.safetensors"
EXTRA = "2_Dense/-more, of it.safetensors"
WEIGHTS, BY_PATTERN, GRAMS = "-list é.json", "{table}.json", "-calibration #1.safetensors"
LAYERS, WIDE, NARROW = 1, 8, 6
SHAPES = {"self_attn.q_proj": (WIDE, WIDE), "self_attn.v_proj": (NARROW, WIDE), "mlp.down_proj": (WIDE, NARROW)}
MODULES = {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in SHAPES.items()}
Words = list[str]


def normal(*shape: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(size=shape)


def write_model(folder: Path, moved: float = 0.0) -> None:
    """A model; `moved` adds updates of rank 2 to its layers, and a little noise."""
    folder.mkdir()
    tensors = {}
    for n, (module, (rows, columns)) in enumerate(MODULES.items()):
        update = (
            normal(rows, 2, seed=n + 20) @ normal(2, columns, seed=n + 40) + normal(rows, columns, seed=n + 60) / 1e3
        )
        tensors[f"{module}.weight"] = f32(normal(rows, columns, seed=n) + moved * update)
    tensors["model.norm.weight"] = f32(normal(WIDE, seed=90))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def write_packed(folder: Path) -> None:
    """The same model with its layers in 8 bits."""
    plain = {f"{m}.weight": torch.from_numpy(normal(*shape, seed=n)) for n, (m, shape) in enumerate(MODULES.items())}
    made = FAMILIES["int8 (W8A8)"](plain)
    norm = {"model.norm.weight": torch.from_numpy(normal(WIDE, seed=90)).float()}
    save_packed(folder, {**norm, **made.tensors}, made.config, architectures=["LlamaForCausalLM"])


def write_gguf(path: Path) -> None:
    """The same model as llama.cpp has it; queries in heads of 2, so that their rows stay in order."""
    names = {"q_proj": "attn_q", "v_proj": "attn_v", "down_proj": "ffn_down"}
    tensors = {}
    for n, (module, shape) in enumerate(MODULES.items()):
        layer, leaf = module.split(".")[2], module.rpartition(".")[2]
        tensors[f"blk.{layer}.{names[leaf]}.weight"] = normal(*shape, seed=n)
    entries = (
        gguf_bytes.words("general.architecture", "llama"),
        gguf_bytes.number("llama.attention.head_count", WIDE // 2),
    )
    path.write_bytes(gguf_bytes.whole_file(entries, tensors))


def write_pipeline(folder: Path, adapter: Path) -> None:
    """A U-Net and a text encoder of one layer each, and an adapter of both as diffusers saves it."""
    modules = {
        "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
    }
    factors = {}
    for n, (name, module) in enumerate(modules.items()):
        (folder / name).mkdir(parents=True)
        weights = safetensors_bytes({f"{module}.weight": f32(normal(WIDE, WIDE, seed=n))})
        (folder / name / "model.safetensors").write_bytes(weights)
        for side, shape in (("A", (2, WIDE)), ("B", (WIDE, 2))):
            factors[f"{name}.{module}.lora_{side}.weight"] = f32(normal(*shape, seed=n + 9))
    write_json(folder / "model_index.json", {"_class_name": "X", **{name: ["diffusers", "Y"] for name in modules}})
    adapter.write_bytes(safetensors_bytes(factors))


def write_adapter(
    folder: Path, seed: int = 7, more: Mapping[str, Any] = MappingProxyType({}), **config: object
) -> None:
    """An adapter of rank 3 on all layers, with `more` tensors; `config` replaces fields of its config."""
    folder.mkdir(parents=True)
    rank, tensors = 3, dict(more)
    for n, (module, (rows, columns)) in enumerate(MODULES.items()):
        tensors[f"base_model.model.{module}.lora_A.weight"] = f32(normal(rank, columns, seed=seed + n))
        tensors[f"base_model.model.{module}.lora_B.weight"] = f32(normal(rows, rank, seed=seed + n + 500))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    targets = [name.rpartition(".")[2] for name in SHAPES]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, **config}
    write_json(folder / "adapter_config.json", {name: value for name, value in settings.items() if value is not None})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every input, in which commands run."""
    home = tmp_path_factory.mktemp("home with spaces")
    write_model(home / BASE)
    write_model(home / TUNED, moved=1.0)
    write_model(home / SIBLING, moved=0.01)
    write_packed(home / PACKED)
    write_gguf(home / IN_GGUF)
    write_pipeline(home / PIPELINE, home / OF_PIPELINE)
    for number, name in enumerate(ADAPTERS):
        write_adapter(home / name, 1000 * (number + 1))
    for name in ("default", "it's"):
        write_adapter(home / SEVERAL / name, seed=len(name))
    write_adapter(home / WITHOUT_ALPHA, lora_alpha=None)
    head = {"base_model.model.score.weight": f32(normal(2, WIDE, seed=91))}
    write_adapter(home / WITH_HEAD, more=head, modules_to_save=["score"])
    write_adapter(home / WITH_MORE)
    for name, seed in ((EXTRA, 92), (EXTRA.replace("2_", "1_"), 93)):  # of one name, in two folders
        (home / WITH_MORE / name).parent.mkdir()
        (home / WITH_MORE / name).write_bytes(safetensors_bytes({"model.norm.weight": f32(normal(WIDE, seed=seed))}))
    write_adapter(home / MEMBER, seed=3)
    loratool.compress([home / MEMBER, home / ADAPTERS[1]], home / SHARED, rank=3)
    write_json(home / WEIGHTS, [0.5, {"q_proj": 2, "default": -1.5}])
    write_json(home / BY_PATTERN, {"q_proj": 2, "v_proj": 0.25})
    grams = {module: (g := normal(9, 3, seed=n)).T @ g for n, module in enumerate(MODULES)}
    (home / GRAMS).write_bytes(safetensors_bytes({name: f32(gram) for name, gram in grams.items()}))
    return home


@dataclass(frozen=True)
class Command:
    """A command that makes an output, and what its options need to be taken."""

    options: type[Options]
    operands: Sequence[str]
    otherwise: Words = field(default_factory=list)  # words of a run whose options alone ask for nothing
    needs: Mapping[str, Words] = field(default_factory=dict)  # option → words without which it is refused
    on: Mapping[str, Sequence[str]] = field(default_factory=dict)  # option → operands on which it does something
    apart: frozenset[str] = frozenset()  # options that have a test of their own


# By the name of the field: values where the description alone gives none that is sure to be taken.
VALUES: Mapping[str, Sequence[str]] = {
    "adapter_name": ("default", "it's"),
    "also_load": (f"{WITH_MORE}/{EXTRA}", EXTRA),
    "architecture": ("sd15", "sd2"),
    "block_weights": ("L=0.5", "L00=-2"),
    "budget": ("300", "2kB", "1.5k"),
    "calibration": (GRAMS,),
    "component_weights": ("unet=0.5", "text_encoder=-1.25"),
    "device": ("cpu",),
    "energy": ("0.5", "0.875"),
    "error": ("0.5", "0.125"),
    "exclude": ("v_proj", r"mlp\.(down|up)"),
    "gguf_type": ("f16", "bf16", "f32"),
    "ignore_files": ("*, of it.safetensors",),
    "onto": (SIBLING,),
    "include": (r"(q|v)_proj|down", "layers[.]"),
    "layer_weights": (BY_PATTERN,),
    "max_memory": ("8GB",),
    "maps": (r"^model\.(layers)=model.\1", rf"self_attn[.]([qv]|{'x' * 220})=self_attn.\1"),
    "match": ("q_proj=0.5", r"layers\.\d\.mlp=-1e-3", "(v|down)_proj=3"),
    "max_rank": ("1", "2"),
    "only": ("unet", "te1"),
    "outliers": ("0.1", "0.05"),
    "rank": ("1", "2", "4"),
    "ratio": ("2", "10.5"),
    "base": (BASE,),
    "server": ("vllm", "mlx", "sglang"),
    "to": ("peft", "mlx"),
    "weights": ("0.5", "-1.25", "1e-3", "2"),
    "weights_file": (WEIGHTS,),
    "window": ("0.1", "0.25"),
}
# Options outside a record that are not tried: with these nothing is written, or something is sent.
NOT_TRIED = {"allow_secret", "dry_run", "exclude", "public", "push_to_hub"}
READING = {"adapter_name": (SEVERAL,), "input_alpha": (WITHOUT_ALPHA,)}
COMMANDS = {
    "merge": Command(
        MergeAndPushOptions,
        (BASE, *ADAPTERS),
        needs={"also_load": ["--ignore-files", EXTRA.replace("2_", "1_")], "accept_loss": ["--requantize"]},
        on={
            **{option: (BASE, *operands) for option, operands in READING.items()},
            **dict.fromkeys(("dequantize", "requantize", "accept_loss"), (PACKED, *ADAPTERS)),
            "gguf_type": (IN_GGUF, *ADAPTERS),
            **dict.fromkeys(("only", "component_weights"), (PIPELINE, OF_PIPELINE)),
            "allow_new_tensors": (BASE, WITH_HEAD),
            "also_load": (BASE, WITH_MORE),
            "ignore_files": (BASE, WITH_MORE),
        },
        apart=frozenset({"num_cpus", "num_gpus"}),  # of a cluster
    ),
    "rescale": Command(RescaleOptions, ADAPTERS[:1], ["--scale", "0.3"], {"each": ["--spectral", "1.5"]}, on=READING),
    "resize": Command(ResizeOptions, ADAPTERS[:1], ["--rank", "2"], {"layer_weights": ["--budget", "300"]}, on=READING),
    "combine": Command(
        CombineOptions,
        ADAPTERS,
        needs={
            "rule": ["--method", "pico"],
            "space": ["--method", "ties"],
            "density": ["--method", "dare_ties"],
            "window": ["--method", "della", "--density", "0.5"],
            "outliers": ["--method", "breadcrumbs", "--density", "0.5"],
            "sign": ["--method", "ties"],
            "normalize": ["--method", "ties"],
            "iso_beta": ["--method", "iso_c"],
            "row_wise": ["--method", "nuslerp"],
            "seed": ["--method", "dare_linear", "--density", "0.5"],
            "rank_policy": ["--rank", "3"],
        },
        on={option: (*operands, ADAPTERS[1]) for option, operands in READING.items()},
    ),
    "convert": Command(
        ConvertOptions,
        ADAPTERS[:1],
        ["--to", "mlx"],
        {"architecture": ["--to", "kohya"]},
        on={**READING, "architecture": (OF_PIPELINE,)},
    ),
    "extract": Command(ExtractOptions, (BASE, TUNED)),
    "compress": Command(
        CompressOptions,
        ADAPTERS,
        ["--rank", "2"],
        on={"adapter_name": (SEVERAL,), "input_alpha": (WITHOUT_ALPHA, ADAPTERS[1])},
        apart=frozenset({"into"}),
    ),
    "expand": Command(ExpandOptions, (SHARED, MEMBER)),
    "rebase": Command(
        RebaseOptions,
        ADAPTERS[:1],
        ["--from", BASE, "--onto", SIBLING],
        {"base": ["--onto", SIBLING], "onto": ["--from", BASE]},
        on=READING,
    ),
}


def value_of(name: str, described: Option, chance: random.Random) -> str:
    """A word that the option takes."""
    if name in VALUES:
        return chance.choice(VALUES[name])
    match described.kind:
        case Choice() as kind:
            return chance.choice(kind.names())
        case Number(whole=True) as kind:
            return str(chance.randint(int(kind.low or 0), min(9, int(kind.high or 9))))
        case Number() as kind:
            return repr(chance.uniform(kind.low or kind.above or 0.25, kind.high or 2))
        case Size():
            return chance.choice(("300B", "1kB", "1.5KiB"))
    raise AssertionError(f"VALUES has no example of {described.flag}, whose kind tells none")


def words_of(name: str, described: Option, count: int, chance: random.Random) -> Words:
    """The words that give an option a value, or `count` of them where it takes several."""
    if isinstance(described.kind, Flag):
        return [chance.choice(described.flags[0].split("/"))]
    values = [value_of(name, described, chance) for _ in range(count if described.many else 1)]
    if described.commas and chance.random() < 0.5:
        values = [",".join(values)]
    return [word for value in values for word in (described.flags[0], value)]


def draws(name: str, chance: random.Random) -> Iterator[tuple[str, list[Words]]]:
    """Every option of a command in turn, with ways to ask for it: with others first, which may not go together."""
    command = COMMANDS[name]
    described = {field: option for field, (option, _) in described_by(command.options).items()}
    every = {
        field: option
        for field, option in described.items()
        if field not in command.apart and (option.recorded or field not in NOT_TRIED)
    }
    for first, option in every.items():
        operands = command.on.get(first, command.operands)
        inputs = [f"./{operand}" for operand in operands]
        count = len(operands) - (name == "merge")

        def asked(field: str, count: int = count) -> Words:
            return [*command.needs.get(field, []), *words_of(field, every[field], count, chance)]

        others = [word for field in chance.sample([*every], 2) if field != first for word in asked(field)]
        besides: tuple[Words, ...] = (
            others,
            [*command.otherwise, *others],
            [],
            command.otherwise,
            [],
            command.otherwise,
        )
        yield option.flag, [[name, *inputs, *words, *asked(first)] for words in besides]


def recorded(folder: Path) -> str:
    """The command that an output's record holds, which is the one of its card."""
    command: str = json.loads((folder / "loratool.json").read_bytes())["command"]
    if (card := folder / "README.md").exists():  # compressed adapters have none
        assert f"\n$ {command}\n" in card.read_text(encoding="utf-8")
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_recorded_command_makes_the_same_bytes(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option at least once, most of them with others: all files are alike, the record and the card too."""
    monkeypatch.chdir(home)
    chance = random.Random(name)
    for number, (flag, ways) in enumerate(draws(name, chance)):
        first, again = tmp_path / f"-first ü {number}", tmp_path / f"-again ü {number}"
        for words in ways:
            if cli.run([*words, "-q", "-o", str(first)]) == 0:
                break
        else:
            pytest.fail(f"{flag} is refused: {ways}")
        command = shlex.split(recorded(first))
        assert command[:2] == ["loratool", name]
        assert command[-2:] == ["-o", "out"]
        assert cli.run([*command[1:-1], str(again), "-q"]) == 0, (words, command)
        assert files_of(again) == files_of(first), (words, command)
        shutil.rmtree(first)
        shutil.rmtree(again)


def test_every_command_with_a_record_is_tried() -> None:
    """`run`, `reproduce` and `merge --also` record the commands that they call."""
    assert {*COMMANDS} == {*MAKERS}


def test_each_of_several_outputs_has_a_command_of_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `merge --also` recorded for an output makes the same bytes alone."""
    monkeypatch.chdir(home)
    one, two = tmp_path / "one", tmp_path / "two"
    inputs = [f"./{operand}" for operand in COMMANDS["merge"].operands]
    words = ["merge", *inputs[:2], "-o", str(one), "--also", f"{two}={inputs[2]}", "--also", f"{two}={inputs[1]}"]
    assert cli.run([*words, "--dtype", "bfloat16", "-q"]) == 0
    for made in (one, two):
        again = tmp_path / f"{made.name} again"
        assert cli.run([*shlex.split(recorded(made))[1:-1], str(again), "-q"]) == 0
        assert files_of(again) == files_of(made)


def test_the_recorded_command_adds_to_compressed_adapters_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compress --into` has no output of its own, and its command is one of a list."""
    monkeypatch.chdir(home)
    for folder in (tmp_path / "first", tmp_path / "again"):
        shutil.copytree(SHARED, folder)
    assert cli.run(["compress", f"./{WITH_MORE}", "--into", str(tmp_path / "first"), "-q"]) == 0
    (command,) = json.loads((tmp_path / "first" / "loratool.json").read_bytes())["added"]
    words = [str(tmp_path / "again") if word == "./first" else word for word in shlex.split(command)]
    assert cli.run([*words[1:], "-q"]) == 0
    names = {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir()}
    again = {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()}
    assert again.pop("loratool.json").replace(b"./again", b"./first") == names.pop("loratool.json")
    assert again == names


@pytest.mark.skipif(os.name != "posix", reason="the command is quoted for such a shell")
def test_a_shell_runs_the_recorded_command_as_it_stands(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sh` takes the very words of the record apart, in a process of its own."""
    monkeypatch.chdir(home)
    inputs = [f"./{operand}" for operand in COMMANDS["merge"].operands]
    assert cli.run(["merge", *inputs, "-w", "-1.5", "-w", "1e-1", "-q", "-o", str(tmp_path / "first")]) == 0
    program = tmp_path / "bin" / "loratool"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m loratool "$@"\n')
    program.chmod(0o755)
    packages = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": packages}
    line = recorded(tmp_path / "first").removesuffix("out") + shlex.quote(str(tmp_path / "again"))
    subprocess.run(["sh", "-c", line], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "first")
