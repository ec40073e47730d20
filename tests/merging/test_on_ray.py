"""`--workers ray` with a stand-in for Ray that runs each task at once; `make distributed` runs it on a cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ray_stand_in import RayError, StandIn
from working_plans import working_plan

import loratool
from loratool import cli
from loratool.commands.merge import MergeAndPushOptions
from loratool.demo import demo
from loratool.errors import StorageError, UsageError
from loratool.merging import dealing, on_ray


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A cluster of two nodes, one of which is too small for what a task gets by default."""
    made = StandIn({"CPU": 8.0}, {"CPU": 2.0})
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setattr(dealing, "SMALLEST", 1 << 20)  # so that the demo's model is several parts
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    demo(folder / "demo")
    loratool.merge(folder / "demo/base", folder / "demo/adapter", folder / "alone")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "loratool.json"}


def merged(home: Path, out: Path, **options: Any) -> Any:
    return loratool.merge(home / "demo/base", home / "demo/adapter", out, **{"workers": "ray", **options})


def test_the_output_is_that_of_one_process(
    ray: StandIn, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file but the record is the same; operands may be relative to a folder in which no task is."""
    monkeypatch.chdir(home)
    seen: list[tuple[int, int]] = []
    report = loratool.merge(
        "demo/base", "demo/adapter", tmp_path / "out", workers="ray", progress=lambda *at: seen.append(at)
    )
    assert contents(tmp_path / "out") == contents(home / "alone")
    assert report.edited > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not ray.open
    assert ray.address == "auto"
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_every_part_is_made_by_one_task_and_read_again_by_another(ray: StandIn, home: Path, tmp_path: Path) -> None:
    """There are at most four tasks for each that has room: four on the first node, one on the second."""
    merged(home, tmp_path / "out", num_cpus=2)
    plan = working_plan(home / "demo/base", home / "demo/adapter")
    names = sorted(part.name for part in dealing.parts_of(plan))
    assert len(names) > 5
    for kind in ("make_share", "check_share"):
        own = [found for name, found, _ in ray.tasks if name == kind]
        assert sorted(name for found in own for name in found) == names
        assert len(own) <= 4 * (4 + 1)
    assert ray.limits == [{"num_cpus": 2, "num_gpus": 0, "max_retries": 8, "max_calls": 0}] * 2


@pytest.mark.parametrize(
    ("nodes", "options", "limits", "room"),
    [
        ([{"CPU": 64.0}], {}, (4, 0), 16),
        ([{"CPU": 2.0}, {"CPU": 64.0}, {"memory": 1.0}], {}, (2, 0), 33),
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0}], {}, (8, 1), 2),
        ([{"CPU": 128.0, "GPU": 2.0}, {"CPU": 30.0, "GPU": 8.0}], {}, (3, 1), 10),
        ([{"CPU": 4.0, "GPU": 8.0}], {}, (1, 1), 4),
        ([{"CPU": 64.0, "GPU": 4.0}], {"num_gpus": 2}, (24, 2), 2),
        ([{"CPU": 256.0, "GPU": 2.0}], {}, (12, 1), 2),
        ([{"CPU": 16.0, "GPU": 2.0}], {"device": "cpu"}, (4, 0), 4),
        ([{"CPU": 16.0, "GPU": 8.0}], {"num_gpus": 2, "num_cpus": 1}, (1, 2), 4),
    ],
)
def test_what_a_task_gets_fits_the_nodes(
    nodes: list[dict[str, float]],
    options: dict[str, Any],
    limits: tuple[int, int],
    room: int,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", StandIn(*nodes))
    chosen = MergeAndPushOptions(workers="ray", **options)
    words = (str(home / "demo/base"), (str(home / "demo/adapter"),), str(tmp_path / "out"), chosen)
    with on_ray.Tasks(words, chosen, chosen, None).connected() as tasks:
        assert (tasks.limits["num_cpus"], tasks.limits["num_gpus"], tasks.room) == (*limits, room)


def test_a_task_that_no_node_has_room_for_is_refused(ray: StandIn, home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no node of the cluster has the 9 CPUs and 0 GPUs"):
        merged(home, tmp_path / "out", num_cpus=9)
    assert not ray.open
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("joins", "rounds"), [(False, ["make_share"]), (True, ["make_share", "check_share"])])
def test_one_machine_reads_nothing_again(
    ray: StandIn, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joins: bool, rounds: list[str]
) -> None:
    """Unless another one joins the cluster meanwhile."""
    ray.resources, get, seen = ({"CPU": 8.0}, {"memory": 1.0}), ray.get, list[tuple[int, int]]()

    def joined(task: int) -> Any:
        if joins:
            ray.resources = ({"CPU": 8.0}, {"CPU": 8.0})
        return get(task)

    monkeypatch.setattr(ray, "get", joined)
    merged(home, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert [*dict.fromkeys(name for name, _, _ in ray.tasks)] == rounds
    assert seen[-1][0] == seen[-1][1] > 0
    assert contents(tmp_path / "out") == contents(home / "alone")


def test_a_damaged_part_is_found_and_made_again(
    ray: StandIn, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that changes after it was written keeps the output from being published; the same command repairs it."""
    once: list[Path] = []

    def damaging(*words: Any) -> Any:
        if not once:
            once.append(next((tmp_path / "out.partial/model").glob("*.safetensors")))
            raw = bytearray(once[0].read_bytes())
            raw[len(raw) // 2] ^= 1
            once[0].write_bytes(raw)
        return check(*words)

    check = on_ray.check_share
    damaging.__name__ = check.__name__
    monkeypatch.setattr(on_ray, "check_share", damaging)
    with pytest.raises(loratool.VerificationError, match="damaged"):
        merged(home, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged(home, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(home / "alone")


def test_an_output_that_another_run_publishes_in_the_meantime_is_left_alone(
    ray: StandIn, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is complete by the time that all parts are made here."""
    wait = ray.wait

    def finishing(pending: Sequence[int], timeout: float) -> Any:
        if len(pending) == 1 and ray.tasks[-1][0] == "make_share":
            last = ray.waiting[pending[0]]

            def then() -> Any:
                table = last()
                loratool.finish_merge(home / "demo/base", home / "demo/adapter", tmp_path / "out")
                return table

            ray.waiting[pending[0]] = then
        return wait(pending, timeout)

    monkeypatch.setattr(ray, "wait", finishing)
    with pytest.raises(UsageError, match="another process published this output"):
        merged(home, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(home / "alone")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_time_of_a_task_is_its_own(home: Path, tmp_path: Path) -> None:
    """The merge is planned once in a process, for its first task."""
    words = on_ray.words_of(home / "demo/base", home / "demo/adapter", tmp_path / "out", MergeAndPushOptions())
    one, before = on_ray.opened("a job", words), time.monotonic()
    other = on_ray.opened("a job", words)
    assert (other.plan, other.parts) == (one.plan, one.parts)
    assert other.plan is one.plan
    assert one.started <= before <= other.started


@pytest.mark.parametrize("joined", [True, False], ids=["joined by the merge", "joined by the caller"])
def test_what_a_task_raises_is_raised_and_the_others_are_ended(
    ray: StandIn, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    """A cluster ends the tasks of a driver that leaves; a caller's connection stays, so there each is cancelled."""
    if not joined:
        ray.init("local")

    def failing(*_: Any) -> Any:
        raise loratool.InputError("base: changed during the merge", ["problem"], hint="loratool inspect base")

    failing.__name__ = "make_share"
    monkeypatch.setattr(on_ray, "make_share", failing)
    with pytest.raises(loratool.InputError, match="changed during the merge") as caught:
        merged(home, tmp_path / "out")
    assert (caught.value.problems, caught.value.hint) == (("problem",), "loratool inspect base")
    assert (ray.open, ray.cancelled) == ((False, 0) if joined else (True, len(ray.tasks)))


def test_a_cluster_that_loses_tasks_is_an_error_of_its_own(ray: StandIn, home: Path, tmp_path: Path) -> None:
    ray.lost = RayError
    with pytest.raises(StorageError, match="the worker died"):
        merged(home, tmp_path / "out")


def test_a_connection_of_the_caller_stays_open(ray: StandIn, home: Path, tmp_path: Path) -> None:
    ray.init("local")
    merged(home, tmp_path / "out")
    assert (ray.open, ray.address) == (True, "local")


def test_a_complete_output_is_not_made_again(ray: StandIn, home: Path, tmp_path: Path) -> None:
    merged(home, tmp_path / "out")
    with pytest.raises(UsageError, match="complete already"):
        merged(home, tmp_path / "out")


def test_without_a_cluster_or_without_ray_the_way_out_is_said(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["merge", str(home / "demo/base"), str(home / "demo/adapter"), "-o", str(tmp_path / "out"), "--workers"]
    monkeypatch.setitem(sys.modules, "ray", StandIn())
    assert cli.run([*line, "ray://nowhere:10001"]) == 2
    assert (
        "no Ray cluster answers; start one with `ray start --head`, or set RAY_AUTH_MODE=token"
        in capsys.readouterr().err
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.run([*line, "ray"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == ['hint: pip install "loratool[ray]"']
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_server_that_starts_slowly_is_asked_once_more(ray: StandIn, home: Path, tmp_path: Path, times: int) -> None:
    """What it said last is told, without the stack above it."""
    ray.refusals = ["Initialization failure from server:\nTraceback\n  File\nRuntimeError: not there yet\n"] * times
    if times == 1:
        assert merged(home, tmp_path / "out", workers="ray://somewhere:10001").edited > 0
        return
    with pytest.raises(UsageError, match=r"\(Initialization failure from server: RuntimeError: not there yet\)"):
        merged(home, tmp_path / "out", workers="ray://somewhere:10001")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("wrong", ["rays", "0", "many", "dask://x"])
def test_workers_are_a_number_or_ray(wrong: str, home: Path, tmp_path: Path) -> None:
    """A word that is not a number is answered with the words that are taken."""
    wanted = "from 1 to 1024" + ("" if wrong == "0" else ", ray, or ray://HOST:PORT")
    with pytest.raises(UsageError, match=rf"--workers must be a whole number {wanted} \(got {wrong}\)"):
        merged(home, tmp_path / "out", workers=wrong)


@pytest.mark.parametrize("name", ["num_cpus", "num_gpus"])
def test_what_a_task_gets_is_for_ray_alone(name: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} needs --workers ray"):
        merged(home, tmp_path / "out", workers=1, **{name: 1})
    line = ["merge", str(home / "demo/base"), str(home / "demo/adapter"), "-o", str(tmp_path / "out")]
    for way in (["--part", "1/2"], ["--finish"], ["--dry-run"]):
        assert cli.run([*line, *way, f"--{name.replace('_', '-')}", "1"]) == 2
    assert [*tmp_path.iterdir()] == []


def test_other_commands_take_threads_alone(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for `loratool merge` into a folder"):
        loratool.verify(home / "alone", home / "demo/base", home / "demo/adapter", workers="ray")
    with pytest.raises(UsageError, match="for `loratool merge` into a folder"):
        loratool.merge_many(home / "demo/base", {tmp_path / "out": home / "demo/adapter"}, workers="ray")[
            tmp_path / "out"
        ]
