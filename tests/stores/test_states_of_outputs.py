"""`--status`, `--finish` and `--abort` in every state of an output, in a folder and in a store."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_server import BUCKET, StoreServer

from loratool import cli

ABORT = "merge -o OUT --abort"
MERGE = "merge BASE ADAPTER -o OUT"
# what is typed, its exit code, and what it prints
STORY = [
    (f"{MERGE} --status", 0, "done         0 of"),
    (f"{MERGE} --finish", 5, "no part of this merge has been made; run --part first"),
    (ABORT, 2, "so nothing was removed"),
    (f"{MERGE} --part 1/2", 0, "next  once all workers have ended"),
    (f"{MERGE} --status", 0, "missing"),
    (f"{MERGE} --finish", 5, "parts are missing; run the missing workers"),
    (f"{MERGE} --weight 2 --status", 2, "(its fingerprint is"),
    (ABORT, 0, "removed"),
    (ABORT, 2, "so nothing was removed"),
    (f"{MERGE} --status", 0, "done         0 of"),
    (f"{MERGE} --part 1/1", 0, "next  once all workers have ended"),
    (f"{MERGE} --status", 0, "next         --finish"),
    (f"{MERGE} --finish", 0, "merged into"),
    (f"{MERGE} --status", 0, "is complete"),
    (f"{MERGE} --part 1/2", 0, "is complete already; nothing to do"),
    (f"{MERGE} --finish", 0, "is complete already; nothing was changed"),
    (ABORT, 2, "so nothing was removed"),
    ("verify OUT", 0, "every file is what loratool.json says was written"),
]


@pytest.mark.parametrize("where", ["folder", "store"])
def test_each_state_has_an_answer_and_a_code(
    store: StoreServer, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    """What is complete is never removed, and what was begun can be given up once."""
    out = str(tmp_path / "out") if where == "folder" else f"s3://{BUCKET}/states"
    named = {"OUT": out, "BASE": str(models / "base"), "ADAPTER": str(models / "adapter")}
    for words, code, said in STORY:
        assert cli.run([named.get(word, word) for word in words.split()]) == code, words
        shown = "".join(capfd.readouterr())
        assert said in shown, words
    if where == "store":
        assert store.uploads(BUCKET) == []
