"""Operands that name a place in an object store: what is asked, what comes here, what is said when that does not work."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file
from store_server import BUCKET, KEYS, SHARDS, Asked, Fault, settled, stormy, tree

import loratool
from loratool import cli
from loratool.errors import InputError, StoreError, UsageError
from loratool.files import stand_ins
from loratool.stores import client
from loratool.stores.names import StorePath, parse_store
from loratool.stores.objects import AHEAD, listed

if TYPE_CHECKING:
    from store_server import StoreServer

BASE, ADAPTER = f"s3://{BUCKET}/team/base", f"s3://{BUCKET}/team/adapter"


@pytest.fixture(scope="module")
def merged(models: Path) -> Path:
    """The same merge of local folders."""
    loratool.merge(models / "base", [models / "adapter"], models / "merged")
    return models / "merged"


@pytest.mark.parametrize(
    ("operand", "place"),
    [
        ("s3://bucket", StorePath("bucket")),
        ("s3://bucket/", StorePath("bucket")),
        ("s3://bucket/a/b/", StorePath("bucket", "a/b")),
        ("s3:/bucket/a/b", StorePath("bucket", "a/b")),
        (Path("s3://bucket/a b+%é"), StorePath("bucket", "a b+%é")),
        ("bucket/a", None),
        ("hf://org/name", None),
    ],
)
def test_what_an_address_names(operand: str, place: StorePath | None) -> None:
    assert parse_store(operand) == place


@pytest.mark.parametrize("address", ["gs://bucket/a", "S3://bucket/a", "https://store.example/a"])
def test_other_addresses_are_refused_as_such(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not called missing files."""
    assert cli.run(["inspect", address]) == 3
    scheme = address.partition("//")[0] + "//"
    said = f"{address}: {scheme} addresses are not supported; expected s3://bucket/prefix"
    assert said in capsys.readouterr().err


def test_the_address_of_a_local_file_leads_to_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    """A file manager copies it like that."""
    assert cli.run(["inspect", "file:///no/where/adapter"]) == 3
    assert "file:///no/where/adapter: pass the path alone, /no/where/adapter" in capsys.readouterr().err


@pytest.mark.parametrize("bucket", ["b", "bad bucket", "-a-"])
def test_the_name_of_a_bucket_that_there_cannot_be_is_said(bucket: str) -> None:
    with pytest.raises(UsageError, match=f"'{bucket}' is not the name of a bucket; expected s3://bucket/prefix"):
        parse_store(f"s3://{bucket}/a")


@pytest.mark.parametrize("operand", ["s3://", "s3://b", "s3://bucket//a", "s3://bucket/../a", "s3://bucket/a//b"])
def test_an_address_that_can_name_nothing_is_wrong_usage(operand: str) -> None:
    with pytest.raises(UsageError):
        parse_store(operand)


def test_a_merge_from_a_store_is_that_of_local_folders(store: StoreServer, merged: Path, tmp_path: Path) -> None:
    """Every file has the same bytes, but that the record's command names the operands by their last names alike."""
    loratool.merge(BASE, [ADAPTER], tmp_path / "out")
    ours, theirs = tree(tmp_path / "out"), tree(merged)
    assert settled(ours.pop("loratool.json")) == settled(theirs.pop("loratool.json"))
    assert ours == theirs


