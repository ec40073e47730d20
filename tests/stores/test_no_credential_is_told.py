"""Credentials in the environment and in files are neither printed nor recorded, whatever goes wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_server import BUCKET, KEYS, StoreServer

from loratool import cli

BASE, ADAPTER, OUT = (f"s3://{BUCKET}/{name}" for name in ("team/base", "team/adapter", "told/out"))
SECRET = "planted/SeCrEt+0123456789abcdefghij"
NOWHERE = "127.0.0.1:9"
SETTINGS: dict[str, dict[str, str]] = {
    "a password in the endpoint": {"AWS_ENDPOINT_URL": f"http://me:{SECRET.replace('/', '')}@{NOWHERE}"},
    "an endpoint that is none": {"AWS_ENDPOINT_URL": f"http://[{SECRET}"},
    "a proxy with a password": {"HTTP_PROXY": f"http://me:{SECRET.replace('/', '')}@{NOWHERE}", "NO_PROXY": ""},
    "a proxy that is none": {"HTTP_PROXY": f"http://me:{SECRET}@[", "NO_PROXY": ""},
    "a key with the end of a line": {"AWS_ACCESS_KEY_ID": f"{SECRET}\n"},
    "a token with a header in it": {"AWS_SESSION_TOKEN": f"{SECRET}\nx: y"},
}
FILES = {
    "a line without a sign": f"[default]\naws_access_key_id = {SECRET}\naws_secret_access_key {SECRET}\n",
    "no section": f"aws_secret_access_key = {SECRET}\n",
    "a program that fails": f"[default]\ncredential_process = sh -c 'echo {SECRET} >&2; exit 1'\n",
    "a program that says no JSON": f"[default]\ncredential_process = echo {SECRET}\n",
    "half a pair": f"[default]\naws_access_key_id = {SECRET}\n",
}


def told(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What a command that fails prints, with the tracebacks of bugs."""
    assert cli.run([*words, "-v"]) == 7
    return "".join(capfd.readouterr())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_nothing_of_the_environment_is_printed(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], settings: dict[str, str]
) -> None:
    assert store.url
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
        monkeypatch.delenv(name.lower(), raising=False)
    assert SECRET.replace("/", "") not in told(["inspect", BASE], capfd).replace("/", "")


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_nothing_of_a_file_of_credentials_is_printed(
    store: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], content: str
) -> None:
    assert store.url
    for name in KEYS:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(content)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "credentials"))
    assert SECRET not in told(["merge", BASE, ADAPTER, "-o", OUT, "--json"], capfd)


def test_no_object_and_no_file_has_the_credentials_of_its_merge(
    store: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By one process, and in parts, with an object of each step still there."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    for words in (["-o", str(tmp_path / "out"), "-vv"], ["-o", OUT, "--json"], ["-o", f"{OUT}-2", "--part", "1/1"]):
        assert cli.run(["merge", BASE, ADAPTER, *words]) == 0
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    objects = [*store.objects(BUCKET, "told/out").values(), *store.objects(BUCKET, "told/out-2").values()]
    assert len(written) > 5
    assert len(objects) > len(written)
    printed = "".join(capfd.readouterr())
    for secret in (SECRET, *KEYS.values()):
        assert not any(secret.encode() in each for each in (*written, *objects))
        assert secret not in printed
