"""Heavy packages, imported at their first use: help, `inspect`, plans and copies wait for none of them.

    from loratool.lazy import Tensor, torch

`Tensor` and `NDArray` are for annotations. To type checkers these are the packages themselves.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "NDArray",
    "Tensor",
    "cyclonedx",
    "cyclonedx_bom",
    "cyclonedx_component",
    "cyclonedx_ids",
    "cyclonedx_json",
    "cyclonedx_license",
    "hub",
    "hub_constants",
    "hub_errors",
    "hub_utils",
    "installed",
    "numpy",
    "purls",
    "spdx",
    "torch",
    "yaml",
]

if TYPE_CHECKING:
    import huggingface_hub as hub
    import numpy
    import torch
    from huggingface_hub import constants as hub_constants, errors as hub_errors, utils as hub_utils
    from numpy.typing import NDArray
    from torch import Tensor

    cyclonedx: Any
    cyclonedx_bom: Any
    cyclonedx_component: Any
    cyclonedx_ids: Any
    cyclonedx_json: Any
    cyclonedx_license: Any
    purls: Any
    spdx: Any
    yaml: Any
else:

    class Lazy:
        """A package that each look at one of its names imports, as `import` inside a function would."""

        def __init__(self, package: str) -> None:
            self.package = package

        def __getattr__(self, name: str) -> Any:
            found = getattr(import_module(self.package), name)
            if not name.isupper():  # a setting may have another value by then
                setattr(self, name, found)  # the next look costs nothing
            return found

    numpy, torch, hub = Lazy("numpy"), Lazy("torch"), Lazy("huggingface_hub")
    hub_constants, hub_errors, hub_utils = (
        Lazy(f"huggingface_hub.{name}") for name in ("constants", "errors", "utils")
    )
    cyclonedx_bom, cyclonedx_component, cyclonedx_license = (
        Lazy(f"cyclonedx.model.{name}") for name in ("bom", "component", "license")
    )
    cyclonedx, cyclonedx_ids, cyclonedx_json = map(Lazy, ("cyclonedx.model", "cyclonedx.spdx", "cyclonedx.output.json"))
    purls, spdx, yaml = map(Lazy, ("packageurl", "spdx_python_model.bindings.v3_0_1", "yaml"))
    Tensor = NDArray = Any


@cache
def installed(package: str) -> str:
    """The version of a package, which is not imported for it; empty where it is not installed.

    Its metadata are looked for where installers put them, for the import of `importlib.metadata` takes as long as the plan
    of a merge; that is asked where there are none.
    """
    wanted = package.lower().replace("-", "_")
    for folder in sys.path:
        with suppress(OSError), os.scandir(folder or os.curdir) as entries:
            for entry in entries:
                name, _, rest = entry.name.partition("-")
                if rest.endswith(".dist-info") and name.lower() == wanted and (told := version_in(entry.path)):
                    return told
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def version_in(folder: str) -> str:
    """The version in a package's metadata, whose head is lines of `Key: value`; empty where they say none."""
    with suppress(OSError, UnicodeDecodeError), open(os.path.join(folder, "METADATA"), encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("Version:"):
                return line.partition(":")[2].strip()
            if not line.strip():
                break
    return ""
