"""Operands that name a place on the Hub: what is asked, what is downloaded, what is said when that does not work."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import faults
import pytest
from hub_models import NEEDED, downloaded
from hub_server import STRANGER, WRITER, Fault, HubServer, tokens_on_other_origins
from peft_files import edit_config
from safetensors.numpy import load_file, save_file

from loratool import cli
from loratool.bases.opening import open_checkpoint
from loratool.errors import HubError, InputError, UsageError, without_tokens
from loratool.fetching import parse, place_of
from loratool.fetching.client import asking
from loratool.files.hub_cache import origin_of
from loratool.files.hub_names import HubPath

if TYPE_CHECKING:
    from hub_client import Client


@pytest.mark.parametrize(
    ("operand", "place"),
    [
        ("org/name", HubPath("org/name")),
        ("org/name@v1.0", HubPath("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubPath("org/name", "refs/pr/3")),
        ("org/name:sub/folder", HubPath("org/name", None, "sub/folder")),
        ("org/name@main:model.safetensors", HubPath("org/name", "main", "model.safetensors")),
        ("hf://org/name", HubPath("org/name")),
        ("hf://models/org/name@main", HubPath("org/name", "main")),
        ("hf:/org/name@refs/pr/3/sub", HubPath("org/name", "refs/pr/3", "sub")),
        ("hf://org/name@a%2Fb/sub/", HubPath("org/name", "a/b", "sub")),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("name", None),
        ("a/b/c", None),
        ("folder/model.safetensors", None),
        ("org/name ", None),
    ],
)
def test_what_an_operand_names(operand: str, place: HubPath | None) -> None:
    assert parse(operand) == place


@pytest.mark.parametrize(
    "operand", ["hf://datasets/org/name", "hf://name", "org/name:../up", "org/name:a//b", "hf://org/name/.."]
)
def test_an_address_that_can_be_no_model_is_wrong_usage(operand: str) -> None:
    with pytest.raises(UsageError):
        parse(operand)


def test_keys_in_addresses_are_not_shown() -> None:
    assert without_tokens("for url 'https://cdn/x?X-Signature=abc&y=1' no") == "for url 'https://cdn/x?…' no"
    assert without_tokens("http://me:word@host/x") == "http://<TOKEN>@host/x"
    assert without_tokens("https://huggingface.co/org/name@main") == "https://huggingface.co/org/name@main"


def test_what_may_not_be_read_is_not_a_matter_of_writing(hub: HubServer, client: Client) -> None:
    hub.faults.append(Fault("GET", "^/cdn/", status=403, times=99))
    told = client.refused("inspect", "org/base")
    assert "you may not read it" in told
    assert "write" not in told


@pytest.mark.parametrize("rest", ["", "/", "/tree/main"])
def test_the_address_of_a_page_is_answered_with_the_name(client: Client, rest: str) -> None:
    told = client.refused("inspect", f"https://huggingface.co/org/base{rest}", code=2)
    assert (
        f"https://huggingface.co/org/base{rest.rstrip('/')} is the address of a web page; use the repository id org/base\n"
        in told
    )


def test_what_is_here_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert place_of("org/name") is None
    assert place_of("org/other") is not None


@pytest.mark.parametrize(
    "words", [["inspect"], ["resize", "-o", "out", "--rank", "2"], ["estimate", "--rank", "2", "--target", "q"]]
)
def test_what_begins_with_a_dot_is_never_asked_for(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A `Path` of ./org/name is org/name: a misspelt folder is none of the Hub's."""
    monkeypatch.chdir(tmp_path)
    assert cli.run([*words, "./runs/adaptor"]) == 3
    assert capsys.readouterr().err.splitlines()[0] == f"Error: {tmp_path}/runs/adaptor: no such file or folder"


