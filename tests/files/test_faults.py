"""Whatever file call goes wrong, at whatever moment: OUT is absent, as before or complete, and a rerun ends well.

Each test makes the 1st, 2nd, 3rd, … file call of a small merge go wrong in one way, until there is no such call.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import faults
import pytest
import torch
from faults import Call, Fault, Mode, Outcome, Picture, picture
from safetensors.torch import load_file
from tree_digests import root_of

OUT, PARTIAL = "out", "out.partial"
LAST_FILE = "fsync(out.partial/model/loratool.json)"


@dataclass
class Scene:
    """A merge into `root/out`, what it must give, and what is there before."""

    base: Path
    adapter: Path
    root: Path
    scratch: Path
    new: Picture = field(default_factory=dict)  # OUT when the merge is done
    old: Picture = field(default_factory=dict)  # OUT before; nothing, where it is not there
    inputs: Picture = field(default_factory=dict)
    rerun: set[str] = field(default_factory=set)  # states that a rerun is known to put right

    def arguments(self, *more: str) -> list[str]:
        out = str(self.root / OUT)
        return ["merge", str(self.base), str(self.adapter), "-o", out, "--device", "cpu", "--workers", "1", *more]

    def merge(self, *more: str, fault: Fault | None = None, exchange: bool = True) -> Outcome:
        return faults.merge(self.arguments(*more), self.root, self.scratch, fault, exchange)

    def reset(self) -> None:
        """The state before the merge."""
        for path in self.root.iterdir():
            shutil.rmtree(path)
        if self.old:
            shutil.copytree(self.scratch / "old", self.root / OUT)

    def is_complete(self) -> bool:
        return picture(self.root / OUT) == self.new and self.names() == {OUT}

    def twin(self) -> Scene:
        """The same merge in folders of its own."""
        home = self.root.parent / "twin"
        (home / "root").mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.scratch, home / "scratch", dirs_exist_ok=True)
        return replace(self, root=home / "root", scratch=home / "scratch", rerun=set())

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()}

    def problems(self, outcome: Outcome, mode: Mode) -> list[str]:
        """What is wrong with the state that a fault has left."""
        found = []
        if outcome.code not in (expected_codes(mode) if outcome.hit else (0,)):
            found.append(f"exit status {outcome.code}: {outcome.errors}")
        if outcome.code == 0 and outcome.hit and "sync" in outcome.hit.name:
            found.append("exit status 0 after a failed sync")
        if "Traceback" in outcome.errors:
            found.append(outcome.errors)
        if outcome.code == 6 and not outcome.errors.startswith("Error: "):
            found.append(f"no error is told: {outcome.errors!r}")
        out = picture(self.root / OUT)
        if out not in (self.old, self.new):
            found.append(f"OUT is neither as before nor complete: {describe(out, self.new)}")
        if outcome.code == 0 and out != self.new:
            found.append("exit status 0, and OUT is not what was asked for")
        if self.names() - {OUT, PARTIAL}:
            found.append(f"left over: {self.names()}")
        left = sorted(picture(self.root / PARTIAL))
        worth_keeping = mode.startswith("SIGINT") and any(name.endswith(".safetensors") for name in left)
        if (
            mode not in faults.KILLS
            and PARTIAL in self.names()
            and not worth_keeping
            and not excuses(outcome.hit, left, mode)
        ):
            found.append(f"left in OUT.partial: {left}")
        if picture(self.base.parent) != self.inputs:
            found.append("an input was changed")
        return found

    def problems_of_rerun(self) -> list[str]:
        """What is wrong after the same command once more, with nothing in its way."""
        state = json.dumps(picture(self.root))
        if state in self.rerun:
            return []
        self.rerun.add(state)
        again = self.merge(*(["--overwrite"] if (self.root / OUT).exists() else []))
        found = [] if again.code == 0 else [f"the rerun ends with {again.code}: {again.errors}"]
        if picture(self.root / OUT) != self.new:
            found.append(f"the rerun gives something else: {describe(picture(self.root / OUT), self.new)}")
        if self.names() != {OUT}:
            found.append(f"the rerun leaves {self.names()}")
        return found


def expected_codes(mode: Mode) -> tuple[int, ...]:
    if mode in faults.KILLS:
        return (-9,)
    if mode.startswith("SIGINT"):
        return (130,)
    return (0,) if mode.startswith("short") else (0, 6)


def excuses(call: Call | None, left: list[str], mode: Mode) -> bool:
    """Whether a fault at this call may leave something: it was to remove it, or came as the folder was just made."""
    just_made = not left and (mode.startswith("SIGINT") or str(call) == f"open({PARTIAL})")
    return just_made or (call is not None and call.name in faults.CLEARING)


def describe(found: Picture, wanted: Picture) -> str:
    if not found:
        return "absent"
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return f"different {other}, missing {sorted(wanted.keys() - found.keys())}, more {sorted(found.keys() - wanted.keys())}"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A merge into a folder that is not there yet."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("faults")
    for name in ("root", "scratch"):
        (home / name).mkdir()
    base = faults.make_base(home / "inputs" / "base")
    adapter = faults.make_adapter(home / "inputs" / "adapter")
    scene = Scene(base, adapter, home / "root", home / "scratch", inputs=picture(home / "inputs"))
    outcome = scene.merge()
    assert outcome.code == 0, outcome.errors
    scene.new = picture(scene.root / OUT)
    shutil.copytree(scene.root / OUT, scene.scratch / "new")
    return scene


@pytest.fixture(scope="module")
def overwriting(fresh: Scene) -> Scene:
    """A merge over a model of the same shape, of the same adapter with another weight."""
    home = fresh.root.parent / "overwriting"
    for name in ("root", "scratch"):
        (home / name).mkdir(parents=True)
    scene = Scene(fresh.base, fresh.adapter, home / "root", home / "scratch", inputs=fresh.inputs, new=fresh.new)
    assert scene.merge("-w", "-2").code == 0
    shutil.move(scene.root / OUT, scene.scratch / "old")
    scene.old = picture(scene.scratch / "old")
    assert scene.old.keys() == scene.new.keys()
    assert scene.old != scene.new
    return scene


def test_the_reference_is_the_formula(fresh: Scene) -> None:
    adapter = load_file(fresh.adapter / "adapter_model.safetensors")
    for shard in sorted(fresh.base.glob("*.safetensors")):
        merged = load_file(fresh.scratch / "new" / shard.name)
        for name, weight in load_file(shard).items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in adapter:
                down, up = adapter[f"{key}.lora_A.weight"].double(), adapter[f"{key}.lora_B.weight"].double()
                weight = (weight.double() + 2 * (up @ down)).bfloat16()
                torch.testing.assert_close(merged[name], weight, rtol=2**-7, atol=0)
                assert (merged[name] == weight).double().mean() > 0.99
            else:
                assert torch.equal(merged[name], weight)


def all_points(
    scene: Scene,
    mode: Mode,
    *more: str,
    since: str = "",
    path: str = "",
    fewest: int = 15,
    lanes: Sequence[int] = (1, 2),
) -> list[str]:
    """Everything that goes wrong when the 1st, 2nd, 3rd, … call does; two lanes of calls side by side.

    By default the lanes are the odd and the even calls. With `halves` or `thirds` each kind of fault takes another half
    or third of them.
    """

    def points(scene: Scene, first: int) -> list[str]:
        found: list[str] = []
        for n in count(first, 2 * (lanes[1] - lanes[0])):
            scene.reset()
            outcome = scene.merge(*more, fault=Fault(mode, n, since, path))
            problems = scene.problems(outcome, mode)
            if outcome.hit is None:
                assert n > fewest, f"only {n - 1} calls were counted"
                assert scene.is_complete()
                return found + problems
            problems += scene.problems_of_rerun()
            found += [f"{mode}, {n}: {outcome.hit}: {problem}" for problem in problems]
        raise AssertionError

    return faults.side_by_side([lambda: points(scene, lanes[0]), lambda: points(scene.twin(), lanes[1])], scene.scratch)


def halves(number: int) -> tuple[int, int]:
    """The first calls of two lanes that together take every second call; which half, the number of the kind decides."""
    return 1 + number % 2, 3 + number % 2


def thirds(number: int) -> tuple[int, int]:
    """The same for every third call."""
    return 1 + number % 3, 4 + number % 3


@pytest.mark.parametrize(("mode", "number"), [("ENOSPC for good", 0), ("killed before", 1)])
def test_a_new_output_is_absent_or_complete_whichever_call_goes_wrong(fresh: Scene, mode: Mode, number: int) -> None:
    problems = all_points(fresh, mode, lanes=halves(number))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("mode", ["EIO", "ENOSPC", "killed after", "SIGINT"])
def test_a_new_output_is_absent_or_complete_whichever_call_goes_wrong_at_the_end(fresh: Scene, mode: Mode) -> None:
    problems = all_points(fresh, mode, since=LAST_FILE, fewest=5)
    assert not problems, "\n".join(problems)


OVERWRITING: tuple[Mode, ...] = ("EIO", "short", "torn", "killed after", "SIGINT")


@pytest.mark.parametrize("mode", OVERWRITING)
def test_an_output_that_is_overwritten_is_the_old_or_the_new_whichever_call_goes_wrong(
    overwriting: Scene, mode: Mode
) -> None:
    problems = all_points(overwriting, mode, "--overwrite", lanes=thirds(OVERWRITING.index(mode)))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", [f"{PARTIAL}/model", "model-00001-of-00002.safetensors"])
def test_an_interrupt_waits_for_the_calls_that_are_under_way_before_it_clears_away(fresh: Scene, path: str) -> None:
    """Else a thread that goes on would put files where everything has been removed."""
    problems = all_points(fresh, "SIGINT, slowly", path=path, fewest=3)
    assert not problems, "\n".join(problems)


def test_writes_that_all_fall_short_are_made_up_for(fresh: Scene) -> None:
    fresh.reset()
    outcome = fresh.merge(fault=Fault("short for good", 1))
    assert outcome.hit is not None
    assert outcome.code == 0, outcome.errors
    assert fresh.is_complete()


@pytest.mark.parametrize("mode", ["EIO", "ENOSPC for good", "killed before", "SIGINT"])
def test_without_an_exchange_of_names_the_old_output_is_still_never_lost(overwriting: Scene, mode: Mode) -> None:
    """Two renames then take the place of one; when the second fails, the old output waits for the next run.

    Two kinds that leave the same behind take turns; the others happen to every call.
    """
    first, second = {"EIO": halves(0), "SIGINT": halves(1)}.get(mode, (1, 2))

    def points(scene: Scene, first: int, step: int = 2 * (second - first)) -> list[str]:
        found: list[str] = []
        put_right: set[str] = set()  # what a rerun is known to start from
        for n in count(first, step):
            scene.reset()
            outcome = scene.merge("--overwrite", fault=Fault(mode, n, LAST_FILE), exchange=False)
            if outcome.hit is None:
                assert n > 5
                return found
            state = json.dumps(picture(scene.root))
            if state in put_right:
                continue
            put_right.add(state)
            if mode in (*faults.KILLS, "ENOSPC for good") and not (scene.root / OUT).exists():
                refused = scene.merge("--overwrite", fault=Fault("ENOSPC", 1, path=".safetensors"), exchange=False)
                found += [f"the next run, which cannot write, ends with {refused.code}"] * (refused.code != 6)
            out = picture(scene.root / OUT)
            if out not in (scene.old, scene.new):
                found.append(f"{mode}, {n}: {outcome.hit}: neither the old nor the new: {describe(out, scene.new)}")
            again = scene.merge("--overwrite", exchange=False)
            if again.code or not scene.is_complete():
                found.append(f"{mode}, {n}: {outcome.hit}: the rerun: {again.errors}, {scene.names()}")
        raise AssertionError

    jobs = [lambda: points(overwriting, first), lambda: points(overwriting.twin(), second)]
    problems = faults.side_by_side(jobs, overwriting.scratch)
    assert not problems, "\n".join(problems)


def test_half_of_an_old_output_never_comes_back(overwriting: Scene) -> None:
    """A kill while the replaced model was being removed; then OUT was removed too, and is made again."""
    overwriting.reset()
    killed = Fault("killed after", 1, since="fsync(.)", path=".safetensors")
    assert overwriting.merge("--overwrite", fault=killed, exchange=False).code == -9
    assert picture(overwriting.root / OUT) == overwriting.new
    shutil.rmtree(overwriting.root / OUT)
    again = overwriting.merge(exchange=False)
    assert overwriting.is_complete(), (again.errors, describe(picture(overwriting.root / OUT), overwriting.new))
    assert again.code == 0


def test_an_old_output_that_comes_back_is_not_overwritten_unasked(overwriting: Scene) -> None:
    """A kill between the two renames, and then the same command without `--overwrite`."""
    overwriting.reset()
    killed = Fault("killed before", 1, since="rename(out.partial/model, out)")
    assert overwriting.merge("--overwrite", fault=killed, exchange=False).code == -9
    assert not (overwriting.root / OUT).exists()
    left = picture(overwriting.root)
    again = overwriting.merge(exchange=False)
    assert again.code == 2, again.errors
    assert "--overwrite" in again.errors
    assert picture(overwriting.root) == left
    waiting = overwriting.root / PARTIAL / "replaced"
    assert str(waiting) in again.errors
    assert picture(waiting) == overwriting.old
    waiting.rename(overwriting.root / OUT)  # which is the other way out that is told
    again = overwriting.merge("--overwrite", exchange=False)
    assert again.code == 0, again.errors
    assert overwriting.is_complete()


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_a_rerun_after_a_kill_behind_the_exchange_of_names_says_that_out_is_complete_and_lets_the_old_one_go(
    exchange: bool, overwriting: Scene
) -> None:
    """A dry run says the same and writes nothing."""
    swap = "renameat2(out.partial/model, out)" if exchange else "rename(out.partial/model, out)"
    overwriting.reset()
    outcome = overwriting.merge("--overwrite", fault=Fault("killed after", 1, since=swap), exchange=exchange)
    assert outcome.code == -9, outcome.hit
    assert picture(overwriting.root / PARTIAL / ("model" if exchange else "replaced")) == overwriting.old
    left = picture(overwriting.root)
    dry = overwriting.merge("--dry-run")
    assert picture(overwriting.root) == left
    again = overwriting.merge()
    for each in (dry, again):
        assert each.code == 2, each.errors
        assert "an earlier run completed it" in each.errors
    assert overwriting.is_complete()
    assert overwriting.names() == {OUT}


def test_a_rerun_after_a_kill_before_the_exchange_of_names_claims_nothing(overwriting: Scene) -> None:
    """OUT is still the old output, and the stage has the new one, which the next run with `--overwrite` makes anew."""
    overwriting.reset()
    swap = Fault("killed before", 1, since="renameat2(out.partial/model, out)")
    assert overwriting.merge("--overwrite", fault=swap).code == -9
    left = picture(overwriting.root)
    again = overwriting.merge()
    assert again.code == 2
    assert "already exists; pass --overwrite" in again.errors
    assert picture(overwriting.root) == left


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rerun_after_a_kill_between_publishing_and_clearing_says_that_out_is_complete_and_clears(
    number: int, fresh: Scene
) -> None:
    """The stage holds nothing any more. A dry run says the same and writes nothing."""
    fresh.reset()
    outcome = fresh.merge(fault=Fault("killed after", number, since="rename(out.partial/model, out)"))
    assert outcome.code == -9, outcome.hit
    assert fresh.names() == {OUT, PARTIAL}
    journal = fresh.root / PARTIAL / "journal"
    told = journal.exists()
    dry = fresh.merge("--dry-run")
    assert (fresh.names(), journal.exists()) == ({OUT, PARTIAL}, told)
    again = fresh.merge()
    assert [each.code for each in (dry, again)] == [2, 2]
    for each in (dry, again):
        assert ("an earlier run completed it" in each.errors) == told, each.errors
        assert "pass --overwrite to replace it" in each.errors
    assert fresh.names() == {OUT}
    assert picture(fresh.root / OUT) == fresh.new


def test_kills_upon_kills_of_changing_plans_end_in_the_right_output(overwriting: Scene) -> None:
    """Runs with two weights, each killed at a random call; the last one is let through."""
    chance = random.Random(0)
    for trial in range(5):
        overwriting.reset()
        history = []
        for _ in range(4):
            weight, at = chance.choice(["1", "1", "3"]), chance.randrange(1, 80)
            mode: Mode = chance.choice(["killed before", "torn", "SIGINT"])
            outcome = overwriting.merge("--overwrite", "-w", weight, fault=Fault(mode, at))
            history.append(f"weight {weight}: {mode} at {at}: {outcome.hit}, {outcome.code}")
        last = overwriting.merge("--overwrite")
        assert last.code == 0, (trial, history, last.errors)
        assert overwriting.is_complete(), (trial, history, describe(picture(overwriting.root / OUT), overwriting.new))


def test_a_torn_line_of_the_journal_hides_none_of_the_lines_after_it(fresh: Scene) -> None:
    """Two interrupted runs: the first is killed while it notes its last file; the second finishes that file."""
    fresh.reset()
    outcome = fresh.merge(fault=Fault("torn", 2, path="journal"))
    assert outcome.code == -9
    outcome = fresh.merge("--json", fault=Fault("SIGINT", 1, since="open(out.partial/model/config.json)"))
    assert outcome.code == 130, outcome.errors
    outcome = fresh.merge("--json")
    assert outcome.code == 0, outcome.errors
    assert sorted(json.loads(outcome.output)["resumed"]) == [
        shard.name for shard in sorted(fresh.base.glob("*.safetensors"))
    ]
    assert fresh.is_complete()


@pytest.mark.parametrize("overwrite", [False, True])
def test_everything_is_on_stable_storage_before_it_is_vouched_for(
    fresh: Scene, overwriting: Scene, overwrite: bool
) -> None:
    """Files before the journal and the final name speak of them, folders too; the old output goes last of all."""
    scene = overwriting if overwrite else fresh
    scene.reset()
    outcome = scene.merge(*(["--overwrite"] if overwrite else []))
    assert outcome.code == 0, outcome.errors
    dirty: set[str] = set()  # files with bytes, and folders with names, that a power cut may lose
    written: set[str] = set()
    lines = 0
    published = durable = False
    for call in outcome.calls:
        path, folder = call.paths[0], str(Path(call.paths[0]).parent)
        if call.name == "start":
            continue
        if call.name in ("fsync", "fdatasync"):
            dirty.discard(path)
            durable = durable or (published and path == ".")
        elif call.name in faults.WRITING | {"truncate", "ftruncate"}:
            dirty.add(path)
            written.add(path)
            if path.endswith(("journal", "journal.new")) and not published:
                shards = {path for path in written if path.endswith(".safetensors")}
                assert len(shards - dirty) >= min(lines, 2), f"line {lines} of the journal speaks of an unsynced file"
                lines += 1
        elif call.creates or call.name == "mkdir":
            dirty.add(folder)
        elif OUT in call.paths:
            assert call.name in ("rename", "renameat2")
            assert not (lost := {path for path in dirty if path.startswith(f"{PARTIAL}/model")}), lost
            published = True
        elif call.name in faults.CLEARING:
            assert durable, f"{call}: before the output is durable under its name"
    assert lines >= 3
    assert durable


def test_no_file_is_written_past_the_injector(overwriting: Scene) -> None:
    """Python's audit events name every file opened for writing; the injector has seen each of them."""
    overwriting.reset()
    outcome = overwriting.merge("--overwrite")
    assert outcome.opened
    assert set(outcome.opened) == {call.paths[0] for call in outcome.calls if call.creates}


def test_the_report_of_an_overwriting_merge_has_the_digests_of_what_was_written(overwriting: Scene) -> None:
    overwriting.reset()
    outcome = overwriting.merge("--overwrite", "--json")
    digests = json.loads(outcome.output)["digests"]
    assert digests == {name: root_of((overwriting.root / OUT / name).read_bytes()) for name in digests}
    assert set(digests) == {name for name in overwriting.new if name.endswith(".safetensors")}
