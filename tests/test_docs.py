"""The documentation tells the truth: links lead somewhere, examples run, what is printed is what is shown."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from paths import ROOT

import loratool
from loratool import cli, devices
from loratool.adapters import formats
from loratool.algebra.methods.table import METHODS
from loratool.demo import demo
from loratool.files import sink
from loratool.merging import resources

PAGES = sorted(
    path
    for folder in (".", "docs", "docs/extending", "fixtures", "benchmarks")
    for path in (ROOT / folder).glob("*.md")
)
DEMO = "loratool-demo"  # the folder that examples which are run work in
HOME = "/projects"  # where the reader is imagined to be

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)


@dataclass
class Example:
    """A command that a page shows after `$`, and the lines it shows below."""

    words: list[str]
    output: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return shlex.join(self.words)


def fences(page: Path, language: str) -> list[str]:
    return [
        match["body"] for match in FENCE.finditer(page.read_text(encoding="utf-8")) if match["language"] == language
    ]


def examples(page: Path) -> list[Example]:
    """Every `$ loratool …` of a page, in order."""
    found: list[Example] = []
    for block in fences(page, "console"):
        current: Example | None = None
        for line in block.splitlines():
            if line.startswith("$ "):
                words = shlex.split(line[2:], comments=True)
                current = Example(words[1:]) if words[0] == "loratool" else None
                found += [current] if current else []
            elif current:
                current.output.append(line)
    return found


def parse(example: Example) -> click.Context | None:
    """The words as Click takes them, nothing run; None where they only ask for help."""
    name, *rest = example.words
    group = click.Context(cli.cli, info_name="loratool", **cli.cli.context_settings)
    if any(name in option.opts for option in cli.cli.params):
        return None
    try:
        return cli.command(name).make_context(name, rest, parent=group)
    except click.exceptions.Exit:
        return None


def works_in_the_demo(example: Example) -> bool:
    """Whether every path of the example lies in the demo's folder, so that it can be run."""
    context = parse(example)
    values = context.params.values() if context else ()
    paths = [v for value in values for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Path)]
    return bool(paths) and all(path.parts[0] == DEMO for path in paths)


def label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def names(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=label(page)) for page in pages]