def test_a_path_in_the_cache_tells_repository_and_commit(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    origin = origin_of(tmp_path / "models--org--a-b.c" / "snapshots" / commit / "sub")
    assert origin is not None
    assert (origin.repo, origin.commit, origin.inside) == ("org/a-b.c", commit, "sub")
    assert str(origin) == f"org/a-b.c@{commit}:sub"
    assert origin_of(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["hf_abcdefghijklmnop in a sentence", "token=hf_ABCDEFGH12345678", "hf_oauth_eyJhb.ci_Oi-x", "hf_jwt_eyJhb.ciOi"],
)
def test_tokens_are_taken_out_of_texts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "<TOKEN>" in without_tokens(text)
    assert "hf_" not in without_tokens(text)
    assert without_tokens("hf_raise_for_status(hf_hub_download)") == "hf_raise_for_status(hf_hub_download)"
    monkeypatch.setenv("HF_TOKEN", "something else")
    assert without_tokens("it is something else") == "it is <TOKEN>"


def test_a_merge_downloads_what_it_needs_and_nothing_else(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "out")
    base = open_checkpoint(models / "base")
    wanted = {*(shard.path.name for shard in base.shards), "model.safetensors.index.json", *base.side_files}
    assert downloaded(hub, "org/base") == wanted
    assert set(NEEDED) < wanted
    assert downloaded(hub, "org/adapter") == {"adapter_config.json", "adapter_model.safetensors"}
    assert tokens_on_other_origins(hub) == []

    client.works("merge", models / "base", models / "adapter", "-o", tmp_path / "local")
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_the_commits_of_the_inputs_stand_in_the_provenance(hub: HubServer, client: Client, tmp_path: Path) -> None:
    client.works("merge", "org/base@main", "hf://org/adapter", "-o", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "loratool.json").read_text())
    base, adapter = (hub.repos[name].branches["main"] for name in ("org/base", "org/adapter"))
    assert (table["base"]["name"], table["base"]["hub"]) == ("org/base", f"org/base@{base}")
    assert table["adapters"][0]["hub"] == f"org/adapter@{adapter}"
    assert table["command"] == f"loratool merge org/base@{base} org/adapter@{adapter} -o out"


def test_a_dry_run_downloads_no_weights_of_the_base(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    shutil.copytree(models / "adapter", tmp_path / "adapter", dirs_exist_ok=True)
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")  # which is held against the base's
    words = ("--dry-run", "--json", "-o", tmp_path / "out")
    remote = json.loads(client.works("merge", "org/base", tmp_path / "adapter", *words).out)
    assert all(r.range and r.sent <= 8192 for r in hub.asked("GET", r"^/cdn/.*\.safetensors$"))
    local = json.loads(client.works("merge", models / "base", tmp_path / "adapter", *words).out)
    assert remote.pop("base") == "org/base"
    assert (remote.pop("gain_forecast"), remote.pop("gains_forecast")) == (None, {})  # rows would be needed for it
    del local["base"], local["gain_forecast"], local["gains_forecast"], local["cost"], remote["cost"]
    assert remote == local
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_cannot_be_read_is_told_by_its_name_on_the_hub(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    pickled, empty = tmp_path / "pickled", tmp_path / "empty"
    pickled.mkdir()
    empty.mkdir()
    shutil.copy(models / "adapter" / "adapter_config.json", pickled)
    (pickled / "adapter_model.bin").write_bytes(b"p" * 9000)
    (empty / "README.md").write_text("# nothing\n")
    hub.add("org/pickled", pickled)
    hub.add("org/empty", empty)
    told = client.refused("merge", "org/base", "org/pickled", "-o", tmp_path / "out", code=3)
    assert "org/pickled/adapter_model.bin: loratool never loads pickled weights" in told
    told = client.refused("merge", "org/base", "org/empty", "-o", tmp_path / "out", code=3)
    assert told.startswith("Error: org/empty: not an adapter")
    assert downloaded(hub, "org/base") | downloaded(hub, "org/empty") == set()


def test_a_second_merge_takes_the_weights_from_the_cache(hub: HubServer, client: Client, tmp_path: Path) -> None:
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "first")
    sent = hub.sent("GET", "^/cdn/")
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "second")
    assert hub.sent("GET", "^/cdn/") == sent

    hub.log.clear()
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "third", HF_HUB_OFFLINE="1")
    assert hub.log == []
    assert faults.picture(tmp_path / "third") == faults.picture(tmp_path / "first")


