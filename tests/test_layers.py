"""Every arrow points one way: which module may import which, and what nothing may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from paths import PACKAGE, ROOT

from loratool.cli import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_MODULE = 500  # lines
LONGEST_FUNCTION = 60  # lines of code: without docstring, comments and empty lines
MOST_PARAMETERS = 8  # of a function; `self` and `cls` do not count

# The design's table: a package, or a module of its own, imports only from those before it.
PACKAGES = (
    "arguments",
    "errors",
    "notes",
    "shown",
    "lazy",
    "grouping",
    "templates",
    "layouts",
    "files",
    "stores",
    "devices",
    "options",
    "algebra",
    "results",
    "provenance",
    "adapters",
    "bases",
    "fetching",
    "measuring",
    "merging",
    "verifying",
    "reworking",
    "inspecting",
    "pictures",
    "publishing",
    "lineage",
    "nn",
    "demo",
    "lesson",
    "commands",
    "cli",
    "__main__",
)

# Those that work on headers and names, but for the reading of values below. They never use torch but in annotations.
WITHOUT_TORCH = (
    *(
        "arguments",
        "errors",
        "notes",
        "shown",
        "grouping",
        "templates",
        "layouts",
        "files",
        "stores",
        "options",
        "results",
        "provenance",
        "bases",
        "fetching",
    ),
    *("inspecting", "pictures", "publishing", "lineage", "commands", "cli", "__main__"),
    *("verifying.options", "verifying.records", "verifying.verify", "verifying.verifier"),
    *("adapters.reading", "adapters.ranks", "adapters.weight_files", "adapters.formats"),
    *("merging.plan", "merging.planning", "merging.draft", "merging.output_layout", "merging.fingerprints"),
)

WITH_TORCH = ("bases.weights", "bases.codecs")


OF_TORCH = "nn", "merging.kernels"  # layers of torch and TorchScript cannot be without it


@dataclass(frozen=True)
class Import:
    """One import statement, and the function it stands in."""

    path: Path
    name: str  # dotted, as imported: `loratool.files.safefile.SafeFile`, `torch`
    line: int
    function: str  # empty at the top of a module
    only_types: bool  # under `if TYPE_CHECKING`

    @property
    def importer(self) -> str:
        return owner(self.module)

    @property
    def module(self) -> str:
        return module_of(self.path)

    @property
    def imported(self) -> str:
        """The row's name of a module of ours; empty for anything else."""
        return owner(self.name) if self.name.startswith("loratool.") else ""

    def __str__(self) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{self.line}: {self.name}"


def module_of(path: Path) -> str:
    """`loratool.files.staging` of its file."""
    dotted = ".".join(("loratool", *path.relative_to(PACKAGE).with_suffix("").parts))
    return dotted.removesuffix(".__init__")


def owner(dotted: str) -> str:
    """`loratool.adapters.formats.peft` → `formats`: packages are one entry of the table."""
    return dotted.split(".")[1]


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever in it."""

    def visit(node: ast.AST, function: str, only_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path, alias.name, child.lineno, function, only_types)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    yield Import(path, f"{child.module}.{alias.name}", child.lineno, function, only_types)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from visit(child, child.name, only_types)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from visit(child, function, True)
            elif not isinstance(child, ast.expr):  # in which there is no statement
                yield from visit(child, function, only_types)

    yield from visit(tree_of(path), "", False)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


@cache
def every_import() -> list[Import]:
    return [found for path in FILES if path != PACKAGE / "__init__.py" for found in imports(path)]


def test_every_package_is_in_the_table_and_says_in_a_sentence_what_it_is() -> None:
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert set(PACKAGES) == there - {"__init__"}
    for folder in (path.parent for path in PACKAGE.rglob("__init__.py")):
        assert ast.get_docstring(tree_of(folder / "__init__.py")), folder


APART = {"acceptance", "benchmarks", "distributed", "helpers", "packaging"}  # folders of tests that are of no package


def test_every_package_has_a_folder_of_tests_and_every_folder_is_of_a_package() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == packages | APART


def test_a_package_imports_only_from_those_before_it() -> None:
    """Imports inside functions and under TYPE_CHECKING count, and there is no exemption."""
    wrong = [
        str(found)
        for found in every_import()
        if found.imported
        and found.imported != found.importer
        and found.name != "loratool.__version__"
        and PACKAGES.index(found.imported) >= PACKAGES.index(found.importer)
    ]
    assert wrong == []


def test_the_map_on_the_design_page_lists_the_packages_in_this_order_and_only_modules_that_exist() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/?` \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    assert [package for package, _ in rows] == [name for name in PACKAGES if name != "__main__"]
    missing = [
        f"{package}: {name}"
        for package, modules in rows
        for name in re.findall(r"`(\w+)/?`", modules)
        if not any((PACKAGE / package).rglob(f"{name}.py")) and not any((PACKAGE / package).rglob(f"{name}/"))
    ]
    assert missing == []


def test_the_map_on_the_design_page_names_every_module_or_its_folder() -> None:
    """Apart from the modules of commands, where a package has one for each, and those of options."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    unnamed = []
    for package, modules in re.findall(r"^\| `(\w+)/` \|(.*)\|$", page, re.MULTILINE):
        named = {"__init__", *re.findall(r"`(\w+)/?`", modules)}
        if re.search("(one|a) module (per|for the page of each) command", modules):
            named |= {*COMMANDS}
        else:
            named.add("options")
        files = [path.relative_to(PACKAGE / package) for path in FILES if path.is_relative_to(PACKAGE / package)]
        unnamed += [f"{package}/{file}" for file in files if not named & {*file.with_suffix("").parts}]
    assert unnamed == []


