"""Results: short in a notebook, whole as text and as data, each with what it took; errors as data where `--json` asks."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from headers import adapter_of, base_of
from malformed import write_adapter, write_base
from paths import PACKAGE
from safetensors.numpy import load_file

import loratool
from loratool import cli
from loratool.demo import demo
from loratool.merging.describing import described
from loratool.merging.merge_options import MergeOptions, PlanOptions
from loratool.merging.planning import plan_merge
from loratool.results.base import Cost, Result
from loratool.results.push import PushReport
from loratool.results.text import kept

if TYPE_CHECKING:
    from loratool.results.plan import MergePlan

LAYERS, HIDDEN, INNER, KEYS = 32, 4096, 14336, 1024  # of Llama 3 8B
LINEAR: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


@pytest.fixture(scope="module")
def plan() -> MergePlan:
    """A merge of an adapter on every linear layer of Llama 3 8B, by names and shapes alone."""
    linear = {f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in LINEAR.items()}
    tables: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, HIDDEN),
        "lm_head.weight": (128256, HIDDEN),
    }
    norms: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{name}.weight": (HIDDEN,) for n in range(LAYERS) for name in ("norm1", "norm2")
    }
    base = base_of(tables | linear | norms, architectures=["LlamaForCausalLM"], model_type="llama")
    return described(plan_merge(base, [adapter_of(linear)], PlanOptions()), MergeOptions())


def test_a_plan_of_a_large_model_is_short_in_a_notebook_and_readable_as_text(plan: MergePlan) -> None:
    assert len(plan.edited) == LAYERS * len(LINEAR)
    assert len(repr(plan)) < 500
    assert 200 < len(str(plan)) < 20_000
    assert "model.layers.{0-31}.mlp.up_proj" in str(plan)


@pytest.mark.usefixtures("here")
def test_a_plan_is_plain_data_that_says_where_every_byte_of_the_output_lies() -> None:
    """The bytes at a tensor's place are those that safetensors reads of it. A plan is equal to its pickled copy."""
    planned = loratool.plan("base", "second")
    assert pickle.loads(pickle.dumps(planned)) == planned
    merged = load_file("tuned/model.safetensors")
    assert {span.placed.name for span in planned.spans} == merged.keys()
    for span in planned.spans:
        start, stop = span.at, span.at + span.placed.nbytes
        assert Path("tuned", span.file).read_bytes()[start:stop] == merged[span.placed.name].tobytes()
        assert span.source.path == Path("base/model.safetensors")


class Printer:
    """What IPython passes to `_repr_pretty_`: where the text goes, and what is being shown around it."""

    def __init__(self, *around: object) -> None:
        self.shown, self.stack = "", [*map(id, around), 0]

    def text(self, words: str) -> None:
        self.shown += words


def test_a_cell_of_a_notebook_shows_the_text_of_a_result_cut_where_it_is_long(plan: MergePlan) -> None:
    """Within a list the result is one line, as its `repr` is."""
    whole, nested = Printer(), Printer([plan])
    plan._repr_pretty_(whole, False)
    assert whole.shown == str(plan)
    plan._repr_pretty_(nested, False)
    assert nested.shown == repr(plan)

    @dataclass(frozen=True, kw_only=True, repr=False)
    class Long(Result):
        def __str__(self) -> str:
            return "\n".join(map(str, range(100)))

    cut = Printer()
    Long()._repr_pretty_(cut, False)
    assert cut.shown.splitlines() == [*map(str, range(60)), "… and 40 more lines; print() shows all of them"]


CALLS: dict[str, Callable[[], Any]] = {
    "merge": lambda: loratool.merge("base", "adapter", "out", device="cpu"),
    "rescale": lambda: loratool.rescale("adapter", "out", scale=0.5),
    "resize": lambda: loratool.resize("adapter", "out", rank=1, device="cpu"),
    "combine": lambda: loratool.combine(["adapter", "second"], "out", device="cpu"),
    "extract": lambda: loratool.extract("base", "tuned", "out", rank=1, device="cpu"),
    "verify": lambda: loratool.verify("tuned", "base", "second", device="cpu"),
    "compare": lambda: loratool.compare(["adapter", "second"], device="cpu"),
    "inspect an adapter": lambda: loratool.inspect("adapter", values=True, check=True, device="cpu"),
    "inspect a model": lambda: loratool.inspect("base", tensors=True),
    "inspect what is not an adapter": lambda: loratool.inspect("adapter/adapter_config.json", check=True),
    "estimate": lambda: loratool.estimate("base", 4, "all-linear"),
    "push": lambda: loratool.push("adapter", "me/adapter", dry_run=True),
    "stream": lambda: loratool.stream("base", "adapter", "me/merged", dry_run=True, device="cpu"),
    "demo": lambda: demo("demo"),
    "plan": lambda: loratool.plan("base", "adapter", simulate=[1, 2], device="cpu"),
    "merge many": lambda: loratool.merge_many("base", {"one": ["adapter"], "two": ["second"]}, device="cpu"),
    "merge a part": lambda: loratool.merge_part("base", "adapter", "out", "1/2", device="cpu"),
    "the status of parts": lambda: loratool.merge_status("base", "adapter", parts("out"), device="cpu"),
    "abort a merge": lambda: loratool.abort_merge(parts("out")),
    "finish a merge": lambda: loratool.finish_merge("base", "adapter", parts("out", "2/2"), device="cpu"),
    "verify a part": lambda: loratool.verify_part("tuned", "base", "second", part="1/1", into="into", device="cpu"),
    "convert": lambda: loratool.convert("adapter", "out", to="mlx"),
    "compress": lambda: loratool.compress(["adapter", "second"], "out", rank=1),
    "expand": lambda: loratool.expand(fleet("out"), "second", "expanded"),
    "rebase": lambda: loratool.rebase("adapter", "out", base="base", onto="tuned", force=True, device="cpu"),
    "index": lambda: loratool.index(["adapter", "second"], "out"),
    "inspect many": lambda: loratool.inspect(["adapter", "second"], where="rank>0"),
    "record": lambda: loratool.record("tuned"),
    "reproduce": lambda: loratool.reproduce("tuned", "out"),
    "run": lambda: loratool.run(manifest("steps.yaml")),
}


