"""`--overwrite` replaces what loratool, transformers and PEFT write as a model or an adapter, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, build_base
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from workbench import tree

import loratool
from loratool.adapters.formats import OUTPUT_FILES
from loratool.cli import run
from loratool.demo import demo

SHARDS, HIDDEN = 2, 32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with side files, two adapters, a tuned model; and in `made` what each command made of them before."""
    home = tmp_path_factory.mktemp("inputs")
    faults.make_base(home / "base", SHARDS, HIDDEN)
    (home / "base" / "modeling_own.py").write_text("x = 1\n")
    for name in ("adapter", "other"):
        faults.make_adapter(home / name, SHARDS, HIDDEN)
        (home / name / "labels.csv").write_text("a,b\n")
    loratool.merge(home / "base", home / "adapter", home / "tuned", weights=[0.5], device="cpu")
    (home / "made").mkdir()
    for name, words in faults.COMMANDS.items():
        assert run([*words(home), "-o", str(home / "made" / name.replace(" ", "")), "-q"]) == 0
    return home


def an_output(inputs: Path, command: str, home: Path) -> Path:
    """What the command made before, in a place of its own."""
    out = home / "out"
    shutil.copytree(inputs / "made" / command.replace(" ", ""), out, copy_function=shutil.copyfile)
    return out


