"""docs/distributed/hf-jobs.sh: the Jobs that it starts merge into a bucket, here one on loopback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from paths import ROOT
from store_merges import assert_same
from store_server import BUCKET, KEYS, StoreServer

from loratool import cli
from loratool.stores import client, limits

if TYPE_CHECKING:
    import pytest

SCRIPT = ROOT / "docs" / "distributed" / "hf-jobs.sh"
GATEWAY = "https://s3.hf.co/me"
CALLED = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(sys.argv[2:]) + chr(10)); print('job-id')"


def stand_in(folder: Path, name: str, log: Path) -> None:
    """A program of that name writes down what it is called with."""
    folder.mkdir(exist_ok=True)
    words = shlex.join([sys.executable, "-S", "-c", CALLED, str(log)])
    (folder / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    (folder / name).chmod(0o755)


def called(words: list[str], home: Path, name: str) -> list[list[str]]:
    """What a stand-in is called with while these words run; `pip` installs nothing."""
    log = home / f"{name}.log"
    stand_in(home / "bin", name, log)
    stand_in(home / "bin", "pip", home / "pip.log")
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(words, check=True, cwd=home, env={"PATH": path, "HF_TOKEN": "hf_x", **KEYS}, timeout=30)
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_example_for_jobs_of_the_hub_merges_into_a_bucket(
    store: StoreServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Jobs make parts and a third publishes, with the environment that they are given; the output is that of one.

    No credential is among the words of a command. Names with spaces arrive as they are.
    """
    base = tmp_path / "a base"
    base.symlink_to(models / "base")
    words = ["bash", str(SCRIPT), str(base), str(models / "adapter"), f"me/{BUCKET}", "2"]
    *parts, waited, last, ended = called(words, tmp_path, "hf")
    assert (waited, ended) == (["jobs", "wait", "job-id", "job-id"], ["jobs", "wait", "job-id"])
    assert len(parts) == 2
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    for job in (*parts, last):
        assert not any(key in word for key in KEYS.values() for word in job)
        options, (*_, command) = job[2 : job.index("bash")], job
        given = dict(each.split("=", 1) for name, each in pairwise(options) if name == "--env")
        assert given == {"AWS_ENDPOINT_URL": GATEWAY}
        (merge,) = called(["bash", "-c", command], tmp_path, "loratool")
        (tmp_path / "loratool.log").unlink()
        assert cli.run([*merge, "-q"]) == 0
    assert cli.run(["merge", str(base), str(models / "adapter"), "-o", str(tmp_path / "merged"), "-q"]) == 0
    assert_same(store, "merged", tmp_path / "merged")


def test_what_the_gateway_before_buckets_of_the_hub_needs_is_known_by_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copies of ranges, no checksums behind bodies, no bucket in the name of the host; no request is made for it."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": GATEWAY}.items():
        monkeypatch.setenv(name, value)
    config = client.connection().client.meta.config
    assert (config.request_checksum_calculation, config.response_checksum_validation) == ("when_required",) * 2
    assert config.s3["addressing_style"] == "path"
    assert limits.limits() == limits.Limits(copies=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert client.connection().client.meta.config.request_checksum_calculation == "when_supported"
    assert limits.limits() == limits.Limits()
