"""Mutations of what a server answers, in a process of its own: the Hub's client reads its settings when it is imported.

python tests/helpers/fuzzing_hub.py FOLDER COUNT SEED      prints a JSON list of what went wrong
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fuzzing import mutated, write_inputs
from hub_server import WRITER, HubServer, Lie
from workbench import is_clean, snapshot

COMMANDS = (
    *(
        "inspect org/base --json",
        "inspect org/adapter",
        "merge org/base org/adapter -o OUT",
        "merge auto org/adapter -o OUT",
    ),
    *(
        "merge org/base org/adapter -o OUT --dry-run",
        "rescale org/adapter -o OUT --scale 2",
        "estimate org/base --rank 1",
    ),
    *("push adapter alice/new", "push base alice/new", "merge base adapter --stream --push-to-hub alice/streamed"),
)
ANSWERS = r"^/api/|/info/lfs/|/lfs/"
FIELDS = (
    *(
        "sha",
        "siblings",
        "rfilename",
        "size",
        "lfs",
        "blobId",
        "oid",
        "path",
        "type",
        "private",
        "gated",
        "name",
        "auth",
    ),
    *(
        "url",
        "actions",
        "objects",
        "files",
        "commitOid",
        "commitUrl",
        "error",
        "errors",
        "uploadMode",
        "transfer",
        "id",
    ),
)


def run_all(home: Path, count: int, seed: int) -> list[str]:
    """What went wrong with each mutation that a seed stands for."""
    write_inputs(home / "in")
    failures = []
    with HubServer(lfs_from=400) as hub:
        for name in ("base", "adapter"):
            hub.add(f"org/{name}", home / "in" / name)
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hub"), "HF_TOKEN": WRITER, "NO_PROXY": "*"}
        os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
        os.chdir(home / "in")
        chance = random.Random(f"{seed} hub")
        repos = dict(hub.repos)
        for _ in range(count):
            hub.repos = dict(repos)
            failures += run_one(hub, home, random.Random(chance.random()), chance.choice(COMMANDS))
    return failures


def run_one(hub: HubServer, home: Path, chance: random.Random, command: str) -> list[str]:
    """What went wrong with one command, an answer to which is mutated."""
    from loratool.cli import run

    told: list[str] = []
    skip = chance.randrange(3)

    def change(value: Any) -> Any:
        made = mutated(value, FIELDS, chance) if len(told) >= skip else value
        told.append(json.dumps(made)[:1500])
        return made

    hub.lies = [Lie(ANSWERS, change=change)]
    out, before = home / "out", snapshot(home / "in")
    shutil.rmtree(home / "hub", ignore_errors=True)
    stdout, stderr = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = run([str(out) if word == "OUT" else word for word in command.split()])
    about = f"{command}: exit code {code}, {stdout.getvalue()[:300]} {stderr.getvalue()[:1500]} {told[-2:]}"
    wrong = [
        reason
        for reason, holds in {
            "a code outside of the contract": code in (0, 2, 3, 4, 5, 6, 7),
            "a bug": "bug in loratool" not in stderr.getvalue() and "Traceback" not in stderr.getvalue(),
            "control characters": is_clean(stdout.getvalue()) and is_clean(stderr.getvalue()),
            "a changed input": snapshot(home / "in") == before,
            "a leftover": sorted(p.name for p in home.iterdir()) in (["hub", "in"], ["in"], ["hub", "in", "out"])
            and (code == 0 or not out.exists()),
            "a message of more than a screen": len(stderr.getvalue()) < 6000,
            "half a minute": time.monotonic() - began < 30,
            "a token": WRITER not in stdout.getvalue() + stderr.getvalue(),
        }.items()
        if not holds
    ]
    shutil.rmtree(out, ignore_errors=True)
    return [f"{reason}: {about}" for reason in wrong]


def main() -> None:
    home, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    time.sleep = lambda _seconds: None  # nobody waits for a server that is wrong to become right
    print(json.dumps(run_all(home, count, seed)))


if __name__ == "__main__":
    main()
