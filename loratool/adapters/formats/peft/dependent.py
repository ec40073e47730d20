"""Types of PEFT 0.21 whose update depends on the weight in other ways than by rotating or scaling it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from loratool.adapters.adapter import derived
from loratool.adapters.formats.peft.draft import Module, UnsupportedError
from loratool.adapters.formats.peft.files import CONFIG
from loratool.adapters.formats.peft.method import MERGE_IN_PEFT, Method, Updates, always
from loratool.algebra.updates import formulas, residual
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.compound import Both, Fill, Image
from loratool.algebra.updates.multiplying import Modulated
from loratool.algebra.updates.residual import Residual
from loratool.algebra.updates.rewriting import Injection, Network, Pairs, Recomposed
from loratool.errors import printable


def deft(module: Module) -> Updates:
    """P by itself, or what its QR gives; an alpha scales R as LoRA's does its product."""
    direction, draft = module.tensor("deft_P"), module.draft
    rows, rank = direction.shape
    method = draft.config.get("decomposition_method", "relu")
    sides = {"relu": (formulas.same, formulas.positive), "qr": (formulas.orthogonal, formulas.orthogonal)}.get(method)
    if sides is None:
        raise UnsupportedError(f"DEFT with unknown decomposition_method {printable(repr(method))}")
    removed = draft.flag("para")
    down: Any = None
    if not removed:
        stored = module.tensor("deft_R")
        module.require(stored.shape[0] == rank, "deft_P and deft_R have different ranks")
        alpha = draft.number("alpha", 0) if draft.config.get("alpha") is not None else 0.0
        down = derived(stored.shape, partial(formulas.times, alpha / rank if alpha else 1.0), stored)
    left, right = (derived((rows, rank), formula, direction) for formula in sides)
    return {"weight": Injection(left, right, down)}


def peanut(module: Module) -> Updates:
    up, down, draft = module.tensor("peanut_B"), module.tensor("peanut_A"), module.draft
    rank, depth = down.shape[0], sum(slot.startswith("peanut_encoders.") for slot in module.slots)
    module.require(up.shape == down.shape[::-1], f"peanut_A is {list(down.shape)} and peanut_B {list(up.shape)}")
    wanted = draft.setting("depth", 0, lambda value: type(value) is int and value >= 0, "a whole number")
    module.agree(depth == wanted, f"it has {depth} encoders, but {CONFIG} says {wanted}")
    name = draft.config.get("act_fn", "relu")
    activation = formulas.ACTIVATIONS.get(name) if isinstance(name, str) else None
    if activation is None:
        raise UnsupportedError(
            f"PEANuT with unsupported act_fn {printable(repr(name))}; supported: {', '.join(formulas.ACTIVATIONS)}; "
            f"{MERGE_IN_PEFT}"
        )
    layers: list[Any] = []
    for side in ("encoders", "decoders") if depth else ():
        stored = [module.tensor(f"peanut_{side}.{number}") for number in range(depth)]
        module.require(
            all(layer.shape == (rank, rank) for layer in stored),
            f"a layer of its {side} does not have the shape {[rank, rank]}",
        )
        layers.append(derived((depth, rank, rank), formulas.stacked, *stored))
    encoders, decoders = layers or (None, None)
    return {"weight": Network(up, down, encoders, decoders, activation, draft.number("scaling", 1.0))}


def road(module: Module) -> Updates:
    """Rows, and elements of the bias, that are turned in pairs."""
    angles, lengths, draft = module.tensor("road_theta", (1,)), module.tensor("road_alpha", (1,)), module.draft
    module.require(angles.shape == lengths.shape, "road_theta and road_alpha have different lengths")
    size, variant = draft.whole("group_size", 64), draft.config.get("variant", "road_1")
    count = angles.shape[0]
    if variant not in formulas.ROAD_ROWS:
        raise UnsupportedError(f"RoAd with unknown variant {printable(repr(variant))}")
    rows = int(count * formulas.ROAD_ROWS[variant])
    module.require(size % 2 == 0 and rows % size == 0, f"its {rows} rows are not a multiple of the group size {size}")
    own, other = (
        derived((rows,), partial(formulas.turns, variant, size, function), angles, lengths)
        for function in ("cos", "sin")
    )
    draft.optional.add(f"{module.name}.bias")
    return {"weight": Pairs(own, other, size), "bias": Pairs(own, other, size, dimensions=1)}


