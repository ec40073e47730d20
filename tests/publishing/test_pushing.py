"""What is sent to the Hub, what never is, and what is there after all that can go wrong on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import faults
import pytest
import torch
from dialect_samples import DIALECTS, gguf_of
from hub_server import READER, STRANGER, WRITER, Fault, HubServer, tokens_on_other_origins
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError
from loratool.files.journal import Journal
from loratool.publishing.selecting import select

if TYPE_CHECKING:
    from hub_client import Client

SHARDS, HIDDEN = 3, 64
SECRETS = {
    ".env": "HF_TOKEN=x",
    "prod.env": "x",
    "token": "x",
    "id_rsa": "x",
    "server.pem": "x",
    "credentials.json": "{}",
    "hf_token.json": "{}",
    "token.json": "{}",
    "client_secret.json": "{}",
    "aws_credentials.json": "{}",
    "my_api_key.txt": "x",
    "passwords.txt": "x",
    ".ssh/id_ed25519": "x",
    ".cache/huggingface/token": "x",
}
LEFT_BY_TRAINING = {
    "optimizer.pt": "x",
    "optimizer.safetensors": "x",
    "rng_state.pth": "x",
    "scheduler.pt": "x",
    "trainer_state.json": "{}",
    "training_args.bin": "x",
    "checkpoint-5/adapter_model.safetensors": "x",
    "last-checkpoint/config.json": "{}",
    "tmp-checkpoint-5/config.json": "{}",
    "pytorch_model_fsdp_0/meta.json": "{}",
    "runs/events.out.tfevents.1.2": "x",
    "__pycache__/a.pyc": "x",
}
UNFINISHED = {"model-00001-of-00003.safetensors.partial": "x", "x.incomplete": "x", "a.lock": "x", "b.tmp": "x"}
CACHES = {"datasets_cache/a.json": "{}", "venv/lib/a.py": "x"}
OTHERS = {"notes.docx": "x", "data.csv": "1,2", "pytorch_model.bin": "x", "original/model.pth": "x"}
SENT = {
    "tokenizer.json": "{}",
    "added_tokens.json": "{}",
    "special_tokens_map.json": "{}",
    "tokens.txt": "a",
    "LICENSE": "terms",
    "extra/notes.txt": "hello, world\n",
    "modeling_own.py": "x = 1\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    faults.make_base(home / "model", shards=SHARDS, hidden=HIDDEN)
    faults.make_adapter(home / "adapter", layers=SHARDS, hidden=HIDDEN, rank=4)
    for folder in (home / "model", home / "adapter"):
        for name, text in {**SECRETS, **LEFT_BY_TRAINING, **UNFINISHED, **CACHES, **OTHERS, **SENT}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    for name in ("pytorch_model.bin", "original/model.pth"):
        (home / "adapter" / name).unlink()  # beside an adapter they count as trained with it, and a merge refuses them
    (home / "model" / "passwd").symlink_to("/etc/passwd")
    return home


def wanted(folder: Path) -> dict[str, bytes]:
    """What a push of one of the models has to bring: by hand, not by the code's own rules."""
    names = {*SENT, "README.md", "config.json", "model.safetensors.index.json", "adapter_config.json"}
    names |= {path.name for path in folder.glob("model-*.safetensors")} | {"adapter_model.safetensors"}
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def held(hub: HubServer, name: str, branch: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.files(name, branch).items() if path != ".gitattributes"}


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_push_brings_the_model_and_nothing_else(hub: HubServer, client: Client, models: Path, kind: str) -> None:
    ran = client.works("push", models / kind, "alice/new", "--json")
    report = json.loads(ran.out)
    assert held(hub, "alice/new") == wanted(models / kind)
    assert hub.repos["alice/new"].private
    assert report["private"]
    assert report["kind"] == kind
    assert report["files"] == {name: len(content) for name, content in wanted(models / kind).items()}
    assert tokens_on_other_origins(hub) == []


def test_pushing_again_sends_nothing(hub: HubServer, client: Client, models: Path) -> None:
    client.works("push", models / "model", "alice/new")
    hub.log.clear()
    ran = client.works("push", models / "model", "alice/new")
    assert "nothing; all files were already there" in ran.out
    assert [r for r in hub.log if r.method in ("PUT", "POST")] == []
    assert len(hub.repos["alice/new"].messages) == 2  # that of the server, and the push