def test_offline_and_not_in_the_cache_is_told_with_the_way_out(hub: HubServer, client: Client) -> None:
    told = client.refused("inspect", "org/base", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in told
    assert "hf download org/base" in told
    assert hub.log == []


def test_offline_a_name_that_none_can_have_is_told_as_online(client: Client) -> None:
    told = client.refused("inspect", "org/na--me", HF_HUB_OFFLINE="1")
    assert "not a valid repository name" in told
    online = client.refused("inspect", "org/na--me")
    assert told.partition("\nhint: ")[0] == online.partition("\nhint: ")[0]  # what to type next may differ


def test_a_revision_is_pinned_to_its_commit(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    old = hub.repos["org/adapter"].branches["main"]
    changed = tmp_path / "changed"
    shutil.copytree(models / "adapter", changed)
    tensors = load_file(changed / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in tensors.items()}, changed / "adapter_model.safetensors")
    new = hub.add("org/adapter", changed)
    hub.repos["org/adapter"].branches["v1"] = old
    found = {}
    for name, revision in {"branch": "@v1", "commit": f"@{old}", "main": ""}.items():
        client.works("rescale", f"org/adapter{revision}", "-o", tmp_path / name, "--scale", "1")
        table = json.loads((tmp_path / name / "loratool.json").read_text())
        found[name] = (table["adapter"]["hub"], (tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert found["branch"] == found["commit"]
    assert found["branch"][0] == f"org/adapter@{old}"
    assert found["main"][0] == f"org/adapter@{new}"
    assert found["main"][1] != found["commit"][1]


def test_the_recorded_command_makes_the_same_bytes_after_the_branch_has_moved_on(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """A base that only the adapter names is recorded with its commit, too."""
    client.works("merge", "auto", "org/adapter", "-o", tmp_path / "first", "-w", "-0.3")
    shutil.copytree(models / "adapter", tmp_path / "changed")
    tensors = load_file(models / "adapter" / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in tensors.items()}, tmp_path / "changed" / "adapter_model.safetensors")
    hub.add("org/adapter", tmp_path / "changed")
    hub.add("org/base", tmp_path / "changed")
    *words, out = shlex.split(json.loads((tmp_path / "first" / "loratool.json").read_text())["command"])
    assert (words[0], words[-1], out) == ("loratool", "-o", "out")
    client.works(*words[1:], tmp_path / "again")
    assert faults.picture(tmp_path / "again") == faults.picture(tmp_path / "first")


def test_a_subfolder_and_a_single_file_are_operands_too(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    nested = tmp_path / "nested"
    shutil.copytree(models / "adapter", nested / "adapters" / "one")
    shutil.copytree(models / "adapter", nested / "adapters" / "two")
    hub.add("org/many", nested)
    client.works("compare", "org/many:adapters/one", "hf://org/many/adapters/two/adapter_model.safetensors")
    assert {name for name in downloaded(hub, "org/many") if "optimizer" in name} == set()
    assert "adapters/one" not in client.refused("inspect", "org/many:adapters/three", code=3)


def test_a_repository_with_a_model_and_an_adapter_gives_what_is_asked_for(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(models / "base", both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(models / "adapter" / name, both / name)
    hub.add("org/both", both)
    client.works("rescale", "org/both", "-o", tmp_path / "out", "--scale", "2")
    assert not {name for name in downloaded(hub, "org/both") if name.startswith("model-")}


@pytest.mark.parametrize("form", [["auto"], ["--base", "auto"]])
def test_the_base_may_be_the_one_that_the_adapter_names(
    hub: HubServer, client: Client, tmp_path: Path, form: list[str]
) -> None:
    client.works("merge", *form, "org/adapter", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "loratool.json").read_text())["base"]["name"] == "org/base"


def test_a_base_from_before_models_had_owners_is_found_under_its_new_name(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """The Hub itself answers to `gpt2` for openai-community/gpt2; a folder of that name comes first."""
    hub.add("openai-community/gpt2", models / "base")
    adapter = shutil.copytree(models / "adapter", tmp_path / "adapter")
    edit_config(adapter, base_model_name_or_path="gpt2")
    client.works("merge", adapter, "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "loratool.json").read_text())["base"]["name"] == "openai-community/gpt2"


def test_an_adapter_that_names_no_base_or_one_that_is_not_here(client: Client, models: Path, tmp_path: Path) -> None:
    config = models / "adapter" / "adapter_config.json"
    for name, told in ((None, "does not name its base"), ("/somewhere/else", "/somewhere/else, which was not found")):
        adapter = tmp_path / f"adapter-{name is None}"
        shutil.copytree(models / "adapter", adapter)
        table = json.loads(config.read_text()) | {"base_model_name_or_path": name}
        (adapter / "adapter_config.json").write_text(json.dumps(table))
        assert told in client.refused("merge", "auto", adapter, "-o", tmp_path / "out", code=2)


def test_another_base_than_the_adapter_names_is_a_warning(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    hub.add("other/base", models / "base")
    ran = client.works("merge", "other/base", "org/adapter", "-o", tmp_path / "out")
    assert "says it was trained on org/base, but BASE is other/base" in ran.out
    assert (
        "says it was trained on" not in client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "right").out
    )


def test_inspect_moves_headers_only(hub: HubServer, client: Client, models: Path) -> None:
    for operand in ("org/base", "org/adapter"):
        local = json.loads(client.works("inspect", "--json", models / operand.split("/")[1]).out)["results"][0]
        remote = json.loads(client.works("inspect", "--json", operand).out)["results"][0]
        assert remote.pop("path") == operand
        del local["path"], local["cost"], remote["cost"]
        assert remote == local
    ranges = [r for r in hub.asked("GET", r"\.safetensors$") if r.sent]
    assert ranges
    assert all(r.range and r.sent <= 8192 for r in ranges)


def test_inspect_of_a_large_model_moves_less_than_a_megabyte(hub: HubServer, client: Client, tmp_path: Path) -> None:
    big = tmp_path / "big"
    faults.make_base(big, shards=40, hidden=512)  # 105 MB
    (big / "tokenizer.json").write_bytes(b" " * 3_000_000)
    size = sum(path.stat().st_size for path in big.iterdir())
    hub.add("org/big", big)
    hub.log.clear()
    facts = json.loads(client.works("inspect", "--json", "org/big").out)["results"][0]
    assert len(facts["files"]) == 40
    moved = hub.sent("GET")
    assert moved < 1_000_000 < size / 100
    assert not (tmp_path / "home" / "hub").exists()  # and nothing stays


def test_an_adapter_is_held_against_a_base_by_headers_alone(hub: HubServer, client: Client, models: Path) -> None:
    local = json.loads(client.works("inspect", "--json", models / "adapter", "--base", models / "base").out)
    remote = json.loads(client.works("inspect", "--json", "org/adapter", "--base", "org/base").out)
    here, there = (table["results"][0] for table in (local, remote))
    assert [m["places"] for m in there["modules"]] == [m["places"] for m in here["modules"]]
    assert there["against"]["parameters"] == here["against"]["parameters"]
    assert all(r.range and r.sent <= 8192 for r in hub.asked("GET", r"\.safetensors$") if r.sent)


def test_estimate_moves_headers_only(hub: HubServer, client: Client, models: Path) -> None:
    words = ("--rank", "8", "--target", "all-linear", "--json")
    local = json.loads(client.works("estimate", models / "base", *words).out)
    hub.log.clear()
    remote = json.loads(client.works("estimate", "org/base@main", *words).out)
    assert remote.pop("path") == "org/base@main"
    del local["path"], local["cost"], remote["cost"]
    assert remote == local
    ranges = [r for r in hub.asked("GET", r"\.safetensors$") if r.sent]
    assert ranges
    assert all(r.range and r.sent <= 8192 for r in ranges)


@pytest.mark.parametrize("operand", ["org/old", "org/old:config.json"])
def test_estimate_of_a_repository_of_pickles_takes_its_config(
    operand: str, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 16}
    config |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"pickled")
    hub.add("org/old", tmp_path / "old")
    told = json.loads(client.works("estimate", operand, "--rank", "4", "--target", "q_proj", "--json").out)
    assert told["ranks"][0]["trainable"] == 2 * 4 * (16 + 16)
    assert not hub.asked("GET", r"\.bin$")
    told = json.loads(client.works("inspect", "org/adapter", "--base-config", operand, "--json").out)["results"][0]
    assert told["against"]["parameters"] == 2 * 100 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16


def test_a_header_longer_than_the_first_read_is_read_whole(hub: HubServer, client: Client, tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "wide").mkdir()
    save_file(
        {f"layer.{n}.weight": np.zeros(1, np.float32) for n in range(500)}, tmp_path / "wide" / "model.safetensors"
    )
    hub.add("org/wide", tmp_path / "wide")
    assert json.loads(client.works("inspect", "--json", "org/wide").out)["results"][0]["tensors"] == 500


def test_a_repository_of_pickles_is_refused_before_anything_is_downloaded(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"p" * 9000)
    hub.add("org/pickled", tmp_path / "pickled")
    told = client.refused("merge", "org/pickled", "org/adapter", "-o", tmp_path / "out", code=3)
    assert "org/pickled" in told
    assert "never loads" in told
    assert downloaded(hub, "org/pickled") == set()


@pytest.mark.parametrize(
    ("operand", "told"),
    [
        ("org/nowhere", "no such repository on the Hub"),
        ("org/base@v9", "has no revision v9"),
        ("org/gated", "is gated; request access at"),
        ("bob/private", "hf auth login"),
    ],
)
def test_what_cannot_be_had_is_told_with_the_next_step(
    hub: HubServer, client: Client, models: Path, tmp_path: Path, operand: str, told: str
) -> None:
    hub.add("org/gated", models / "base", gated=True)
    hub.add("bob/private", models / "base", private=True)
    assert told in client.refused("merge", operand, "org/adapter", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_who_has_access_reads_gated_and_private_repositories(hub: HubServer, client: Client, models: Path) -> None:
    hub.add("org/gated", models / "base", gated=True)
    hub.add("bob/private", models / "base", private=True)
    client.token = WRITER
    client.works("inspect", "org/gated")
    client.token = STRANGER
    client.works("inspect", "bob/private")
    assert "is gated" in client.refused("inspect", "org/gated")
    assert tokens_on_other_origins(hub) == []


def test_a_wrong_token_is_told_and_not_shown(client: Client) -> None:
    client.token = "hf_wrongwrongwrongwrong"
    assert "the token is not valid" in client.refused("inspect", "org/base")


def test_faults_that_pass_are_waited_for(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.faults += [
        Fault("GET", "^/api/models/org/base", status=503),
        Fault("GET", "^/cdn/", cut=100),
        Fault("GET", r"config\.json$", status=429, headers={"Retry-After": "1"}),
    ]
    client.works("inspect", "org/base")
    assert [fault.times for fault in hub.faults] == [0, 0, 0]
    hub.faults.append(Fault("GET", "^/cdn/.*model-", cut=20_000))
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "out")
    assert hub.faults[-1].times == 0


def test_a_server_that_is_not_there_is_told(hub: HubServer, client: Client) -> None:
    told = client.refused("inspect", "org/base", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in told
    assert "HF_HUB_OFFLINE=1" in told


def test_a_server_without_xet_is_told_with_the_setting_that_helps() -> None:
    """What the client raises in its function of this name for an answer of 404 to its request of a token for Xet."""
    place = "http://127.0.0.1:9/api/models/me/x/xet-write-token/main"

    def _upload_xet_files() -> None:
        raise ConnectionError(
            f"Network error: Request error: HTTP status client error (404 Not Found), domain: {place}"
        )

    with pytest.raises(HubError, match="set HF_HUB_DISABLE_XET=1 to send them without it"), asking("me/x"):
        _upload_xet_files()


def test_an_endpoint_that_is_not_an_address_is_named(client: Client) -> None:
    told = client.refused("inspect", "org/base", HF_ENDPOINT="huggingface.co")
    assert "HF_ENDPOINT must be an address such as https://huggingface.co (got 'huggingface.co')" in told


def test_content_that_arrives_damaged_is_found_and_not_kept(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """Plain HTTP compares sizes only."""
    hub.damage.add("model-00002-of-00003.safetensors")
    told = client.refused("merge", "org/base", "org/adapter", "-o", tmp_path / "out")
    assert "model-00002-of-00003.safetensors was damaged in transfer" in told
    hub.damage.clear()
    client.works("merge", "org/base", "org/adapter", "-o", tmp_path / "out")


def test_outlines_are_held_to_the_rules_of_local_folders(models: Path) -> None:
    from loratool.fetching.outline import needed

    found = needed(models / "base", models / "base", "model")
    base = open_checkpoint(models / "base")
    assert set(found.weights) == {shard.path.name for shard in base.shards}
    assert set(found.others) == {"model.safetensors.index.json", *base.side_files}
    with pytest.raises(InputError):
        needed(models, models, "model")
