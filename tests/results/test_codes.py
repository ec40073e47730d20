"""Codes for programs are constants of their own: sentences may change at any time, and no code changes with them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path

import pytest
from malformed import (
    A_VALUES,
    ADAPTER_CONFIG,
    B_VALUES,
    FACTORS,
    QUERY,
    A,
    B,
    Stored,
    f32,
    write_adapter,
    write_base,
)
from paths import PACKAGE, ROOT

from loratool import cli, errors, notes
from loratool.inspecting.health.servers import FACTS as SERVERS

OTHER = "base_model.model.model.layers.1.self_attn.q_proj"
# Adapters with several faults each, as tensors and fields of the config.
FAULTS: dict[str, tuple[dict[str, Stored], dict[str, object]]] = {
    "no partner": ({A: FACTORS[A], f"{OTHER}.lora_B.weight": FACTORS[B]}, {}),
    "another rank": (dict(FACTORS), {"r": 3, "rank_pattern": {"nothing": 4}}),
    "another method": (dict(FACTORS), {"peft_type": "LOHA"}),
    "no magnitude": (dict(FACTORS), {"use_dora": True, "lora_bias": True}),
    "fields of other types": (dict(FACTORS), {"bias": 3, "use_rslora": "yes", "alpha_pattern": {"(": 1}}),
    "not gathered": ({A: Stored("F32", (0,), b""), B: FACTORS[B]}, {}),
    "two spellings": ({**FACTORS, A.replace(".weight", ".default.weight"): FACTORS[A]}, {}),
    "saved twice": ({f"{QUERY}.weight": FACTORS[A], f"base_model.model.{QUERY}.weight": FACTORS[A]}, {}),
    "a start that is refused": (dict(FACTORS), {"init_lora_weights": "lora_ga"}),
    "a start that is not known": (dict(FACTORS), {"init_lora_weights": "new"}),
    "not as long": ({A: f32(A_VALUES[:1]), B: f32(B_VALUES)}, {"alpha_pattern": {"x": 1}}),
    "nothing": ({}, {}),
    "a tensor that nobody knows": ({**FACTORS, f"{OTHER}.lora_C.weight": FACTORS[A]}, {}),
}
MLX = {f"{QUERY}.lora_a": FACTORS[A]}


def codes_told(
    path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[set[tuple[str, str]], set[str], str]:
    """The findings of a check, as level and code, and the codes and the next command in the error object of a merge."""
    capsys.readouterr()
    cli.run(["inspect", str(path), "--check", "--json"])
    results = json.loads(capsys.readouterr().out)["results"]
    findings = {(found["level"], found["code"]) for found in results[0]["findings"]}
    cli.run(["merge", str(base), str(path), "-o", str(path.parent / "out"), "--dry-run", "--json"])
    error = json.loads(capsys.readouterr().out).get("error", {"code": "", "problems": [], "hint": ""})
    return findings, {error["code"], *(problem["code"] for problem in error["problems"])}, error["hint"]


@pytest.mark.parametrize("name", [*FAULTS, "mlx"])
def test_codes_stay_the_same_when_every_sentence_is_another(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All problems, notes and errors say something else, each something of its own; `--check` and `--json` say the same codes."""
    if name == "mlx":
        write_adapter(tmp_path / "adapter", MLX, lora_parameters={"rank": 2, "scale": 2.0})
        (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapters.safetensors")
        config = tmp_path / "adapter" / ADAPTER_CONFIG
        config.write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}}))
    else:
        tensors, fields = FAULTS[name]
        write_adapter(tmp_path / "adapter", tensors, **fields)
    write_base(tmp_path / "base")
    expected = codes_told(tmp_path / "adapter", tmp_path / "base", capsys)
    numbers = count()

    def problem(kind: type[errors.Problem], _text: str, code: str = "malformed") -> errors.Problem:
        made = str.__new__(kind, f"lorem ipsum {next(numbers)}")
        made.code = code
        return made

    def note(self: notes.Note) -> None:
        object.__setattr__(self, "text", f"dolor sit {next(numbers)}")

    def error(self: errors.LoratoolError, _message: str, problems: object = (), hint: str = "") -> None:
        self.message, self.problems = f"amet {next(numbers)}", tuple(problems)  # type: ignore[arg-type]
        self.hint = hint

    monkeypatch.setattr(errors.Problem, "__new__", problem)
    monkeypatch.setattr(notes.Note, "__post_init__", note)
    monkeypatch.setattr(errors.LoratoolError, "__init__", error)
    assert codes_told(tmp_path / "adapter", tmp_path / "base", capsys) == expected
    assert expected[0]