def put(path: Path, text: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def a_listed_file_was_edited(out: Path) -> None:
    """One that no model is known by: what somebody wrote there is theirs."""
    name = "extra/notes.txt" if (out / "extra").is_dir() else "labels.csv"
    (out / name).write_text("my own thoughts\n")


def a_note_among_templates(out: Path) -> None:
    put(out / "additional_chat_templates" / "a.jinja")
    put(out / "additional_chat_templates" / "mine.txt")


def a_link_to_a_text(page: Path) -> None:
    page.with_name("kept").write_text("mine")
    page.symlink_to("kept")


ODD: dict[str, Callable[[Path], None]] = {
    "thesis.tex": lambda out: put(out / "thesis.tex"),
    ".git/": lambda out: put(out / ".git" / "HEAD"),
    ".env": lambda out: put(out / ".env"),
    ".cache/": lambda out: put(out / ".cache" / "huggingface" / "x"),
    "src/": lambda out: put(out / "src" / "main.py"),
    "train.py": lambda out: put(out / "train.py"),
    "modeling_mine.py": lambda out: put(out / "modeling_mine.py"),
    "checkpoint-5/": lambda out: put(out / "checkpoint-5" / "adapter_model.safetensors"),
    "other-adapter/": lambda out: put(out / "other-adapter" / "adapter_config.json"),
    "empty/": lambda out: (out / "empty").mkdir(),
    "optimizer.pt": lambda out: put(out / "optimizer.pt"),
    "model.safetensors.bak": lambda out: put(out / "model.safetensors.bak"),
    "my-best-model.safetensors": lambda out: put(out / "my-best-model.safetensors"),
    "MODEL.SAFETENSORS": lambda out: put(out / "MODEL.SAFETENSORS"),
    "README.md~": lambda out: put(out / "README.md~"),
    "vocab.txt": lambda out: (out / "vocab.txt").symlink_to("/etc/hostname"),
    "merges.txt": lambda out: os.mkfifo(out / "merges.txt"),
    "added_tokens.json/": lambda out: (out / "added_tokens.json").mkdir(),
    "additional_chat_templates/mine.txt": a_note_among_templates,
    "changed since": a_listed_file_was_edited,
}


# Every command has some of them, and the two that make a folder in different ways have all.
SOME = ("thesis.tex", ".git/", "checkpoint-5/", "changed since")
CELLS = [
    (command, odd)
    for command in faults.COMMANDS
    for odd in ODD
    if (command in ("merge", "rescale --bake") or odd in SOME)
    and (command, odd) != ("extract", "changed since")  # extract carries no file over that models are not known by
]


@pytest.mark.parametrize(("command", "odd"), CELLS)
def test_an_output_with_anything_else_in_it_is_not_replaced(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, odd: str
) -> None:
    """The entry is named, nothing changes, also in a dry run; and where it is moved away, the output is replaced."""
    out = an_output(inputs, command, tmp_path)
    ODD[odd](out)
    words = [*faults.COMMANDS[command](inputs), "-o", str(out), "--overwrite"]
    before = tree(tmp_path)
    for more in ([], ["--dry-run"]):
        assert run([*words, *more]) == 2
        said = capsys.readouterr().err
        assert odd in said
        assert "--overwrite does not replace it" in said
        assert tree(tmp_path) == before
    if odd != "changed since":
        shutil.move(out / odd.rstrip("/"), tmp_path / "away")
        assert run([*words, "-q"]) == 0
        assert os.path.lexists(tmp_path / "away")


@pytest.mark.parametrize("command", faults.COMMANDS)
def test_an_output_of_an_earlier_run_is_replaced_with_all_its_files(inputs: Path, tmp_path: Path, command: str) -> None:
    """Those too that only its own list knows: code, notes in a folder, whatever lay beside the base or the adapter."""
    out = an_output(inputs, command, tmp_path)
    wanted = faults.picture(out)
    weights = next(out.glob("*.safetensors"))
    weights.write_bytes(b"damaged, which is no reason to keep it")
    assert run([*faults.COMMANDS[command](inputs), "-o", str(out), "--overwrite", "-q"]) == 0
    assert faults.picture(out) == wanted
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_appears_in_the_old_output_during_the_run_is_not_replaced(inputs: Path, tmp_path: Path) -> None:
    out = an_output(inputs, "merge", tmp_path)
    old = faults.picture(out)

    def progress(_done: int, _all: int) -> None:
        (out / "thesis.tex").write_text("mine")

    with pytest.raises(loratool.UsageError, match="thesis"):
        loratool.merge(inputs / "base", inputs / "adapter", out, overwrite=True, progress=progress)
    (out / "thesis.tex").unlink()
    assert faults.picture(out) == old


@pytest.mark.parametrize(
    "files",
    [["config.json"], ["README.md"], ["README.md", "LICENSE", "config.json"], ["tokenizer.json", "vocab.txt"]],
)
def test_a_folder_without_weights_and_without_a_record_is_no_model(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str]
) -> None:
    """A config.json alone may be that of anything."""
    for name in files:
        put(tmp_path / "out" / name, "{}")
    before = tree(tmp_path)
    assert run([*faults.COMMANDS["merge"](inputs), "-o", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "contains no model" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_record_that_somebody_wrote_lists_nothing_that_is_not_as_it_says(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = an_output(inputs, "merge", tmp_path)
    put(out / "thesis.tex", "years of work")
    table = json.loads((out / "loratool.json").read_text())
    table["files"]["thesis.tex"] = {"size": 13, "sha256": "0" * 64}
    (out / "loratool.json").write_text(json.dumps(table))
    assert run([*faults.COMMANDS["merge"](inputs), "-o", str(out), "--overwrite"]) == 2
    assert "thesis.tex: changed since" in capsys.readouterr().err


@pytest.mark.parametrize("record", ["{", "[]", '{"files": 7}', '{"files": {"thesis.tex": 1}}', ""])
def test_a_record_that_cannot_be_read_lists_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str
) -> None:
    out = an_output(inputs, "merge", tmp_path)
    (out / "loratool.json").write_text(record)
    before = tree(tmp_path)
    assert run([*faults.COMMANDS["merge"](inputs), "-o", str(out), "--overwrite"]) == 2
    assert "modeling_own.py" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_what_release_0_1_0_made_is_replaced_where_its_names_are_usual(inputs: Path, tmp_path: Path) -> None:
    """It listed weights only; files that no model is known by are then nobody's that can be told."""
    out = an_output(inputs, "merge", tmp_path)
    table = json.loads((out / "loratool.json").read_text())
    files = table.pop("files")
    table["shards"] = {name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    (out / "loratool.json").write_text(json.dumps(table))
    words = [*faults.COMMANDS["merge"](inputs), "-o", str(out), "--overwrite", "-q"]
    assert run(words) == 2
    (out / "modeling_own.py").unlink()
    shutil.rmtree(out / "extra")
    assert run(words) == 0


# ---------------------------------------------------------------- the table of names


def test_a_model_as_transformers_saves_it_is_replaced(inputs: Path, tmp_path: Path) -> None:
    """In several files, with a generation config and a tokenizer: what `save_pretrained` really writes."""
    model = LlamaForCausalLM.from_pretrained(build_base(tmp_path / "in", FAMILIES["llama"]))
    for variant in ("", "fp16"):
        out = tmp_path / "out"
        model.save_pretrained(out, max_shard_size="20KB", **({"variant": variant} if variant else {}))
        words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
        tokenizer.chat_template = {"default": "{{ 1 }}", "rag": "{{ 2 }}"}
        tokenizer.save_pretrained(out)
        assert [p for p in out.rglob("*") if p.is_file() and not OUTPUT_FILES.know(p.relative_to(out).as_posix())] == []
        assert run([*faults.COMMANDS["merge"](inputs), "-o", str(out), "--overwrite", "-q"]) == 0
        shutil.rmtree(out)


def test_an_adapter_as_peft_saves_it_is_replaced(inputs: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(build_base(tmp_path / "in", FAMILIES["llama"]))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "out")
    assert run([*faults.COMMANDS["rescale"](inputs), "-o", str(tmp_path / "out"), "--overwrite", "-q"]) == 0


YES = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model-00001-of-00002.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "loratool.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
]
NO = [
    "thesis.pdf",
    "notes.txt",
    "data.csv",
    "train.py",
    "modeling_llama.py",
    "__init__.py",
    "setup.py",
    "Makefile",
    "index.html",
    "photo.jpg",
    ".gitignore",
    ".gitattributes",
    ".env",
    "model.safetensors.tmp",
    "model.safetensors~",
    "model.safetensors.bak",
    "Model.safetensors",
    "best.safetensors",
    "consolidated.00.pth",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "README.md.orig",
    "README",
    "checkpoint-5/model.safetensors",
    "sub/config.json",
    "additional_chat_templates/../x.jinja",
    "additional_chat_templates/a/b.jinja",
    "model-1-of-2.safetensors",
    "model-00001-of-00002.safetensors/x",
    "requirements.txt",
    "package.json",
    "settings.json",
    "LICENSES",
]


@pytest.mark.parametrize("name", YES)
def test_names_of_the_table(name: str) -> None:
    """As transformers 5, PEFT 0.21 and loratool write them at the top of a folder."""
    assert OUTPUT_FILES.know(name)


@pytest.mark.parametrize("name", [*NO, "model.safetensors\n", "modèle.safetensors", "model\u0661.safetensors", ""])
def test_names_that_are_not_in_the_table(name: str) -> None:
    """What people write, what training leaves, and what only looks like a name of the table."""
    assert not OUTPUT_FILES.know(name)


# ---------------------------------------------------------------- other commands that replace something


def test_a_demo_replaces_only_what_a_demo_made(tmp_path: Path) -> None:
    home = tmp_path / "demo"
    demo(home)
    demo(home, overwrite=True)
    for odd in (home / "base" / "thesis.tex", home / "notes.txt", home / "again" / "notes.txt"):
        put(odd)
        before = tree(home)
        with pytest.raises(loratool.UsageError, match=odd.name if odd.parent != home else "files that no demo wrote"):
            demo(home, overwrite=True)
        assert tree(home) == before
        odd.unlink()
        if odd.parent.name == "again":
            odd.parent.rmdir()
    (tmp_path / "kept").mkdir()
    put(tmp_path / "kept" / "config.json")
    (home / "again").symlink_to(tmp_path / "kept")
    with pytest.raises(loratool.UsageError, match="again"):
        demo(home, overwrite=True)
    assert (tmp_path / "kept" / "config.json").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(loratool.UsageError):
        demo(tmp_path / "file", overwrite=True)


PAGES: dict[str, Callable[[Path], object]] = {
    "a text": lambda page: page.write_text("mine"),
    "somebody's page": lambda page: page.write_text("<!doctype html>\n<html><title>my thesis</title></html>"),
    "an empty file": lambda page: page.touch(),
    "a pipe": lambda page: os.mkfifo(page),
    "a link to a text": a_link_to_a_text,
}


@pytest.mark.parametrize("case", PAGES)
def test_a_page_replaces_only_pages_that_were_made_here(inputs: Path, tmp_path: Path, case: str) -> None:
    page = tmp_path / "r.html"
    PAGES[case](page)
    before = {name: entry for name, entry in tree(tmp_path).items() if "kept" in name or "r.html" in name}
    for more in ([], ["--overwrite"]):
        assert run(["inspect", str(inputs / "adapter"), "--html", str(page), "-q", *more]) == 2
        assert {name: entry for name, entry in tree(tmp_path).items() if "kept" in name or "r.html" in name} == before
    page.unlink()
    assert run(["inspect", str(inputs / "adapter"), "--html", str(page), "-q"]) == 0
    assert run(["inspect", str(inputs / "other"), "--html", str(page), "-q", "--overwrite"]) == 0
    assert "· loratool inspect</title>" in page.read_text("utf-8")


def test_files_beside_a_page_are_not_touched_whatever_their_names(inputs: Path, tmp_path: Path) -> None:
    """Names that a program might take for its own temporary ones, as files, as links and as pipes."""
    page = tmp_path / "r.html"
    names = [
        "r.html.tmp",
        "r.html~",
        ".r.html.swp",
        "r.html.part",
        "r.html.bak",
        "#r.html#",
        f".r.html.{os.getpid()}.partial",
    ]
    for name in names:
        put(tmp_path / name)
    (tmp_path / "r.html.partial").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "r.html.new")
    before = tree(tmp_path)
    assert run(["inspect", str(inputs / "adapter"), "--html", str(page), "-q"]) == 0
    assert run(["inspect", str(inputs / "adapter"), "--html", str(page), "-q", "--overwrite"]) == 0
    page.unlink()
    after = tree(tmp_path)
    assert {name: entry for name, entry in after.items() if name != str(tmp_path)} == {
        name: entry for name, entry in before.items() if name != str(tmp_path)
    }
