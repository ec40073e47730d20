"""`loratool.json` lists every file of an output with its size and SHA-256, whichever command wrote it."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
import torch
from hub_client import Client
from hub_server import WRITER, HubServer
from safetensors.torch import load_file, save_file
from tree_digests import file_entry

import loratool
from loratool import cli
from loratool.files.digests import Digest, digest_of_bytes, read_recorded

LAYERS, HIDDEN = 2, 32
SIDE_FILES = {"tokenizer.json": "{}", "LICENSE": "terms", "tokenizer_config.json": "{}"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters with a tokenizer, and a model that was fine-tuned from the base."""
    home = tmp_path_factory.mktemp("inputs")
    base = faults.make_base(home / "base", LAYERS, HIDDEN)
    (base / "LICENSE").write_text("terms")
    for name in ("adapter", "other"):
        adapter = faults.make_adapter(home / name, LAYERS, HIDDEN)
        for side, text in SIDE_FILES.items():
            (adapter / side).write_text(text)
    tuned = faults.make_base(home / "tuned", LAYERS, HIDDEN)
    for shard in tuned.glob("*.safetensors"):
        changed = {
            name: tensor + torch.eye(*tensor.shape).bfloat16()
            for name, tensor in load_file(shard).items()
            if tensor.ndim == 2
        }
        save_file({**load_file(shard), **changed}, shard, {"format": "pt"})
    return home


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda home, out: loratool.merge(home / "base", [home / "adapter"], out),
    "merge of two": lambda home, out: loratool.merge(home / "base", [home / "adapter", home / "other"], out),
    "merge into other files": lambda home, out: loratool.merge(home / "base", home / "adapter", out, shard_size=9000),
    "rescale, which copies the weights": lambda home, out: loratool.rescale(home / "adapter", out, scale=0.5),
    "rescale, which writes them": lambda home, out: loratool.rescale(home / "adapter", out, scale=0.5, bake=True),
    "resize": lambda home, out: loratool.resize(home / "adapter", out, rank=1),
    "combine": lambda home, out: loratool.combine([home / "adapter", home / "other"], out),
    "extract": lambda home, out: loratool.extract(home / "base", home / "tuned", out, rank=2),
}


def told(folder: Path) -> dict[str, dict[str, object]]:
    return dict(json.loads((folder / "loratool.json").read_text())["files"])


