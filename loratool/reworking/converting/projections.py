"""Layers before and after the attention of a U-Net, in the form that their model has: linear, or a convolution of 1 × 1.

The numbers are the same; tools load factors of the form alone that the layer of their model has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.adapters.layers import Contents, Layer, innermost, kind_of
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.dora import Magnitude
from loratool.layouts.diffusion.kernels import PROJECTIONS, is_projection

Kernel = tuple[int, ...]


def projections(contents: Contents, kernels: Mapping[str, Kernel], architecture: str) -> dict[str, Kernel]:
    """The kernels of these layers, nothing of a linear one: those that a base tells, else those of an architecture."""
    names = [target for target in contents.layers if is_projection(target.rpartition(".")[0])]
    known = {target: kernels.get(target, PROJECTIONS.get(architecture)) for target in names}
    return {target: kernel for target, kernel in known.items() if kernel is not None}


def in_their_form(contents: Contents, kernels: Mapping[str, Kernel]) -> Contents:
    """The contents with some layers in the form of their kernels; the same where all are."""
    layers = {
        target: in_form(layer, kernels[target])
        for target, layer in contents.layers.items()
        if target in kernels and layer.kernel != kernels[target] and is_one(layer.kernel) and is_one(kernels[target])
    }
    return replace(contents, layers={**contents.layers, **layers}) if layers else contents


def is_one(kernel: Kernel) -> bool:
    return math.prod(kernel) == 1


def in_form(layer: Layer, kernel: Kernel) -> Layer:
    """A layer with another kernel of one element."""
    plain: Any = innermost(layer.update)
    assert isinstance(plain, LowRank), "it has a kernel"
    update = replace(plain, kernel=kernel, turnable=not kernel)
    magnitude = replace(layer.magnitude, inner=update) if isinstance(layer.magnitude, Magnitude) else layer.magnitude
    return replace(layer, kind=kind_of(update), update=update, magnitude=magnitude)
