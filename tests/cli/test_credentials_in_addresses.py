"""Users, passwords and signatures that people leave in an address are not repeated, whatever the command says of it."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest

from loratool import cli
from loratool.errors import printable

SECRET = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"
ADDRESSES = (
    f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@models/base",
    f"s3://{SECRET}@models/base",
    f"s3://models/base?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}",
    f"https://me:{SECRET}@s3.example.com/models/base",
    f"https://models.s3.example.com/base?X-Amz-Signature={SECRET}",
    f"https://huggingface.co/org/name?token={SECRET}",
    f"hf://me:{SECRET}@org/name",
)
COMMANDS = (
    "inspect ADDRESS",
    "merge ADDRESS adapter -o out",
    "merge base ADDRESS -o out --json",
    "merge base adapter -o ADDRESS -v",
    "merge base adapter -o ADDRESS --part 1/2 --json",
    "verify ADDRESS",
    "extract base ADDRESS -o out --rank 2",
    "push adapter ADDRESS",
    "reproduce ADDRESS -o out",
    "record ADDRESS",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("addresses")
    faults.make_base(home / "base", 1, 64)
    faults.make_adapter(home / "adapter", 1, 64)
    return home


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_secret_in_an_address_is_not_printed(
    address: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither in the error nor in its hint, in text or JSON; and nothing is written."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in COMMANDS:
        assert cli.run([word.replace("ADDRESS", address) for word in command.split()]) > 1
        printed = "".join(capfd.readouterr())
        assert "Error: " in printed
        assert SECRET not in printed, command
    assert {path.name for path in home.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:word@bucket/x", "s3://<TOKEN>@bucket/x"),
        ("in https:/me:word@host/x", "in https:/<TOKEN>@host/x"),
        ("https://host/x?a=1&Signature=ab/cd&b=2", "https://host/x?a=1&Signature=<TOKEN>&b=2"),
        ("hf://org/name@main:folder", "hf://org/name@main:folder"),
        ("hf://gpt2@main", "hf://gpt2@main"),
        ("s3://bucket/me@home/x=1", "s3://bucket/me@home/x=1"),
        ("org/name@v1:sub", "org/name@v1:sub"),
        ("C:/models/me@home", "C:/models/me@home"),
    ],
)
def test_what_is_no_credential_is_shown_as_it_is(text: str, shown: str) -> None:
    assert printable(text) == shown