def test_the_walk_through_a_merge_on_the_design_page_names_only_files_and_definitions_that_exist() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    walk = page[page.index("## A merge, step by step") : page.index("## Creating and comparing adapters")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    files = re.findall(r"`([\w/]+\.py)`", walk)
    names = re.findall(r"`(?:[A-Z][a-z]\w+\.)?([A-Za-z_]+)`", walk)
    assert len(files) > 10
    assert [file for file in files if not (PACKAGE / file).is_file()] == []
    assert len(names) > 20
    assert [n for n in names if not re.search(rf"(?:def|class) {n}\b", source) and not (PACKAGE / n).is_dir()] == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    """All imports count, wherever they stand: there is an order in which the files could be read."""
    known = {module_of(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path == PACKAGE / "__init__.py":  # its names are loaded on first use
            continue
        targets = set()
        for found in imports(path):
            dotted = found.name
            while dotted and dotted not in known:
                dotted = dotted.rpartition(".")[0]
            targets.add(dotted)
        graph[module_of(path)] = targets - {module_of(path), "loratool", ""}
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_types_of_arguments_are_defined_once() -> None:
    """Whoever takes a path, or tells of progress, has the type from `loratool.arguments`, and does not write it out."""
    home = PACKAGE / "arguments.py"
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    types = {ast.unparse(node.value) for node in tree_of(home).body if isinstance(node, ast.Assign)}
    made = {PACKAGE / "commands" / "keywords.py"}  # of the words with which options describe their values
    quoted = {f'"{each}' for each in types}
    assert len(types) == 2
    for path in set(texts) - {home} - made:
        text = texts[path]
        for each in quoted:
            text = text.replace(each, "")
        assert [each for each in types if each in text] == [], path


def test_relative_imports_are_not_used() -> None:
    relative = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in nodes_of(path)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_only_the_command_line_loads_a_foreign_package_before_it_is_used() -> None:
    foreign = {
        str(found)
        for found in every_import()
        if not found.function
        and not found.only_types
        and found.name.split(".")[0] not in {*sys.stdlib_module_names, "loratool"}
        and (found.importer, found.name) != ("cli", "click")
        and found.module.removeprefix("loratool.") not in OF_TORCH
    }
    assert foreign == set()


def test_nothing_imports_the_layers_of_torch() -> None:
    assert [str(found) for found in every_import() if found.imported == "nn" and found.importer != "nn"] == []


def uses_torch(path: Path) -> bool:
    """Whether a file names torch anywhere but in annotations."""
    every = nodes_of(path)
    annotations = [getattr(node, name, None) for node in every for name in ("annotation", "returns")]
    types = {id(node) for found in annotations if found is not None for node in ast.walk(found)}
    return any(isinstance(node, ast.Name) and node.id == "torch" and id(node) not in types for node in every)


def test_modules_about_headers_and_names_never_use_torch() -> None:
    names = {module_of(path).removeprefix("loratool."): path for path in FILES}
    wrong = [
        name
        for name, path in names.items()
        if name.startswith(WITHOUT_TORCH) and not name.startswith(WITH_TORCH) and uses_torch(path)
    ]
    assert wrong == []
    assert uses_torch(names["algebra.lowrank.products"])


def test_algebra_knows_no_files_and_no_names() -> None:
    outside = {
        f.name.split(".")[0]
        for f in every_import()
        if f.importer == "algebra" and f.imported not in ("algebra", "errors", "lazy")
    }
    pure = {
        "__future__",
        "bisect",
        "collections",
        "dataclasses",
        "fractions",
        "functools",
        "hashlib",
        "heapq",
        "itertools",
        "math",
        "operator",
        "typing",
    }
    assert outside <= pure | {"numpy", "torch"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_longer_than_one_can_keep_in_mind(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Every function of a file, and where it stands."""
    for node in nodes_of(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.name}"


def test_no_function_is_longer_than_a_screen() -> None:
    long = {}
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for function, where in functions(path):
            told = ast.get_docstring(function) is not None and len(function.body) > 1
            first = function.body[1 if told else 0].lineno
            code = [line for line in lines[first - 1 : function.end_lineno] if line.strip() and line.strip()[0] != "#"]
            if len(code) > LONGEST_FUNCTION:
                long[where] = len(code)
    assert long == {}


def test_no_function_takes_more_parameters_than_one_can_keep_in_mind() -> None:
    """Options come in one object; the library's functions take them as keywords that their dataclass checks."""
    many = {}
    for path in FILES:
        for function, where in functions(path):
            named = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            if len([name for name in named if name not in ("self", "cls")]) > MOST_PARAMETERS:
                many[where] = named
    assert many == {}


def test_importing_any_module_loads_no_heavy_package() -> None:
    modules = [
        module_of(path)
        for path in FILES
        if path.stem != "__main__" and module_of(path).removeprefix("loratool.") not in OF_TORCH
    ]
    code = f"import sys, {', '.join(modules)}; print(*sorted({{'torch', 'numpy', 'huggingface_hub', 'safetensors'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
