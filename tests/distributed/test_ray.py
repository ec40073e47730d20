"""A merge by the tasks of a Ray cluster gives the bytes of a merge in one process, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from paths import ROOT

import loratool

if TYPE_CHECKING:
    from servers import Cluster

ROUNDS = 20
PROVENANCE = "loratool.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 25 parts and an adapter, and what a merge in one process makes of them."""
    home = tmp_path_factory.mktemp("model")
    shapes = runpy.run_path(str(ROOT / "benchmarks" / "shapes.py"))
    shape = shapes["Shape"]("small", 1024, 2816, 15, 8, 2, 32000, tied=False, shard_bytes=150_000_000)
    shapes["make"](shape, home)
    loratool.merge(home / "base", home / "adapter", home / "local")
    return home


def words(model: Path, out: Path, address: str, *more: str) -> list[str]:
    operands = [str(model / "base"), str(model / "adapter"), "-o", str(out)]
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


@pytest.mark.parametrize("number", range(ROUNDS))
def test_whoever_is_killed_the_result_is_right(number: int, model: Path, cluster: Cluster, tmp_path: Path) -> None:
    """Processes of tasks die and are started again by Ray; in every other round the driver dies too, and is started again.

    OUT is not there before it is complete, and nothing is left next to it.
    """
    chance = random.Random(number)
    line = words(model, tmp_path / "out", "ray", "-q")
    driver_dies = number % 2 == 1
    with begun(line, cluster) as run:
        kill_workers(cluster, run, chance)
        if driver_dies:
            time.sleep(chance.uniform(0, 1))
            run.kill()
        _, said = run.communicate(timeout=120)
    if driver_dies and run.returncode:
        assert run.returncode == -signal.SIGKILL, said
        if (tmp_path / "out").exists():  # it was killed after its work was done
            same(tmp_path / "out", model)
        with begun(line, cluster) as run:
            _, said = run.communicate(timeout=120)
        assert run.returncode == 0 or "complete already" in said, said
    else:
        assert run.returncode == 0, said
    same(tmp_path / "out", model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def kill_workers(cluster: Cluster, run: subprocess.Popen[str], chance: random.Random) -> None:
    """Kill one or two processes of tasks, each some time after it was seen."""
    for _ in range(chance.randint(1, 2)):
        while run.poll() is None and not cluster.workers:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.8))
        if at_work := cluster.workers:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(at_work), signal.SIGKILL)


def test_an_interrupt_leaves_what_the_same_command_continues(model: Path, cluster: Cluster, tmp_path: Path) -> None:
    """Ctrl-C ends the driver with 130 and the tasks with it; parts that were made are not made again."""
    line = words(model, tmp_path / "out", "ray", "-q")
    parts = tmp_path / "out.partial" / "parts"
    with begun(line, cluster) as run:
        while run.poll() is None and len([*parts.glob("part-*.json")]) < 3:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    assert run.returncode == 130
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
