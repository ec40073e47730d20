"""Secrets in what is about to be published: found by the whole shape of their kind, named by file and line, never shown.

The values here are made at random, in the lengths and alphabets that their issuers document; no file of this
repository holds one.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
from hub_client import Client
from hub_server import WRITER, HubServer
from safetensors.torch import load_file, save_file

from loratool.errors import InputError, UsageError
from loratool.provenance.secrets import OVERLAP, secrets_in, without_secrets
from loratool.publishing.selecting import select

CHANCE = random.Random(11)
LETTERS, ALNUM, HEX = string.ascii_letters, string.ascii_letters + string.digits, "0123456789abcdef"
WEB, UPPER = ALNUM + "-_", string.ascii_uppercase + "234567"


def some(characters: str, count: int) -> str:
    return "".join(CHANCE.choice(characters) for _ in range(count))


def segment(count: int) -> str:
    return base64.urlsafe_b64encode(CHANCE.randbytes(count)).decode().rstrip("=")


def pem(title: str, end: str = "\n") -> str:
    body = base64.b64encode(CHANCE.randbytes(96)).decode()
    lines = [f"-----BEGIN {title}-----", body[:64], body[64:], f"-----END {title}-----"]
    return end.join(lines)


# kind → a value of it. Written in two parts, so that no scanner takes this file for a leak.
VALUES: dict[str, str] = {
    "hugging face": "hf_" + some(LETTERS, 34),
    "hugging face with digits": "hf_" + some(ALNUM, 34),
    "hugging face oauth": "hf_oauth_" + "eyJ" + f"{segment(20)}.eyJ{segment(30)}.{segment(32)}",
    "openai of a project": "sk-proj-" + f"{some(WEB, 74)}T3BlbkFJ{some(WEB, 74)}",
    "openai, old": "sk-" + f"{some(ALNUM, 20)}T3BlbkFJ{some(ALNUM, 20)}",
    "sk with 48": "sk-" + some(ALNUM, 48),
    "anthropic": "sk-ant-api03-" + some(WEB, 93) + "AA",
    "github": "ghp_" + some(ALNUM, 36),
    "github of an app": "ghs_" + some(ALNUM, 36),
    "github, fine-grained": "github_pat_" + f"{some(ALNUM, 22)}_{some(ALNUM, 59)}",
    "gitlab": "glpat-" + some(WEB, 20),
    "aws": "AKIA" + some(UPPER, 16),
    "aws secret": "aws_secret_access_key = " + some(ALNUM + "/+", 40),
    "google": "AIza" + some(WEB, 35),
    "slack": "xoxb-" + f"{some(string.digits, 12)}-{some(string.digits, 12)}-{some(ALNUM, 24)}",
    "weights & biases": "WANDB_API_KEY=" + some(HEX, 40),
    "npm": "npm_" + some(ALNUM, 36),
    "a web token": "eyJ" + f"{segment(20)}.eyJ{segment(40)}.{segment(32)}",
    "a private key": pem("PRIVATE KEY"),
    "an openssh key": pem("OPENSSH PRIVATE KEY"),
    "a pgp key": pem("PGP PRIVATE KEY BLOCK", "\n\n"),
    "a key on one line": pem("RSA PRIVATE KEY", "\\n"),
    "credentials": "https://" + "alice:" + f"{some(ALNUM, 12)}@example.org/repo.git",
    "credentials of a database": "postgres://" + "alice:" + f"{some(ALNUM, 12)}@db.example.org:5432/x",
    "a signed address": "https://x.s3.amazonaws.com/y?X-Amz-Signature=" + some(HEX, 64),
}
HARMLESS: dict[str, str] = {
    "prefixes": 'the tokens "hf_", "sk-", "ghp_", "github_pat_", "AKIA", "ASIA", "AIza", "xoxb-", "npm_", "eyJ" and "://"',
    "too short": "hf_" + some(LETTERS, 33) + " ghp_" + some(ALNUM, 35) + " AKIA" + some(UPPER, 15),
    "too long": "hf_" + some(LETTERS, 35) + " ghp_" + some(ALNUM, 37) + " AKIA" + some(UPPER, 17),
    "inside a word": "x" + "hf_" + some(LETTERS, 34) + " FAKIA" + some(UPPER, 16),
    "another alphabet": "hf_" + "a-b." * 8 + "xy AKIA" + some(string.ascii_lowercase, 16),
    "words": "scikit-learn sk-learn-style-estimators hf_transfer hf_hub_download_with_a_long_name_of_words",
    "a header in prose": "A line of -----BEGIN PRIVATE KEY----- begins a key, and -----END PRIVATE KEY----- ends it.",
    "a header as a token": json.dumps({"-----BEGIN RSA PRIVATE KEY-----": 3, "-----END RSA PRIVATE KEY-----": 4}),
    "a public key": pem("PUBLIC KEY") + pem("CERTIFICATE"),
    "placeholders": "https://user:password@host https://user:$TOKEN@host https://user:<token>@host http://a:***@b",
    "addresses": "https://example.org:8080/a@b mailto:a@b.c git@github.com:org/repo.git https://alice@example.org",
    "a hash": some(HEX, 40) + " " + some(HEX, 64),
    "a variable": "HF_TOKEN=${HF_TOKEN} WANDB_API_KEY= aws_secret_access_key=...",
}


def lines_of(text: str | bytes) -> list[int]:
    return sorted({line for line, _ in secrets_in([text.encode() if isinstance(text, str) else text])})


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda value: value,
        lambda value: f"a = '{value}'\nb",
        lambda value: json.dumps({"a": [value]}, indent=1),
        lambda value: json.dumps(json.dumps({"a": value})),
        lambda value: f"{'x' * 10}: {value}, {value}\n",
    ],
    ids=["bare", "quoted", "JSON", "JSON in JSON", "twice"],
)
def test_each_kind_is_found_wherever_it_stands(kind: str, wrap: Callable[[str], str]) -> None:
    """A value of every kind alone, between quotes, in JSON, in JSON within JSON as notebooks have it, and in a line."""
    assert lines_of(f"first\nsecond\n{wrap(VALUES[kind])}\nlast\n")[0] >= 3
    assert lines_of(wrap(VALUES[kind]).encode("utf-16"))


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_has_only_the_beginning_of_a_shape_passes(kind: str) -> None:
    """Prefixes, wrong lengths, wrong alphabets, words, headers without a key, placeholders."""
    assert lines_of(f"{HARMLESS[kind]}\n") == []


@pytest.mark.parametrize("offset", [*range(-60, 8), -OVERLAP, -OVERLAP + 20, -OVERLAP - 20])
def test_parts_of_a_file_hide_nothing_and_invent_nothing(offset: int) -> None:
    """A value across the border of two parts is found once, in its line; a longer word that a border cuts is none."""
    size = 3 * OVERLAP
    for value, expected in ((VALUES["hugging face"], [7]), (VALUES["hugging face"] + "x" * 9, [])):
        text = b"\n" * 6 + b"." * (size + offset - 6) + b" " + value.encode() + b" " + b"." * size + b"\n"
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        assert [line for line, _ in secrets_in(parts)] == expected


def test_a_redacted_text_says_what_was_there() -> None:
    """The rest of it stays as it is."""
    text = f"merge ./a {VALUES['hugging face']} -w 1 {VALUES['credentials']} 'ä'"
    redacted = without_secrets(text)
    assert redacted.startswith("merge ./a <an access token of Hugging Face> -w 1 https<")
    assert redacted.endswith("/repo.git 'ä'")
    assert lines_of(redacted) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    faults.make_base(home / "model", shards=2, hidden=64)
    faults.make_adapter(home / "adapter", layers=2, hidden=64, rank=4)
    for folder in (home / "model", home / "adapter"):
        (folder / "README.md").write_text("# mine\n")
        (folder / "loratool.json").write_text("{}")
    return home


def put(path: Path, value: str) -> None:
    """A secret in a file of its kind, so that the file stays what it is."""
    if path.suffix == ".safetensors":
        save_file(load_file(path), path, metadata={"ss_command": f"train --token {value}"})
    elif path.suffix in (".json", ".ipynb") and path.name != "tokenizer.json":
        table = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**table, "note": value}, indent=1))
    elif path.name == "tokenizer.json":  # a large one
        path.write_text(json.dumps({"vocab": {f"token{n}": n for n in range(200_000)}, "x": value}, indent=0))
    else:
        path.write_text(f"{path.read_text() if path.exists() else ''}one\n{value}\n")


FILES = (
    *("README.md", "loratool.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"),
    *("run.yaml", "own.py", "extra/deep.json", "notebook.ipynb", "data.csv"),
)
CASES = [
    *(("model", name) for name in (*FILES, "config.json", "model-00002-of-00002.safetensors")),
    *(("adapter", name) for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "loratool.json")),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_secret_in_any_file_that_would_be_sent_is_refused(models: Path, tmp_path: Path, kind: str, name: str) -> None:
    """Configs, cards, provenance, tokenizers, templates, code, notebooks, headers of weights: refused with file and line,
    never with the value; --allow-secret and, where the model can do without the file, --exclude let the push go on."""
    folder = copy(models / kind, tmp_path / "x")
    (folder / name).parent.mkdir(exist_ok=True)
    for value in (VALUES["hugging face"], VALUES["a key on one line"]):
        put(folder / name, value)
        with pytest.raises(InputError) as caught:
            select(folder, ["*.ipynb", "*.csv"], [], False, "alice/new")
        told = str(caught.value)
        assert f"{name}, line " in told
        assert "a private key" in told or "token of Hugging Face" in told
        assert value not in told
        assert value[8:30] not in told
        assert "--exclude" in told
        assert "--allow-secret" in told
    allowed = select(folder, ["*.ipynb", "*.csv"], [], False, "alice/new", [name])
    assert name in {upload.name for upload in allowed.uploads}
    assert [note.code for note in allowed.notes].count("secret-allowed") >= 1
    if name.endswith(".safetensors") or name in ("config.json", "adapter_config.json"):
        return  # what the model cannot do without cannot be left out
    left = select(folder, ["*.ipynb", "*.csv"], [name], False, "alice/new")
    assert name not in {upload.name for upload in left.uploads}


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_the_line_is_the_one_that_an_editor_shows(models: Path, tmp_path: Path) -> None:
    """Counted from 1; of a file with many, five lines are named and the others counted."""
    folder = copy(models / "adapter", tmp_path / "x")
    (folder / "notes.txt").write_text("a\nb\n" + f"{VALUES['github']}\n" * 9)
    with pytest.raises(InputError) as caught:
        select(folder, [], [], False, "alice/new")
    named = [line.split(": ")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert named == [*(f"notes.txt, line {n}" for n in range(3, 8)), "notes.txt, further lines"]
    assert "a token of GitHub ×4" in str(caught.value)


def test_a_secret_in_the_message_of_the_commit_is_wrong_usage(models: Path) -> None:
    """The history of a repository shows it for good."""
    from loratool import push, stream

    with pytest.raises(UsageError, match="commit message"):
        push(models / "adapter", "alice/new", message=f"now with {VALUES['npm']}", dry_run=True)
    with pytest.raises(UsageError, match="commit message"):
        stream(models / "model", models / "adapter", "alice/new", message=VALUES["npm"], dry_run=True)


def test_push_sends_nothing_until_it_is_told_that_it_is_no_secret(hub: HubServer, models: Path, tmp_path: Path) -> None:
    """By the command line and the real client: refused before anybody is asked, and each way out works."""
    client = Client(hub, tmp_path / "home", WRITER)
    folder = copy(models / "adapter", tmp_path / "x")
    put(folder / "notes.txt", VALUES["aws"])
    told = client.refused("push", folder, "alice/new", code=3)
    assert "notes.txt, line 2: an access key of AWS" in told
    assert VALUES["aws"] not in told
    assert hub.log == []
    client.works("push", folder, "alice/without", "--exclude", "notes.txt")
    assert "notes.txt" not in hub.files("alice/without")
    client.works("push", folder, "alice/with", "--allow-secret", "notes.txt")
    assert VALUES["aws"].encode() in hub.files("alice/with")["notes.txt"]


@pytest.mark.parametrize("way", ["--push-to-hub", "--stream"])
def test_a_merge_that_is_pushed_is_held_to_the_same(hub: HubServer, models: Path, tmp_path: Path, way: str) -> None:
    """A secret in a file that the base brings is refused before anything is sent, as a stream or after the merge."""
    client = Client(hub, tmp_path / "home", WRITER)
    base = copy(models / "model", tmp_path / "base")
    put(base / "notes.txt", VALUES["github"])
    out = ["--stream"] if way == "--stream" else ["-o", "out", "--overwrite"]
    words = ["merge", base, models / "adapter", *out, "--push-to-hub"]
    told = client.refused(*words, "alice/new", code=3, cwd=tmp_path)
    assert "notes.txt, line 2: a token of GitHub" in told
    assert VALUES["github"] not in told
    assert "alice/new" not in hub.repos
    client.works(*words, "alice/without", "--exclude", "notes.txt", cwd=tmp_path)
    assert "notes.txt" not in hub.files("alice/without")
    client.works(*words, "alice/with", "--allow-secret", "*.txt", cwd=tmp_path)
    assert "notes.txt" in hub.files("alice/with")


def test_a_secret_in_the_weights_of_a_base_is_found_before_a_stream_begins(models: Path, tmp_path: Path) -> None:
    """The header of each output file is the base's, with the metadata that training put there."""
    from loratool import stream

    base = copy(models / "model", tmp_path / "base")
    put(base / "model-00001-of-00002.safetensors", VALUES["hugging face"])
    with pytest.raises(InputError, match=r"model-00001-of-00002.safetensors, line 1: an access token"):
        stream(base, models / "adapter", "alice/new", dry_run=True)


def test_a_command_that_is_recorded_holds_no_secret(models: Path, tmp_path: Path) -> None:
    """A token on the command line ends up neither in loratool.json nor in the card."""
    from loratool import rescale

    named = tmp_path / VALUES["hugging face"]
    copy(models / "adapter", named)
    rescale(named, tmp_path / "out", scale=0.5)
    table = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert VALUES["hugging face"] not in table["command"]
    assert "<an access token of Hugging Face>" in table["command"]