def parts(out: str, *numbers: str) -> str:
    """An output of which the first part is there, and those that are named."""
    for number in ("1/2", *numbers):
        loratool.merge_part("base", "adapter", out, number, device="cpu")
    return out


def fleet(out: str) -> str:
    loratool.compress(["adapter", "second"], out, rank=1)
    return out


def manifest(path: str) -> str:
    Path(path).write_text("steps:\n- rescale: {adapter: adapter, scale: 2, output: made}\n")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_base(Path("base"))
    write_adapter(Path("adapter"))
    write_adapter(Path("second"), lora_alpha=6)
    loratool.merge("base", "second", "tuned", device="cpu")
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", CALLS)
def test_every_result_is_short_in_a_notebook_prints_itself_and_says_what_it_took(name: str) -> None:
    """`repr` is under 500 characters, `str` is what the command prints, `to_dict` has a schema and the cost."""
    result = CALLS[name]()
    assert isinstance(result, Result)
    assert len(repr(result)) < 500
    assert repr(result).startswith(f"{type(result).__name__}(")
    assert str(result) != repr(result)
    table = result.to_dict()
    assert next(iter(table)) == "schema"
    assert table["schema"] == 1
    assert isinstance(result.cost, Cost)
    assert table["cost"]["seconds"] > 0
    assert table["cost"]["peak_memory"] > 10_000_000


def test_every_result_is_a_frozen_dataclass_of_the_package_of_results() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "Result" in text and (path.parent.name == "results" or "loratool.results.base" in text):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef) and {"Result", "Written"} & {ast.unparse(b) for b in node.bases}:
                    assert any("frozen=True" in ast.unparse(each) for each in node.decorator_list), node.name
                    assert path.parent.name == "results", node.name


@pytest.mark.usefixtures("here")
def test_open_files_are_short_in_a_notebook_too() -> None:
    assert len(repr(loratool.open_checkpoint("base"))) < 500
    assert len(repr(loratool.read_adapter("adapter"))) < 500


def test_a_long_value_of_a_user_is_cut_and_not_the_name_of_the_result() -> None:
    name = "a" * 10_000
    report = PushReport(name, name, name, name, name, False, {}, (), (), (), (), False)
    assert len(repr(report)) < 500
    assert repr(report).startswith("PushReport(repo='aaa")


WRONG: dict[str, tuple[list[str], int, str]] = {
    "an unknown option": (["merge", "base", "adapter", "-o", "out", "--nonsense"], 2, "wrong-usage"),
    "a value out of range": (["merge", "base", "adapter", "-o", "out", "--workers", "0"], 2, "wrong-usage"),
    "no such path": (["inspect", "nowhere"], 3, "unusable-input"),
    "an adapter that does not fit": (["merge", "base", "other", "-o", "out"], 4, "does-not-fit"),
    "no folder to write into": (["merge", "base", "adapter", "-o", "no/where/out"], 6, "storage"),
}


def test_what_the_system_refuses_is_an_object_too(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that no sentence of ours was written for: its code says storage, its message what the system said."""

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(here / "base"))

    monkeypatch.setattr("loratool.inspecting.inspect.inspect", refuse)
    monkeypatch.setattr(cli, "silence_stdout", lambda: None)
    assert cli.run(["inspect", "base", "--json"]) == 6
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert (error["code"], error["exit_code"], error["problems"]) == ("storage", 6, [])
    assert shown.err == f"Error: {error['message']}\nhint: loratool inspect base\n"
    assert os.strerror(errno.EIO) in error["message"]


@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_an_object_on_stdout_where_json_is_asked_for(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The object has a constant code and the exit code; stderr says the same in a sentence; without --json stdout is empty."""
    words, code, kind = WRONG[name]
    write_adapter(here / "other")
    path = here / "other" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"layers.0", b"layers.7").replace(b"q_proj", b"z_proj"))
    capsys.readouterr()
    assert cli.run(words) == code
    plain = capsys.readouterr()
    assert plain.out == ""
    assert cli.run([*words, "--json"]) == code
    shown = capsys.readouterr()
    table = json.loads(shown.out)
    assert set(table) == {"schema", "error"}
    assert table["error"]["code"] == kind
    assert table["error"]["exit_code"] == code
    assert table["error"]["message"].splitlines()[0] in shown.err
    assert shown.err == plain.err
    assert all(problem.keys() == {"code", "text"} for problem in table["error"]["problems"])


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (0.9996, "99.96 %"),
        (0.99951, "99.95 %"),
        (0.9994, "99.9 %"),
        (1 - 1e-9, "100.0 %"),
        (1.0, "100.0 %"),
        (None, "–"),
    ],
)
def test_energy_that_is_not_all_of_it_is_not_called_all_of_it(part: float | None, said: str) -> None:
    assert kept(part) == said
