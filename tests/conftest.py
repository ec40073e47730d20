"""What every test runs with: no network, a quiet transformers, few threads, and no GPU or waiting disk unless asked for."""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jinja2
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from workbench import Workbench

# before transformers and torch are imported anywhere
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compare bytes, fork and count memory, which a CUDA context gets in the way of; those of CUDA ask for it.
if not os.environ.get("LORATOOL_TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A run in the background of a shell ignores interrupts, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def at_ease(sync: Callable[[int], None]) -> Callable[[int], None]:
    """`fsync` without the wait for a disk, which only a power cut would tell from it."""

    def noted(descriptor: int) -> None:
        if os.environ.get("LORATOOL_TEST_SYNC"):
            sync(descriptor)
        else:
            os.fstat(descriptor)  # which a closed one fails here too

    return noted


# Before loratool is imported. Processes of their own wait, and so do the forks in which runs are killed.
for name in {"fsync", "fdatasync"} & set(dir(os)):
    setattr(os, name, at_ease(getattr(os, name)))


def looked_up(name: str) -> Callable[..., Any]:
    """The function of `os` that has this name when it is called."""
    return lambda *args, **named: getattr(os, name)(*args, **named)


# Before Python 3.11, paths keep the functions of `os`, so that they would go past those that tests put in their place.
if accessor := getattr(pathlib, "_normal_accessor", None):
    for name in set(dir(accessor)) & set(dir(os)):
        if getattr(accessor, name) is getattr(os, name):
            setattr(accessor, name, looked_up(name))

# PEFT compiles the same template of a card at every save, which takes longer than the save.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[assignment]

# Neither is what all tests import garbage, while it is imported or later.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    some = gc.get_freeze_count()
    gc.get_freeze_count = lambda: some  # which counts a million of them one by one, and every command asks
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


# The same examples every time; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture
def bench(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Workbench:
    """A sound base and a sound adapter, for a test to spoil."""
    from workbench import Workbench

    return Workbench(tmp_path, capsys)
