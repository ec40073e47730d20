"""Outputs of the other commands in a store, and what cannot be there: refused before the store is asked anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from store_server import BUCKET, StoreServer, tree

from loratool import cli

BASE, ADAPTER = f"s3://{BUCKET}/team/base", f"s3://{BUCKET}/team/adapter"
OUT = f"s3://{BUCKET}/out"


@pytest.fixture(scope="module")
def here(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters in a folder, and the same compressed together."""
    home = tmp_path_factory.mktemp("here")
    for name in ("one", "two"):
        shutil.copytree(models / "adapter", home / "fleet" / name)
    assert cli.run(["compress", str(home / "fleet"), "-o", str(home / "shared"), "--rank", "2", "-q"]) == 0
    return home


@pytest.mark.parametrize(
    "words",
    [
        ["resize", ADAPTER, "--rank", "2"],
        ["combine", ADAPTER, f"{BASE}-fleet/one"],
        ["rebase", ADAPTER, "--from", BASE, "--onto", BASE],
        ["compress", f"{BASE}-fleet/one", f"{BASE}-fleet/two", "--rank", "2"],
        ["compress", "fleet", "--rank", "2"],
        ["expand", f"{BASE}-shared", "two"],
        ["expand", "shared", "two"],
    ],
    ids=" ".join,
)
def test_an_output_in_a_store_is_that_in_a_folder(
    store: StoreServer, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[str]
) -> None:
    """Every file but the record; the output is not replaced without being asked to, and nothing of its making is left."""
    for name in ("fleet", "shared"):
        store.put(BUCKET, here / name, f"team/base-{name}")
    monkeypatch.chdir(here)
    out, prefix = f"{OUT}/{words[0]}", f"out/{words[0]}"
    assert cli.run([*words, "-o", out, "-q", "--overwrite"]) == 0
    assert cli.run([*words, "-o", str(tmp_path / words[0]), "-q"]) == 0
    there, local = store.objects(BUCKET, prefix), tree(tmp_path / words[0])
    assert there.pop("loratool.json")
    assert local.pop("loratool.json")
    assert there == local
    assert cli.run([*words, "-o", out, "-q"]) == 2


def test_an_adapter_never_replaces_a_model(
    store: StoreServer, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in a store nor on a disk, although loratool made the model and every object of it is in its record."""
    merge = ["merge", str(models / "base"), str(models / "adapter"), "-o", str(tmp_path / "model"), "-q"]
    assert cli.run(merge) == 0
    store.put(BUCKET, tmp_path / "model", "out/model")
    before = store.objects(BUCKET, "out/model")
    for out in (f"{OUT}/model", str(tmp_path / "model")):
        assert cli.run(["rescale", str(models / "adapter"), "--scale", "2", "-o", out, "--overwrite", "-q"]) == 2
        assert "is not an adapter, so --overwrite does not replace it with one" in capsys.readouterr().err
    assert store.objects(BUCKET, "out/model") == before
    assert tree(tmp_path / "model") == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("merge base adapter -o OUT.safetensors", "must be a folder"),
        ("merge base adapter -o OUT --also OUT/x=adapter", "is inside"),
        ("merge base adapter -o OUT --html OUT.html", "cannot be written into a store"),
        ("merge base adapter -o local --svg OUT", "cannot be written into a store"),
        ("compress adapter --into OUT", "local folder only"),
        ("inspect adapter --values --part 1/1 --into OUT", "--into s3://"),
        ("compress adapter --into org/name", "local folder only"),
        ("index adapter -o OUT", "cannot be written into a store"),
        ("demo OUT", "cannot be written into a store"),
        ("demo OUT --learn", "cannot be written into a store"),
    ],
)
def test_what_cannot_be_in_a_store_is_refused_before_any_request(
    store: StoreServer,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: str,
    said: str,
) -> None:
    """In one sentence, and nothing is written here either."""
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    before = tree(models)
    assert cli.run(words.replace("OUT", f"{OUT}/no").split()) == 2
    told = capfd.readouterr().err
    assert said in told
    assert told.count("Error:") == 1
    assert store.requests == []
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    assert tree(models) == before


@pytest.mark.parametrize(
    "words",
    [
        ["resize", ADAPTER, "--rank", "2"],
        ["compress", "fleet", "--rank", "2"],
    ],
    ids=lambda words: words[0],
)
def test_an_unfinished_output_is_called_what_it_is(
    store: StoreServer,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: Sequence[str],
) -> None:
    """Whoever meets it names the command that had begun it: a reader, a merge, `--status`, and `--abort`, which ends it."""
    monkeypatch.chdir(here)
    out, prefix = f"{OUT}/half-{words[0]}", f"out/half-{words[0]}"
    with monkeypatch.context() as patch:
        patch.setattr("loratool.stores.bucket.Bucket.put_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.run([*words, "-o", out, "-q"]) == 130
    assert f"{out} may be incomplete; run the same command again to finish it" in capfd.readouterr().err
    merge = ["merge", BASE, ADAPTER, "-o", out]
    for again, code in ((["inspect", out], 3), (merge, 2), ([*merge, "--status"], 2)):
        assert cli.run(again) == code
        told = capfd.readouterr().err
        assert f"{out}: contains an unfinished {words[0]}; run" in told
        assert "unfinished merge" not in told
    assert cli.run(["merge", "-o", out, "--abort"]) == 0
    assert f"begun by  {words[0]}\n" in capfd.readouterr().out
    assert store.objects(BUCKET, prefix) == {}


def test_several_adapters_below_a_prefix_are_told_with_a_name_that_works(
    store: StoreServer, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store.put(BUCKET, here / "fleet", "team/fleet")
    assert cli.run(["resize", f"s3://{BUCKET}/team/fleet", "--rank", "2", "-o", f"{OUT}/none"]) == 3
    assert f"(one, two); name one, such as s3://{BUCKET}/team/fleet/one" in capfd.readouterr().err
    assert cli.run(["inspect", f"s3://{BUCKET}/team/fleet/one", f"s3://{BUCKET}/team/fleet/two"]) == 0


def test_a_prefix_of_adapters_is_a_table(
    store: StoreServer, here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rows are those of the folder, but for paths and dates; of each file of weights the header is asked for once."""
    shutil.copytree(here / "fleet", tmp_path / "fleet")
    shutil.copytree(here / "fleet" / "one", tmp_path / "fleet" / "deep" / "three")
    store.put(BUCKET, tmp_path / "fleet", "team/many")

    def rows(operand: str, *more: str) -> list[dict[str, object]]:
        assert cli.run(["inspect", operand, "--json", *more]) == 0
        (found,) = json.loads(capfd.readouterr().out)["results"]
        unlike = ("path", "date", "near")
        return [{key: value for key, value in row.items() if key not in unlike} for row in found["adapters"]]

    there = rows(f"s3://{BUCKET}/team/many")
    assert [row["name"] for row in there] == ["deep/three", "one", "two"]
    weights = [each for each in store.requests if each.kind == "get" and each.key.endswith(".safetensors")]
    assert len(weights) == len(there)
    assert there == rows(str(tmp_path / "fleet"))
    values = rows(f"s3://{BUCKET}/team/many", "--values")
    assert values == rows(str(tmp_path / "fleet"), "--values")
    assert cli.run(["inspect", f"s3://{BUCKET}/team/*"]) == 2
    assert "pass the prefix" in capfd.readouterr().err
