"""Heavy packages, imported at their first use: help, `inspect` and plans wait for none of them.

    from loratool.lazy import Tensor, torch

`Tensor` and `NDArray` are for annotations. To type checkers these are the packages themselves.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["NDArray", "Tensor", "numpy", "torch"]

if TYPE_CHECKING:
    import numpy
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:

    class Lazy:
        """A package that each look at one of its names imports, as `import` inside a function would."""

        def __init__(self, package: str) -> None:
            self.package = package

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self.package), name)

    numpy, torch = Lazy("numpy"), Lazy("torch")
    Tensor = NDArray = Any
