"""What commands print with `--json` is what their JSON Schema says, which `loratool --json-schema COMMAND` prints.

The judge is the package jsonschema; the schemas are those that are published in docs/schemas/.
"""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from malformed import write_adapter, write_base
from paths import ROOT

from loratool import cli

jsonschema = pytest.importorskip("jsonschema")
FOLDER = ROOT / "docs" / "schemas"
SCHEMAS = {path.name.partition(".")[0]: json.loads(path.read_text("utf-8")) for path in FOLDER.glob("*.json")}

PRINTED = {
    "merge": "merge base style -o out",
    "a plan": "merge base style -o out --dry-run",
    "a plan without an output": "plan base style",
    "a simulated plan": "plan base style --simulate 1,2 --object-store",
    "several merges": "merge base style -o out --also other=style",
    "several plans": "merge base style -o out --also other=style --dry-run",
    "a merge that streams": "merge base style --stream --push-to-hub me/merged --dry-run",
    "a model's record": "verify merged",
    "a proof": "verify merged --base base --adapter style",
    "an adapter and a model": "inspect style base --values --check --tensors --metadata --base base",
    "what cannot be read": "inspect style/adapter_config.json --check",
    "a part of a merge": "merge base style -o parts --part 1/1",
    "parts of a merge": "merge base style -o parts --status",
    "a merge that is finished": "merge base style -o parts --finish",
    "a part of a proof": "verify merged --base base --adapter style --part 1/2 --into proofs",
    "a part of a record": "verify merged --part 1/2 --into records",
    "a part of values": "inspect style --values --part 1/2 --into values",
    "a part of an extraction": "extract base merged -o out --rank 1 --part 1/2 --into factors",
    "rescale": "rescale style -o out --scale 0.5",
    "resize": "resize style -o out --rank 1",
    "combine": "combine style style -o out",
    "convert": "convert style -o out --to mlx",
    "extract": "extract base merged -o out --rank 1",
    "compare": "compare style style",
    "estimate": "estimate base --rank 2 --target q_proj",
    "push": "push style me/style --dry-run",
    "record": "record merged",
    "help": "help operands",
    "completion": "completion fish",
    "operands that were swapped": "merge style base -o out --dry-run",
    "wrong words": "merge base --nonsense",
    "an error": "merge base nowhere -o out",
    "an error of an output": "merge base style -o out --also other=nowhere",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("schemas")
    write_base(home / "base")
    write_adapter(home / "style")
    assert cli.run(["merge", str(home / "base"), str(home / "style"), "-o", str(home / "merged"), "-q"]) == 0
    assert cli.run(["merge", str(home / "base"), str(home / "style"), "-o", str(home / "parts"), "--part", "1/1"]) == 0
    return home


@pytest.mark.parametrize("name", PRINTED)
def test_what_a_command_prints_is_as_its_schema_says(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    words = shlex.split(PRINTED[name])
    cli.run([*words, "--json"])
    judge = jsonschema.Draft202012Validator(SCHEMAS[words[0]])
    found = json.loads(capsys.readouterr().out)
    judge.validate(found)
    assert ("error" in found) == name.startswith(("wrong", "an error")) or "outputs" in found


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_prints_its_published_schema(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--json-schema", command]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(printed)
    assert SCHEMAS[command] == printed, "run `make docs`"
    assert not jsonschema.Draft202012Validator(printed).is_valid({"schema": 1})
    assert not jsonschema.Draft202012Validator(printed).is_valid({"schema": 1, "error": {}})


def test_the_published_schemas_are_those_of_the_commands() -> None:
    fresh = runpy.run_path(str(ROOT / "docs" / "generate_schemas.py"))["pages"]()
    assert {path.name for path in FOLDER.iterdir()} == set(fresh)
    stale = [name for name, text in fresh.items() if (FOLDER / name).read_text("utf-8") != text]
    assert stale == [], "run `make docs`"


def test_a_schema_of_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--json-schema", "bogus"]) == 2
    assert "merge, verify, inspect" in capsys.readouterr().err
    assert cli.run(["--json-schema", "inspct"]) == 2
    assert "did you mean 'inspect'?" in capsys.readouterr().err
