"""One browser for all tests of pages, which takes seconds to start, and one adapter with values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, FLAGS
from pictured import write_adapter, write_base

import loratool
from loratool.results.facts import AdapterFacts
from loratool.results.merge import MergeReport


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("html") / "adapter")


@pytest.fixture(scope="session")
def facts(adapter: Path) -> AdapterFacts:
    found = loratool.inspect(adapter, values=True, check=True, device="cpu")
    assert isinstance(found, AdapterFacts)
    return found


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="session")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> MergeReport:
    """A merge of the adapter, of which rounding to bfloat16 leaves nearly all."""
    return loratool.merge(base, adapter, tmp_path_factory.mktemp("merges") / "merged", device="cpu")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page is not opened in a browser")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    with driver.sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()
