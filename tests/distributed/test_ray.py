"""A merge by the tasks of a Ray cluster gives the bytes of a merge in one process, whoever is killed on the way."""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from paths import ROOT

import loratool

if TYPE_CHECKING:
    from servers import Cluster

ROUNDS = 16  # in which processes of tasks are killed
DRIVERS = 4  # rounds in which the driver is killed
PROVENANCE = "loratool.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 25 parts, an adapter on three of its blocks, and what a merge in one process makes of them."""
    home = tmp_path_factory.mktemp("model")
    shapes = runpy.run_path(str(ROOT / "benchmarks" / "shapes.py"))
    shape = shapes["Shape"]("small", 1024, 2816, 15, 8, 2, 32000, tied=False, shard_bytes=150_000_000)
    shapes["make_base"](shape, home / "base")
    shapes["make_adapter"](shape, home / "adapter", layers=3)
    loratool.merge(home / "base", home / "adapter", home / "local", device="cpu")
    return home


def words(model: Path, out: Path, address: str, *more: str) -> list[str]:
    operands = [str(model / "base"), str(model / "adapter"), "-o", str(out), "--device", "cpu"]
    return [sys.executable, "-m", "loratool", "merge", *operands, "--workers", address, "--num-cpus", "1", *more]


@contextmanager
def begun(line: Sequence[str], cluster: Cluster) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone afterwards."""
    settings = {**os.environ, **cluster.settings}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings) as process:
        try:
            yield process
        finally:
            process.kill()


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != PROVENANCE:
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def same(out: Path, model: Path) -> None:
    """Every file but the record is that of the merge in one process, and so are the digests in the record."""
    assert dict(contents(out)) == dict(contents(model / "local"))
    ours, theirs = (json.loads((folder / PROVENANCE).read_text()) for folder in (out, model / "local"))
    assert ours["files"] == theirs["files"]


@pytest.mark.parametrize("way", ["address", "client"])
def test_tasks_make_the_bytes_of_one_process(way: str, model: Path, cluster: Cluster, tmp_path: Path) -> None:
    """With the cluster of the environment, as nodes have it, and with a driver that is a client."""
    address = "ray" if way == "address" else cluster.client
    with begun(words(model, tmp_path / "out", address, "--json"), cluster) as run:
        shown, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert json.loads(shown)["edited"] > 0
    same(tmp_path / "out", model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def connected(cluster: Cluster) -> Iterator[Cluster]:
    """This process as a driver, whose tasks keep their processes from one merge to the next."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.settings.items():
            patch.setenv(name, value)
        ray = importlib.import_module("ray")
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield cluster
        finally:
            ray.shutdown()


def test_processes_of_tasks_that_are_killed_are_started_again(model: Path, connected: Cluster, tmp_path: Path) -> None:
    """One or two of them in each round, at any moment; the merge goes on, and its result is right."""
    killed = 0
    for number in range(ROUNDS):
        chance, out = random.Random(number), tmp_path / "out"
        with ThreadPoolExecutor(1) as pool:
            merge = pool.submit(
                loratool.merge, model / "base", model / "adapter", out, workers="ray", num_cpus=1, device="cpu"
            )
            for _ in range(chance.randint(1, 2)):
                killed += kill_one(connected, merge.done, chance)
            merge.result(timeout=120)
        same(out, model)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)
    assert killed > ROUNDS // 2


def kill_one(cluster: Cluster, over: Callable[[], bool], chance: random.Random) -> bool:
    """Kill a process of a task some time after there is one; whether there was."""
    while not cluster.workers and not over():
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.8))
    if not (at_work := cluster.workers):
        return False
    with suppress(ProcessLookupError):
        os.kill(chance.choice(at_work), signal.SIGKILL)
    return True


@pytest.mark.parametrize("number", range(DRIVERS))
def test_the_same_command_continues_after_the_driver_was_killed(
    number: int, model: Path, cluster: Cluster, tmp_path: Path
) -> None:
    """OUT is not there before it is complete, and nothing is left next to it. A task was killed before that, too."""
    chance = random.Random(number)
    line = words(model, tmp_path / "out", "ray", "-q")
    with begun(line, cluster) as run:
        kill_one(cluster, lambda: run.poll() is not None, chance)
        time.sleep(chance.uniform(0, 3))
        run.kill()
        run.communicate(timeout=60)
    if (tmp_path / "out").exists():  # it was killed after its work was done
        same(tmp_path / "out", model)
    with begun(line, cluster) as run:
        _, said = run.communicate(timeout=120)
    assert run.returncode == 0 or "complete already" in said, said
    same(tmp_path / "out", model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_what_the_same_command_continues(model: Path, cluster: Cluster, tmp_path: Path) -> None:
    """Ctrl-C ends the driver with 130 and the tasks with it; parts that were made are not made again."""
    line = words(model, tmp_path / "out", "ray", "-q")
    parts = tmp_path / "out.partial" / "parts"
    with begun(line, cluster) as run:
        while run.poll() is None and len([*parts.glob("part-*.json")]) < 3:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + 30
    while cluster.workers and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cluster.workers == []
    made = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.json")}
    assert len(made) >= 3
    with begun(line, cluster) as run:
        while run.poll() is None and parts.is_dir():
            found = {path.name: at for path in parts.glob("part-*.json") if (at := written(path))}
            assert all(found.get(name, at) == at for name, at in made.items())
            time.sleep(0.05)
        _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    same(tmp_path / "out", model)


def written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def test_an_error_of_a_task_is_the_error_of_the_command(model: Path, cluster: Cluster, tmp_path: Path) -> None:
    """What only values can show is found by tasks, and said as in one process, with the same exit code."""
    adapter = tmp_path / "adapter"
    shutil.copytree(model / "adapter", adapter)
    weights = adapter / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    weights.write_bytes(raw)
    line = [str(adapter) if word == str(model / "adapter") else word for word in words(model, tmp_path / "out", "ray")]
    with begun(line, cluster) as run:
        _, said = run.communicate(timeout=60)
    with pytest.raises(loratool.InputError) as caught:
        loratool.merge(model / "base", adapter, tmp_path / "other")
    assert run.returncode == caught.value.exit_code
    assert str(caught.value) in said
    assert not (tmp_path / "out").exists()


def test_of_two_drivers_one_publishes(model: Path, cluster: Cluster, tmp_path: Path) -> None:
    """Both may work on the same output; the other one says that it is there."""
    line = words(model, tmp_path / "out", "ray", "-q")
    with begun(line, cluster) as one, begun(line, cluster) as other:
        said = [each.communicate(timeout=180)[1] for each in (one, other)]
    codes = sorted(each.returncode for each in (one, other))
    assert codes[0] == 0, said
    assert codes[1] in (0, 2), said
    same(tmp_path / "out", model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
