"""Merges into an object store: what is sent and what is copied, and what a reader of the prefix sees at any time."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ray_stand_in import StandIn
from store_merges import PIECE, SMALLEST, assert_same, make_models, small_parts
from store_server import BUCKET, Asked, Fault, stormy, tree

import loratool
from loratool import cli
from loratool.errors import FitError, InputError, StoreError, UsageError, VerificationError
from loratool.merging import resources
from loratool.merging.in_parts import make_parts, publish
from loratool.merging.merge_options import MergeOptions
from loratool.merging.parted_merge import open_parts
from loratool.stores.bucket import Bucket, each_of
from loratool.stores.names import FOLDER

if TYPE_CHECKING:
    from store_server import StoreServer

BASE, ADAPTER = f"s3://{BUCKET}/team/base", f"s3://{BUCKET}/team/adapter"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    make_models(home)
    loratool.merge(home / "base", [home / "adapter"], home / "merged")
    return home


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)


@pytest.mark.parametrize("source", ["local", "store"])
def test_tasks_of_a_cluster_make_the_same(
    store: StoreServer, models: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Each task makes a share of the parts, and the command publishes the output; it is not made a second time."""
    monkeypatch.setitem(sys.modules, "ray", ray := StandIn({"CPU": 2.0}))
    base, adapter = (BASE, ADAPTER) if source == "store" else (models / "base", models / "adapter")
    out = f"s3://{BUCKET}/tasks/{source}"
    loratool.merge(base, [adapter], out, workers="ray", num_cpus=1)
    assert len(ray.tasks) >= 2
    assert_same(store, f"tasks/{source}", models / "merged")
    with pytest.raises(UsageError, match="complete already"):
        loratool.merge(base, [adapter], out, workers="ray", num_cpus=1)


@pytest.mark.parametrize("source", ["local", "store"])
def test_a_merge_into_a_store_is_that_into_a_folder(
    store: StoreServer, models: Path, tmp_path: Path, source: str
) -> None:
    """Every file has the same bytes, no upload is left, and `verify` proves it by its record and by the formula."""
    base, adapter = (BASE, ADAPTER) if source == "store" else (models / "base", models / "adapter")
    out = f"s3://{BUCKET}/out/{source}"
    report = loratool.merge(base, [adapter], out)
    assert str(report).startswith(f"merged into        {out}\n")
    assert_same(store, f"out/{source}", models / "merged")
    assert store.uploads(BUCKET) == []
    assert loratool.verify(out).exit_code == 0
    assert loratool.verify(out, base=base, adapters=[adapter]).exit_code == 0


