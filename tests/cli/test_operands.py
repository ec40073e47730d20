"""Operands as people type them: read as the one thing that they can mean, which is said; else a command is proposed.

What a command did with them is told by what it wrote: the reference is the same command with the operands as they should
be.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from malformed import write_adapter, write_base
from safetensors.numpy import save_file

from loratool import cli


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("typed")
    write_base(home / "base")
    write_adapter(home / "style")
    assert cli.run(["merge", str(home / "base"), str(home / "style"), "-o", str(home / "merged"), "-q"]) == 0
    return home


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, an adapter of it, and their merge, in which the commands are typed."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home"


def moved(folder: str, into: str) -> None:
    Path(into).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, into)


def command(words: str) -> list[str]:
    return shlex.split(words)


SWAPPED = {
    "merge": ("merge style base -o out --dry-run --json", "merge base style -o out --dry-run --json"),
    "merge with a base as an option": (
        "merge base --base style -o out --dry-run --json",
        "merge style --base base -o out --dry-run --json",
    ),
    "merge of a base between adapters": (
        "merge style base style -w 0.5 -w 2 -o out --dry-run --json",
        "merge base style style -w 0.5 -w 2 -o out --dry-run --json",
    ),
    "verify": ("verify merged --base style --adapter base --json", "verify merged --base base --adapter style --json"),
    "verify of an adapter": (
        "verify style --base base --adapter merged --json",
        "verify merged --base base --adapter style --json",
    ),
    "inspect": ("inspect base --base style --json", "inspect style --base base --json"),
    "convert": (
        "convert base -o out --to mlx --base style --dry-run --json",
        "convert style -o out --to mlx --base base --dry-run --json",
    ),
    "push": ("push me/style ./style --dry-run --json", "push ./style me/style --dry-run --json"),
}


def data(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, object], str]:
    """What a command prints for programs, without what it cost, and what it says on stderr."""
    code = cli.run(command(words))
    shown = capsys.readouterr()
    assert code == 0, shown.err
    table = json.loads(shown.out)
    found = {key: value for key, value in table.items() if key not in ("cost", "operands", "peak_memory")}
    for result in found.get("results", ()):
        result.pop("cost")
    return found, shown.err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_operands_are_said_and_do_what_was_meant(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    typed, meant = SWAPPED[name]
    found, said = data(typed, capsys)
    wanted, silence = data(meant, capsys)
    assert found == wanted
    assert silence == ""
    assert said.count("\n") == 1
    assert said.startswith("note: the operands are swapped: ")


@pytest.mark.usefixtures("here")
def test_two_adapters_are_not_taken_for_swapped_operands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command("merge style style -o out")) == 3
    assert "swapped" not in capsys.readouterr().err


NEAR = {
    "a folder above the model": ("merge models style -o out --dry-run --json", "models", "models/base"),
    "a run folder with one checkpoint": ("extract base tuned -o out --rank 1 --json", "tuned", "tuned/checkpoint-40"),
    "a repository in the Hub's cache": ("merge cache style -o out --dry-run --json", "cache", "cache/snapshots/abc"),
    "a folder inside the model": ("merge base/logs style -o out --dry-run --json", "base/logs", "base"),
    "the config of the model": ("merge base/config.json style -o out --dry-run --json", "base/config.json", "base"),
    "the config of the adapter": (
        "compare style/adapter_config.json style --json",
        "style/adapter_config.json",
        "style",
    ),
    "a file of an adapter to be pushed": (
        "push style/adapter_model.safetensors me/style --dry-run --json",
        "style/adapter_model.safetensors",
        "style",
    ),
    "a file without its ending": ("inspect one --json", "one", "one.safetensors"),
    "a path with backslashes": (r"inspect 'models\base' --json", r"models\base", "models/base"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", NEAR)
def test_what_can_only_mean_one_thing_is_read_as_that_and_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    moved("base", "models/base")
    moved("merged", "tuned/checkpoint-40")
    moved("base", "cache/snapshots/abc")
    Path("base/logs").mkdir()
    shutil.copy("style/adapter_model.safetensors", "one.safetensors")
    words, typed, meant = NEAR[name]
    found, said = data(words, capsys)
    shutil.rmtree("out", ignore_errors=True)
    wanted, silence = data(" ".join(meant if word == typed else word for word in command(words)), capsys)
    assert found == wanted
    assert said.count("\n") == 1 + silence.count("\n")
    assert said.startswith(f"note: {typed}: ")


@pytest.mark.usefixtures("here")
def test_of_two_commits_in_the_hub_s_cache_that_of_main_is_read_and_without_one_a_commit_is_proposed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The client writes `refs` for the revisions it was asked for; a commit that was asked for has none."""
    moved("base", "cache/snapshots/abc")
    moved("base", "cache/snapshots/def")
    assert cli.run(command("merge cache style -o out")) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "hint: loratool merge cache/snapshots/def style -o out"
    Path("cache/refs").mkdir()
    Path("cache/refs/main").write_text("abc")
    _, said = data("merge cache style -o out --dry-run --json", capsys)
    assert said.startswith("note: cache: the model is in its subfolder abc, which is read")