@cache
def nodes(path: Path) -> Sequence[ast.AST]:
    """All of a file, parsed once."""
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


# maker → which argument the code is; those with a dot are methods
CODE = {"Note": 0, "told_losses": 1, "Finding": 1, "Problem": 1, "UnusableError": 1, ".require": 2, ".refuse": 2}
OF_NOTES = {"Note", "told_losses"}


def codes_in(path: Path) -> Iterator[tuple[str, str, ast.expr]]:
    """Where a code is given, to what, and the expression that it is."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            name = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in CODE and len(node.args) > CODE[name]:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", name, node.args[CODE[name]]


def test_every_code_is_a_constant_or_passed_on() -> None:
    """A code is written as a literal, is a named constant, or is the code of what is passed on: it is never worked out."""
    seen = [found for path in sorted(PACKAGE.rglob("*.py")) for found in codes_in(path)]
    assert len(seen) > 100
    for where, _, code in seen:
        match code:
            case ast.Constant(value=str(text)):
                assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", text), (where, text)
            case ast.Name(id=name):
                assert name.isupper() or name == "code", where
            case ast.Attribute(attr=name):
                assert name == "code", where
            case _:
                raise AssertionError((where, ast.unparse(code)))


def test_the_page_of_codes_lists_every_code_that_is_written_as_a_literal() -> None:
    page = (ROOT / "docs/codes.md").read_text(encoding="utf-8")
    literals = {
        str(c.value) for path in PACKAGE.rglob("*.py") for *_, c in codes_in(path) if isinstance(c, ast.Constant)
    }
    assert len(literals) > 80
    assert sorted(code for code in literals if f"| `{code}`" not in page) == []


def test_the_docs_list_every_code_of_a_finding() -> None:
    """Those on servers by their beginnings, and those of notes by what they are of."""
    told = set(SERVERS)
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for _, maker, code in codes_in(path):
            if maker not in OF_NOTES and isinstance(code, ast.Constant):
                told.add(str(code.value))
            elif maker not in OF_NOTES and isinstance(code, ast.Name) and code.id.isupper():
                told.add(getattr(import_module(module), code.id))
    page = (ROOT / "docs/inspecting.md").read_text(encoding="utf-8")
    listed = {code for line in page.splitlines() if line.startswith("| `") for code in line.split("`")[1::2]}
    beginnings = tuple(code.removesuffix("…") for code in listed if code.endswith("…"))
    assert [code for code in sorted(told) if code not in listed and not code.startswith(beginnings)] == []


@pytest.mark.parametrize(
    "kind", [errors.LoratoolError, *errors.LoratoolError.__subclasses__()], ids=lambda kind: kind.__name__
)
def test_the_docs_list_the_code_of_every_error(kind: type[errors.LoratoolError]) -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8").partition("## Errors")[2]
    rows = [line.split("|") for line in page.splitlines() if line.startswith(f"| `{kind.__name__}`")]
    assert [(row[2].strip(), row[3].strip()) for row in rows] == [(f"`{kind.code}`", str(kind.exit_code))]


def is_sentence(node: ast.AST) -> bool:
    """Whether it is what an error, a problem or a note says: `error.message`, `note.text`, `str(error)`."""
    match node:
        case ast.Attribute(attr="message" | "text"):
            return True
        case ast.Call(func=ast.Name(id="str"), args=[ast.Name(id="error" | "other" | "problem" | "note" | "reason")]):
            return True
    return False


def test_nothing_is_decided_by_the_words_of_a_sentence() -> None:
    """No sentence is looked through for words, nor for what it begins or ends with."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in nodes(path):
            match node:
                case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[where]) if is_sentence(where):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
                case ast.Call(func=ast.Attribute(value=where, attr="startswith" | "endswith" | "find" | "count")) if (
                    is_sentence(where)
                ):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
                case ast.Call(func=ast.Attribute(attr="search" | "match" | "fullmatch"), args=args) if any(
                    map(is_sentence, args)
                ):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []
