"""The rates from which benchmarks/distributed.py has merges simulated; expected values are by hand."""

from __future__ import annotations

import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import distributed
from running import Run


def run(wall: float, processor: float = 1.0, seconds: float = 0.0, startup: float = 0.0) -> list[Run]:
    """A process that reports so many seconds of its own; those before them are the interpreter's."""
    return [Run(wall, 0.0, processor, 0, {"cost": {"seconds": seconds, "startup_seconds": startup}})]


@pytest.fixture
def known() -> distributed.Known:
    """A merge that computes 8 GB and copies 4 GB, which take 6 s and 4 s; 1 s of copies passes while torch is imported.

    The tiny model, of which a worker starts in 1 s, needs no torch.
    """
    runs = {
        "copy": run(12.5, seconds=12),
        "merge": run(11, seconds=10, startup=1),
        "verify": run(4, seconds=3),
        "start": run(1, processor=2),
        "end": run(0.5),
    }
    return distributed.Known.of(runs, computed=8 * 10**9, copied=4 * 10**9)


def test_rates_are_those_that_processes_report_and_start_ups_those_of_a_tiny_model(known: distributed.Known) -> None:
    """However short a process is next to its start-up, that is not subtracted from anything."""
    assert known.copy == pytest.approx(1e9)
    assert known.compute == pytest.approx(8e9 / 6)
    assert known.read == pytest.approx(4e9)
    assert (known.startup, known.finish) == (2, 0.5)


def test_processes_that_start_at_once_share_the_cores(
    known: distributed.Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates are divided; start-up takes longer once there are too few cores for all: 8 times 3 s on 4 cores are 6 s."""
    monkeypatch.setattr(distributed, "cores", lambda: 4)
    assert known.shared(2).startup == 2
    rates = known.shared(8)
    assert rates.startup == 6
    assert rates.copy == pytest.approx(1e9 / 8)
    assert rates.bandwidth == pytest.approx(4e9)
