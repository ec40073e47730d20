"""A server that lies: nothing it says leads out of the cache, into a size, a range or an address that no Hub gives."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import faults
import pytest
from hub_client import Client
from hub_server import WRITER, HubServer, Lie
from oracle import needs

from loratool.errors import HubError, InputError, UsageError
from loratool.fetching import outline, parse
from loratool.fetching.answers import RemoteFile, commit_of, files_of

SHARDS, HIDDEN = 2, 64
INFO = r"^/api/models/org/(base|adapter)([?]|$|/revision/)"
RESOLVE = r"/resolve/"
OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567"
READING = {
    "inspect": ("inspect", "org/base"),
    "merge": ("merge", "org/base", "org/adapter", "-o", "out"),
    "stream": ("merge", "org/base", "org/adapter", "--stream", "--push-to-hub", "alice/new"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    faults.make_base(home / "base", shards=SHARDS, hidden=HIDDEN)
    faults.make_adapter(home / "adapter", layers=SHARDS, hidden=HIDDEN, rank=4)
    return home


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """A user whose folders are deep enough that what leads out of one of them by some steps stays in the test's own."""
    home = tmp_path / "a" / "b" / "c" / "home"
    home.mkdir(parents=True)
    return Client(hub, home, WRITER)


def outside(client: Client, tmp_path: Path) -> dict[str, str]:
    """Everything that is not in the user's cache, with its content."""
    found = {}
    for path in sorted(tmp_path.rglob("*")):
        name = path.relative_to(tmp_path).as_posix()
        if path.is_relative_to(client.home / "hub") or path.name in ("stdout", "stderr"):
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def inside(client: Client) -> set[str]:
    """The kinds of entries that the cache has: what stands for a repository, and below it for a commit."""
    cache = client.home / "hub"
    return {path.relative_to(cache).as_posix() for path in cache.glob("*/*/*")}


def of_siblings(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], object]:
    """A lie about each file of a listing."""

    def changed(info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "siblings": [change(sibling) for sibling in info["siblings"]]}

    return changed


def one_more(name: str) -> Callable[[Any], object]:
    """A lie that adds a file to the listing."""
    return lambda info: {
        **info,
        "siblings": [*info["siblings"], {"rfilename": name, "size": 1, "blobId": "0" * 40}],
    }


def deep(_answer: object) -> object:
    nested: object = 1
    for _ in range(900):
        nested = [nested]
    return nested


LIES_TO_ALL = {
    "a commit that leads out": Lie(INFO, change=lambda info: {**info, "sha": "../../../../../evil"}),
    "a name that leads out": Lie(INFO, change=one_more("../../../../../evil")),
    "a file that is a folder too": Lie(INFO, change=one_more("config.json/evil")),
    "a size of all disks": Lie(INFO, change=of_siblings(lambda sibling: {**sibling, "size": 1 << 62})),
    "files that are none": Lie(INFO, change=of_siblings(lambda sibling: 7)),
    "a listing that is none": Lie(INFO, change=lambda info: [info]),
    "not valid JSON": Lie(INFO, body=b"<html>\xff"),
    "JSON without an end": Lie(INFO, endless=True),
    "deep JSON": Lie(INFO, change=deep),
    "another range": Lie(r"/(resolve|cdn)/", headers={"Content-Range": "bytes 5-9/10"}),
    "no size": Lie(r"/resolve/", headers={"X-Linked-Size": "-1"}),
    "a redirection to a file": Lie(r"/resolve/.*safetensors$", headers={"Location": "file:///etc/passwd"}),
    "a storage that is a folder": Lie(r"/resolve/", headers={"X-Xet-Cas-Url": "local:///tmp/evil"}),
    "a hash that leads out": Lie(r"/resolve/", headers={"X-Xet-Hash": "../../evil", "X-Xet-Refresh-Route": "/x"}),
    "the commit of a file that leads out": Lie(RESOLVE, headers={"X-Repo-Commit": "../../../../../evil"}),
    "a digest that leads out": Lie(RESOLVE, headers={"ETag": '"../../../../../../evil"'}),
    "a linked digest that leads out": Lie(RESOLVE, headers={"X-Linked-Etag": '"../../../../../../evil"'}),
}  # fmt: skip
# inspect moves no file as a whole
LIES_TO_DOWNLOADS = {
    "another commit": Lie(RESOLVE, headers={"X-Repo-Commit": OTHER_COMMIT}),
    "a file without an end": Lie(r"/cdn/", endless=True),
}
LEADING_OUT = ("a commit that leads out", "a name that leads out", "a digest that leads out", "JSON without an end")
CASES = [
    *(("inspect", name) for name in LIES_TO_ALL),  # every command begins with what inspect asks
    *(("merge", name) for name in (*LEADING_OUT, *LIES_TO_DOWNLOADS)),
    *(("stream", name) for name in ("a digest that leads out", *LIES_TO_DOWNLOADS)),
]