def test_after_a_change_only_what_changed_is_sent(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "model", tmp_path / "model", symlinks=True)
    client.works("push", tmp_path / "model", "alice/new")
    (tmp_path / "model" / "tokenizer.json").write_text('{"a": 1}')
    hub.log.clear()
    report = json.loads(client.works("push", tmp_path / "model", "alice/new", "--json", "-m", "Better words").out)
    assert report["uploaded"] == ["tokenizer.json"]
    assert hub.asked("PUT", "") == []
    assert hub.repos["alice/new"].messages[-1] == "Better words"
    assert held(hub, "alice/new") == wanted(tmp_path / "model")


def test_the_old_weights_go_with_the_commit_that_brings_others(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    """A loader would take a left model.safetensors for the model."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(models / "model" / "model-00001-of-00003.safetensors", old / "model.safetensors")
    (old / "kept.txt").write_text("mine")
    hub.add("alice/new", old)
    report = json.loads(client.works("push", models / "model", "alice/new", "--json").out)
    assert report["replaced"] == ["model.safetensors"]
    assert held(hub, "alice/new") == {**wanted(models / "model"), "kept.txt": b"mine"}


def test_a_model_is_not_pushed_next_to_an_adapter(hub: HubServer, client: Client, models: Path) -> None:
    """transformers loads the model of a repository with the adapter that is in it, so a merged one would be changed twice.

    An adapter is pushed next to a model, with a note.
    """
    client.works("push", models / "adapter", "alice/new")
    before = held(hub, "alice/new")
    said = client.refused("push", models / "model", "alice/new", code=2)
    assert "alice/new contains an adapter (adapter_config.json)" in said
    assert "another repository" in said
    assert held(hub, "alice/new") == before
    words = ("merge", models / "model", models / "adapter", "-o", client.home / "merged", "--push-to-hub", "alice/new")
    assert "alice/new contains an adapter" in client.refused(*words, code=2)
    assert not (client.home / "merged").exists()  # found out before any work
    client.works("push", models / "model", "alice/base")
    report = json.loads(client.works("push", models / "adapter", "alice/base", "--json").out)
    assert "model-in-repo" in {note["code"] for note in report["notes"]}
    assert held(hub, "alice/base").keys() >= {"config.json", "adapter_config.json"}


def test_an_adapter_with_values_that_are_not_finite_is_pushed_with_a_warning(models: Path, tmp_path: Path) -> None:
    """Whoever downloads it can do nothing with it."""
    broken = shutil.copytree(models / "adapter", tmp_path / "adapter", symlinks=True)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    notes = {note.code: note for note in loratool.push(broken, "alice/new", dry_run=True).notes}
    assert f"{name} contains NaN or infinite values" in str(notes["adapter-not-finite"])
    assert notes["adapter-not-finite"].is_warning
    sound = loratool.push(models / "adapter", "alice/new", dry_run=True)
    assert "adapter-not-finite" not in {note.code for note in sound.notes}


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_dry_run_tells_what_would_be_sent_and_asks_nobody(
    hub: HubServer, client: Client, models: Path, kind: str
) -> None:
    client.token = None
    report = json.loads(client.works("push", models / kind, "alice/new", "--dry-run", "--json").out)
    assert hub.log == []
    assert report["files"] == {name: len(content) for name, content in wanted(models / kind).items()}
    text = client.works("push", models / kind, "alice/new", "--dry-run").out
    for name in ("optimizer.pt", ".env", "notes.docx", "token", "a.lock"):
        assert f"left out           {name} (" in text or f"left out            {name} (" in text, text
    assert "would be pushed to" in text
    assert "training_args.bin (left by training)" in text


def test_secrets_are_not_to_be_had_by_including_them(models: Path) -> None:
    found = select(models / "model", ["*"], [], False, "alice/new")
    names = {upload.name for upload in found.uploads}
    assert names == set(wanted(models / "model")) | {
        "notes.docx",
        "data.csv",
        "pytorch_model.bin",
        "original/model.pth",
    }
    assert not names & {*SECRETS, *LEFT_BY_TRAINING, *UNFINISHED, *CACHES, "passwd"}
    assert len(set(found.left_out)) == len(found.left_out)


def test_a_model_that_nobody_described_is_no_adapter(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "model", tmp_path / "model", symlinks=True)
    (tmp_path / "model" / "README.md").unlink()
    client.works("push", tmp_path / "model", "plain")
    text = held(hub, "alice/plain")["README.md"].decode()
    assert "adapter" not in text
    assert "peft" not in text
    assert 'library_name: "transformers"' in text
    assert 'place = "alice/plain"\nmodel = AutoModel.from_pretrained(place)' in text


def test_the_card_of_a_result_loads_it_from_where_it_was_pushed(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink()
    words = ("resize", tmp_path / "adapter", "-o", tmp_path / "small", "--rank", "2", "--push-to-hub", "small")
    client.works(*words)
    here, there = (tmp_path / "small" / "README.md").read_text(), held(hub, "alice/small")["README.md"].decode()
    assert 'place = "."  # this folder, or the repository\'s id\n' in here
    named = here.replace('"."  # this folder, or the repository\'s id', '"alice/small"')
    picture = "## Spectrum\n\n![Singular values of the update by kind of module, on a logarithmic scale](loratool-spectrum.svg)\n"
    assert there == named.replace("\n## Usage\n", f"\n{picture}\n## Usage\n")
    svg = held(hub, "alice/small")["loratool-spectrum.svg"]
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    listed = json.loads(held(hub, "alice/small")["loratool.json"])["files"]["loratool-spectrum.svg"]
    assert listed["size"] == len(svg)
    assert not (tmp_path / "small" / "loratool-spectrum.svg").exists()
    hub.log.clear()
    assert "nothing; all files were already there" in client.works("push", tmp_path / "small", "alice/small").out
    (tmp_path / "small" / "README.md").write_text('# mine\nplace = "."\n')
    client.works("push", tmp_path / "small", "alice/small")
    assert held(hub, "alice/small")["README.md"] == b'# mine\nplace = "."\n'


def test_a_model_pushed_over_a_streaming_merge_ends_it(hub: HubServer, client: Client, models: Path) -> None:
    files = models / "adapter" / "extra"
    hub.add("alice/new", files)
    repo = hub.repos["alice/new"]
    repo.commit("main", {"loratool-stream.json": hub.blob(b"{}")}, "Start a merge with loratool")
    client.works("push", models / "model", "alice/new")
    assert held(hub, "alice/new") == wanted(models / "model")


def test_a_base_that_is_a_folder_of_this_machine_is_told(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    for base, told in (("/srv/mine/base", True), ("org/base", False)):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
        notes = select(tmp_path / "adapter", [], [], False, "alice/new").notes
        assert any("/srv/mine/base" in note for note in map(str, notes)) is told


def test_include_and_exclude(hub: HubServer, client: Client, models: Path) -> None:
    client.works(
        "push", models / "model", "alice/new", "--include", "*.csv", "--exclude", "extra/*", "--exclude", "*.py"
    )
    expected = {**wanted(models / "model"), "data.csv": b"1,2"}
    del expected["extra/notes.txt"], expected["modeling_own.py"]
    assert held(hub, "alice/new") == expected
    told = client.refused("push", models / "model", "alice/new", "--exclude", "*.safetensors", code=2)
    assert "but a model needs it" in told


@pytest.mark.parametrize("what", ["nothing", "text", "pickle", "half", "file", "partial"])
def test_what_is_no_model_and_no_adapter_is_refused(models: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "x"
    shutil.copytree(models / "adapter", folder)
    if what in ("nothing", "text", "pickle"):
        shutil.rmtree(folder)
        folder.mkdir()
    if what == "text":
        (folder / "README.md").write_text("# hello")
    if what == "pickle":
        (folder / "pytorch_model.bin").write_text("x")
    if what == "half":
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    if what == "partial":
        (folder / "journal").write_bytes(Journal("x").head())
    with pytest.raises(InputError):
        select(folder / "README.md" if what == "file" else folder, [], [], False, "alice/new")


def test_public_is_asked_for(hub: HubServer, client: Client, models: Path) -> None:
    client.works("push", models / "adapter", "alice/shown", "--public")
    assert not hub.repos["alice/shown"].private
    ran = client.works("push", models / "adapter", "alice/shown")
    assert "is public, so everyone can see" in ran.out


def test_a_name_alone_is_a_repository_of_the_token_s_account(hub: HubServer, client: Client, models: Path) -> None:
    client.works("push", models / "adapter", "mine")
    assert "alice/mine" in hub.repos
    assert "not a valid repository name" in client.refused("push", models / "adapter", "a/b/c", code=2)


def test_a_branch_is_made_where_it_is_missing(hub: HubServer, client: Client, models: Path) -> None:
    client.works("push", models / "adapter", "alice/new", "--revision", "v2")
    assert held(hub, "alice/new") == {}
    assert held(hub, "alice/new", "v2") == wanted(models / "adapter")


def test_a_pull_request_leaves_main_as_it_was(hub: HubServer, client: Client, models: Path) -> None:
    report = json.loads(
        client.works("push", models / "adapter", "org/theirs", "--create-pr", "-m", "Try", "--json").out
    )
    assert held(hub, "org/theirs") == {}
    assert held(hub, "org/theirs", "refs/pr/1") == wanted(models / "adapter")
    assert report["pull_request"].endswith("/org/theirs/discussions/1")
    assert hub.repos["org/theirs"].pulls == {1: "Try"}


@pytest.mark.parametrize(
    ("token", "repo", "told"),
    [
        (None, "alice/new", "hf auth login"),
        (READER, "alice/new", "is read-only"),
        (STRANGER, "alice/new", "may not do this"),
        ("hf_wrongwrongwrongwrong", "alice/new", "the token is not valid"),
        (STRANGER, "alice/there", "no such repository on the Hub that you may read|may not do this"),
        (STRANGER, "alice/open", "may not do this"),
    ],
)
def test_who_may_not_push_is_told_what_to_do(
    hub: HubServer, client: Client, models: Path, token: str | None, repo: str, told: str
) -> None:
    hub.add("alice/there", models / "adapter" / "extra", private=True)
    hub.add("alice/open", models / "adapter" / "extra")
    client.token = token
    message = client.refused("push", models / "adapter", repo)
    assert any(part in message for part in told.split("|")), message


def test_a_card_that_the_hub_refuses_is_told(hub: HubServer, client: Client, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nbase_model: /srv/mine/base\n---\n")
    told = client.refused("push", tmp_path / "adapter", "alice/new")
    assert "base_model is no id" in told
    assert held(hub, "alice/new") == {}


def test_a_large_file_is_sent_as_lfs_by_itself_and_arrives(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.lfs_from = 10_000_000
    faults.make_base(tmp_path / "big", shards=1, hidden=1536)
    (file,) = (tmp_path / "big").glob("*.safetensors")
    assert file.stat().st_size > 10_000_000
    hub.faults.append(Fault("PUT", "^/lfs/", cut=5_000_000))  # the line drops in the middle, once
    client.works("push", tmp_path / "big", "alice/big")
    assert [r.received for r in hub.asked("PUT", "^/lfs/")][-1] == file.stat().st_size
    assert held(hub, "alice/big")[file.name] == file.read_bytes()
    hub.log.clear()
    client.works("push", tmp_path / "big", "alice/big")
    assert hub.asked("PUT", "") == []


FAULTS = {
    "500 on whoami": [Fault("GET", "whoami", status=500)],
    "503 on info": [Fault("GET", "^/api/models/alice/new$", status=503)],
    "502 on create": [Fault("POST", "/repos/create", status=502)],
    "429 on preupload": [Fault("POST", "/preupload/", status=429, headers={"Retry-After": "1"})],
    "500 on batch": [Fault("POST", "/objects/batch", status=500)],
    "dropped upload": [Fault("PUT", "^/lfs/", cut=10_000, skip=1)],
    "503 on commit": [Fault("POST", "/commit/", status=503)],
    "lost commit": [Fault("POST", "/commit/", lost=True)],
    "lost create": [Fault("POST", "/repos/create", lost=True)],
    "dropped listing": [Fault("GET", "/tree/", cut=3)],
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_that_pass_end_in_one_whole_commit(hub: HubServer, client: Client, models: Path, case: str) -> None:
    hub.faults += [
        Fault(f.method, f.pattern, f.times, f.skip, f.status, f.headers, f.cut, f.lost) for f in FAULTS[case]
    ]
    client.works("push", models / "model", "alice/new")
    assert [fault.times for fault in hub.faults] == [0] * len(hub.faults)
    assert held(hub, "alice/new") == wanted(models / "model")
    assert len(hub.repos["alice/new"].messages) == 2


def test_a_fault_that_stays_is_told_and_the_next_run_goes_on(
    hub: HubServer, client: Client, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.append(Fault("POST", "/commit/", times=99, status=403, headers={"X-Error-Message": "quota"}))
    assert "quota" in client.refused("push", models / "model", "alice/new")
    hub.faults.clear()
    hub.log.clear()
    client.works("push", models / "model", "alice/new")
    assert hub.asked("PUT", "") == []  # the objects were there already
    assert held(hub, "alice/new") == wanted(models / "model")


def test_what_arrives_as_something_else_is_found(hub: HubServer, client: Client, models: Path) -> None:
    sha256 = hashlib.sha256((models / "model" / "model-00002-of-00003.safetensors").read_bytes()).hexdigest()
    hub.objects[sha256] = b"something else, which the server takes for it"
    told = client.refused("push", models / "model", "alice/new", code=5)
    assert "model-00002-of-00003.safetensors: different content" in told


def test_killed_at_any_moment_and_run_again_ends_in_the_same_state(
    hub: HubServer, client: Client, models: Path
) -> None:
    hub.slow = 0.03
    client.works("push", models / "model", "alice/reference")
    requests = len(hub.log)
    killed, stages = 0, set()
    for number in range(0, requests, 2):
        name = f"alice/killed{number}"
        hub.objects.clear()
        before = len(hub.log)
        pid = client.begin("push", models / "model", name)
        until = time.monotonic() + 20
        while len(hub.log) <= before + number and time.monotonic() < until:
            time.sleep(0.002)
        client.kill(pid, signal.SIGKILL)
        killed += client.end().code == -signal.SIGKILL
        stages.add((name in hub.repos, len(hub.objects), bool(name in hub.repos and held(hub, name))))
        if name in hub.repos and held(hub, name):
            assert held(hub, name) == held(hub, "alice/reference")  # whole or not at all
        client.works("push", models / "model", name)
        assert held(hub, name) == held(hub, "alice/reference") == wanted(models / "model")
        assert len(hub.repos[name].messages) == 2
    assert killed >= requests / 8
    assert len(stages) >= 3


def test_interrupted_is_told_with_how_to_go_on(hub: HubServer, client: Client, models: Path) -> None:
    hub.slow = 2
    pid = client.begin("push", models / "model", "alice/new")
    until = time.monotonic() + 20
    while not hub.asked("PUT", "") and time.monotonic() < until:
        time.sleep(0.01)
    client.kill(pid, signal.SIGINT)
    ran = client.end()
    assert ran.code == 130
    assert "run the same command again to continue" in ran.err


def test_interrupted_after_the_output_was_written_is_told_so(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    hub.slow = 2
    words = ("resize", models / "adapter", "-o", tmp_path / "small", "--rank", "2", "--push-to-hub", "alice/small")
    pid = client.begin(*words)
    until = time.monotonic() + 20
    while not hub.asked("PUT", "") and time.monotonic() < until:
        time.sleep(0.01)
    client.kill(pid, signal.SIGINT)
    ran = client.end()
    assert ran.code == 130
    assert "nothing was written" not in ran.err
    assert f"small is complete; to continue, run `loratool push {tmp_path / 'small'} alice/small`." in ran.err
    hub.slow = 0
    client.works("push", tmp_path / "small", "alice/small")


def test_commands_that_write_can_push_what_they_wrote(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    ran = client.works(
        "merge",
        models / "model",
        models / "adapter",
        "-o",
        tmp_path / "out",
        "--push-to-hub",
        "alice/m",
        "--public",
        "--json",
    )
    report = json.loads(ran.out)
    assert report["pushed"]["repo"] == "alice/m"
    assert not hub.repos["alice/m"].private
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(wanted(tmp_path / "out")) | {"loratool.json"} == set(held(hub, "alice/m"))
    assert names - set(held(hub, "alice/m")) <= {*SECRETS, *LEFT_BY_TRAINING, *UNFINISHED, *CACHES, *OTHERS}
    client.works("resize", models / "adapter", "-o", tmp_path / "small", "--rank", "2", "--push-to-hub", "alice/small")
    words = ["extract", models / "model", tmp_path / "out", "-o", tmp_path / "back", "--push-to-hub", "alice/back"]
    client.works(*words, "--rank", "4")
    for repo in ("alice/small", "alice/back"):
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(held(hub, repo))


LIBRARY = """
import json, sys
import loratool
home, out, command, *words = sys.argv[1:]
operands = {
    "merge": [f"{home}/model", f"{home}/adapter"],
    "combine": [[f"{home}/adapter", f"{home}/adapter"]],
    "extract": [f"{home}/model", f"{home}/tuned"],
}.get(command, [f"{home}/adapter"])
report = getattr(loratool, command)(*operands, out, push_to_hub="alice/made", **json.loads(words[0]))
print(json.dumps(report.to_dict()))
"""
WRITERS: dict[str, dict[str, object]] = {
    "merge": {"exclude": ["tokens.txt"], "device": "cpu"},
    "rescale": {"scale": 0.5},
    "resize": {"rank": 2, "device": "cpu"},
    "combine": {"device": "cpu"},
    "extract": {"rank": 4, "device": "cpu"},
}


@pytest.mark.parametrize("command", WRITERS)
def test_functions_of_the_library_push_what_they_wrote(
    hub: HubServer, client: Client, models: Path, tmp_path: Path, command: str
) -> None:
    """`push_to_hub=` and `public=` are what the options are: the repository holds the output, and the report says so."""
    home, out = tmp_path / "home", tmp_path / "out"
    shutil.copytree(models, home)
    if command == "extract":
        client.works("merge", home / "model", home / "adapter", "-o", home / "tuned")
    ran = client.program(LIBRARY, home, out, command, json.dumps({"public": True, **WRITERS[command]}))
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["pushed"]["repo"] == "alice/made"
    assert not hub.repos["alice/made"].private
    there = held(hub, "alice/made")
    assert set(report["pushed"]["files"]) == set(there)
    ours = {
        "README.md",
        "loratool.json",
        "loratool-spectrum.svg",
    }  # a card of ours names the repository, and has a picture
    own = ours if command == "extract" else set()
    assert all((out / name).read_bytes() == content for name, content in there.items() if name not in own)
    assert not own or b"alice/made" in there["README.md"]
    assert command != "merge" or "tokens.txt" not in there


@pytest.mark.parametrize("command", WRITERS)
def test_the_library_finds_out_before_any_work_that_a_push_is_not_possible(
    client: Client, models: Path, tmp_path: Path, command: str
) -> None:
    client.token = None
    ran = client.program(LIBRARY, models, tmp_path / "out", command, json.dumps(WRITERS[command]))
    assert ran.code == 1
    assert "loratool.errors.HubError" in ran.err
    assert "hf auth login" in ran.err
    assert not (tmp_path / "out").exists()


def test_without_a_token_nothing_is_merged_for_a_push_in_vain(client: Client, models: Path, tmp_path: Path) -> None:
    client.token = None
    words = ("merge", models / "model", models / "adapter", "-o", tmp_path / "out", "--push-to-hub", "alice/m")
    assert "hf auth login" in client.refused(*words)
    assert not (tmp_path / "out").exists()
    client.works(*words, "--dry-run")


def test_a_push_that_fails_after_a_merge_tells_where_the_output_is(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    hub.faults.append(Fault("POST", "/repos/create", times=99, status=403))
    words = ("merge", models / "model", models / "adapter", "-o", tmp_path / "out", "--push-to-hub", "alice/m")
    told = client.refused(*words)
    assert "is complete; to continue, run `loratool push" in told
    assert (tmp_path / "out" / "loratool.json").exists()


def test_a_bug_s_traceback_shows_no_token(client: Client, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loratool import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "loratool.inspecting.inspect.inspect",
            lambda *_, **__: (_ for _ in ()).throw(RuntimeError(f"Bearer {WRITER}")),
        )
        assert cli.run(["inspect", str(models / "adapter"), "-v"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert WRITER not in shown
    assert "<TOKEN>" in shown


def test_a_single_file_is_refused_with_the_commands_that_push_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's and a merged model's, the latter with its record; each is then a folder that can be pushed."""
    module = "lora_unet_mid_block_attn_to_q"
    factors = {f"{module}.lora_down.weight": torch.ones(2, 4), f"{module}.lora_up.weight": torch.ones(6, 2)}
    save_file(factors, tmp_path / "lora.safetensors")
    save_file({"unet.mid_block.attn.to_q.weight": torch.ones(6, 4)}, tmp_path / "base.safetensors")
    merged = tmp_path / "merged.safetensors"
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", merged, device="cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.gguf").write_bytes(gguf_of(DIALECTS["gguf"].tensors))
    for name, kind, files in (
        ("chat.gguf", "adapter", {"README.md", "loratool-spectrum.svg", "chat.gguf"}),
        ("lora.safetensors", "adapter", {"README.md", "loratool-spectrum.svg", "lora.safetensors"}),
        ("merged.safetensors", "model", {"README.md", "merged.safetensors", "merged.safetensors.loratool.json"}),
    ):
        with pytest.raises(InputError, match="put the file into one of its own") as caught:
            select(Path(name), [], [], False, "me/style")
        commands = caught.value.hint
        assert commands.endswith(f"&& loratool push {Path(name).stem} me/style")
        subprocess.run(commands.rpartition(" && ")[0], shell=True, check=True)
        chosen = select(Path(Path(name).stem), [], [], False, "me/style")
        assert (chosen.kind, {upload.name for upload in chosen.uploads}) == (kind, files)
