"""Arguments of the library that should be paths: what is none is named, before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loratool

WRONG: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "nothing": ("merge", (None, "a", "out"), "base must be a path (got None)"),
    "a number": ("resize", (5, "out"), "adapter must be a path (got 5)"),
    "bytes": ("verify", (b"merged",), "merged must be a path (got b'merged')"),
    "no list": ("merge", ("base", None, "out"), "adapters must be a path or a list of paths (got None)"),
    "weights by adapter": (
        "merge",
        ("base", {"a": 0.5}, "out"),
        "adapters must be a path or a list of paths (got {'a': 0.5}); weights are a list of their own, weights=[…]",
    ),
    "pairs of adapter and weight": (
        "combine",
        ([("a", 0.5), ("b", 1)], "out"),
        "adapters must be a path or a list of paths (got [('a', 0.5), ('b', 1)]); weights are a list of their own, "
        "weights=[…]",
    ),
    "one path where several are compared": ("compare", ("style",), "adapters must be a list of paths (got 'style')"),
    "an empty text": ("inspect", ("",), "path: a path is empty"),
    "an empty text among others": ("compare", (["a", ""],), "adapters: a path is empty"),
    "an empty list": ("inspect", ([],), "inspect needs at least one path"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_that_is_no_path_is_named(case: str) -> None:
    """None of these is there, so that anything read would be told first; a list of letters is not a list of paths."""
    name, arguments, told = WRONG[case]
    with pytest.raises(loratool.UsageError) as error:
        getattr(loratool, name)(*arguments)
    assert str(error.value) == told


def test_a_generator_of_paths_is_no_list() -> None:
    """It could be read only once, and the adapters are looked at several times."""
    with pytest.raises(loratool.UsageError, match="list of paths"):
        loratool.merge("base", Path().glob("*"), "out")  # type: ignore[arg-type]


def test_what_is_missing_is_said_by_python_itself() -> None:
    """The call is not complete, so its paths are not looked at."""
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'out'"):
        loratool.merge(None, "a")  # type: ignore[call-arg, arg-type]


def test_none_is_a_path_where_it_means_something() -> None:
    """`plan` without an output, and `verify` by the record alone, go on to what is not there."""
    with pytest.raises(loratool.InputError, match="no such file or folder"):
        loratool.plan("nowhere", "a", None)
    with pytest.raises(loratool.InputError, match="no such file or folder"):
        loratool.verify("nowhere", None)