def test_weights_of_a_model_do_not_come_to_the_disk_and_nothing_is_left_of_the_rest(
    store: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a process runs, the files that stand for the base's weights hold only their headers."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loratool.merge(BASE, [ADAPTER], tmp_path / "out")
    shards = list(tmp_path.glob("loratool-*/base/*.safetensors"))
    assert len(shards) == SHARDS
    for shard in shards:
        raw = shard.read_bytes()
        assert not any(raw[8 + int.from_bytes(raw[:8], "little") :])
    stand_ins.forget()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_inspect_asks_for_a_header_at_most_twice_and_for_no_tensor(store: StoreServer, models: Path) -> None:
    """A shard whose header is longer than the first request brings takes two, and nobody reads further."""
    facts = loratool.inspect(BASE)
    assert facts.parameters == loratool.inspect(models / "base").parameters  # type: ignore[union-attr]
    asked = Counter(each.key for each in store.requests if each.key.endswith(".safetensors"))
    assert len(asked) == SHARDS
    assert max(asked.values()) <= 2


def test_a_merge_reads_each_byte_of_its_base_about_once(store: StoreServer, models: Path, tmp_path: Path) -> None:
    """Requests are for runs of bytes, not for rows: two for a header, and no more than tensors for what follows."""
    loratool.merge(BASE, [ADAPTER], tmp_path / "out")
    read = [each for each in store.requests if each.kind == "get" and "team/base/model-" in each.key]
    size = sum(path.stat().st_size for path in (models / "base").glob("*.safetensors"))
    heads = 2 * SHARDS * (1 << 16)
    assert sum(each.sent for each in read) <= size + heads
    tensors = sum(len(load_file(path)) for path in (models / "base").glob("*.safetensors"))
    assert len(read) <= 2 * SHARDS + tensors


def test_expected_bytes_come_in_large_pieces_and_no_others(store: StoreServer, models: Path) -> None:
    """Reads of a kilobyte within what was announced are one request; outside they are what they are."""
    there = listed(StorePath(BUCKET, "team/base"))["model-00001-of-00002.safetensors"]
    raw = (models / "base" / "model-00001-of-00002.safetensors").read_bytes()
    store.requests.clear()
    source, found, into = there.source(), bytearray(), memoryview(bytearray(1000))
    source.expect(500, 5000)
    for start in range(500, 5500, 1000):
        source.read(start, 1000, into)
        found += into
    source.read(9000, 10, into)
    assert bytes(found) == raw[500:5500]
    assert bytes(into[:10]) == raw[9000:9010]
    assert [each.span for each in store.requests] == ["bytes=500-5499", "bytes=9000-9009"]
    assert AHEAD >= 5000
    assert not len(source.window.held)  # a thread that has read its part of a file holds nothing of it


@pytest.mark.parametrize("seed", range(2))
def test_faults_that_pass_change_nothing(store: StoreServer, merged: Path, tmp_path: Path, seed: int) -> None:
    """Refusals, bodies that end early, resets, slow answers and those of another object are asked for again."""
    store.fault = stormy(seed)
    loratool.merge(BASE, [ADAPTER], tmp_path / "out")
    for name, content in tree(tmp_path / "out").items():
        assert name == "loratool.json" or content == (merged / name).read_bytes()


@pytest.mark.parametrize(
    "fault", [503, "short", "reset", "tag", "AccessDenied", "ExpiredToken", "RequestTimeTooSkewed"]
)
def test_a_fault_that_stays_ends_with_the_code_of_stores_and_shows_no_secret(
    store: StoreServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: int | str
) -> None:
    """Exit code 7, a sentence, and nothing written; the store's own text, which holds a key here, is not repeated."""
    store.fault = lambda asked: fault if asked.kind == "get" else None
    assert cli.run(["merge", BASE, ADAPTER, "-o", str(tmp_path / "out")]) == 7
    printed = "".join(capfd.readouterr())
    assert f"Error: {BASE.rpartition('/')[0]}" in printed
    assert not any(key in printed for key in KEYS.values())
    assert list(tmp_path.iterdir()) == []


UNUSABLE = {
    "nobody listens": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9 is unreachable; check AWS_"),
    "no address": ({"AWS_ENDPOINT_URL": "localhost:9"}, "AWS_ENDPOINT_URL must be an address such as http://local"),
    "no credentials": (dict.fromkeys(KEYS, ""), "no usable credentials (NoCredentialsError); set AWS_ACCESS_KEY_ID"),
    "half of them": ({"AWS_SECRET_ACCESS_KEY": ""}, "no usable credentials (PartialCredentialsError); set AWS_ACC"),
    "no profile": ({"AWS_PROFILE": "nobody"}, "the profile 'nobody' is not configured; check AWS_PROFILE"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_wrong_with_the_environment_is_said_with_exit_code_7(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    settings, said = UNUSABLE[case]
    for name, value in settings.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.run(["inspect", BASE]) == 7
    assert said in capfd.readouterr().err


def test_an_object_that_changes_while_it_is_read_is_an_error_of_the_input(store: StoreServer, tmp_path: Path) -> None:
    """Bytes of two states are never mixed: every request after the listing is for the object that was listed."""
    key = "team/changing/model-00001-of-00002.safetensors"
    for name, content in store.objects(BUCKET, "team/base").items():
        store.client.put_object(Bucket=BUCKET, Key=f"team/changing/{name}", Body=content)
    raw = bytearray(store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    raw[-1] ^= 1
    changed: list[int] = []

    def fault(asked: Asked) -> Fault:
        if asked.kind == "get" and asked.key == key and not asked.span.startswith("bytes=0-") and not changed:
            changed.append(1)
            store.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(raw))
        return None

    store.fault = fault
    with pytest.raises(InputError, match="changed while it was being read"):
        loratool.merge(f"s3://{BUCKET}/team/changing", [ADAPTER], tmp_path / "out")
    assert changed
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said(store: StoreServer) -> None:
    with pytest.raises(InputError, match=f"^s3://{BUCKET}/nothing/here: no such object, and none below it$"):
        loratool.inspect(f"s3://{BUCKET}/nothing/here")
    with pytest.raises(StoreError, match="no such bucket"):
        loratool.inspect("s3://no-such-bucket/here")
    with pytest.raises(
        StoreError, match=r"^s3://no-such-bucket/here: no such bucket"
    ):  # of an output, not of its parts
        loratool.abort_merge("s3://no-such-bucket/here")


def test_keys_with_odd_characters_are_read(store: StoreServer, models: Path) -> None:
    """A prefix may have spaces, signs and letters of any script; objects that can be no files are passed over."""
    prefix = "odd/my model+v1%20(é)"
    store.put(BUCKET, models / "base", prefix)
    for key in (f"{prefix}//double", f"{prefix}/../up", f"{prefix}/folder/"):
        store.client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    facts = loratool.inspect(f"s3://{BUCKET}/{prefix}")
    assert facts.tensors == loratool.inspect(models / "base").tensors  # type: ignore[union-attr]


def test_every_command_takes_addresses(store: StoreServer, merged: Path, tmp_path: Path) -> None:
    """Whatever reads a base, an adapter or a merged model reads it from a store, and ends as it does with folders."""
    store.put(BUCKET, merged, "team/merged")
    tuned = f"s3://{BUCKET}/team/merged"
    out = map(str, (tmp_path / str(number) for number in range(20)))
    for words in (
        ["inspect", BASE, ADAPTER],
        ["inspect", ADAPTER, "--check", "--values", "--base", BASE],
        ["inspect", f"{ADAPTER}/adapter_model.safetensors"],
        ["verify", tuned],
        ["verify", tuned, "--base", BASE, "--adapter", ADAPTER],
        ["estimate", BASE, "--rank", "4", "--target", "q_proj"],
        ["extract", BASE, tuned, "-o", next(out), "--rank", "4"],
        ["compare", ADAPTER, ADAPTER],
        ["rescale", ADAPTER, "--scale", "0.5", "-o", next(out)],
        ["resize", ADAPTER, "--rank", "2", "-o", next(out)],
        ["combine", ADAPTER, ADAPTER, "-o", next(out)],
        ["convert", ADAPTER, "--to", "mlx", "-o", next(out)],
        ["merge", BASE, ADAPTER, "-o", next(out), "--dry-run"],
        ["merge", f"{BASE}/model.safetensors.index.json", ADAPTER, "-o", next(out)],
    ):
        assert cli.run(words) == 0, words


def test_without_boto3_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "installed", lambda _package: "")
    assert cli.run(["inspect", BASE]) == 2
    assert capfd.readouterr().err.splitlines()[1:] == ['hint: pip install "loratool[s3]"']


def test_only_an_address_loads_boto3(models: Path) -> None:
    """Neither help nor a command on local folders waits for it."""
    code = "import sys; from loratool.cli import run; run(sys.argv[1:]); sys.exit(100 * ('boto3' in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code, "inspect", str(models / "base")], check=False)
    assert ran.returncode == 0
