"""`record`, `reproduce` and `run` with outputs in a store, and what `push` says of addresses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from store_merges import assert_same
from store_server import BUCKET, StoreServer

import loratool
from loratool import cli

BUCKET_OF = f"s3://{BUCKET}"
BASE, ADAPTER, MADE = f"{BUCKET_OF}/team/base", f"{BUCKET_OF}/team/adapter", f"{BUCKET_OF}/lineage/made"


@pytest.fixture
def home(store: StoreServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base and adapter, and a merge of theirs in the store."""
    assert store.url
    for name in ("base", "adapter"):
        shutil.copytree(models / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["merge", BASE, ADAPTER, "-o", MADE, "-q", "--overwrite"]) == 0
    return tmp_path


@pytest.mark.usefixtures("home")
def test_the_bill_of_an_output_in_a_store_has_the_digests_of_its_objects(store: StoreServer) -> None:
    """Every object is read for it; expected values are SHA-256 of what the store holds."""
    document = loratool.record(MADE).document
    found = {each["name"]: each["sha256"] for each in document["files"]}
    wanted = {name: hashlib.sha256(body).hexdigest() for name, body in store.objects(BUCKET, "lineage/made").items()}
    assert found == wanted


def test_an_output_in_a_store_is_reproduced_here_and_there(home: Path, store: StoreServer) -> None:
    """From local inputs with the digests of the record; a changed object is found."""
    there = f"{BUCKET_OF}/lineage/again"
    assert cli.run(["reproduce", MADE, "-o", "again", "-q"]) == 0
    assert cli.run(["reproduce", MADE, "-o", there, "-q", "--overwrite"]) == 0
    for prefix in ("lineage/made", "lineage/again"):
        assert_same(store, prefix, home / "again")
    key = "lineage/made/model.safetensors.index.json"
    body = store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    store.client.put_object(Bucket=BUCKET, Key=key, Body=body.replace(b" ", b"\t", 1))
    assert cli.run(["reproduce", MADE, "-o", "third", "-q"]) == 5


def test_steps_of_a_manifest_may_write_into_a_store_and_are_done_once(
    home: Path, store: StoreServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step reads what one before it has written there; the second run finds all of it as it was."""
    small, merged = f"{BUCKET_OF}/lineage/small", f"{BUCKET_OF}/lineage/ran"
    (home / "steps.yaml").write_text(
        f"steps:\n- resize: {{adapter: adapter, rank: 2, output: {small}}}\n"
        f"- merge: {{base: {BASE}, adapters: [{small}], output: {merged}}}\n"
    )

    def statuses() -> list[tuple[str, str]]:
        capsys.readouterr()
        assert cli.run(["run", "steps.yaml", "--json"]) == 0
        return [(each["out"], each["status"]) for each in json.loads(capsys.readouterr().out)["steps"]]

    assert statuses() == [(small, "made"), (merged, "made")]
    before = store.objects(BUCKET, "lineage/ran")
    assert statuses() == [(small, "up-to-date"), (merged, "up-to-date")]
    assert store.objects(BUCKET, "lineage/ran") == before
    assert loratool.verify(merged).passes
    assert {path.name for path in home.iterdir()} == {"base", "adapter", "steps.yaml"}


def test_a_step_does_not_replace_what_loratool_did_not_make_in_a_store(
    home: Path, store: StoreServer, capfd: pytest.CaptureFixture[str]
) -> None:
    store.client.put_object(Bucket=BUCKET, Key="foreign/notes.txt", Body=b"mine")
    (home / "steps.yaml").write_text(
        f"steps:\n- merge: {{base: base, adapters: [adapter], output: {BUCKET_OF}/foreign}}\n"
    )
    assert cli.run(["run", "steps.yaml"]) == 2
    assert "were not made by loratool, so no step replaces them" in capfd.readouterr().err
    assert store.objects(BUCKET, "foreign") == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("push adapter STORE/x", 2, "only repositories of the Hub can be pushed to"),
        ("merge base adapter -o out --push-to-hub STORE/x", 2, "only repositories of the Hub can be pushed to"),
        ("reproduce base -o again --from STORE/team", 2, "--from must be a local folder"),
        ("run STORE/steps.yaml", 3, "a manifest must be a local file"),
    ],
)
def test_what_cannot_be_in_a_store_is_refused_with_what_can(
    store: StoreServer,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: str,
    code: int,
    said: str,
) -> None:
    """Before any request, and nothing is written."""
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    assert cli.run(words.replace("STORE", BUCKET_OF).split()) == code
    assert said in capfd.readouterr().err
    assert store.requests == []
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
