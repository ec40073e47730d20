"""Merges whose output goes to the Hub file by file: the same model, two weight files on the disk, at any interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import faults
import pytest
import torch
from hub_client import Client
from hub_server import WRITER, Blob, Fault, HubServer, tokens_on_other_origins
from peft_files import edit_config
from safetensors.torch import load_file, save_file

SHARDS, HIDDEN = 4, 64
JOURNAL = "loratool-stream.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    faults.make_base(home / "base", shards=SHARDS, hidden=HIDDEN)
    faults.make_adapter(home / "adapter", layers=SHARDS, hidden=HIDDEN, rank=4)
    (home / "base" / "tokenizer.json").write_text("{}")
    (home / "base" / "pytorch_model.bin").write_text("pickled twin")
    (home / "base" / "LICENSE").write_text("terms")
    return home


@pytest.fixture
def hub(models: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/base", models / "base")
        server.add("org/adapter", models / "adapter")
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    (tmp_path / "work").mkdir()
    return Client(hub, tmp_path / "home", WRITER)


def words(repo: str, base: str | Path = "org/base", adapter: str | Path = "org/adapter", *more: str) -> list[str]:
    return ["merge", str(base), str(adapter), "--stream", "--push-to-hub", repo, *more]


def held(hub: HubServer, name: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.files(name).items() if path != ".gitattributes"}


def is_whole_or_cannot_be_loaded(hub: HubServer, name: str) -> bool:
    """Whether it is whole; then it has everything, else neither a config nor an index."""
    found = held(hub, name) if name in hub.repos else {}
    if "config.json" in found or "model.safetensors.index.json" in found:
        index = json.loads(found["model.safetensors.index.json"])
        assert set(index["weight_map"].values()) <= set(found)
        assert {"config.json", "README.md", "loratool.json", "tokenizer.json"} <= set(found)
        assert JOURNAL not in found
        return True
    return False


def test_a_streamed_merge_is_the_merge(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    full = ["--digests", "full"]  # a local merge knows of copies what the cache knows of their files
    ran = client.works(*words("alice/new"), *full, cwd=tmp_path / "work")
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "out", *full)
    found = held(hub, "alice/new")
    local = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert set(found) == set(local)
    assert {name for name in found if found[name] != local[name]} == {"README.md", "loratool.json"}
    streamed, merged = (json.loads(each["loratool.json"]) for each in (found, local))
    assert streamed.pop("plan")
    assert streamed.pop("command") == merged.pop("command").replace("-o out", "--stream --push-to-hub alice/new")
    cards = [table["files"].pop("README.md") for table in (streamed, merged)]  # whose code names other places
    assert cards[0] != cards[1]
    for name, entry in streamed["files"].items():
        if name.endswith(".safetensors"):  # which the Hub knows by its SHA-256
            assert entry.pop("sha256") == hashlib.sha256(found[name]).hexdigest()
    assert streamed == merged
    assert hub.repos["alice/new"].private
    assert "merged into" in ran.out
    assert "‖ΔW‖ is up to" in ran.out  # as the merge says too; the test of continued merges knows the norms
    assert os.listdir(tmp_path / "work") == []
    assert tokens_on_other_origins(hub) == []


def test_each_file_of_the_base_comes_once_whatever_reads_it(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """DoRA reads a weight twice: for the norms of its rows, and to merge it."""
    dora = shutil.copytree(models / "adapter", tmp_path / "dora")
    tensors = load_file(dora / "adapter_model.safetensors")
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.linspace(1, 2, len(tensor))
        for name, tensor in tensors.items()
        if "lora_B" in name
    }
    save_file({**tensors, **magnitudes}, dora / "adapter_model.safetensors")
    edit_config(dora, use_dora=True)
    client.works(*words("alice/new", adapter=dora), cwd=tmp_path / "work")
    fetched = [request.path for request in hub.asked("GET", "^/cdn/.*model-") if not request.range]
    client.works("merge", models / "base", dora, "-o", tmp_path / "out")
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    assert {name: held(hub, "alice/new")[name] for name in local} == local
    assert len(fetched) == len(set(fetched)) == SHARDS


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="takes a second file system")
def test_temporary_files_may_be_on_another_file_system(hub: HubServer, client: Client, tmp_path: Path) -> None:
    assert os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev
    client.works(*words("alice/new"), cwd=tmp_path / "work", TMPDIR="/dev/shm")
    assert is_whole_or_cannot_be_loaded(hub, "alice/new")
    assert os.listdir(tmp_path / "work") == []


def test_config_index_and_card_come_last(hub: HubServer, client: Client, tmp_path: Path) -> None:
    client.works(*words("alice/new"), cwd=tmp_path / "work")
    for commit in list(hub.repos["alice/new"].commits.values())[:-1]:
        assert not {"config.json", "model.safetensors.index.json", "README.md"} & set(commit)
    assert "README.md" in held(hub, "alice/new")


def blocks(folder: Path) -> tuple[int, int]:
    """Bytes on the disk, and the largest apparent size of all weight files together."""
    real = apparent = 0
    for home, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".safetensors", ".incomplete")):
                with suppress(FileNotFoundError):
                    status = os.lstat(os.path.join(home, name))
                    real += status.st_blocks * 512
                    apparent += status.st_size
    return real, apparent


def test_ten_shards_take_the_room_of_two(hub: HubServer, client: Client, tmp_path: Path) -> None:
    faults.make_base(tmp_path / "big", shards=10, hidden=512)
    faults.make_adapter(tmp_path / "adapter", layers=10, hidden=512, rank=4)
    (tmp_path / "home").mkdir()
    shard = max(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    hub.add("org/big", tmp_path / "big")
    shutil.rmtree(tmp_path / "big")
    hub.slow = 0.05
    client.begin(*words("alice/new", "org/big", tmp_path / "adapter", "--json"), cwd=tmp_path / "work")
    most, seen = (0, 0), 0
    while "README.md" not in (held(hub, "alice/new") if "alice/new" in hub.repos else {}):
        for folder in (tmp_path / "work", tmp_path / "home"):
            found = blocks(folder)
            most = (max(most[0], found[0]), max(most[1], found[1]))
            seen += found[1] > 0
        time.sleep(0.003)
    ran = client.end()
    assert ran.code == 0, ran
    assert seen > 10
    assert shard < most[1] <= 2 * shard
    assert most[0] <= 2 * (shard + 8192)
    assert json.loads(ran.out)["most_on_disk"] <= 2 * shard
    assert sum(len(content) for content in held(hub, "alice/new").values()) > 9 * shard


def test_run_again_when_all_is_done_sends_nothing(hub: HubServer, client: Client, tmp_path: Path) -> None:
    client.works(*words("alice/new"), cwd=tmp_path / "work")
    hub.log.clear()
    ran = client.works(*words("alice/new"), cwd=tmp_path / "work")
    assert "4 files were already uploaded" in ran.out
    assert [r for r in hub.log if r.method in ("PUT", "POST")] == []


def test_a_fault_that_stays_ends_it_and_the_next_run_goes_on_from_there(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    hub.faults.append(Fault("POST", "/commit/", skip=3, times=99, status=403, headers={"X-Error-Message": "quota"}))
    assert "quota" in client.refused(*words("alice/new"), cwd=tmp_path / "work")
    assert os.listdir(tmp_path / "work") == []
    assert len([name for name in held(hub, "alice/new") if name.endswith(".safetensors")]) == 2
    hub.faults.clear()
    hub.log.clear()
    report = json.loads(client.works(*words("alice/new"), "--json", cwd=tmp_path / "work").out)
    assert len(report["resumed"]) == 2
    weights = {hashlib.sha256(c).hexdigest() for n, c in held(hub, "alice/new").items() if n.endswith(".safetensors")}
    assert len([sent for sent in hub.asked("PUT", "^/lfs/") if sent.path.rpartition("/")[2] in weights]) <= 2
    assert is_whole_or_cannot_be_loaded(hub, "alice/new")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "^/lfs/", cut=10_000, skip=1),
        Fault("POST", "/commit/", lost=True, skip=3),
        Fault("POST", "/commit/", lost=True, skip=5),
        Fault("POST", "/commit/", status=503, skip=2),
        Fault("GET", "^/cdn/.*00004-of", cut=9_000, skip=1),
    ],
    ids=["upload", "lost", "lost-last", "503", "download"],
)
def test_faults_that_pass_change_nothing(hub: HubServer, client: Client, tmp_path: Path, fault: Fault) -> None:
    hub.faults.append(fault)
    client.works(*words("alice/new"), cwd=tmp_path / "work")
    assert fault.times == 0
    assert len(hub.repos["alice/new"].messages) == SHARDS + 3
    assert is_whole_or_cannot_be_loaded(hub, "alice/new")


def test_killed_at_any_moment_and_run_again_ends_in_the_same_state(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    hub.slow = 0.01
    client.works(*words("alice/same"), cwd=tmp_path / "work")  # which warms the cache of the adapter too
    reference = held(hub, "alice/same")
    before = len(hub.log)
    client.works(*words("alice/counted"), cwd=tmp_path / "work")
    requests = len(hub.log) - before
    killed, moments = 0, set()
    for percent in (5, 35, 60, 85):
        del hub.repos["alice/same"]
        hub.objects = {
            s: c for s, c in hub.objects.items() if s in {b.sha256 for b in blobs(hub, "org/base", "org/adapter")}
        }
        before, wanted = len(hub.log), 1 + requests * percent // 100
        pid = client.begin(*words("alice/same"), cwd=tmp_path / "work")
        until = time.monotonic() + 20
        while len(hub.log) < before + wanted and time.monotonic() < until:
            time.sleep(0.002)
        client.kill(pid, signal.SIGKILL)
        killed += client.end().code == -signal.SIGKILL
        is_whole_or_cannot_be_loaded(hub, "alice/same")
        moments.add(len(held(hub, "alice/same")) if "alice/same" in hub.repos else -1)
        client.works(*words("alice/same"), cwd=tmp_path / "work")
        assert held(hub, "alice/same") == reference
        assert os.listdir(tmp_path / "work") == []
    assert killed >= 3
    assert len(moments) >= 3


def blobs(hub: HubServer, *names: str) -> Iterator[Blob]:
    for name in names:
        for commit in hub.repos[name].commits.values():
            yield from commit.values()


def test_another_plan_begins_anew(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.faults.append(Fault("POST", "/commit/", skip=3, times=1, status=403))
    client.refused(*words("alice/new"), cwd=tmp_path / "work")
    client.works(*words("alice/new"), "-w", "0.5", cwd=tmp_path / "work")
    client.works(*words("alice/clean"), "-w", "0.5", cwd=tmp_path / "work")
    found, clean = held(hub, "alice/new"), held(hub, "alice/clean")
    assert {name for name in clean if clean[name] != found[name]} == {"README.md", "loratool.json"}  # the names
    assert set(found) == set(clean)


def test_a_repository_that_holds_a_model_is_kept_unless_told(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(models / "base", old)
    (old / "model-extra.safetensors").write_bytes((old / "model-00001-of-00004.safetensors").read_bytes())
    (old / "adapter_config.json").write_text("{}")  # which transformers would put on top of the merged model
    hub.add("alice/there", old)
    before = held(hub, "alice/there")
    assert "--overwrite" in client.refused(*words("alice/there"), code=2, cwd=tmp_path / "work")
    assert held(hub, "alice/there") == before
    client.works(*words("alice/there"), "--overwrite", cwd=tmp_path / "work")
    commits = list(hub.repos["alice/there"].commits.values())[1:]
    for commit in commits[:-1]:  # never the old config beside the new weights
        assert not {"config.json", "model.safetensors.index.json"} & set(commit)
    assert not {"model-extra.safetensors", "adapter_config.json"} & set(held(hub, "alice/there"))
    assert "pytorch_model.bin" in held(hub, "alice/there")  # which is no business of a merge


def test_a_local_base_can_be_streamed_and_stays(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    before = faults.picture(models / "base")
    client.works(*words("alice/new", models / "base", models / "adapter"), cwd=tmp_path / "work")
    assert faults.picture(models / "base") == before
    assert is_whole_or_cannot_be_loaded(hub, "alice/new")


def test_a_card_with_what_looks_like_a_token_is_refused_until_another_is_written(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "base", tmp_path / "told")
    (tmp_path / "told" / "README.md").write_text(f"# use hf_{'writer' * 5}four\n")
    hub.add("org/told", tmp_path / "told")
    told = client.refused(*words("alice/new", "org/told"), code=3, cwd=tmp_path / "work")
    assert "README.md, line 1" in told
    assert "alice/new" not in hub.repos
    client.works(*words("alice/new", "org/told"), "--card", cwd=tmp_path / "work")
    assert b"hf_" not in held(hub, "alice/new")["README.md"]


def test_a_dry_run_moves_headers_and_sends_nothing(hub: HubServer, client: Client, tmp_path: Path) -> None:
    client.token = None
    ran = client.works(*words("alice/new"), "--dry-run", cwd=tmp_path / "work")
    assert "would be merged into" in ran.out
    assert "alice/new" not in hub.repos
    assert all(r.range for r in hub.asked("GET", "^/cdn/.*model-"))


def test_damaged_content_is_fetched_again_and_never_merged(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.damage.add("model-00003-of-00004.safetensors")
    told = client.refused(*words("alice/new"), cwd=tmp_path / "work")
    assert "model-00003-of-00004.safetensors was damaged in transfer 3 times" in told
    hub.damage.clear()
    client.works(*words("alice/new"), cwd=tmp_path / "work")
    assert is_whole_or_cannot_be_loaded(hub, "alice/new")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["-o", "out"], "writes no folder"),
        (["--shard-size", "5GB"], "keeps the base's shards"),
    ],
)
def test_what_does_not_go_with_streaming_is_wrong_usage(client: Client, more: list[str], told: str) -> None:
    assert told in client.refused(*words("alice/new"), *more, code=2)


def test_streaming_needs_a_place_to_go_and_a_token(client: Client, tmp_path: Path) -> None:
    assert "--push-to-hub REPO" in client.refused("merge", "org/base", "org/adapter", "--stream", code=2)
    client.token = None
    assert "hf auth login" in client.refused(*words("alice/new"), cwd=tmp_path / "work")


def test_an_adapter_that_does_not_fit_is_refused_before_a_repository_is_made(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    faults.make_adapter(tmp_path / "other", layers=SHARDS, hidden=32, rank=4)
    client.refused(*words("alice/new", "org/base", tmp_path / "other"), code=4, cwd=tmp_path / "work")
    assert "alice/new" not in hub.repos
    assert os.listdir(tmp_path / "work") == []


def test_a_dead_adapter_beside_a_live_one_is_warned_of_in_a_streamed_merge_too(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """Its modules are counted over all files, in the report and in the record that goes to the Hub."""
    dead = tmp_path / "dead"
    shutil.copytree(models / "adapter", dead)
    edit_config(dead, lora_alpha=0)
    ran = client.works(*words("alice/new", "org/base", "org/adapter", str(dead), "--json"), cwd=tmp_path / "work")
    assert "warning: dead: changes no element" in ran.err
    live, still = json.loads(ran.out)["adapters"]
    assert live["modules"] == still["modules"] == len(still["unchanged"]) > 0
    assert live["unchanged"] == []
    record = json.loads(held(hub, "alice/new")["loratool.json"])
    assert [a["unchanged"] for a in record["adapters"]] == [0, still["modules"]]
    assert "adapter-without-effect" in [note["code"] for note in record["notes"]]
