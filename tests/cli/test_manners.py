"""The command line's manners: help, version, exit codes, what goes to stdout, and what is not loaded for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

import loratool
from loratool import cli

COMMANDS = sorted(cli.COMMANDS)
HEAVY = ("torch", "numpy", "huggingface_hub", "safetensors", "tqdm", "boto3", "botocore", "ray")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of one layer and an adapter for it, written by the safetensors package."""
    home = tmp_path_factory.mktemp("start")
    (home / "base").mkdir()
    (home / "adapter").mkdir()
    save_file({"layer.weight": np.ones((6, 4), np.float32)}, home / "base" / "model.safetensors")
    (home / "base" / "config.json").write_text('{"architectures": ["Tiny"]}')
    factors = {
        "base_model.model.layer.lora_A.weight": np.ones((2, 4), np.float32),
        "base_model.model.layer.lora_B.weight": np.ones((6, 2), np.float32),
    }
    save_file(factors, home / "adapter" / "adapter_model.safetensors")
    (home / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    return home


def loaded_by(arguments: Sequence[str], folder: Path) -> set[str]:
    """Which heavy packages a process has loaded at the end of `loratool ARGUMENTS`."""
    code = (
        "import sys; from loratool.cli import run; code = run(sys.argv[1:])\n"
        f"print('loaded:', *({set(HEAVY)} & sys.modules.keys()), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.partition("loaded:")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["merge", "--help"],
        ["inspect", "base", "adapter"],
        ["inspect", "--json", "adapter"],
        ["inspect", "--tensors", "--base", "base", "adapter"],
        ["estimate", "base", "--rank", "8", "--target", "layer"],
        ["merge", "base", "adapter", "-o", "out", "--dry-run"],
        ["plan", "base", "adapter", "--simulate", "1,8", "--object-store"],
    ],
    ids=" ".join,
)
def test_what_headers_can_answer_loads_no_heavy_package(arguments: list[str], folders: Path) -> None:
    assert loaded_by(arguments, folders) == set()


def test_a_check_looks_at_values_without_torch(folders: Path) -> None:
    assert loaded_by(["inspect", "--check", "adapter"], folders) == {"numpy"}


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "loratool"
)
def test_every_command_has_help_with_an_example(
    command: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*command, flag]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"loratool {' '.join(command)}".strip() in text.partition("Example")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command: str) -> None:
    options = [p for p in cli.command(command).params if isinstance(p, click.Option)]
    assert [option.name for option in options if not (option.help or "").endswith(".")] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_json_quiet_and_verbose(command: str) -> None:
    spellings = {spelling for parameter in cli.command(command).params for spelling in parameter.opts}
    assert {"--json", "-q", "--quiet", "-v", "--verbose"} <= spellings


def test_the_help_lists_every_exit_code_of_the_errors(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["--help"])
    codes = capsys.readouterr().out.partition("Exit codes:")[2]
    for kind in loratool.LoratoolError.__subclasses__():
        assert f"{kind.exit_code} " in codes


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"loratool, version {loratool.__version__}\n"


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "loratool", "--version"], capture_output=True, text=True, check=True)
    assert loratool.__version__ in done.stdout


