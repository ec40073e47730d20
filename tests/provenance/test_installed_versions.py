"""Versions of packages that a record names; the oracle is importlib.metadata."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from loratool.lazy import installed, version_in


@pytest.mark.parametrize("package", ["torch", "numpy", "huggingface-hub", "safetensors", "click"])
def test_the_version_of_a_package_is_what_its_metadata_say(package: str) -> None:
    assert installed(package) == version(package)


def test_packages_are_found_where_python_finds_them_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first folder of the path counts; older installers write a file of another kind; nothing that is there is ''."""
    places = {
        "first/My_Tool-1.5rc1.dist-info/METADATA": "Metadata-Version: 2.1\nName: My-Tool\nVersion: 1.5rc1+cpu\n\nVersion: 9\n",
        "second/my_tool-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: my-tool\nVersion: 1.0\n",
        "second/my_tool_more-7.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: my-tool-more\nVersion: 7.0\n",
        "second/old_tool-3.0.egg-info/PKG-INFO": "Metadata-Version: 1.0\nName: old-tool\nVersion: 3.0\n",
        "second/broken_tool-4.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: broken-tool\n\nVersion: 4.0\n",
    }
    for name, text in places.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "missing"), str(tmp_path / "first"), str(tmp_path / "second")])
    for package in ("my-tool", "my_tool", "old-tool"):
        assert installed.__wrapped__(package) == version(package)
    assert installed.__wrapped__("my-tool") == "1.5rc1+cpu"
    with pytest.raises(PackageNotFoundError):
        version("tool")
    assert installed.__wrapped__("tool") == ""
    assert version_in(str(tmp_path / "second" / "broken_tool-4.0.dist-info")) == ""
