"""What is wrong with hundreds of modules in the same way is told in one line, with how many they are and the first names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from malformed import FACTORS, A, B, write_adapter, write_base
from workbench import Workbench

from loratool.errors import InputError, folded

COUNT = 288
COMMANDS: dict[str, Sequence[str]] = {
    "merge": ("merge", "base", "adapter", "-o", "OUT"),
    "merge --dry-run": ("merge", "base", "adapter", "-o", "OUT", "--dry-run"),
    "inspect": ("inspect", "adapter"),
    "inspect --check": ("inspect", "--check", "adapter"),
    "rescale": ("rescale", "adapter", "-o", "OUT", "--scale", "2"),
    "resize": ("resize", "adapter", "-o", "OUT", "--rank", "1"),
    "combine": ("combine", "adapter", "adapter", "-o", "OUT"),
    "compare": ("compare", "adapter", "adapter"),
    "push": ("push", "adapter", "org/name", "--dry-run"),
}
# What is wrong with all modules of an adapter: the sides that are stored, the fields of its config, the words for it.
FAULTS: dict[str, tuple[str, dict[str, object], str]] = {
    "no partner": ("A", {}, "lora_B is missing"),
    "another rank": ("AB", {"r": 3}, "r = 3"),
    "another method": ("AB", {"peft_type": "LOHA"}, "spelled as LORA"),
    "no magnitude": ("AB", {"use_dora": True}, "lora_magnitude_vector"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_flood_is_one_line(name: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """288 modules with one fault: every command names it once, with the number of modules or tensors."""
    bench = Workbench(tmp_path, capsys)
    sides, config, told = FAULTS[fault]
    tensors = {
        key.replace("layers.0", f"layers.{n}"): FACTORS[key]
        for n in range(COUNT)
        for key in (A, B)
        if re.search(f"lora_[{sides}]", key)
    }
    write_adapter(bench.adapter, tensors, **config)
    write_base(bench.base)
    words = [
        {"base": str(bench.base), "adapter": str(bench.adapter), "OUT": str(bench.out)}.get(w, w)
        for w in COMMANDS[name]
    ]
    outcome = bench.run(*words)
    assert outcome.code == 3, outcome
    shown = " ".join((outcome.out + outcome.err).split())
    assert told in shown, outcome
    assert shown.count(told) <= 2, outcome
    assert len(outcome.err.splitlines()) < 10, outcome
    if fault in ("no partner", "no magnitude"):
        assert f"{COUNT} modules: " in shown, outcome
    elif fault == "another method":
        assert f"{2 * COUNT} tensors: " in shown, outcome


ALIKE = [f"model.layers.{n}.q: stored as I8" for n in range(5)]


@pytest.mark.parametrize(
    ("problems", "lines"),
    [
        (ALIKE, ["5 modules: stored as I8 (model.layers.0.q, model.layers.1.q, model.layers.2.q and 2 more)"]),
        (ALIKE[:3], ALIKE[:3]),
        ([f"ad: {line}" for line in ALIKE[:4]], ["ad: 4 modules: stored as I8 (model.layers.0.q, model.layers.1.q, model.layers.2.q and 1 more)"]),
        ([f"a.{n}.b: is [{n}, 2]" for n in range(5)], [f"a.{n}.b: is [{n}, 2]" for n in range(5)]),
        (
            [f"ad: m.{{0-2,5}}.{name}.weight: no place" for name in "abcd"],
            ["ad: 16 tensors: no place (m.{0-2,5}.a.weight, m.{0-2,5}.b.weight, m.{0-2,5}.c.weight and 1 more)"],
        ),
        (["one", "one: two", "", "a.b"], ["one", "one: two", "", "a.b"]),
        (
            [f"x.{n}.q.weight: x.{n}.q.lora_A.weight and y.{n}.lora_A are two spellings" for n in range(4)],
            ["4 tensors: x.0.q.lora_A.weight and y.0.lora_A are two spellings (x.0.q.weight, x.1.q.weight, x.2.q.weight and 1 more)"],
        ),
    ],
)  # fmt: skip
def test_only_what_says_the_same_is_folded(problems: list[str], lines: list[str]) -> None:
    """Three or fewer stay as they are, and so do sentences that differ in more than names and numbers of layers.

    A range of layers in braces counts as so many names."""
    assert [text for text, _ in folded(problems)] == lines
    assert str(InputError("x:", problems)).splitlines()[1:] == [f"  {line}" for line in lines]
    assert InputError("x:", problems).problems == tuple(problems)
