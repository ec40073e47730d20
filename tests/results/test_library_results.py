"""The library and the command line are one: the same data, the same errors, whatever kind of path an argument is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from malformed import ADAPTER_CONFIG, put, write_adapter, write_base, write_sharded

import loratool
from loratool import cli
from loratool.demo import demo

VOLATILE = {"seconds", "startup_seconds", "peak_memory", "gpu_memory", "profile"}  # another in each run


class Place:
    """A path of a kind that nobody knows."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


Kind = Callable[[str], Any]
KINDS: dict[str, Kind] = {"str": str, "Path": Path, "PathLike": Place}


@dataclass(frozen=True)
class Command:
    """The words of a command, and the call that does the same."""

    words: Sequence[str]
    call: Callable[[Kind], Any]


COMMANDS: dict[str, Command] = {
    "merge": Command(
        ("merge", "base", "adapter", "second", "-o", "out", "-w", "1", "-w", "0.5", "--dtype", "float32"),
        lambda p: loratool.merge(p("base"), [p("adapter"), p("second")], p("out"), weights=[1, 0.5], dtype="float32"),
    ),
    "merge --dry-run": Command(
        ("merge", "base", "adapter", "-o", "out", "--dry-run", "--workers", "2"),
        lambda p: loratool.plan(p("base"), p("adapter"), p("out"), workers=2),
    ),
    "plan": Command(
        ("plan", "base", "adapter", "--simulate", "1,3", "--bandwidth", "2MB", "--workers", "2"),
        lambda p: loratool.plan(p("base"), p("adapter"), simulate=[1, 3], bandwidth="2MB", workers=2),
    ),
    "merge --stream --dry-run": Command(
        ("merge", "base", "adapter", "--stream", "--push-to-hub", "org/name", "--dry-run"),
        lambda p: loratool.stream(p("base"), p("adapter"), "org/name", dry_run=True),
    ),
    "inspect an adapter": Command(
        ("inspect", "adapter", "--values"), lambda p: loratool.inspect(p("adapter"), values=True)
    ),
    "inspect with a base": Command(
        ("inspect", "adapter", "--base", "base", "--tensors", "--check"),
        lambda p: loratool.inspect(p("adapter"), base=p("base"), tensors=True, check=True),
    ),
    "inspect with a config": Command(
        ("inspect", "adapter", "--base-config", "llama.json"),
        lambda p: loratool.inspect(p("adapter"), base_config=p("llama.json")),
    ),
    "inspect a base": Command(("inspect", "base", "--check"), lambda p: loratool.inspect(p("base"), check=True)),
    "inspect nothing": Command(("inspect", "broken", "--check"), lambda p: loratool.inspect(p("broken"), check=True)),
    "rescale": Command(
        ("rescale", "adapter", "-o", "out", "--scale", "2", "--match", "q_proj=3", "--bake"),
        lambda p: loratool.rescale(p("adapter"), p("out"), scale=2, match=["q_proj=3"], bake=True),
    ),
    "resize": Command(
        ("resize", "adapter", "-o", "out", "--budget", "16", "--layer-weights", "weights.json", "--dry-run"),
        lambda p: loratool.resize(p("adapter"), p("out"), budget="16", layer_weights={"q_proj": 2.0}, dry_run=True),
    ),
    "combine": Command(
        ("combine", "adapter", "second", "-o", "out", "--method", "ties", "--density", "0.5"),
        lambda p: loratool.combine([p("adapter"), p("second")], p("out"), method="ties", density=0.5),
    ),
    "convert": Command(
        ("convert", "adapter", "-o", "out", "--to", "mlx"),
        lambda p: loratool.convert(p("adapter"), p("out"), to="mlx"),
    ),
    "extract": Command(
        ("extract", "base", "tuned", "-o", "out", "--rank", "2", "--exclude", "norm"),
        lambda p: loratool.extract(p("base"), p("tuned"), p("out"), rank=2, exclude=["norm"]),
    ),
    "verify": Command(
        ("verify", "tuned", "--base", "base", "--adapter", "second", "--device", "cpu"),
        lambda p: loratool.verify(p("tuned"), p("base"), [p("second")], device="cpu"),
    ),
    "verify a record": Command(("verify", "tuned"), lambda p: loratool.verify(p("tuned"))),
    "compare": Command(("compare", "adapter", "second"), lambda p: loratool.compare([p("adapter"), p("second")])),
    "estimate": Command(
        ("estimate", "base", "--rank", "2", "--rank", "4", "--target", "q_proj"),
        lambda p: loratool.estimate(p("base"), [2, 4], "q_proj"),
    ),
    "push --dry-run": Command(
        ("push", "adapter", "org/name", "--dry-run", "--exclude", "*.md"),
        lambda p: loratool.push(p("adapter"), "org/name", dry_run=True, exclude=["*.md"]),
    ),
    "demo": Command(("demo", "out"), lambda p: demo(p("out"))),
    "merge --also": Command(
        ("merge", "base", "adapter", "-o", "out", "--also", "two=second", "--device", "cpu"),
        lambda p: loratool.merge_many(p("base"), {p("out"): [p("adapter")], p("two"): [p("second")]}, device="cpu"),
    ),
    "merge --part": Command(
        ("merge", "base", "adapter", "-o", "out", "--part", "1/2", "--device", "cpu"),
        lambda p: loratool.merge_part(p("base"), p("adapter"), p("out"), "1/2", device="cpu"),
    ),
    "merge --status": Command(
        ("merge", "base", "adapter", "-o", "parts", "--status"),
        lambda p: loratool.merge_status(p("base"), p("adapter"), p("parts")),
    ),
    "verify --part": Command(
        ("verify", "tuned", "--base", "base", "--adapter", "second", "--part", "1/1", "--into", "out"),
        lambda p: loratool.verify_part(p("tuned"), p("base"), [p("second")], part="1/1", into=p("out")),
    ),
    "compress": Command(
        ("compress", "adapter", "second", "-o", "out", "--rank", "1"),
        lambda p: loratool.compress([p("adapter"), p("second")], p("out"), rank=1),
    ),
    "expand": Command(
        ("expand", "fleet", "second", "-o", "out"), lambda p: loratool.expand(p("fleet"), "second", p("out"))
    ),
    "rebase": Command(
        ("rebase", "adapter", "--from", "base", "--onto", "tuned", "-o", "out", "--force"),
        lambda p: loratool.rebase(p("adapter"), p("out"), base=p("base"), onto=p("tuned"), force=True),
    ),
    "index": Command(
        ("index", "adapter", "second", "-o", "out"),
        lambda p: loratool.index([p("adapter"), p("second")], p("out")),
    ),
    "inspect many": Command(
        ("inspect", "adapter", "second", "--where", "rank>0"),
        lambda p: loratool.inspect([p("adapter"), p("second")], where="rank>0"),
    ),
    "record": Command(("record", "tuned"), lambda p: loratool.record(p("tuned"))),
    "reproduce": Command(("reproduce", "tuned", "-o", "out"), lambda p: loratool.reproduce(p("tuned"), p("out"))),
    "run": Command(("run", "steps.yaml", "--dry-run"), lambda p: loratool.run(p("steps.yaml"), dry_run=True)),
}

WITH_ERRORS = {"merge --also", "index", "inspect many"}  # results of several, with an error for each that failed
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_base(Path("base"))
    write_adapter(Path("adapter"))
    write_adapter(Path("second"), lora_alpha=6)
    write_adapter(Path("broken"))
    put(Path("broken") / ADAPTER_CONFIG, b"{")
    Path("llama.json").write_text(json.dumps(LLAMA))
    Path("weights.json").write_text('{"q_proj": 2.0}')
    Path("steps.yaml").write_text("steps:\n- rescale: {adapter: adapter, scale: 2, output: made}\n")
    loratool.merge("base", "second", "tuned", device="cpu")
    return tmp_path


@pytest.fixture
def more(here: Path) -> None:
    """What only some commands work on."""
    loratool.compress(["adapter", "second"], "fleet", rank=1)
    loratool.merge_part("base", "adapter", "parts", "1/2", device="cpu")


def steady(value: Any) -> Any:
    """Data without what is another in each run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    return [steady(each) for each in value] if isinstance(value, list) else value


def refuse(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.usefixtures("more")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_to_dict_is_what_the_command_prints_as_json(
    name: str, kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Field by field, for every command, whatever kind of path the call was made with; and it is JSON already."""
    command = COMMANDS[name]
    table = command.call(KINDS[kind]).to_dict()
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    for made in (Path("out"), Path("two"), Path("out.partial")):
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    capsys.readouterr()
    code = cli.run([*command.words, "--json"])
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert code == (3 if name == "inspect nothing" else 0)
    if "results" in printed:
        (one,) = printed["results"]
        printed = {"schema": printed["schema"], **one}
    assert table["schema"] == 1
    assert steady(table) == steady(printed)


def break_adapter(here: Path) -> None:
    put(here / "adapter" / ADAPTER_CONFIG, b'{"peft_type": "LORA", "r": 7, "lora_alpha": [1]}')