@pytest.mark.parametrize(
    ("given", "added"),
    [("", " --rank 8 --target all-linear"), (" --rank=4", " --target all-linear"), (" --target q_proj", " --rank 8")],
)
def test_an_estimate_of_nothing_in_particular_ends_with_one_that_runs(
    given: str, added: str, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is missing is added at once."""
    monkeypatch.chdir(folders)
    assert cli.run(["estimate", "base", *given.split()]) == 2
    assert f"hint: loratool estimate base{given}{added}\n" in capsys.readouterr().err
    assert cli.run(["estimate", "base", "--rank", "8", "--target", "all-linear"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bogus"], "there is no command 'bogus'\n"),
        (["reszie"], "there is no command 'reszie'; did you mean 'resize'?"),
        (["merge", "base"], "Missing option '-o' / '--output'"),
        (["merge", "base", "-o", "out"], "a merge needs an ADAPTER as well as a BASE"),
        (["merge", "base", "adapter"], "Missing option '-o' / '--output'"),
        (["inspect"], "nothing to inspect; pass a path, or --from-file LIST"),
        (["estimate", "base", "--target", "layer"], "Missing option '--rank'"),
        (["estimate", "base", "--rank", "8"], "Missing option '--target'"),
        (
            ["estimate", "base", "--rank", "0", "--target", "layer"],
            "--rank must be a whole number of at least 1 (got 0)",
        ),
        (["merge", "base", "adapter", "-o", "out", "--nonsense"], "No such option"),
        (
            ["merge", "base", "adapter", "-o", "out", "--dtype", "int8"],
            "--dtype must be one of keep, float32, bfloat16, float16 (got 'int8')",
        ),
        (["merge", "base", "adapter", "-o", "out", "--shard-size", "five"], "'five' is not a size; write it like 5GB"),
        (
            ["merge", "base", "adapter", "-o", "out", "--workers", "0"],
            "--workers must be a whole number from 1 to 1024 (got 0)",
        ),
        (["merge", "base", "adapter", "-o", "out", "-w", "1", "-w", "2"], "2 weights for 1 adapter;"),
        (["rescale", "adapter", "-o", "out", "--scale", "0,5"], "(got 0,5); did you mean 0.5?"),
        (["merge", "base", "adapter", "-o", "out", "-w", "0,5"], "decimals are written with a point, such as 0.5"),
        (["merge", "base", "adapter", "-o", "out", "--device", "tpu"], "'tpu'"),
        (["merge", "base", "adapter", "-o", "out", "--public"], "--public needs --push-to-hub REPO"),
        (["merge", "base", "adapter", "-o", "out", "--exclude", "x"], "--exclude needs --push-to-hub REPO"),
        (["merge", "base", "adapter", "-o", "out", "--exclude", "x", "--public"], "--exclude need --push-to-hub REPO"),
        (["resize", "adapter", "-o", "out", "--rank", "1", "--allow-secret", "x"], "--allow-secret needs"),
        (["rescale", "adapter", "-o", "out", "--scale", "2", "--public"], "--public needs --push-to-hub REPO"),
        (["combine", "adapter", "-o", "out", "--public"], "--public needs --push-to-hub REPO"),
        (["extract", "base", "base", "-o", "out", "--public"], "--public needs --push-to-hub REPO"),
        (["merge", "base", "adapter", "-o", "base"], "OUT is, contains or is inside the input base"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(
    arguments: list[str],
    sentence: str,
    folders: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folders)
    assert cli.run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err
    assert "Traceback" not in shown.err
    assert sorted(os.listdir(folders)) == ["adapter", "base"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere"],
        ["estimate", "nowhere", "--rank", "8", "--target", "layer"],
        ["merge", "nowhere", "adapter", "-o", "out"],
        ["merge", "base", "nowhere", "-o", "out"],
        ["merge", "base", "nowhere", "-o", "out", "--dry-run"],
    ],
    ids=" ".join,
)
def test_an_unknown_path_ends_with_3_and_is_named(
    arguments: list[str], folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    assert cli.run(arguments) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "Error: nowhere: no such file or folder\nhint: loratool help operands\n"


def test_json_is_one_object_on_stdout_and_nothing_else(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    assert cli.run(["inspect", "--json", "base", "adapter"]) == 0
    shown = capsys.readouterr()
    base, adapter = json.loads(shown.out)["results"]
    assert (base["kind"], base["tensors"], base["parameters"]) == ("checkpoint", 1, 24)
    assert (adapter["kind"], adapter["ranks"], adapter["scalings"]) == ("adapter", {"2": 1}, {"2": 1})
    assert shown.err == ""

    assert cli.run(["merge", "base", "adapter", "-o", "out", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [edit["tensor"] for edit in plan["edits"]] == ["layer.weight"]


def test_json_of_a_merge_has_the_fields_of_the_report(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "merge",
        str(folders / "base"),
        str(folders / "adapter"),
        "-o",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert cli.run([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out).keys() == {"schema", *loratool.MergeReport.__dataclass_fields__}
    assert shown.err == ""


@pytest.mark.parametrize("arguments", [["inspect", "base"], ["merge", "base", "adapter", "-o", "out", "--dry-run"]])
def test_quiet_says_nothing(
    arguments: list[str], folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    assert cli.run([*arguments, "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_bug_ends_with_1_and_shows_its_traceback_only_when_asked(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr("loratool.inspecting.inspect.inspect", broken)
    assert cli.run(["inspect", str(folders / "base")]) == 1
    short = capsys.readouterr().err
    assert "this is a bug in loratool: RuntimeError: what nobody thought of" in short
    assert "Traceback" not in short
    assert cli.run(["inspect", str(folders / "base"), "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err