PATTERNS = {
    "adapters": ("compare 'runs/*' --json", "compare runs/one runs/two --json"),
    "the only base": ("merge 'ba?e' style -o out --dry-run --json", "merge base style -o out --dry-run --json"),
    "the user's folder": ("inspect '~/style' '~/base' --json", "inspect {here}/style {here}/base --json"),
    "an option": (
        "verify ~/merged --base '~/base' --adapter 'st*' --json",
        "verify {here}/merged --base {here}/base --adapter style --json",
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_and_the_user_s_folder_mean_what_they_mean_to_a_shell(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """cmd.exe and PowerShell hand both over as they are typed, as quotes do elsewhere."""
    moved("style", "runs/one")
    moved("style", "runs/two")
    typed, meant = PATTERNS[name]
    assert data(typed, capsys) == data(meant.format(here=here), capsys)


def test_a_file_with_such_a_name_is_that_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("style", "st*")
    found, _ = data("inspect 'st*' --json", capsys)
    assert [result["path"] for result in found["results"]] == ["st*"]  # type: ignore[attr-defined]


PROPOSED = {
    "a near name": ("merge bose style -o out", 3, "merge base style -o out"),
    "another case": ("inspect STYLE", 3, "inspect style"),
    "several checkpoints": ("rescale run -o out --scale 2", 3, "rescale run/checkpoint-100 -o out --scale 2"),
    "a repository that is a folder here": ("merge org/base style -o out", 7, "merge ./base style -o out"),
    "a folder that holds nothing, called as a repository is": (
        "merge org/name style -o out",
        3,
        "merge hf://org/name style -o out",
    ),
    "an output that is there": ("merge base style -o merged", 2, "merge base style -o merged --overwrite"),
    "an output that is an input": ("merge base style -o base", 2, "merge base style -o ./base-style"),
    "a command with a typing error": ("marge base style -o out", 2, "merge base style -o out"),
    "an output inside a file": ("merge base style -o base/config.json/no/out", 6, "merge base style -o ./base-style"),
    "a run whose weights are in pieces": ("merge base sharded -o out", 3, "inspect sharded --check"),
    "an option without its value": ("merge base style -o", 2, "merge --help"),
    "an output without -o": ("merge base style out", 2, "merge base style -o out"),
    "an output without -o, where only one operand is taken": (
        "rescale style out --scale 2",
        2,
        "rescale style --scale 2 -o out",
    ),
    "what verify compares with, as operands": (
        "verify merged base style",
        2,
        "verify merged --base base --adapter style",
    ),
    "a folder in one that is not here": ("merge base style -o new/er/out", 6, ""),
    "an unknown option": ("merge base style -o out --nonsense", 2, "merge --help"),
    "an adapter of another model": ("merge base other -o out", 4, "inspect other --base base"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", PROPOSED)
def test_an_error_ends_with_the_next_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    moved("style", "run/checkpoint-20")
    moved("style", "run/checkpoint-100")
    Path("org/name").mkdir(parents=True)
    moved("style", "sharded/checkpoint-3")
    Path("sharded/checkpoint-3/adapter_model.safetensors").unlink()
    Path("sharded/checkpoint-3/pytorch_model_fsdp_0").mkdir()
    Path("sharded/checkpoint-3/pytorch_model_fsdp_0/__0_0.distcp").touch()
    moved("style", "other")
    path = Path("other/adapter_model.safetensors")
    path.write_bytes(path.read_bytes().replace(b"q_proj", b"z_proj"))
    words, code, proposed = PROPOSED[name]
    assert cli.run(command(words)) == code
    *_, last = capsys.readouterr().err.splitlines()
    assert last == (f"hint: loratool {proposed}" if proposed else f"hint: mkdir -p {Path.cwd() / 'new' / 'er'}")


@pytest.mark.usefixtures("here")
def test_an_output_in_the_user_s_folder_is_written_there(here: Path) -> None:
    """Not every shell expands `~`, and a folder of that name is never meant."""
    assert cli.run(command("rescale style --scale 2 -o ~/doubled -q")) == 0
    assert (here / "doubled" / "adapter_config.json").is_file()
    assert not Path("~").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", ["merge '' style -o out", "merge base '' -o out", "merge base style -o ''"])
def test_an_empty_word_is_not_the_working_folder(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As `merge $BASE style` is, where BASE is not set and in quotes."""
    assert cli.run(command(words)) == 2
    assert "it is empty; is a shell variable unset?" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_known_model_that_is_named_without_its_option_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command("estimate llama-2-7b --rank 8 --target q_proj")) == 2
    assert "for the known model, pass --preset llama-2-7b" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_plan_without_an_adapter_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command("plan base")) == 2
    assert "needs an ADAPTER as well as a BASE" in capsys.readouterr().err


ON_THE_HUB = {
    "org/other": "org/other is read from the Hub; it is not in the local folder ./org",
    "org/style": "org/style is read from the Hub; the local folder ./style is not used",
    "hf://me/style": "hf://me/style is read from the Hub; the local folder ./style is not used",
    "hf://org/other": "",
    "me/other": "",
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("word", ON_THE_HUB)
def test_a_name_on_the_hub_that_may_have_been_meant_as_a_path_is_said(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network error alone would not tell somebody who mistyped a path that no such folder is here."""
    Path("org").mkdir()
    assert cli.run(["inspect", word]) == 7
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == ([f"note: {ON_THE_HUB[word]}"] if ON_THE_HUB[word] else [])


@pytest.mark.usefixtures("here")
def test_a_file_or_folder_among_loose_adapters_is_not_read_as_one_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A working folder with a file of weights is no adapter, so what is in it is not taken for a part of one."""
    os.mkdir("loose")
    shutil.copy("style/adapter_model.safetensors", "loose/one.safetensors")
    Path("loose/notes.txt").write_text("what I tried\n")
    os.mkdir("loose/empty")
    for word, told in (("loose/notes.txt", "loose/notes.txt: not an adapter"), ("loose/empty", "loose/empty: not an")):
        assert cli.run(["merge", "base", word, "-o", "out"]) == 3
        assert capsys.readouterr().err.startswith(f"Error: {told}")


WITHOUT_OUT = {
    "merge base style": "base-style",
    "merge style": "style-merged",
    "merge base/model.safetensors style": "model-style.safetensors",
    "rescale style --scale 0.5": "style-rescaled",
    "resize style --rank 1": "style-resized",
    "combine style style": "style-style",
    "convert style --to mlx": "style-mlx",
    "convert style --for vllm": "style-vllm",
    "extract base merged": "merged-adapter",
    "resize style/adapter_model.safetensors --rank 1": "adapter_model-resized",
    "resize flux.safetensors --rank 1": "flux-resized.safetensors",
    "convert flux.safetensors --to comfy": "flux-comfy.safetensors",
    "convert flux.safetensors --to peft": "flux-peft",
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", WITHOUT_OUT)
def test_without_an_output_a_name_and_the_whole_command_are_proposed(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written; the command that is proposed is one that Click takes, and its name is free."""
    module = "transformer.single_transformer_blocks.0.proj_mlp"
    save_file({f"{module}.lora_{side}.weight": np.ones((2, 2), np.float32) for side in "AB"}, "flux.safetensors")
    before = sorted(os.listdir())
    name = WITHOUT_OUT[words]
    for wanted in (name, f"{Path(name).stem}-2{Path(name).suffix}"):
        assert cli.run(command(words)) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last == f"hint: loratool {words} -o ./{wanted}"
        assert sorted({*os.listdir()} - {name}) == before
        Path(name).mkdir(exist_ok=True)


TYPED_AS_ON_WINDOWS = {
    r"rescale style --scale 0.5 -o '.\again'": "rescale style --scale 0.5 -o ./again",
    r"merge base style --output 'made\of it'": "merge base style -o './made/of it'",
    r"merge base style -o 'C:\models\made'": "merge base style -o ./made",
    r"index . -o '\\server\all.index'": "index . -o ./all.index",
    r"inspect style --html '.\page.html'": "inspect style --html ./page.html",
    r"inspect style --svg '.\figures'": "inspect style --svg ./figures",
}


@pytest.mark.skipif(os.sep == "\\", reason="backslashes separate folders on Windows")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", TYPED_AS_ON_WINDOWS)
def test_an_output_with_backslashes_is_no_hidden_folder_but_a_question(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that is proposed has slashes; an absolute path, which nobody types by mistake, is what it is."""
    before = sorted(os.listdir())
    assert cli.run(command(words)) == 2
    *said, last = capsys.readouterr().err.splitlines()
    assert "separated by '/'" in "\n".join(said)
    assert last == f"hint: loratool {TYPED_AS_ON_WINDOWS[words]}"
    assert sorted(os.listdir()) == before
    Path("made").mkdir()
    assert cli.run([*command("rescale style --scale 0.5 -q -o"), os.path.abspath(r".\again")]) == 0
    assert Path(r".\again").is_dir()


MEANT = {
    "convert style -o out --to pefft": "convert style -o out --to peft",
    "convert style --to=mlxx --dtype float32 -o out": "convert style --dtype float32 -o out --to mlx",
    "merge base style -o out --max-memory 8192 --dry-run": "merge base style -o out --dry-run --max-memory 8192MB",
    "estimate --preset llama-2-7B --rank 8 --target q_proj": "estimate --rank 8 --target q_proj --preset llama-2-7b",
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", MEANT)
def test_a_value_that_was_meant_is_in_the_command_that_is_proposed(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command(words)) == 2
    hint = capsys.readouterr().err.splitlines()[-1].removeprefix("hint: loratool ")
    assert hint == MEANT[words]
    assert cli.run(command(hint)) == 0


@pytest.mark.parametrize("words", ["inspect . --json", "inspect . --csv", "inspect . --jsonl", "index . -o all.index"])
def test_what_fails_for_one_of_many_ends_with_a_command_that_shows_it(
    here: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are told all the same."""
    shutil.copytree("style", "broken style")
    Path("broken style/adapter_model.safetensors").write_bytes(b"junk")
    assert cli.run(command(words)) == 3
    hint = capsys.readouterr().err.splitlines()[-1].removeprefix("hint: loratool ")
    assert hint == ("inspect ." if words.startswith("index") else "inspect 'broken style' --check")
    assert cli.run(command(hint)) == 3
    shown = capsys.readouterr()
    assert "too few for a safetensors header" in " ".join((shown.out + shown.err).split())


@pytest.mark.usefixtures("here")
def test_a_list_of_paths_is_inspected_by_the_option_that_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("names.txt").write_text("style\nmerged\n")
    assert cli.run(command("inspect names.txt --sort rank")) == 3
    hint = capsys.readouterr().err.splitlines()[-1].removeprefix("hint: loratool ")
    assert hint == "inspect --sort rank --from-file names.txt"
    assert cli.run(command(hint)) == 0


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_output_is_one_that_is_proposed(name: str) -> None:
    """So that no command ends with Click's own sentence, which has no name."""
    from loratool.cli.operands import Output

    outputs = [p for p in cli.command(name).params if "--output" in p.opts]
    assert all(isinstance(each, Output) for each in outputs)


@pytest.mark.usefixtures("here")
def test_what_was_read_otherwise_is_in_the_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    words: Sequence[str] = command("merge style base -o out --dry-run --json -q")
    assert cli.run([*words]) == 0
    shown = capsys.readouterr()
    assert [note["code"] for note in json.loads(shown.out)["operands"]] == ["operands-swapped"]
    assert shown.err == ""