@pytest.mark.parametrize(("command", "lie"), CASES)
def test_a_lie_of_a_server_ends_the_command_and_leads_nowhere(
    hub: HubServer, client: Client, tmp_path: Path, command: str, lie: str
) -> None:
    """Whatever a server says in place of a commit, a name, a size, a range or an address, the command ends with exit
    code 7 and one message, and outside the cache nothing is written."""
    before = outside(client, tmp_path)
    hub.lies.append({**LIES_TO_ALL, **LIES_TO_DOWNLOADS}[lie])
    told = client.refused(*READING[command], cwd=client.home)
    assert "HF_ENDPOINT" in told or "cannot be reached" in told or "another commit" in told, told
    assert outside(client, tmp_path) == before
    assert not any("evil" in name for name in inside(client))
    assert not os.path.lexists("/tmp/evil")


@pytest.mark.parametrize("lie", ["a digest that leads out", "another commit", "a file without an end"])
def test_after_a_lie_an_honest_server_is_believed(hub: HubServer, client: Client, lie: str) -> None:
    """Nothing of what was refused is left in the cache where it would be taken for an answer."""
    if lie == "a file without an end":
        needs("huggingface_hub", "1.18", "goes on at the end of a file that is too long already")
    hub.lies.append({**LIES_TO_ALL, **LIES_TO_DOWNLOADS}[lie])
    client.refused(*READING["merge"], cwd=client.home)
    hub.lies.clear()
    client.works(*READING["merge"], cwd=client.home)
    assert json.loads((client.home / "out" / "loratool.json").read_text())["base"]["hub"].startswith("org/base@")


NAMES = [
    *("../x", "a/../../x", "/etc/x", "", ".", "..", "a//b", "a/./b", "a/", "/", "C:/x", "c:x", "a\\b", "\\\\host\\x"),
    *("a\0b", "a\nb", "a\x1b[2Jb", "a\x7fb", "a\x9bb", "\ud800", "x" * 300, "/".join(["x" * 200] * 20)),
]


@pytest.mark.parametrize("name", [*NAMES, 7, None, ["a"], {}, True])
def test_a_name_that_is_no_plain_relative_path_is_refused(name: object) -> None:
    """Absolute, upward, doubled, empty, with a drive, a backslash, a control character, too long, or no text at all."""
    with pytest.raises(HubError):
        files_of("org/x", [("config.json", 1, None, None), (name, 1, None, None)])


@pytest.mark.parametrize("name", ["a", "a/b.c", "ä ö/ü", "ab:c", ".gitattributes", "...", "a..b", "x" * 255, " "])
def test_a_name_that_a_repository_may_have_is_taken(name: str) -> None:
    """Git takes more names than most people use."""
    assert list(files_of("org/x", [(name, 1, None, None)])) == [name]


@pytest.mark.parametrize("size", [-1, 1 << 44, 1 << 70, 1.0, "1", True, [], {}])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    """A size is a whole number from 0 to the largest file that file systems take."""
    with pytest.raises(HubError):
        files_of("org/x", [("a", size, None, None)])


@pytest.mark.parametrize("digest", ["../x", "0" * 39, "Z" * 40, 7, ["0" * 40]])
def test_a_digest_that_is_none_is_refused(digest: object) -> None:
    """git's SHA-1 has 40 hexadecimal digits, SHA-256 has 64."""
    for entry in (("a", 1, digest, None), ("a", 1, None, digest)):
        with pytest.raises(HubError):
            files_of("org/x", [entry])


@pytest.mark.parametrize(
    "commit", ["main", "../../x", "0" * 39, "0" * 41, "0" * 40 + "\n", "A" * 40, "٠" * 40, 7, None]
)
def test_a_commit_is_40_hexadecimal_digits(commit: object) -> None:
    """Anything else is refused before it becomes a folder of the cache."""
    with pytest.raises(HubError):
        commit_of("org/x", commit)


@pytest.mark.parametrize(
    "revision", ["../x", "a/../../x", "/x", "a//b", ".x", "a/.x", "-x", "a b", "a\0", "a\nb", "a~1", "a^", "a\\b", "x."]
)
def test_a_revision_that_git_would_not_take_is_wrong_usage(revision: str) -> None:
    """It becomes the name of a file in the cache, and an adapter's config may bring it."""
    for operand in (f"org/name@{revision}", f"hf://org/name@{revision.replace('/', '%2F')}"):
        with pytest.raises(UsageError):
            parse(operand)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "a-b_c", "0" * 40, "über"])
def test_a_revision_that_git_takes_is_taken(revision: str) -> None:
    """Branches, tags, commits, and the references of pull requests."""
    place = parse(f"org/name@{revision}")
    assert place
    assert place.revision == revision


