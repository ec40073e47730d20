"""Whatever is in a file that is parsed, a command ends with the right result or with one message, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import KINDS, check_outcome, mutations, words_of, write_inputs
from paths import ROOT
from workbench import snapshot, within

from loratool.cli import run

# of each kind of file; LORATOOL_MUTATIONS=5000 LORATOOL_SEED=7 pytest tests/files/test_fuzzing.py tries as many as wanted
COUNT = int(os.environ.get("LORATOOL_MUTATIONS", "60"))
SEED = int(os.environ.get("LORATOOL_SEED", "11"))
LONGEST = 20.0  # seconds until a command counts as hanging


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_rightly_or_refused_in_a_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 with the right output or 2 to 7 with one message: never a bug, a hang, a changed input, a leftover."""
    root, out = tmp_path / "in", tmp_path / "out" / "made"
    out.parent.mkdir()
    write_inputs(root)
    path = root / KINDS[kind].path
    sound = path.read_bytes()
    failures: list[str] = []
    wanted = snapshot(root)
    name, mode = KINDS[kind].path, path.lstat().st_mode
    for mutation in mutations(kind, COUNT, SEED, sound):
        path.write_bytes(mutation.content)
        wanted[name] = (mode, mutation.content)
        capsys.readouterr()
        try:
            with within(LONGEST):
                code = run(words_of(mutation.command, root, out))
            check_outcome(mutation, code, *capsys.readouterr(), root, out)
            assert snapshot(root) == wanted, f"{mutation}: changed an input"
        except (AssertionError, pytest.fail.Exception) as error:
            failures.append(f"{mutation.command}: {error}")
        clear(out.parent)
    assert not failures, f"{len(failures)} failures\n" + "\n\n".join(text[:3000] for text in failures[:5])


def test_a_server_whose_answers_are_mutated_is_told_so_or_served_rightly(tmp_path: Path) -> None:
    """Wrong types, names, numbers and nesting in the JSON of every answer, through the real client of the Hub."""
    words = [
        sys.executable,
        str(ROOT / "tests" / "helpers" / "fuzzing_hub.py"),
        str(tmp_path),
        str(COUNT // 3),
        str(SEED),
    ]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    failures = json.loads(ran.stdout)
    assert not failures, f"{len(failures)} failures\n" + "\n\n".join(failures[:5])


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
