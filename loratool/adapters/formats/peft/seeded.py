"""Types of PEFT 0.21 that train little of an update, the rest being random: drawn from a seed, and saved besides."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from loratool.adapters.adapter import derived
from loratool.adapters.formats.peft.draft import Draft, Module, UnsupportedError
from loratool.adapters.formats.peft.method import MERGE_IN_PEFT, Method, Reader, Updates, always, low_rank, save_again
from loratool.algebra.updates import formulas
from loratool.algebra.updates.products import Bases
from loratool.algebra.updates.sparse import LARGEST_ORDER, Wavelet


def randlora(module: Module) -> Updates:
    """Random matrices that all layers share, cut to size, each with diagonals of the layer's own."""
    shared = module.draft.modules.get("", module)
    if "randlora_A" not in shared or "randlora_B" not in shared:
        raise UnsupportedError(
            "randlora_A and randlora_B are not in the file (save_projection was false), and regenerating them needs "
            f"every layer's shape; {save_again('save_projection')}"
        )
    small, large = shared.tensor("randlora_A", (3,)), shared.tensor("randlora_B", (3,))
    left, right = module.tensor("randlora_lambda"), module.tensor("randlora_gamma")
    (rank, count), (bases, side) = left.shape, right.shape
    module.require(
        bases == count <= large.shape[1]
        and rank == small.shape[0] == large.shape[2]
        and small.shape[1] == 1
        and side <= small.shape[2],
        f"the shared randlora_A {list(small.shape)} and randlora_B {list(large.shape)} do not match its diagonals "
        f"{list(left.shape)} and {list(right.shape)}",
    )
    return {
        "weight": Bases(
            derived((large.shape[0], count * rank), partial(formulas.first_bases, count), large),
            derived((rank * count, side), formulas.scaled_bases, small, left, right),
            module.draft.number("randlora_alpha", 640) / rank,
        )
    }


def tinylora(draft: Draft) -> Reader:
    """B (Σ vᵢ Pᵢ) A, a vector v serving one layer or several.

    Vectors go by the order of the model's layers, which a file does not keep; a layer's number is in the seed of its P.
    """
    layers = [module for path, module in draft.modules.items() if path]
    tying = draft.number("weight_tying", 0.0)
    vectors = max(1, round(len(layers) * (1 - tying)))
    each = max(1, len(layers) // vectors)
    seed = draft.setting("projection_seed", 42, lambda value: type(value) is int, "a whole number")

    def read(module: Module) -> Updates:
        if "tinylora_P" not in module:
            raise UnsupportedError(
                "tinylora_P is not in the file (save_projection was false), and regenerating it needs the order of "
                f"the model's layers; {save_again('save_projection')}"
            )
        shared = draft.modules.get("", module)
        every = [shared.tensor(f"tinylora_v.{number}", (1,)) for number in range(vectors)]
        a, b, random = module.tensor("tinylora_A"), module.tensor("tinylora_B"), module.tensor("tinylora_P", (3,))
        wanted = (every[0].shape[0], b.shape[1], a.shape[0])
        module.require(random.shape == wanted, f"tinylora_P is {list(random.shape)}; expected {list(wanted)}")
        formula = partial(formulas.mixed_projections, module.shown, seed, len(layers), each)
        return {"weight": low_rank(module, b, derived((b.shape[1], a.shape[1]), formula, random, a, *every), 1.0)}

    return read


def unilora(draft: Draft) -> Reader:
    """Both factors picked from one vector of the whole adapter, and scaled."""
    if not any(draft.modules):
        draft.unsupported.append(
            "unilora_indices and unilora_scales are not in the file (save_indices was false), and regenerating them "
            f"needs the order of the model's layers; {save_again('save_indices')}"
        )

    def read(module: Module) -> Updates:
        vector = draft.modules.get("", module).tensor("unilora_theta_d", (1,))
        factors: dict[str, Any] = {}
        for side in "AB":
            index, scale = module.indices(f"unilora_indices_{side}", (2,)), module.tensor(f"unilora_scales_{side}")
            module.require(index.shape == scale.shape, f"unilora_scales_{side} is {list(scale.shape)}")
            factors[side] = derived(index.shape, formulas.picked, vector, index, scale)
        return {"weight": low_rank(module, factors["B"], factors["A"], 1.0)}

    return read


def waveft(module: Module) -> Updates:
    spectrum, draft = module.tensor("waveft_spectrum", (1,)), module.draft
    seed = draft.setting("random_loc_seed", 777, lambda value: type(value) is int, "a whole number")
    order = 0
    if draft.flag("use_idwt", True):
        family = draft.setting("wavelet_family", "db1", lambda value: isinstance(value, str), "the name of a wavelet")
        orders = {f"db{number}": number for number in range(1, LARGEST_ORDER + 1)}
        if family not in orders:
            raise UnsupportedError(f"WaveFT with a wavelet other than db1 to db{LARGEST_ORDER}; {MERGE_IN_PEFT}")
        order = orders[family]
    return {"weight": Wavelet(spectrum, draft.number("scaling", 25.0), seed, order)}


METHODS: Mapping[str, Method] = {
    "RANDLORA": always(randlora, "randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    "TINYLORA": Method(("tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v.*"), tinylora),
    "UNILORA": Method(
        ("unilora_theta_d", *(f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB")), unilora
    ),
    "WAVEFT": always(waveft, "waveft_spectrum"),
}
