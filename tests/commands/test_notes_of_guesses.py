"""Whatever was guessed or renamed is a note with a constant code: in every command's report, its `--json` and its record.

The cells are what makes a guess necessary × the commands that meet it. A command without a base binds no names, so that
what is guessed of a base is for `merge`, its plan and `inspect --base` alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from malformed import Stored, f32, random, write_adapter, write_base, write_json
from workbench import Workbench

PREFIX = "base_model.model."
H = 6
Q = tuple(f"model.layers.{n}.self_attn.q_proj" for n in range(2))


def factors(modules: tuple[str, ...] = Q, name: str = "", prefix: str = PREFIX) -> dict[str, Stored]:
    return {
        f"{prefix}{module}.lora_{side}{name}.weight": f32(0.1 * random(*shape, seed=seed))
        for seed, module in enumerate(modules)
        for side, shape in (("A", (2, H)), ("B", (H, 2)))
    }


def model(modules: tuple[str, ...] = Q, more: Mapping[str, Stored] = MappingProxyType({})) -> dict[str, Stored]:
    return {**{f"{module}.weight": f32(random(H, H, seed=9)) for module in modules}, **more}


def codes_of(notes: list[dict[str, str]]) -> set[str]:
    assert all(set(note) == {"code", "text"} and note["text"] for note in notes)
    return {note["code"] for note in notes}


# what the file spells otherwise → its tensors
SPELLED: dict[str, dict[str, Stored]] = {
    "prefix-missing": factors(prefix=""),
    "prefix-doubled": factors(prefix=2 * PREFIX),
    "adapter-name-in-names": factors(name=".default"),
    "wrapper-in-names": factors(prefix=f"{PREFIX}_orig_mod."),
}
Words = Callable[[Workbench], list[str | Path]]
# every command that reads an adapter, and writes a record of it (or none)
COMMANDS: dict[str, Words] = {
    "merge": lambda b: ["merge", b.base, b.adapter, "-o", b.out],
    "merge --dry-run": lambda b: ["merge", b.base, b.adapter, "-o", b.out, "--dry-run"],
    "inspect": lambda b: ["inspect", b.adapter],
    "inspect --base": lambda b: ["inspect", b.adapter, "--base", b.base],
    "rescale": lambda b: ["rescale", b.adapter, "--scale", "2", "-o", b.out],
    "resize": lambda b: ["resize", b.adapter, "--rank", "1", "-o", b.out],
    "combine": lambda b: ["combine", b.adapter, b.inputs / "plain", "-o", b.out],
    "compare": lambda b: ["compare", b.adapter, b.inputs / "plain"],
}


def check(bench: Workbench, command: str, *options: str) -> set[str]:
    """Run a command; the codes of its report, which its record must have too."""
    outcome = bench.run(*COMMANDS[command](bench), "--json", *options)
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    found = codes_of(told["results"][0]["notes"] if command.startswith("inspect") else told["notes"])
    record = bench.out / "loratool.json"
    assert record.exists() == ("-o" in COMMANDS[command](bench) and "--dry-run" not in command)
    if record.exists():
        recorded = codes_of(json.loads(record.read_text())["notes"])
        assert found - {"update-larger-than-weight"} <= recorded
    return found


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("code", SPELLED)
def test_names_that_peft_does_not_write_are_told_by_every_command(bench: Workbench, code: str, command: str) -> None:
    """They are read all the same, and in an output they are spelled as PEFT does."""
    write_base(bench.base, model())
    write_adapter(bench.adapter, SPELLED[code], r=2, lora_alpha=4)
    names = tuple(f"{PREFIX}{q}" for q in Q) if code == "prefix-doubled" else Q
    write_adapter(bench.inputs / "plain", factors(names), r=2, lora_alpha=4)
    assert code in check(bench, command)


# what must be guessed of a base → (the base's tensors, its config, the adapter's tensors, options)
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
TIED = {**LLAMA, "tie_word_embeddings": True}
EMBEDDING = {"model.embed_tokens.weight": f32(random(12, H, seed=5))}
HEAD = {f"{PREFIX}lm_head.lora_A.weight": f32(random(2, H)), f"{PREFIX}lm_head.lora_B.weight": f32(random(12, 2))}
LAYERS = tuple(f"layers.{n}.self_attn.q_proj" for n in range(2))
FUSED = {f"model.layers.{n}.self_attn.qkv_proj.weight": f32(random(3 * H, H)) for n in range(2)}
VIT = tuple(f"encoder.layer.{n}.attention.attention.query" for n in range(2))
CONV = ("transformer.h.0.attn.c_proj",)
C_ATTN = {
    "transformer.h.0.attn.c_attn.weight": f32(random(H, 3 * H)),
    "transformer.h.0.attn.c_attn.bias": f32(random(3 * H)),
}
GUESSES: dict[str, tuple[dict[str, Stored], dict[str, Any], dict[str, Stored], list[str]]] = {
    "prefix-dropped": (model(LAYERS), LLAMA, factors(), []),
    "prefix-added": (model(), LLAMA, factors(LAYERS), []),
    "suffix-match": (model(tuple(f"strange.{q}" for q in LAYERS)), LLAMA, factors(), []),
    "renamed": (
        model(VIT),
        {"model_type": "vit"},
        factors(tuple(f"layers.{n}.attention.q_proj" for n in range(2))),
        [],
    ),
    "part-of-fused": (FUSED, {"model_type": "phi3"}, factors(), []),
    "wrapper-dropped": (model(tuple(f"_orig_mod.{q}" for q in Q)), LLAMA, factors(), []),
    "map-used": (model(tuple(f"net.{q}" for q in LAYERS)), LLAMA, factors(), ["--map", "^model=net"]),
    "map-unused": (model(), LLAMA, factors(), ["--map", "^nowhere=net"]),
    "orientation-guessed": (model(CONV, C_ATTN), {}, factors(CONV), []),
    "orientation-overruled": (model(CONV), {"model_type": "gpt2"}, factors(CONV), ["--no-fan-in-fan-out"]),
}


@pytest.mark.parametrize("command", ["merge", "merge --dry-run", "inspect --base"])
@pytest.mark.parametrize("code", GUESSES)
def test_what_is_guessed_of_a_base_is_told_wherever_there_is_one(bench: Workbench, code: str, command: str) -> None:
    """Names that are not the base's own, and the way round of a matrix."""
    tensors, config, adapter, options = GUESSES[code]
    write_base(bench.base, tensors)
    write_json(bench.base / "config.json", config)
    write_adapter(bench.adapter, adapter, r=2, lora_alpha=4, target_modules=None)
    assert code in check(bench, command, *options)


