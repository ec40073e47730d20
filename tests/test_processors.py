"""Numerics on other processors: kernels chosen otherwise, additions in another order, more threads.

What PyTorch and MKL would run elsewhere is asked for by their environment variables, which have an effect on x86 only;
a test that passes under one order of additions and fails under another is wrong on some machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

FILES = ("reworking/test_cancellation.py",)
SOME = "hard_cases or plain_sums or pair_that_cancels and float32"  # of what is near a threshold, as -k takes names
PROCESSORS = {
    "without vector units": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
    "avx2, two threads": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "2"},
}
SEEDS = "20"  # of each hard case
PATIENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}  # a thread that waits takes no core


@pytest.mark.parametrize("processor", PROCESSORS)
def test_numerics_hold_on_other_processors(processor: str, tmp_path: Path) -> None:
    """The same tests pass in a process that is told to use other kernels and another number of threads."""
    settings = {**PROCESSORS[processor], "MKL_NUM_THREADS": PROCESSORS[processor]["OMP_NUM_THREADS"]}
    environment = {**os.environ, **settings, **PATIENT, "LORATOOL_SEEDS": SEEDS}
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={tmp_path}", "-k", SOME]
    done = subprocess.run(
        [*words, *(str(ROOT / "tests" / name) for name in FILES)],
        env=environment, cwd=ROOT, text=True, capture_output=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
