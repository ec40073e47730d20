"""What `import loratool` offers: three lists of the same names, and each name is there."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import loratool
from loratool import errors

SOURCE = Path(loratool.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", loratool.__all__)
def test_every_name_resolves_to_the_object_of_its_module(name: str) -> None:
    value = getattr(loratool, name)
    if name != "__version__":
        assert value.__module__.startswith(f"loratool.{loratool.EXPORTS[name]}")


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    blocks = [
        node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    declared = {
        alias.name: node.module
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # the spelling that re-exports
    }
    assert declared == {name: f"loratool.{module}" for name, module in loratool.EXPORTS.items()}


def test_all_is_the_exports_and_the_version_in_order() -> None:
    assert loratool.__all__ == [*sorted(loratool.EXPORTS), "__version__"]
    assert set(dir(loratool)) == set(loratool.__all__)


def test_the_layers_are_an_attribute_as_those_of_torch_are() -> None:
    """`import loratool` is enough for `loratool.nn.LoRALinear`, and does not import torch."""
    assert loratool.nn.LoRALinear(4, 2, r=1).lora_B.shape == (4, 1)


def test_a_star_import_gives_all_of_them() -> None:
    namespace: dict[str, object] = {}
    exec("from loratool import *", namespace)
    assert set(loratool.__all__) <= set(namespace)


def test_every_kind_of_error_is_exported() -> None:
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert kinds <= set(loratool.__all__)


@pytest.mark.parametrize("name", loratool.EXPORTS)
def test_every_exported_name_says_what_it_is(name: str) -> None:
    text = inspect.getdoc(getattr(loratool, name)) or ""
    assert not text.startswith(f"{name}(")  # what a dataclass writes for itself
    assert text.endswith((".", ":")) or "\n" in text


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'loratool' has no attribute 'nothing'"):
        _ = loratool.nothing