def glora(module: Module) -> Updates:
    """W + W ⊙ A + B and b + b ⊙ D + E + W C, each of A to E a product, a vector, a number or nothing."""
    modulating, added = (glora_part(module, side) for side in "AB")
    found: dict[str, Update] = {}
    if update := together(Modulated(modulating) if modulating else None, added):
        found["weight"] = update
    bias = [glora_part(module, side, dimensions=1) for side in "DE"]
    image: Update | None = None
    if "glora_C.Xd" in module:
        left, right = module.tensor("glora_C.Xd"), module.tensor("glora_C.Xu")
        module.require(
            left.shape[1] == right.shape[0] and right.shape[1] == 1, "glora_C must be a product with one column"
        )
        image = Image(derived((left.shape[0],), formulas.flat_product, left, right))
    elif "glora_C.X" in module:
        stored = module.tensor("glora_C.X")
        image = Image(derived((math.prod(stored.shape),), formulas.flat, stored))
    if update := together(Modulated(bias[0]) if bias[0] else None, bias[1], image):
        found["bias"] = update
    return found


def glora_part(module: Module, side: str, dimensions: int = 2) -> Update | None:
    """What one of GLoRA's parts adds, or multiplies the weight by; None where the adapter has no such part."""
    slot = f"glora_{side}"
    if f"{slot}.Xd" in module:
        up, down = module.tensor(f"{slot}.Xd"), module.tensor(f"{slot}.Xu")
        module.require(up.shape[1] == down.shape[0], f"{slot}.Xd and {slot}.Xu have different ranks")
        return LowRank(up, down, 1.0)
    if f"{slot}.X" in module:
        stored = module.tensor(f"{slot}.X", (1, 2))
        return Fill(derived((math.prod(stored.shape),), formulas.flat, stored), dimensions)
    return None


def together(*parts: Update | None) -> Update | None:
    found: Update | None = None
    for part in parts:
        found = part if found is None else found if part is None else Both(found, part)
    return found


def osf(module: Module) -> Updates:
    """The smaller singular values and their vectors, trained; the larger ones are the weight's own."""
    up, values, down = (module.tensor(f"osf_svd_params.{name}", ()) for name in ("U_low", "S_low", "V_low"))
    module.require(
        len(up.shape) == len(down.shape) == 2 and up.shape[1:] == values.shape == down.shape[:1],
        f"U_low {list(up.shape)}, S_low {list(values.shape)}, V_low {list(down.shape)} cannot be multiplied",
    )
    scaled = derived(up.shape, formulas.scaled_columns, up, values)
    return {"weight": Residual(LowRank(scaled, down, 1.0), residual.MINOR)}


def frod(module: Module) -> Updates:
    """The projection V is that of all modules with the same role, by which PEFT names it."""
    shared, role = module.draft.modules.get("", module), role_of(module.name)
    if f"frod_V.{role}" not in shared or f"frod_s_indices.{role}" not in shared:
        raise UnsupportedError(
            "frod_V and frod_s_indices are not in the file (save_projection was false), and computing them needs a "
            f"decomposition of all layers together; {MERGE_IN_PEFT}"
        )
    if shared.shape(f"frod_s_indices.{role}") == (2, 0):
        raise UnsupportedError(
            "FRoD without entries outside of the diagonal (sparse_rate 0), whose frod_lambda_s_values are empty; "
            f"{MERGE_IN_PEFT}"
        )
    basis, index = shared.tensor(f"frod_V.{role}"), shared.indices(f"frod_s_indices.{role}", (2,))
    diagonal, values = module.tensor("frod_lambda_l", (1,)), module.tensor("frod_lambda_s_values", (1,))
    side = diagonal.shape[0]
    module.require(
        basis.shape == (side, side) and index.shape == (2, values.shape[0]),
        f"frod_V {list(basis.shape)} and frod_s_indices {list(index.shape)} do not match {side} and {values.shape[0]} "
        "values",
    )
    return {"weight": Recomposed(basis, diagonal, index, values)}


def role_of(module: str) -> str:
    """PEFT's name for what modules of several layers have in common: the last parts of their paths."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


METHODS: Mapping[str, Method] = {
    "DEFT": always(deft, "deft_P", "deft_R"),
    "FROD": always(
        frod, "frod_lambda_l", "frod_lambda_s_values", "frod_V.*", "frod_s_indices.*", ignored=("frod_s_size.*",)
    ),
    "GLORA": always(glora, "glora_A.*", "glora_B.*", "glora_C.*", "glora_D.*", "glora_E.*"),
    "OSF": always(osf, "osf_svd_params.*"),
    "PEANUT": always(peanut, "peanut_A", "peanut_B", "peanut_encoders.*", "peanut_decoders.*"),
    "ROAD": always(road, "road_theta", "road_alpha"),
}
