"""A place for an output that must not come to be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def unwritten(tmp_path: Path) -> Iterator[Path]:
    """A folder for the output in which nothing may be left."""
    home = tmp_path / "home"
    home.mkdir()
    yield home / "out"
    assert list(home.iterdir()) == []
