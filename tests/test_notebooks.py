"""The notebooks run from top to bottom and print what they show."""

from __future__ import annotations

import ast
import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
CELL = {"cell_type", "id", "metadata", "source"}  # keys of the format's version 4.5, of any cell


def notebook(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def steady(text: str) -> list[str]:
    """Lines with 0 for every number, since times and the last digits differ between machines."""
    return [re.sub(r"\d[\d.,]*", "0", line) for line in text.splitlines()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_the_structure_of_the_format(path: Path) -> None:
    """Version 4.5 of nbformat, whose own validator reads it in tests/acceptance."""
    book = notebook(path)
    assert book.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == CELL | code
        assert cell["cell_type"] in ("code", "markdown")
        for output in cell.get("outputs", ()):
            assert output.keys() == {"name", "output_type", "text"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_s_cells_run_in_order_and_print_what_is_shown(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), path.name, "exec", dont_inherit=True), namespace)
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        assert steady(printed.getvalue()) == steady(shown)


def test_the_lesson_s_notebook_has_the_steps_of_the_lesson() -> None:
    cells = notebook(ROOT / "docs" / "notebooks" / "lora.ipynb")["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert re.findall(r"^## (\d)\. ", text, re.MULTILINE) == list("123456")
    source = (ROOT / "loratool" / "cli" / "lesson.py").read_text(encoding="utf-8").lower()
    for title in re.findall(r"^## \d\. (.+)$", text, re.MULTILINE):
        assert f'"{title.lower()}"' in source


def test_a_cell_of_the_notebook_can_be_run_again() -> None:
    """Every call that writes replaces what the cell wrote before, as a reader runs a cell more than once."""
    cells = notebook(ROOT / "docs" / "notebooks" / "lora.ipynb")["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    writing = [call for call in calls if re.fullmatch(r"loratool\.(merge|rescale|resize)", ast.unparse(call.func))]
    assert len(writing) == 6
    for call in writing:
        assert {keyword.arg or ast.unparse(keyword.value) for keyword in call.keywords} & {"overwrite", "options"}