def found(folder: Path) -> dict[str, dict[str, object]]:
    """The same by reading every file but the record itself."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "loratool.json"]
    return {path.relative_to(folder).as_posix(): file_entry(path.name, path.read_bytes()) for path in paths}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_file_that_a_command_writes_is_listed(inputs: Path, tmp_path: Path, command: str) -> None:
    """Weights, index, config, tokenizer, licence, card and files in folders; nothing else is listed."""
    COMMANDS[command](inputs, tmp_path / "out")
    listed = told(tmp_path / "out")
    assert listed == found(tmp_path / "out")
    assert {"README.md", "LICENSE"} <= set(listed)
    assert any(name.endswith(".safetensors") for name in listed)


def test_a_merge_into_a_single_file_base_lists_its_one_weight_file_and_its_card(inputs: Path, tmp_path: Path) -> None:
    """Such a base has no files beside it."""
    adapter = faults.make_adapter(tmp_path / "adapter", 1, HIDDEN)
    loratool.merge(inputs / "base" / "model-00001-of-00002.safetensors", adapter, tmp_path / "out")
    listed = told(tmp_path / "out")
    assert listed == found(tmp_path / "out")
    assert set(listed) == {"README.md", "model-00001-of-00002.safetensors"}


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_a_card_that_somebody_wrote_is_listed_as_it_is(inputs: Path, tmp_path: Path, place: str) -> None:
    """In a merged model the base's own card is kept, in an adapter made of another that one's."""
    base, adapter = faults.make_base(tmp_path / "base"), faults.make_adapter(tmp_path / "adapter")
    (tmp_path / place / "README.md").write_text("# mine\n")
    if place == "base":
        loratool.merge(base, adapter, tmp_path / "out")
    else:
        loratool.rescale(adapter, tmp_path / "out", scale=2)
    assert told(tmp_path / "out") == found(tmp_path / "out")
    assert told(tmp_path / "out")["README.md"] == file_entry("README.md", b"# mine\n")


def test_what_a_streaming_merge_or_a_push_sends_is_what_its_record_lists(inputs: Path, tmp_path: Path) -> None:
    """The card that either of them writes names the repository, so its digest differs from that of a local card."""
    (tmp_path / "work").mkdir()
    loratool.merge(inputs / "base", inputs / "adapter", tmp_path / "merged")
    loratool.rescale(inputs / "adapter", tmp_path / "rescaled", scale=2)
    with HubServer() as hub:
        client = Client(hub, tmp_path / "home", WRITER)
        words = ["merge", inputs / "base", inputs / "adapter", "--stream", "--push-to-hub", "alice/streamed"]
        client.works(*words, cwd=tmp_path / "work")
        client.works("push", tmp_path / "merged", "alice/merged")
        client.works("push", tmp_path / "rescaled", "alice/rescaled")
        for repo in ("streamed", "merged", "rescaled"):
            held = {name: raw for name, raw in hub.files(f"alice/{repo}").items() if name != ".gitattributes"}
            table = json.loads(held.pop("loratool.json"))
            streamed = repo == "streamed"
            assert table["files"] == {name: file_entry(name, raw, streamed) for name, raw in sorted(held.items())}
            assert f'place = "alice/{repo}"'.encode() in held["README.md"]


def test_a_pushed_record_of_an_earlier_release_stays_as_it_is(tmp_path: Path) -> None:
    """0.1.0 listed weights only, as "shards", which a card is not one of."""
    adapter = faults.make_adapter(tmp_path / "adapter")
    old = b'{"made_by": "loratool merge", "shards": {}}'
    (adapter / "loratool.json").write_bytes(old)
    with HubServer() as hub:
        client = Client(hub, tmp_path / "home", WRITER)
        client.works("push", adapter, "alice/old")
        assert hub.files("alice/old")["loratool.json"] == old


NOT_FILES: dict[str, object] = {
    "no table": [],
    "a number": {"a.json": 7},
    "no size": {"a.json": {"sha256": "0" * 64}},
    "a negative size": {"a.json": {"size": -1, "sha256": "0" * 64}},
    "a size that is true": {"a.json": {"size": True, "sha256": "0" * 64}},
    "a digest that is too short": {"a.json": {"size": 1, "sha256": "0" * 63}},
    "a digest in other digits": {"a.json": {"size": 1, "sha256": "x" * 64}},
    "a way out of the folder": {"../a.json": {"size": 1, "sha256": "0" * 64}},
    "an absolute path": {"/a.json": {"size": 1, "sha256": "0" * 64}},
    "a detour": {"a/./b.json": {"size": 1, "sha256": "0" * 64}},
    "no name": {"": {"size": 1, "sha256": "0" * 64}},
    "a NUL": {"a\0b": {"size": 1, "sha256": "0" * 64}},
}


@pytest.mark.parametrize("key", ["files", "shards"])
@pytest.mark.parametrize("case", NOT_FILES)
def test_entries_of_a_record_that_are_none_are_passed_over(case: str, key: str) -> None:
    """Anybody may have written a `loratool.json`; the sound entry beside each of these is read."""
    table = NOT_FILES[case]
    sound = {"extra/b.json": file_entry("b.json", b"sound")}
    listed = {**table, **sound} if isinstance(table, dict) else table
    wanted = {"extra/b.json": digest_of_bytes(b"sound")} if isinstance(table, dict) else {}
    assert read_recorded({key: listed}) == wanted


def test_the_digest_of_a_file_is_its_size_and_sha256() -> None:
    assert digest_of_bytes(b"abc") == Digest(3, hashlib.sha256(b"abc").hexdigest())


@pytest.mark.parametrize("verb", ["merge", "combine", "rescale", "resize"])
@pytest.mark.parametrize("chosen", [True, False], ids=["one of several", "the only one"])
def test_the_recorded_command_makes_the_same_output_of_an_adapter_in_a_subfolder(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, chosen: bool
) -> None:
    """A folder that holds an adapter in a subfolder is named as it was given, with the name of the one that was read."""
    shutil.copytree(inputs / "base", tmp_path / "base")
    for name in ("first", "second") if chosen else ("second",):
        shutil.copytree(inputs / "adapter", tmp_path / "run" / name)
    monkeypatch.chdir(tmp_path)
    words = {"merge": ["base", "run"], "combine": ["run", "run"]}.get(verb, ["run"])
    options = {"rescale": ["--scale", "2"], "resize": ["--rank", "1"]}.get(verb, [])
    options += ["--adapter-name", "second"] if chosen else []
    assert cli.run([verb, *words, *options, "-o", "first-made"]) == 0
    command = shlex.split(json.loads(Path("first-made", "loratool.json").read_text())["command"])
    assert command[0] == "loratool"
    assert cli.run(command[1:]) == 0
    assert faults.picture(tmp_path / "out") == faults.picture(tmp_path / "first-made")
