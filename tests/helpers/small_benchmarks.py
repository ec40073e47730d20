"""Benchmarks on a tiny model, whose commands of loratool run in the process of the test: torch is imported once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from paths import ROOT

from loratool import cli

sys.path.insert(0, str(ROOT / "benchmarks"))

import engine
import machine
import programs
import running
import shapes

if TYPE_CHECKING:
    import pytest

SMALL = shapes.Shape("tiny", 64, 160, 2, 4, 2, 128, tied=False, shard_bytes=100_000)
PROGRAMS = str(ROOT / "benchmarks" / "programs.py")


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *scripts: ModuleType) -> None:
    """Have `engine` and other scripts run loratool in this process, on a tiny model; nobody waits for the disk."""

    def said(words: Sequence[str]) -> str:
        capsys.readouterr()
        if words[1] == PROGRAMS:
            programs.main(words[2:])
        else:
            assert words[1:3] == ["-m", "loratool"]
            assert cli.run(list(words[3:])) == 0
        return capsys.readouterr().out

    def run(words: Sequence[str], tree: Path = ROOT) -> running.Run:
        if words[0] != sys.executable:
            return running.run(words, tree)[0]
        told = said(words)
        return running.Run(2.0, 0.5, 1.0, 10**8, json.loads(told) if told else {})

    def here(function: Callable[..., Any], *words: Any, **named: Any) -> Any:
        return function(*words, **named)

    for script in (engine, *scripts):
        for name, value in {"apart": here, "TINY": SMALL, "SHAPES": {**shapes.SHAPES, "tiny": SMALL}}.items():
            monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(running, "loratool_run", run)
    monkeypatch.setattr(programs, "at_once", lambda commands: [said(words) for words in commands])
    monkeypatch.setattr(engine, "SAMPLED", 500)
    monkeypatch.setattr(engine, "BLOCKS", ())
    monkeypatch.setattr(engine, "WORKERS", (1, 3))
    monkeypatch.setattr(engine, "gpus", list)
    monkeypatch.setattr(machine, "TORCH", "print('torch')")
    monkeypatch.setattr(os, "sync", lambda: None)
