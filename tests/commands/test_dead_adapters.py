"""Adapters that change nothing: alone they are refused, beside a live one they are warned of, in part they are counted.

The oracle is bytes: what a dead adapter is merged into is what it would be without it.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed import Stored, bf16, f32, random, write_adapter, write_base
from workbench import Workbench, is_clean, tensors_of

import loratool
from loratool.merging.engine import Engine

PREFIX = "base_model.model."
MODULES = tuple(f"model.layers.{n}.self_attn.{leaf}" for n in range(2) for leaf in ("q_proj", "k_proj"))
ROWS, COLUMNS, RANK = 6, 8, 2


def factors(dead: tuple[str, ...] = (), side: str = "B", size: float = 1.0, seed: int = 1) -> dict[str, Stored]:
    """Factors of all modules, with zeros on one side of those that are `dead`."""
    found: dict[str, Stored] = {}
    for number, module in enumerate(MODULES):
        for letter, shape in (("A", (RANK, COLUMNS)), ("B", (ROWS, RANK))):
            values = random(*shape, seed=10 * seed + number) * (size if letter == "B" else 1)
            zero = module in dead and letter == side
            found[f"{PREFIX}{module}.lora_{letter}.weight"] = f32(values * 0 if zero else values)
    return found


# what makes an adapter dead → (its factors, fields of its config, its weight)
DEAD: dict[str, tuple[dict[str, Stored], dict[str, Any], str]] = {
    "alpha 0": (factors(), {"lora_alpha": 0}, "1"),
    "alpha 0 by patterns": (factors(), {"alpha_pattern": {"q_proj": 0, "k_proj": 0}}, "1"),
    "B 0": (factors(MODULES), {}, "1"),
    "A 0": (factors(MODULES, "A"), {}, "1"),
    "weight 0": (factors(), {}, "0"),
    "lost in rounding": (factors(size=1e-9), {}, "1"),
    "lost by its weight": (factors(), {}, "1e-9"),
}


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workbench:
    made = Workbench(tmp_path, capsys)
    write_base(made.base, {f"{m}.weight": bf16(random(ROWS, COLUMNS, seed=3)) for m in MODULES})
    return made


def adapter(bench: Workbench, name: str, tensors: dict[str, Stored], **config: Any) -> Path:
    folder = bench.inputs / name
    write_adapter(folder, tensors, r=RANK, **{"lora_alpha": 4, **config})
    return folder


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_adapter_alone_is_refused(bench: Workbench, name: str) -> None:
    """Whatever makes it dead: exit 4, and nothing is written."""
    tensors, config, weight = DEAD[name]
    dead = adapter(bench, "dead", tensors, **config)
    bench.refuses("merge", bench.base, dead, "-w", weight, "-o", bench.out, told=["zero"], code=4)


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_adapter_beside_a_live_one_is_warned_of_and_changes_no_byte(bench: Workbench, name: str) -> None:
    """A warning on stderr names it, its modules are counted in the report and in the record, and it has no effect."""
    tensors, config, weight = DEAD[name]
    dead, live = adapter(bench, "dead", tensors, **config), adapter(bench, "live", factors(seed=2))
    loratool.merge(bench.base, live, bench.outputs / "alone")
    words = ("merge", bench.base, dead, live, "-w", weight, "-w", "1", "-o", bench.outputs / "both")
    outcome = bench.run(*words, "--json")
    assert outcome.code == 0
    assert outcome.err.startswith("warning: dead: changes no element")
    assert is_clean(outcome.err)
    assert "live" not in outcome.err
    assert weights_of(bench.outputs / "both") == weights_of(bench.outputs / "alone")
    report = json.loads(outcome.out)
    counts = [(a["name"], a["modules"], len(a["unchanged"])) for a in report["adapters"]]
    assert counts == [("dead", len(MODULES), len(MODULES)), ("live", len(MODULES), 0)]
    assert "adapter-without-effect" in [note["code"] for note in report["notes"]]
    record = json.loads((bench.outputs / "both" / "loratool.json").read_text())
    assert [a["unchanged"] for a in record["adapters"]] == [len(MODULES), 0]
    assert "adapter-without-effect" in [note["code"] for note in record["notes"]]
    text = bench.run(*words, "--overwrite")
    assert f"dead: 0 of {len(MODULES)} modules changed" in text.out


@pytest.mark.parametrize("dead", [MODULES[:1], MODULES[1:]])
def test_modules_without_effect_are_counted_and_named(bench: Workbench, dead: tuple[str, ...]) -> None:
    """An adapter that changes some modules and not others: a note with their number, no warning."""
    folder = adapter(bench, "half", factors(dead))
    outcome = bench.run("merge", bench.base, folder, "-o", bench.out, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    (effect,) = json.loads(outcome.out)["adapters"]
    assert effect["unchanged"] == sorted(f"{module}.weight" for module in dead)
    notes = {note["code"]: note["text"] for note in json.loads(outcome.out)["notes"]}
    assert f"{len(dead)} of {len(MODULES)} modules change no element" in notes["modules-without-effect"]
    before, after = tensors_of(bench.base), tensors_of(bench.out)
    for module in MODULES:
        assert np.array_equal(before[f"{module}.weight"], after[f"{module}.weight"]) == (module in dead)


def test_what_a_continued_merge_did_not_write_itself_is_counted_too(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that was interrupted after its first file counts the modules of that file as well."""
    folder = adapter(bench, "half", factors(MODULES[:1]))
    finish, done = Engine.finish, threading.Event()

    def stop(self: Engine, shard: Any) -> None:
        if shard.plan.name != "model-00001-of-00004.safetensors":
            done.wait(10)
            raise KeyboardInterrupt
        finish(self, shard)
        done.set()

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            loratool.merge(bench.base, folder, bench.outputs / "a", shard_size=100, workers=1)
    report = loratool.merge(bench.base, folder, bench.outputs / "a", shard_size=100, workers=1)
    assert report.resumed
    assert [(a.modules, a.unchanged) for a in report.adapters] == [(len(MODULES), (f"{MODULES[0]}.weight",))]
    fresh = loratool.merge(bench.base, folder, bench.outputs / "b", shard_size=100)
    assert fresh.adapters == report.adapters