def break_base(here: Path) -> None:
    write_sharded(here / "base")
    for path in (here / "base").glob("*-of-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


def take_adapter(here: Path) -> None:
    shutil.rmtree(here / "adapter")


def take_base(here: Path) -> None:
    shutil.rmtree(here / "base")


BREAKS = {"adapter": (break_adapter, take_adapter), "base": (break_base, take_base)}


@pytest.mark.parametrize("way", ["malformed", "missing"])
@pytest.mark.parametrize("what", BREAKS)
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in {"demo", "inspect nothing"} | WITH_ERRORS])
def test_errors_are_the_same_with_the_same_text(
    name: str, what: str, way: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the library raises is what the command prints between `Error:` and a line with the next command to type.

    With --check both tell it.
    """
    command = COMMANDS[name]
    if what not in command.words or (way == "malformed" and "--check" in command.words):
        return  # the command does not read it; or a check reports it, as the test above sees
    BREAKS[what][way == "missing"](here)
    try:
        command.call(str)
    except loratool.LoratoolError as error:
        raised = error
    else:
        assert "--check" in command.words
        return
    capsys.readouterr()
    code = cli.run([*command.words])
    out, err = capsys.readouterr()
    assert (code, out) == (raised.exit_code, "")
    told, _, hint = err.rpartition("hint: ")
    assert told == f"Error: {raised}\n"
    assert re.fullmatch(r"loratool [^\n]+\n", hint)


WRONG: dict[str, tuple[Sequence[str], Callable[[], Any]]] = {
    "dtype of merge": (("merge", "base", "adapter", "-o", "out", "--dtype", "int8"), lambda: loratool.merge("base", "adapter", "out", dtype="int8")),
    "device of merge": (("merge", "base", "adapter", "-o", "out", "--device", "tpu"), lambda: loratool.merge("base", "adapter", "out", device="tpu")),
    "workers": (("merge", "base", "adapter", "-o", "out", "--workers", "0"), lambda: loratool.merge("base", "adapter", "out", workers=0)),
    "weights": (("merge", "base", "adapter", "-o", "out", "-w", "1", "-w", "2"), lambda: loratool.merge("base", "adapter", "out", weights=[1, 2])),
    "dtype of rescale": (("rescale", "adapter", "-o", "out", "--scale", "2", "--dtype", "x"), lambda: loratool.rescale("adapter", "out", scale=2, dtype="x")),
    "dtype of resize": (("resize", "adapter", "-o", "out", "--rank", "1", "--dtype", "x"), lambda: loratool.resize("adapter", "out", rank=1, dtype="x")),
    "dtype of combine": (("combine", "adapter", "second", "-o", "out", "--dtype", "x"), lambda: loratool.combine(["adapter", "second"], "out", dtype="x")),
    "dtype of extract": (("extract", "base", "tuned", "-o", "out", "--dtype", "x"), lambda: loratool.extract("base", "tuned", "out", dtype="x")),
    "nothing to rescale": (("rescale", "adapter", "-o", "out"), lambda: loratool.rescale("adapter", "out")),
    "no rule of resize": (("resize", "adapter", "-o", "out"), lambda: loratool.resize("adapter", "out")),
    "rank of resize": (("resize", "adapter", "-o", "out", "--rank", "0"), lambda: loratool.resize("adapter", "out", rank=0)),
    "method": (("combine", "adapter", "second", "-o", "out", "--method", "x"), lambda: loratool.combine(["adapter", "second"], "out", method="x")),
    "space": (("combine", "adapter", "second", "-o", "out", "--space", "x"), lambda: loratool.combine(["adapter", "second"], "out", space="x")),
    "rank of combine": (("combine", "adapter", "second", "-o", "out", "--rank", "0"), lambda: loratool.combine(["adapter", "second"], "out", rank=0)),
    "sign": (("combine", "adapter", "second", "-o", "out", "--sign", "x"), lambda: loratool.combine(["adapter", "second"], "out", sign="x")),
    "saved": (("combine", "adapter", "second", "-o", "out", "--saved", "x"), lambda: loratool.combine(["adapter", "second"], "out", saved="x")),
    "device of compare": (("compare", "adapter", "second", "--device", "x"), lambda: loratool.compare(["adapter", "second"], device="x")),
    "rank of extract": (("extract", "base", "tuned", "-o", "out", "--rank", "0"), lambda: loratool.extract("base", "tuned", "out", rank=0)),
    "rank of estimate": (("estimate", "base", "--rank", "0", "--target", "q_proj"), lambda: loratool.estimate("base", [0], "q_proj")),
    "dtype of estimate": (("estimate", "base", "--rank", "1", "--target", "q_proj", "--dtype", "x"), lambda: loratool.estimate("base", [1], "q_proj", dtype="x")),
    "two bases": (("inspect", "adapter", "--base", "base", "--base-config", "llama.json"), lambda: loratool.inspect("adapter", base="base", base_config="llama.json")),
    "name of a repository": (("push", "adapter", "a/b/c", "--dry-run"), lambda: loratool.push("adapter", "a/b/c", dry_run=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_a_usage_error_of_both(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and `UsageError`. The words of an option are the command line's own where it knows all its values."""
    words, call = WRONG[name]
    assert cli.run(list(words)) == 2
    with pytest.raises(loratool.UsageError):
        call()
    assert not os.path.lexists("out")