@pytest.mark.parametrize("command", ["merge", "merge --dry-run"])
@pytest.mark.parametrize("code", ["tied-weight-split", "tied-weight-kept"])
def test_what_becomes_of_tied_weights_is_told(bench: Workbench, code: str, command: str) -> None:
    """A head that is changed by itself gets a tensor of its own; one that is changed as its embedding stays tied.

    Inspect shows what is tied, and decides nothing.
    """
    write_base(bench.base, model(more=EMBEDDING))
    write_json(bench.base / "config.json", TIED)
    a, b = (HEAD[f"{PREFIX}lm_head.lora_{side}.weight"] for side in "AB")
    values = [np.frombuffer(t.raw, "<f4").reshape(t.shape) for t in (a, b)]
    both = {
        **HEAD,
        f"{PREFIX}model.embed_tokens.lora_embedding_A": f32(values[1].T),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": f32(values[0].T),
    }
    write_adapter(bench.adapter, HEAD if code == "tied-weight-split" else both, r=2, lora_alpha=4, target_modules=None)
    assert code in check(bench, command)


@pytest.mark.parametrize("command", ["merge", "merge --dry-run", "inspect --base"])
def test_a_base_whose_config_is_not_that_of_the_named_one_is_told(bench: Workbench, command: str) -> None:
    """The adapter names a folder that is here, whose config has other sizes than BASE's; a copy of BASE is no reason."""
    write_base(bench.base, model())
    write_json(bench.base / "config.json", {**LLAMA, "hidden_size": H, "num_hidden_layers": 2})
    other = bench.inputs / "other"
    other.mkdir()
    write_adapter(bench.adapter, factors(), r=2, lora_alpha=4, base_model_name_or_path=str(other))
    shutil.copy(bench.base / "config.json", other)
    assert "base-mismatch" not in check(bench, command)
    shutil.rmtree(bench.out, ignore_errors=True)
    write_json(other / "config.json", {**LLAMA, "hidden_size": H, "num_hidden_layers": 4})
    assert "base-mismatch" in check(bench, command)


@pytest.mark.parametrize("command", ["merge", "merge --dry-run", "inspect --base"])
def test_a_base_whose_values_are_not_those_of_the_named_one_is_told(bench: Workbench, command: str) -> None:
    """The adapter names a folder that is here, with the shapes of BASE; a copy is no reason, nor what loratool made."""
    tensors = model()
    write_base(bench.base, tensors)
    other = shutil.copytree(bench.base, bench.inputs / "other")
    write_adapter(bench.adapter, factors(), r=2, lora_alpha=4, base_model_name_or_path=str(other))
    assert "base-mismatch" not in check(bench, command)
    shutil.rmtree(bench.out, ignore_errors=True)
    with open(other / "model.safetensors", "r+b") as file:  # every value is another, and the header as it was
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        values = file.read()
        file.seek(start)
        file.write(bytes(byte ^ 1 for byte in values))
    assert "base-mismatch" in check(bench, command)
    shutil.rmtree(bench.out, ignore_errors=True)
    write_json(bench.base / "loratool.json", {"made_by": "loratool merge"})
    assert "base-mismatch" not in check(bench, command)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_named_base_in_the_cache_of_the_hub_is_compared_too(
    bench: Workbench, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded for it: the config is looked up where the Hub's client keeps what it has fetched."""
    write_base(bench.base, model())
    write_json(bench.base / "config.json", {**LLAMA, "num_hidden_layers": 2})
    write_adapter(bench.adapter, factors(), r=2, lora_alpha=4, base_model_name_or_path="org/base")
    home = bench.outputs.parent / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(home))
    snapshot = home / "models--org--base" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (home / "models--org--base" / "refs").mkdir()
    (home / "models--org--base" / "refs" / "main").write_text("a" * 40)
    write_json(snapshot / "config.json", {**LLAMA, "num_hidden_layers": layers})
    assert ("base-mismatch" in check(bench, "merge")) == (layers != 2)