EXAMPLES = [pytest.param(e, id=f"{label(page)}: {e}") for page in PAGES for e in examples(page)]
RUN_PAGES = [page for page in PAGES if any(works_in_the_demo(e) for e in examples(page))]
RUN_BLOCKS = DEMO, "from loratool.nn import"  # a block of Python that names one of them needs nothing else
PYTHON_PAGES = [page for page in PAGES if any(word in block for block in fences(page, "python") for word in RUN_BLOCKS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo's folder, to be copied."""
    folder = tmp_path_factory.mktemp("docs") / DEMO
    demo(folder)
    return folder


@pytest.fixture
def reader(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's working folder, with the demo made."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / DEMO)
    return tmp_path


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", m["text"].lower()).replace(" ", "-") for m in HEADING.finditer(text)}


def links(page: Path) -> Iterator[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return (match["target"] for match in LINK.finditer(text))


@pytest.mark.parametrize("page", names(PAGES))
def test_every_link_inside_the_docs_leads_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or not file.is_relative_to(ROOT) or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    ahead = [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in reached or page.suffix != ".md" or not page.is_file():
            continue
        reached.add(page)
        ahead += [(page.parent / t.partition("#")[0]).resolve() for t in links(page) if not t.startswith("https://")]
    assert {page for page in PAGES if page.parent.name == "docs"} <= reached


@pytest.mark.parametrize("page", ["cli", "codes", "dialects", "servers", "supported"])
def test_a_page_that_is_made_of_help_or_tables_is_what_they_say_today(page: str) -> None:
    fresh = runpy.run_path(str(ROOT / "docs" / f"generate_{page}.py"))["page"]()
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == fresh, "run `make docs`"


def test_the_tests_that_the_page_of_dialects_names_are_there() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate_dialects.py"))
    named = {test for row in made["ROWS"].values() for test in row.test.split(", ")}
    assert [test for test in sorted(named) if not (ROOT / "tests" / test).is_file()] == []


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_and_option_is_documented_by_hand_too(command: str) -> None:
    """docs/cli.md has them all by construction; a person has to have said what they are good for."""
    by_hand = "\n".join(
        p.read_text(encoding="utf-8") for p in PAGES if p.name not in ("cli.md", "codes.md", "CHANGELOG.md")
    )
    assert f"loratool {command}" in by_hand
    options = [p.opts for p in cli.command(command).params if isinstance(p, click.Option)]
    unexplained = [
        spellings
        for spellings in options
        if not any(re.search(rf"{re.escape(s)}(?![\w-])", by_hand) for s in spellings)
    ]
    assert unexplained == []


def test_every_method_of_combine_is_on_its_page_and_in_its_help() -> None:
    page = (ROOT / "docs" / "algebra.md").read_text(encoding="utf-8")
    help_text = " ".join(str(cli.command("combine").help).split())
    assert [name for name in METHODS if f"`{name}`" not in page] == []
    assert [name for name in METHODS if not re.search(rf"(?<![\w-]){name}(?![\w-])", help_text)] == []


def test_every_exported_name_is_on_the_library_page() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in loratool.EXPORTS if not re.search(rf"\b{name}\b", page)] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_shown_command_is_one_that_click_takes(example: Example) -> None:
    parse(example)


@pytest.mark.parametrize("page", names(RUN_PAGES))
def test_shown_commands_print_what_is_shown(
    page: Path, reader: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # a reader's process is a fresh one; this has run other tests
    for module in ("loratool.merging.engine", "loratool.merging.resources"):
        monkeypatch.setattr(f"{module}.resident_memory", lambda: devices.RUNTIME_MEMORY)
    shown = examples(page)
    if any(example.words[0] == "demo" and works_in_the_demo(example) for example in shown):
        shutil.rmtree(reader / DEMO)  # the page makes its own
    for example in filter(works_in_the_demo, shown):
        code = cli.run(example.words)
        printed = capsys.readouterr()
        assert (code != 0) == bool(printed.err), printed.err
        assert (code != 0) == any(line.startswith("Error: ") for line in example.output), printed.err
        if example.output:
            text = (printed.out + printed.err).replace(str(reader.resolve()), HOME)
            printed_lines = text.splitlines()
            assert neutral(printed_lines) == neutral(with_the_gap_filled(example.output, printed_lines))


def with_the_gap_filled(shown: list[str], printed: list[str]) -> list[str]:
    """The lines that a page shows, with the printed ones for a line of only `…`, which stands for what is left out."""
    if "…" not in shown:
        return shown
    before = shown.index("…")
    after = len(shown) - before - 1
    return [*shown[:before], *printed[before : len(printed) - after], *shown[before + 1 :]]


def neutral(lines: list[str]) -> list[str]:
    """Lines without what differs from run to run: numbers, and all that is said of device and memory."""
    return [re.sub(r"\d[\d.,]*", "0", re.sub(r"^(device|peak memory) .*", r"\1", line)) for line in lines]


@pytest.mark.parametrize("page", names(PYTHON_PAGES))
def test_python_examples_on_the_demo_run(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a reader's process is a fresh one; this has run other tests
    for module in ("loratool.merging.engine", "loratool.merging.resources"):
        monkeypatch.setattr(f"{module}.resident_memory", lambda: devices.RUNTIME_MEMORY)
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)  # to which an example adds its own
    namespace: dict[str, Any] = {"__name__": "example"}
    for block in fences(page, "python"):
        if (
            any(word in block for word in RUN_BLOCKS) or page.parent.name == "extending"
        ):  # whose examples are of several blocks
            exec(compile(block, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", names([page for page in PAGES if fences(page, "python")]))
def test_python_examples_call_what_there_is_with_arguments_it_takes(page: Path) -> None:
    for block in fences(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "loratool":
                assert node.attr in loratool.EXPORTS
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("loratool."):
                function = getattr(loratool, ast.unparse(node.func).removeprefix("loratool."))
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                inspect.signature(function).bind(*node.args, **keywords)


def own_outputs(page: Path) -> Iterator[tuple[str, str]]:
    """Every output in the demo's folder that an example of a page writes, with the example."""
    for example in examples(page):
        context = parse(example) if works_in_the_demo(example) else None
        option = next((each for each in context.command.params if "-o" in each.opts), None) if context else None
        idle = context and any(context.params.get(word) for word in ("dry_run", "part", "status"))
        if context and option and context.params[str(option.name)] and not idle:
            yield str(context.params[str(option.name)]), str(example)
    for block in fences(page, "python"):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).removeprefix("loratool.")
            if ast.unparse(call.func).startswith("loratool.") and name != "plan":
                keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
                words = inspect.signature(getattr(loratool, name)).bind(*call.args, **keywords).arguments
                written = ast.unparse(words.get("out", ast.Constant(""))).strip("'")
                if written.startswith(f"{DEMO}/"):
                    yield written, ast.unparse(call)


def test_the_examples_of_all_pages_can_be_run_in_one_folder() -> None:
    """No two of them write the same output, so whoever follows the pages meets no output that exists."""
    written: dict[str, list[str]] = {}
    for page in PAGES:
        for out, example in own_outputs(page):
            written.setdefault(out, []).append(f"{label(page)}: {example}")
    assert len(written) > 40
    assert {out: found for out, found in written.items() if len(found) > 1} == {}


@pytest.mark.parametrize("page", names([p for p in PAGES if p.parent.name == "docs" and p.name != "design.md"]))
def test_a_page_whose_examples_use_the_demo_s_folder_says_how_it_is_made(page: Path) -> None:
    """Readers come from a search or a link, not only from the page before."""
    text = page.read_text(encoding="utf-8")
    assert f"{DEMO}/" not in text or "loratool demo" in text


@pytest.mark.parametrize("page", names([page for page in PAGES if fences(page, "python")]))
def test_python_examples_of_a_page_import_what_they_use(page: Path) -> None:
    """Whoever copies the blocks of a page into a notebook, in order, meets no name that is not there."""
    known = {*dir(builtins), "model"}  # the reader's own
    for block in fences(page, "python"):
        every = list(ast.walk(ast.parse(block)))
        for node in every:
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(each.asname or each.name).partition(".")[0] for each in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
                known.add(node.name)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
        named = [node for node in every if isinstance(node, ast.Name)]
        known |= {node.id for node in named if isinstance(node.ctx, ast.Store)}
        assert {node.id for node in named if isinstance(node.ctx, ast.Load)} <= known


def test_numbers_in_the_text_are_the_code_s() -> None:
    text = " ".join((ROOT / "docs" / "merging.md").read_text(encoding="utf-8").split())
    small, large = resources.CPU_BLOCK >> 20, resources.LARGE_BLOCK >> 20
    assert f"{small} MiB of weight on a CPU, {large} MiB with more than {resources.FEW_WORKERS} workers" in text
    assert f"{small * resources.NUMPY_BLOCKS} MiB where numpy computes, " in text
    on_gpu, packed = (round(size / (1 << 20)) for size in (resources.CUDA_BLOCK, resources.PACKED_CUDA_BLOCK))
    assert f"{on_gpu} MiB on a GPU, and {packed} MiB there for packed weights" in text
    assert f"{sink.COPY_PIECE >> 20} MiB for copies" in text
    more = ("no", "one", "two", "three")[resources.WAITING_WORKERS]
    assert f"{more} more workers than cores, at most {resources.MOST_WORKERS}," in text
    assert f"at most {resources.NUMPY_WORKERS} where numpy computes" in text
    assert f"lower than what {resources.NUMPY_WORKERS} workers would take with torch" in text
    assert f"one per core, at most {resources.GPU_WORKERS} per GPU" in text
    text = " ".join((ROOT / "docs" / "in-memory.md").read_text(encoding="utf-8").split())
    sizes = resources.CPU_BLOCK >> 20, round(resources.CUDA_BLOCK / (1 << 20))
    assert "block is {} MiB of weight on a CPU and {} MiB on a GPU".format(*sizes) in text


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\S+)", text, re.MULTILINE)
    released = re.findall(r"^## (\S+)(?! \(unreleased\))(?: |$)", text, re.MULTILINE)
    assert released[0] == loratool.__version__
    assert versions.index(released[0]) <= 1


def test_the_readme_s_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = set(re.findall(r"\bmake (\w+)", "\n".join(re.findall(r"`[^`]+`", (ROOT / "README.md").read_text("utf-8")))))
    shown = {
        line.split()[2]
        for block in fences(ROOT / "README.md", "console")
        for line in block.splitlines()
        if "$ make" in line
    }
    assert {"demo", "test"} <= shown
    assert shown | asked <= targets


def test_the_fixture_s_adapter_merges_into_the_model_that_peft_runs(tmp_path: Path) -> None:
    """From a real training run to a merged model, with PEFT's own forward pass as the oracle."""
    torch = pytest.importorskip("torch")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    made = runpy.run_path(str(ROOT / "fixtures" / "make_tiny.py"))
    losses = made["make_tiny"](tmp_path)
    assert losses[-1] < losses[0]

    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", device="cpu")

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted, found = tuned(made["TOKENS"]).logits, merged(made["TOKENS"]).logits
        untouched = tuned.get_base_model()
        with tuned.disable_adapter():
            before = untouched(made["TOKENS"]).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (before - wanted).abs().max() > 0.1