# -- the other commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpha 0", "B 0", "weight 0"])
def test_combine_and_compare_warn_of_a_dead_adapter(bench: Workbench, name: str) -> None:
    """The others among DEAD are no zeros, and these commands round nothing away; compare has no weights."""
    tensors, config, weight = DEAD[name]
    dead, live = adapter(bench, "dead", tensors, **config), adapter(bench, "live", factors(seed=2))
    outcome = bench.run("combine", dead, live, "-w", weight, "-w", "1", "-o", bench.outputs / "a", "--json")
    assert outcome.code == 0
    assert "warning: dead: every update is zero" in outcome.err
    assert "adapter-without-effect" in [note["code"] for note in json.loads(outcome.out)["notes"]]
    words = ("combine", dead, dead, "-w", weight, "-w", weight, "-o", bench.outputs / "b")
    bench.refuses(*words, told=["nothing to combine"], code=4)
    if weight != "0":
        outcome = bench.run("compare", dead, live)
        assert outcome.code == 0
        assert "warning: dead: every update is zero" in outcome.err


@pytest.mark.parametrize("name", ["alpha 0", "B 0"])
def test_resize_refuses_a_dead_adapter_and_a_check_finds_it(bench: Workbench, name: str) -> None:
    """What is zero has no leading part; inspect says which of the two it is."""
    tensors, config, _ = DEAD[name]
    dead = adapter(bench, "dead", tensors, **config)
    bench.refuses("resize", dead, "--rank", "1", "-o", bench.out, told=["nothing to resize"], code=4)
    outcome = bench.run("inspect", dead, "--check")
    assert outcome.code == 3
    assert ("alpha is 0" if name == "alpha 0" else "every update is zero") in outcome.out


@pytest.mark.parametrize("bake", [False, True])
@pytest.mark.parametrize("config", [{"lora_alpha": 0}, {"alpha_pattern": {"q_proj": 0}}], ids=["all", "some"])
def test_rescale_sets_an_alpha_that_is_zero(bench: Workbench, config: dict[str, Any], bake: bool) -> None:
    """`--alpha` gives the update α/r · BA, in the config or in the factors, whatever α was."""
    dead = adapter(bench, "dead", factors(), **config)
    outcome = bench.run("rescale", dead, "--alpha", "6", "-o", bench.out, "--json", *(["--bake"] if bake else []))
    assert outcome.code == 0, outcome.err
    assert "alpha-was-zero" in [note["code"] for note in json.loads(outcome.out)["notes"]]
    told = json.loads((bench.out / "adapter_config.json").read_text())
    scale = told["lora_alpha"] / told["r"]
    assert not told.get("alpha_pattern")
    before, after = tensors_of(dead), tensors_of(bench.out)
    for module in MODULES:
        (a, b), (c, d) = (
            (tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"])
            for tensors in (before, after)
        )
        assert np.allclose(scale * d @ c, 6 / RANK * b @ a, rtol=1e-5, atol=1e-6)
    loratool.merge(bench.base, bench.out, bench.outputs / "model")


def test_rescale_cannot_wake_what_is_zero(bench: Workbench) -> None:
    """With α = 0 and B = 0 no α helps; a factor leaves α = 0 what it is, and --frobenius names --alpha."""
    both = adapter(bench, "both", factors(MODULES), lora_alpha=0)
    bench.refuses("rescale", both, "--alpha", "8", "-o", bench.out, told=["so is all of B"], code=4)
    dead = adapter(bench, "dead", factors(), lora_alpha=0)
    bench.refuses("rescale", dead, "--frobenius", "1", "-o", bench.out, told=["--alpha"], code=4)
    outcome = bench.run("rescale", dead, "--scale", "2", "-o", bench.out)
    assert outcome.code == 0
    assert "warning: 4 layers have an alpha of 0" in outcome.err


# -- updates that are too large ------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "told"), [(4, False), (4000, True)])
def test_an_update_larger_than_its_weight_is_told(bench: Workbench, alpha: int, told: bool) -> None:
    """‖ΔW‖/‖W‖ above 1, by the norms of what was written, is a note that names the matrices."""
    folder = adapter(bench, "strong", factors(size=0.05), lora_alpha=alpha)
    report = loratool.merge(bench.base, folder, bench.out, dtype="float32")
    before, after = tensors_of(bench.base), tensors_of(bench.out)
    ratios = [np.linalg.norm(after[n] - before[n]) / np.linalg.norm(before[n]) for n in before]
    assert (max(ratios) > 1) == told
    assert ("update-larger-than-weight" in [note.code for note in report.notes]) == told
    assert np.allclose(sorted(report.relative_norms.values()), sorted(ratios), rtol=1e-4)
