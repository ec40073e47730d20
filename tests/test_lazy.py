"""What is known of packages that are not imported."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from loratool.lazy import installed


@pytest.mark.parametrize("package", ["torch", "numpy", "safetensors", "pyyaml", "huggingface_hub"])
def test_versions_are_those_of_the_metadata_of_packages(package: str) -> None:
    assert installed(package) == version(package)


def test_a_package_that_is_not_there_has_none() -> None:
    assert installed("nothing-of-this-name") == ""