def test_an_adapter_s_config_cannot_lead_out_of_the_cache(hub: HubServer, client: Client, models: Path) -> None:
    """`base_model_name_or_path` and `revision` of a foreign config name the base "auto", and are held to the same."""
    config = json.loads((models / "adapter" / "adapter_config.json").read_text())
    folder = client.home / "adapter"
    folder.mkdir()
    for file in (models / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    evil = {**config, "base_model_name_or_path": "org/base", "revision": "../../../../evil"}
    (folder / "adapter_config.json").write_text(json.dumps(evil))
    hub.repos["org/base"].branches["../../../../evil"] = hub.repos["org/base"].branches["main"]
    told = client.refused("merge", "auto", folder, "-o", client.home / "out", code=2, cwd=client.home)
    assert "not a branch, tag or commit" in told
    assert not (client.home / "hub").exists()


PUSHING = {
    "an account that is no name": Lie("/whoami", change=lambda who: {**who, "name": "../../x"}),
    "a repository of another name": Lie("/repos/create", change=lambda made: {"url": "https://hf.co/../../../x"}),
    "a listing that leads out": Lie("/tree/", change=lambda tree: [*tree, {**tree[0], "path": "../../x"}]),
    "no listing": Lie("/tree/", change=lambda tree: {"a": 1}),
    "a next page on a disk": Lie("/tree/", headers={"Link": '<file:///etc/passwd>; rel="next"'}),
    "no batch": Lie("/objects/batch", change=lambda batch: {"objects": [{"oid": 1}]}),
    "an upload to a disk": Lie(
        "/objects/batch",
        change=lambda batch: {
            "objects": [{**each, "actions": {"upload": {"href": "file:///tmp/evil"}}} for each in batch["objects"]]
        },
    ),
    "parts of no size": Lie(
        "/objects/batch",
        change=lambda batch: {
            "objects": [
                {**each, "actions": {"upload": {"href": "http://localhost", "header": {"chunk_size": "0", "1": "x"}}}}
                for each in batch["objects"]
            ]
        },
    ),
    "a commit of another name": Lie("/commit/", change=lambda made: {**made, "commitOid": "../../x"}),
    "a wait for ever": Lie("/tree/", headers={"Retry-After": "99999999999"}),
}


@pytest.mark.parametrize("lie", PUSHING)
def test_a_lie_to_a_push_ends_it(hub: HubServer, client: Client, models: Path, tmp_path: Path, lie: str) -> None:
    """What a server says of accounts, repositories, listings, uploads and commits is checked as what it says of files."""
    before = outside(client, tmp_path)
    hub.lies.append(PUSHING[lie])
    client.refused("push", models / "adapter", "new", cwd=client.home)
    assert outside(client, tmp_path) == before
    assert not os.path.lexists("/tmp/evil")


def test_a_journal_of_a_stream_that_is_no_journal_counts_as_none(hub: HubServer, client: Client, models: Path) -> None:
    """The repository may hold anything under the journal's name."""
    plan = {"plan": "x", "finished": {"config.json": 7, "../../x": {"size": 1}, "model.safetensors": {"size": []}}}
    for number, content in enumerate([b"[" * 5000, json.dumps(plan).encode()]):
        repo = f"alice/new{number}"
        hub.add(repo, models / "adapter")
        hub.repos[repo].commit("main", {"loratool-stream.json": hub.blob(content)}, "x")
        words = ("merge", "org/base", "org/adapter", "--stream", "--push-to-hub", repo, "--overwrite")
        client.works(*words, cwd=client.home)
        assert "config.json" in hub.files(repo)


def test_what_a_server_warns_of_is_shown_as_text(hub: HubServer, client: Client, models: Path) -> None:
    """The Hub's client repeats warnings of a server, by its log and by Python's warnings: without what terminals obey."""
    evil = "\x1b[2J\x9b31m\u202eforged\u200b"
    hub.lies += [
        Lie("/validate-yaml", change=lambda _answer: {"warnings": [{"message": evil}]}),
        Lie("/api/", headers={"X-HF-Warning": "topic; \x9b31mforged"}),
    ]
    ran = client.works("push", models / "adapter", "alice/new", cwd=client.home)
    assert "forged" in ran.err
    shown = ran.err + ran.out
    assert [c for c in shown if c != "\n" and unicodedata.category(c) in ("Cc", "Cf")] == []


def test_a_record_in_a_subfolder_may_be_as_large_as_one_at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists digests of every tensor; a config of the same size is refused."""
    names = ("loratool.json", "unet/loratool.json", "config.json")
    remote = outline.Remote("org/model", OTHER_COMMIT, dict.fromkeys(names, RemoteFile(20 << 20, OTHER_COMMIT)))
    monkeypatch.setattr(outline, "read_range", lambda _remote, name: name.encode())
    for name in names[:2]:
        assert outline.read_small(remote, PurePath(name)) == name.encode()
    with pytest.raises(InputError, match=r"config\.json: is 20971520 bytes, over the limit"):
        outline.read_small(remote, PurePath("config.json"))