def test_untouched_ranges_do_not_pass_through_here(store: StoreServer, models: Path) -> None:
    """The bytes that are read of the base and sent are those of edited tensors, and what the limits of parts add."""
    loratool.merge(BASE, [ADAPTER], f"s3://{BUCKET}/out/copied")
    record = json.loads(store.objects(BUCKET, "out/copied")["loratool.json"])
    kinds = Counter(each.kind for each in store.requests)
    edited = sum(2 * 160 * rows for rows in (2 * 160, 160)) * 2  # up_proj and q_proj in BF16, of two layers
    edges = 2 * SMALLEST
    read = [each for each in store.requests if each.kind == "get" and "team/base/model-" in each.key]
    heads = [each for each in read if each.span.startswith("bytes=0-")]
    assert sum(each.sent for each in read) - sum(each.sent for each in heads) <= 1.1 * edited + edges
    assert sum(each.came for each in store.requests if each.kind == "part") <= 1.1 * edited + edges
    assert kinds["copy part"] == 2
    assert kinds["part"] <= -(-edited // PIECE) + 2
    copies = [copy for entry in record["files"].values() for copy in entry.get("copies", ())]
    assert [copy["source"]["version"] for copy in copies] == [
        store.client.head_object(Bucket=BUCKET, Key=f"team/base/{name}")["ETag"] for name in sorted(record["base"]["files"]) if name.endswith(".safetensors")
    ]  # fmt: skip


def test_verify_reads_what_was_copied_and_says_so(
    store: StoreServer, models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A range that never passed through loratool is compared with the MD5 that the store told; damage is found in it."""
    out = f"s3://{BUCKET}/out/damaged"
    loratool.merge(BASE, [ADAPTER], out)
    found = loratool.verify(out)
    assert {note.code for note in found.notes} >= {"copied-in-store"}
    name = "model-00001-of-00002.safetensors"
    raw = bytearray(store.objects(BUCKET, "out/damaged")[name])
    copy = json.loads(store.objects(BUCKET, "out/damaged")["loratool.json"])["files"][name]["copies"][0]
    raw[copy["range"][1] - 1] ^= 1
    store.client.put_object(Bucket=BUCKET, Key=f"out/damaged/{name}", Body=bytes(raw))
    assert cli.run(["verify", out]) == 5
    assert f"{name}: differs from the bytes that were written" in "".join(capfd.readouterr())


@pytest.mark.parametrize("way", ["uncopied", "uniform"])
def test_stores_that_copy_no_ranges_or_want_parts_of_one_size_get_them(
    store: StoreServer, models: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("LORATOOL_S3_PARTS", way)
    loratool.merge(BASE, [ADAPTER], f"s3://{BUCKET}/out/{way}")
    assert_same(store, f"out/{way}", models / "merged")
    parts = [each for each in store.requests if each.kind == "part"]
    assert not any(each.kind == "copy part" for each in store.requests)
    if way == "uniform":
        for key in {each.key for each in parts}:
            sizes = sorted(each.came for each in parts if each.key == key)
            assert len({*sizes[1:]}) == 1
    assert store.requests


def interrupted(store: StoreServer, kind: str, number: int, out: str) -> None:
    """A merge whose request of that kind and number is refused, as are all that follow it."""
    seen = 0

    def fault(asked: Asked) -> Fault:
        nonlocal seen
        seen += asked.kind == kind
        return "AccessDenied" if seen >= number else None

    store.fault = fault
    with pytest.raises((StoreError, InputError)):
        loratool.merge(BASE, [ADAPTER], out)
    store.fault = lambda _asked: None


def test_a_request_that_fails_leaves_no_other_under_way(store: StoreServer) -> None:
    begun, ended = list[int](), list[int]()

    def call(number: int) -> None:
        begun.append(number)
        if not number:
            raise StoreError("refused")
        time.sleep(0.05)
        ended.append(number)

    with pytest.raises(StoreError, match="refused"):
        each_of(call, range(100))
    assert sorted(begun) == sorted([0, *ended])
    assert len(begun) < 100


STOPS = [("create", 2), ("part", 2), ("copy part", 1), ("complete", 1), ("complete", 2), ("put", 9), ("delete", 1)]


@pytest.mark.parametrize(("kind", "number"), STOPS)
def test_an_interrupted_merge_is_no_model_and_goes_on(store: StoreServer, models: Path, kind: str, number: int) -> None:
    """Whatever was the last request that worked: the prefix is said to be unfinished, or is complete; the same call
    finishes it, and sends no part again that the store has.
    """
    prefix = f"out/stopped-{kind.replace(' ', '-')}-{number}"
    out = f"s3://{BUCKET}/{prefix}"
    interrupted(store, kind, number, out)
    if "loratool.json" not in store.objects(BUCKET, prefix):
        with pytest.raises(InputError, match="unfinished merge"):
            loratool.inspect(out)
    records = {name for name in store.objects(BUCKET, prefix) if name.startswith(f"{FOLDER}/part-")}
    store.requests.clear()
    loratool.merge(BASE, [ADAPTER], out)
    assert_same(store, prefix, models / "merged")
    assert store.uploads(BUCKET) == []
    if kind in ("complete", "put", "delete"):
        assert records
        assert not any(each.kind in ("part", "copy part") for each in store.requests)


@pytest.mark.parametrize(("kind", "number"), [("create", 2), ("copy part", 1), ("complete", 2), ("delete", 1)])
def test_abort_removes_what_an_unfinished_merge_left_and_nothing_else(
    store: StoreServer, models: Path, kind: str, number: int
) -> None:
    """Uploads of other keys, even of one with the output's name elsewhere, stay; a complete output stays too."""
    prefix = f"out/aborted-{kind.replace(' ', '-')}-{number}"
    out = f"s3://{BUCKET}/{prefix}"
    client = store.client
    other = client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}-other/model-00001-of-00002.safetensors")
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/notes/mine.txt", Body=b"mine")
    client.delete_object(Bucket=BUCKET, Key=f"{prefix}/notes/mine.txt")
    interrupted(store, kind, number, out)
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/mine.txt", Body=b"mine")
    assert cli.run(["merge", "-o", out, "--abort"]) == 0
    left = store.objects(BUCKET, prefix)
    assert {name for name in left if name.startswith(FOLDER)} == set()
    if kind != "delete":
        assert left == {"mine.txt": b"mine"}
    assert store.uploads(BUCKET) == [f"{prefix}-other/model-00001-of-00002.safetensors"]
    client.abort_multipart_upload(
        Bucket=BUCKET, Key=f"{prefix}-other/model-00001-of-00002.safetensors", UploadId=other["UploadId"]
    )
    with pytest.raises(UsageError, match="no unfinished output"):
        loratool.abort_merge(out)


def test_faults_that_pass_change_nothing_of_an_output(store: StoreServer, models: Path) -> None:
    """Answers that are lost among them: a part or a record that is there already is found, and not taken for another's."""
    store.fault = stormy(3, lost=True)
    loratool.merge(BASE, [ADAPTER], f"s3://{BUCKET}/out/stormy")
    store.fault = lambda _asked: None
    assert_same(store, "out/stormy", models / "merged")
    assert store.uploads(BUCKET) == []


def test_two_merges_at_once_make_one_output(store: StoreServer, models: Path) -> None:
    """Each does what the other has not done; the uploads of one plan are used, and the others ended."""
    out, ended = f"s3://{BUCKET}/out/raced", []

    def run() -> None:
        try:
            ended.append(str(loratool.merge(BASE, [ADAPTER], out).out))
        except UsageError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 2
    assert any("already exists" not in each for each in ended)
    assert_same(store, "out/raced", models / "merged")
    assert store.uploads(BUCKET) == []


def test_a_prefix_with_something_else_is_not_touched(store: StoreServer, models: Path) -> None:
    """Without --overwrite nothing is replaced; with it only what the output's own record lists."""
    out = f"s3://{BUCKET}/out/taken"
    loratool.merge(BASE, [ADAPTER], out)
    with pytest.raises(UsageError, match="already exists; pass --overwrite"):
        loratool.merge(BASE, [ADAPTER], out)
    before = store.objects(BUCKET, "out/taken")
    store.client.put_object(Bucket=BUCKET, Key="out/taken/mine.txt", Body=b"mine")
    with pytest.raises(UsageError, match="does not list"):
        loratool.merge(BASE, [ADAPTER], out, weights=[0.5], overwrite=True)
    assert store.objects(BUCKET, "out/taken") == {**before, "mine.txt": b"mine"}
    store.client.delete_object(Bucket=BUCKET, Key="out/taken/mine.txt")
    loratool.merge(BASE, [ADAPTER], out, weights=[0.5], overwrite=True, shard_size="100KB")
    assert loratool.verify(out).exit_code == 0
    after = store.objects(BUCKET, "out/taken")
    assert {*after} == {*json.loads(after["loratool.json"])["files"], "loratool.json"}
    assert after != before


def test_an_unfinished_merge_of_something_else_is_refused(store: StoreServer, models: Path) -> None:
    out = f"s3://{BUCKET}/out/mixed"
    interrupted(store, "part", 2, out)
    with pytest.raises(UsageError, match="unfinished merge of other inputs"):
        loratool.merge(BASE, [ADAPTER], out, weights=[0.5])
    loratool.abort_merge(out)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (f"s3://{BUCKET}", "OUT must be a prefix"),
        (f"s3://{BUCKET}/out/x.safetensors", f"OUT must be a folder, such as s3://{BUCKET}/out/x,"),
        (f"{BASE}/merged", "OUT is, contains or is inside the input"),
        (f"s3://{BUCKET}/team", "OUT is, contains or is inside the input"),
    ],
)
def test_an_output_that_no_prefix_can_be_is_wrong_usage(store: StoreServer, out: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        loratool.merge(BASE, [ADAPTER], out)
    assert not any(each.kind in ("put", "create") for each in store.requests)


def test_a_merge_that_changes_nothing_leaves_nothing(store: StoreServer, models: Path) -> None:
    """The same refusal as for a folder, and no upload or object remains."""
    with pytest.raises(FitError):
        loratool.merge(BASE, [ADAPTER], f"s3://{BUCKET}/out/same", weights=[1e-30])
    assert store.objects(BUCKET, "out/same") == {}
    assert store.uploads(BUCKET) == []


def test_a_merge_that_is_refused_before_it_begins_ends_nobody_elses_upload(store: StoreServer, models: Path) -> None:
    """One of the output's own keys, begun by another program, is still there."""
    words = {"Bucket": BUCKET, "Key": "out/nothing/model-00001-of-00002.safetensors"}
    upload = store.client.create_multipart_upload(**words)["UploadId"]
    with pytest.raises(FitError, match="nothing to merge"):
        loratool.merge(models / "base", [models / "adapter"], f"s3://{BUCKET}/out/nothing", weights=[0])
    assert words["Key"] in store.uploads(BUCKET)
    store.client.abort_multipart_upload(**words, UploadId=upload)


def test_other_outputs_are_built_here_and_committed_by_their_record(
    store: StoreServer, models: Path, tmp_path: Path
) -> None:
    """An adapter in a store is the one that the same command writes into a folder; an existing one is not replaced."""
    for number, words in enumerate(
        (
            ["rescale", ADAPTER, "--scale", "0.5"],
            ["convert", ADAPTER, "--to", "mlx"],
            ["extract", BASE, f"{BASE}-tuned", "--rank", "2"],
        )
    ):
        if words[0] == "extract":
            store.put(BUCKET, models / "merged", "team/base-tuned")
        out = f"s3://{BUCKET}/adapters/{number}"
        assert cli.run([*words, "-o", out]) == 0
        assert cli.run([*words, "-o", str(tmp_path / str(number))]) == 0
        there, here = store.objects(BUCKET, f"adapters/{number}"), tree(tmp_path / str(number))
        assert there.pop("loratool.json")
        assert here.pop("loratool.json")
        assert there == here
        assert cli.run(["inspect", out, "--check"]) == 0
        assert cli.run([*words, "-o", out]) == 2
        assert cli.run([*words, "-o", out, "--overwrite"]) == 0


def test_workers_on_many_machines_make_one_output(store: StoreServer, models: Path) -> None:
    """Any shares in any order; whoever finishes first publishes, and everybody else is told that it is complete."""
    prefix = "out/shared"
    out = f"s3://{BUCKET}/{prefix}"
    assert cli.run(["merge", BASE, ADAPTER, "-o", out, "--finish"]) == 5
    for share in ("3/3", "1/3"):
        assert loratool.merge_part(BASE, [ADAPTER], out, share).made
    status = loratool.merge_status(BASE, [ADAPTER], out)
    assert not status.published
    assert status.done
    assert status.missing
    assert cli.run(["merge", BASE, ADAPTER, "-o", out, "--finish"]) == 5
    rest = loratool.merge_part(BASE, [ADAPTER], out, "1/1")
    assert {*rest.made} == {*status.missing}
    assert {*rest.kept} == {*status.done}
    finished = loratool.finish_merge(BASE, [ADAPTER], out)
    assert finished.published
    assert finished.parts == status.parts
    assert_same(store, prefix, models / "merged")
    assert not loratool.finish_merge(BASE, [ADAPTER], out).published
    assert loratool.merge_part(BASE, [ADAPTER], out, "2/3").published
    assert loratool.merge_status(BASE, [ADAPTER], out).published
    assert store.uploads(BUCKET) == []


def test_a_worker_that_planned_before_the_output_was_published_leaves_nothing(store: StoreServer, models: Path) -> None:
    """It finds the output complete when it begins to work; no upload, and nothing that says that one was begun, is left."""
    prefix = "out/late"
    opened = open_parts(BASE, [ADAPTER], f"s3://{BUCKET}/{prefix}", MergeOptions())
    loratool.merge(BASE, [ADAPTER], f"s3://{BUCKET}/{prefix}")
    assert make_parts(opened, opened.parts, "1/1").published
    assert not publish(opened).published
    assert_same(store, prefix, models / "merged")
    assert not [key for key in store.uploads(BUCKET) if key.startswith(prefix)]


def test_a_part_that_is_not_what_its_record_says_is_made_again(store: StoreServer, models: Path) -> None:
    """The store's list decides: a part that was sent anew with other bytes, and a record that is torn."""
    prefix = "out/lied"
    out = f"s3://{BUCKET}/{prefix}"
    loratool.merge_part(BASE, [ADAPTER], out, "1/1")
    left = store.objects(BUCKET, prefix)
    uploads = json.loads(left[f"{FOLDER}/plan.json"])["uploads"]
    name = "model-00002-of-00002.safetensors"
    sent = store.client.list_parts(Bucket=BUCKET, Key=f"{prefix}/{name}", UploadId=uploads[name])["Parts"]
    store.client.upload_part(
        Bucket=BUCKET,
        Key=f"{prefix}/{name}",
        UploadId=uploads[name],
        PartNumber=sent[-1]["PartNumber"],
        Body=bytes(sent[-1]["Size"]),
    )
    records = sorted(each for each in left if each.startswith(f"{FOLDER}/part-00000-"))
    store.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{records[0]}", Body=left[records[0]][:-5])
    assert cli.run(["merge", BASE, ADAPTER, "-o", out, "--finish"]) == 5
    assert loratool.merge_part(BASE, [ADAPTER], out, "1/1").redone
    assert loratool.finish_merge(BASE, [ADAPTER], out).published
    assert_same(store, prefix, models / "merged")


def test_a_base_that_changes_while_it_is_copied_is_an_error_of_the_input(store: StoreServer, models: Path) -> None:
    """Some stores copy from whatever is there: the source is looked at once more before anything gets its name."""
    key = "team/other/model-00001-of-00002.safetensors"
    changed: list[str] = []
    for name, content in store.objects(BUCKET, "team/base").items():
        store.client.put_object(Bucket=BUCKET, Key=f"team/other/{name}", Body=content)
    raw = bytearray(store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    raw[-1] ^= 1

    def fault(asked: Asked) -> Fault:
        if asked.kind == "complete" or (asked.kind == "list parts" and not changed):
            changed.append(asked.kind)
            store.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(raw))
        return None

    store.fault = fault
    out = f"s3://{BUCKET}/out/other"
    with pytest.raises(InputError, match="changed while it was being read"):
        loratool.merge(f"s3://{BUCKET}/team/other", [ADAPTER], out)
    assert changed == ["list parts"]
    loratool.abort_merge(out)
    assert store.objects(BUCKET, "out/other") == {}


@pytest.mark.parametrize(
    "settings", [{"dtype": "float32"}, {"rounding": "compensated"}, {"shard_size": "100KB"}], ids=str
)
def test_other_kinds_of_work_are_made_in_parts_too(
    store: StoreServer, models: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    """Weights that are converted, made as a whole, or in other files than those of the base."""
    prefix = f"out/{next(iter(settings))}"
    loratool.merge(models / "base", [models / "adapter"], tmp_path / "out", **settings)  # type: ignore[arg-type]
    loratool.merge(BASE, [ADAPTER], f"s3://{BUCKET}/{prefix}", **settings)  # type: ignore[arg-type]
    assert_same(store, prefix, tmp_path / "out")


@pytest.mark.parametrize("command", ["merge", "part"])
def test_a_limit_of_memory_counts_what_is_read_and_sent(
    store: StoreServer, models: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A limit that is too small is refused before anything is written; one that is just enough is enough."""
    out = f"s3://{BUCKET}/out/limited-{command}"

    def make(limit: int) -> None:
        if command == "merge":
            loratool.merge(BASE, [ADAPTER], out, max_memory=limit)
        else:
            loratool.merge_part(BASE, [ADAPTER], out, "1/1", max_memory=limit)

    with monkeypatch.context() as patch:
        patch.setattr(resources, "read_ahead", lambda _spans: 1 << 30)
        patch.setattr(Bucket, "held", lambda _bucket, _parts: 1 << 30)
        with pytest.raises(UsageError, match=r"needs at least (2[1-9]|[3-9]\d)\d\d MB"):
            make(1)
    assert store.objects(BUCKET, f"out/limited-{command}") == {}
    assert not any(each.kind == "create" for each in store.requests)
    with pytest.raises(UsageError, match="needs at least") as caught:
        make(1)
    merge = open_parts(BASE, [ADAPTER], out, MergeOptions())
    make(int(re.findall(r"\d+", str(caught.value))[-1]) * 10**6 + 20_000_000)
    assert merge.output.held(merge.parts) == 2 * max(each.came for each in store.requests if each.kind == "part")


def test_uploads_that_somebody_removed_are_said_and_can_be_cleared(store: StoreServer, models: Path) -> None:
    """Buckets often have a rule that ends old uploads; after --abort the merge can be made anew."""
    prefix = "out/expired"
    out = f"s3://{BUCKET}/{prefix}"
    interrupted(store, "part", 1, out)
    store.fault = lambda asked: "NoSuchUpload" if asked.kind in ("part", "copy part", "list parts") else None
    with pytest.raises(StoreError, match=r"removed by something else.*--abort"):
        loratool.merge(BASE, [ADAPTER], out)
    store.fault = lambda _asked: None
    loratool.abort_merge(out)
    loratool.merge(BASE, [ADAPTER], out)
    assert_same(store, prefix, models / "merged")


def test_an_output_that_was_to_be_replaced_stays_if_the_uploads_are_gone(store: StoreServer, models: Path) -> None:
    prefix = "out/kept"
    out = f"s3://{BUCKET}/{prefix}"
    loratool.merge(models / "base", [ADAPTER], out, weights=[2])
    before = store.objects(BUCKET, prefix)
    loratool.merge_part(models / "base", [ADAPTER], out, "1/1", overwrite=True)
    for each in store.client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)["Uploads"]:
        store.client.abort_multipart_upload(Bucket=BUCKET, Key=each["Key"], UploadId=each["UploadId"])
    with pytest.raises(StoreError, match="removed by something else"):
        loratool.finish_merge(models / "base", [ADAPTER], out, overwrite=True)
    with pytest.raises(StoreError, match="removed by something else"):
        loratool.merge_part(models / "base", [ADAPTER], out, "1/1", overwrite=True)
    loratool.abort_merge(out)
    assert store.objects(BUCKET, prefix) == before


def test_weights_are_read_again_for_their_sha256_and_for_verify(store: StoreServer, models: Path) -> None:
    """The record lists the SHA-256 of each object, workers' outputs too; the report counts the files that were read."""
    prefix = "out/read-again"
    loratool.merge_part(BASE, [ADAPTER], f"s3://{BUCKET}/{prefix}", "1/1")
    finished = loratool.finish_merge(BASE, [ADAPTER], f"s3://{BUCKET}/{prefix}", sha256=True, verify=True)
    there = store.objects(BUCKET, prefix)
    files = json.loads(there["loratool.json"])["files"]
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert there[name] == (models / "merged" / name).read_bytes()
        assert files[name]["sha256"] == hashlib.sha256(there[name]).hexdigest()
    assert files.keys() == there.keys() - {"loratool.json"}
    assert finished.merge is not None
    assert finished.merge.verified == len(there)


def test_an_output_that_a_store_damaged_is_taken_back_by_verify(store: StoreServer, models: Path) -> None:
    """The file is named, and nothing of the output stays; without --verify the damage would be there."""
    prefix = "out/damaged-there"
    key = f"{prefix}/model-00001-of-00002.safetensors"

    def fault(asked: Asked) -> Fault:
        if asked.kind == "head" and asked.key == key:  # the first request for it once it has its name
            raw = bytearray(store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
            raw[-1] ^= 1
            store.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(raw))
        return None

    store.fault = fault
    with pytest.raises(VerificationError, match="what was read back is not what was written") as caught:
        loratool.merge(models / "base", [ADAPTER], f"s3://{BUCKET}/{prefix}", verify=True)
    store.fault = lambda _asked: None
    assert "model-00001-of-00002" in str(caught.value.problems)
    assert store.objects(BUCKET, prefix) == {}
    assert not [key for key in store.uploads(BUCKET) if key.startswith(prefix)]
