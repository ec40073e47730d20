"""The other types of PEFT 0.21: what each saves on a module, and the updates that this makes.

A reader gives the updates of one module's parameters by name. Formulas are those that PEFT merges with; the papers
are named where the updates and `formulas` are defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from loratool.adapters.adapter import derived
from loratool.adapters.formats.peft import dependent, seeded
from loratool.adapters.formats.peft.draft import Draft, Module, UnsupportedError, UnusableError
from loratool.adapters.formats.peft.files import AGAINST_TENSORS, CONFIG
from loratool.adapters.formats.peft.method import MERGE_IN_PEFT, Method, Updates, always, low_rank, save_again, scaled
from loratool.adapters.formats.peft.scaling import Scaling
from loratool.adapters.formats.roles.products import as_matrix, hadamard_factor, kronecker_factor, kronecker_rank
from loratool.adapters.patterns import match_patterns
from loratool.algebra.updates import formulas
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.compound import Both, Chain
from loratool.algebra.updates.multiplying import BlockAffine, Modulated, Reflections, Rotation, Scale
from loratool.algebra.updates.products import Circulant, Grid, Hadamard, Kronecker, Shared, Tiled
from loratool.algebra.updates.replacing import Replace
from loratool.algebra.updates.sparse import Scatter, Spectrum
from loratool.errors import Problem, printable

SMALL = 1e-5  # that AdaLoRA adds to its rank
CORES = (4,)  # dimensions of a Tucker core of LoHa or LoKr


def adalora(module: Module) -> Updates:
    """α/(init_r + 1e-5) · B (E ⊙ A): pruning drops rows, and the rank that divides stays the first one."""
    config = module.draft
    for slot in ("lora_A", "lora_B", "lora_E"):
        if slot in module and 0 in config.file.tensors[module.slots[slot]].shape:
            raise UnusableError(
                f"{module.shown}: {slot} is empty: pruning removed all of it, or it was not gathered before saving"
            )
    a, b, e = module.tensor("lora_A"), module.tensor("lora_B"), module.tensor("lora_E")
    module.require(e.shape == (a.shape[0], 1), f"lora_E is {list(e.shape)}; expected {[a.shape[0], 1]}")
    first, alpha = config.whole("init_r", 12), config.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else first) / (first + SMALL)
    return {"weight": low_rank(module, b, derived(a.shape, formulas.scaled_rows, a, e), scale)}


def loha(module: Module, scaling: Scaling) -> Updates:
    (up1, down1, _), (up2, down2, _) = (hadamard_factor(module, side) for side in "12")
    sides = [up1.shape[0], down1.shape[1]], [up2.shape[0], down2.shape[1]]
    module.require(sides[0] == sides[1], f"its two products have different shapes: {sides[0]} and {sides[1]}")
    return {"weight": Hadamard(up1, down1, up2, down2, scaling.scale(module.name, down1.shape[0]))}


def lokr(module: Module, scaling: Scaling) -> Updates:
    left, right = (kronecker_factor(module, side) for side in "12")
    if len(right.shape) != 3:  # which `Kronecker` takes in an order of PEFT's own
        right = as_matrix(right)
    rank, ranks = kronecker_rank(module), scaling.expected(module.name)
    module.agree(bool(rank or ranks), f"{CONFIG} has no r, and neither factor is a product")
    return {"weight": Kronecker(left, right, scaling.scale(module.name, rank or next(iter(ranks))))}


def ia3(module: Module, feedforward: Callable[[str], bool]) -> Updates:
    """A factor for each output, of the bias too, or for each input of a feed-forward layer."""
    stored = module.tensor("ia3_l", (2, 4, 5))
    count = math.prod(stored.shape)
    module.require(max(stored.shape) == count, f"ia3_l is {list(stored.shape)}; expected a row or a column")
    inputs, dimensions = feedforward(module.name), len(stored.shape)
    if dimensions == 2 and count > 1:
        module.agree(
            inputs == (stored.shape[0] == 1),
            f"ia3_l is {list(stored.shape)}, which feedforward_modules in {CONFIG} contradicts",
        )
    factors = derived((count,), formulas.flat, stored)
    found: dict[str, Update] = {"weight": Scale(factors, inputs, dimensions, turnable=dimensions == 2)}
    if not inputs:
        found["bias"] = Scale(factors, dimensions=1)
        module.draft.optional.add(f"{module.name}.bias")
    return found


def feedforward(draft: Draft) -> Callable[[str], bool]:
    """Whether (IA)³ scales the inputs of a module: PEFT's reading of `feedforward_modules`."""
    listed = draft.config.get("feedforward_modules") or []
    if isinstance(listed, str):
        whole = f"^(?:{listed})"  # anchored, so that the tails that rank patterns may match do not count
        try:
            found = match_patterns([whole], (module.name for module in draft.modules.values()))
        except ValueError as error:
            draft.problems.append(Problem(f"{CONFIG}: feedforward_modules: {error}", AGAINST_TENSORS))
            return lambda _: False
        return lambda name: whole in found[name]
    return lambda name: any(isinstance(entry, str) and name.endswith(entry) for entry in listed)


def vera(module: Module, prefix: str, halved: bool = False) -> Updates:
    """Two matrices that all layers share, each cut to size, with two vectors of the layer's own.

    PVeRA trains means and variances, one after the other in a vector, and merges the means.
    """
    shared = module.draft.modules.get("")
    if shared is None or f"{prefix}A" not in shared or f"{prefix}B" not in shared:
        raise UnsupportedError(
            f"{prefix}A and {prefix}B are not in the file (save_projection was false), and regenerating them needs "
            f"every layer's shape; {MERGE_IN_PEFT}"
        )
    left, right = module.tensor(f"{prefix}lambda_b", (1,)), module.tensor(f"{prefix}lambda_d", (1,))
    a, b = shared.tensor(f"{prefix}A"), shared.tensor(f"{prefix}B")
    rank = right.shape[0] // 2 if halved else right.shape[0]
    module.require(
        b.shape[0] >= left.shape[0] and b.shape[1] == rank and a.shape[0] == right.shape[0],
        f"the shared {prefix}A {list(a.shape)} and {prefix}B {list(b.shape)} do not match its vectors",
    )
    return {
        "weight": Shared(
            derived((left.shape[0], rank), partial(formulas.first_rows, left.shape[0]), b, left),
            derived((rank, a.shape[1]), partial(formulas.first_rows, rank), a, right),
        )
    }


def delora(module: Module) -> Updates:
    a, b = module.tensor("delora_A"), module.tensor("delora_B")
    strength, norms = module.tensor("delora_lambda", (1,)), module.tensor("delora_w_norm", (1,))
    module.require(strength.shape == (1,), f"delora_lambda has {strength.shape[0]} values")
    module.require(norms.shape[0] == a.shape[1], f"delora_w_norm has {norms.shape[0]} values for {a.shape[1]} columns")
    module.require(b.shape[1] == a.shape[0], "delora_A and delora_B have different ranks")
    return {
        "weight": LowRank(
            derived(b.shape, formulas.normalised_left, b, a, strength),
            derived(a.shape, formulas.scaled_columns, a, norms),
            1.0,
        )
    }


def hra(module: Module) -> Updates:
    stored, ordered = module.tensor("hra_u"), module.draft.flag("apply_GS")
    columns, rank = stored.shape
    if ordered and rank > columns:
        raise UnsupportedError(
            f"HRA with apply_GS has {rank} vectors for {columns} columns, so Gram-Schmidt makes the last ones of rounding "
            "errors, which are others on other machines; merge it with PEFT's merge_and_unload where it was trained"
        )
    formula = formulas.orthogonal_units if ordered else formulas.units
    return {"weight": Reflections(derived(stored.shape, formula, stored))}


def oft(module: Module) -> Updates:
    """Blocks from the upper triangles of skew-symmetric matrices; an embedding is multiplied from the other side."""
    embedding = "oft_embedding_R" in module
    if "oft_R" not in module and not embedding:
        raise UnsupportedError("OFT as stored by an older PEFT (oft_r); merge it with the PEFT release that wrote it")
    slot = "oft_embedding_R" if embedding else "oft_R"
    shape = module.shape(slot)
    module.require(
        len(shape) != 2 or shape[1] > 0 or shape[0] == 0,
        f"{slot} is {list(shape)}: blocks of size 1 (oft_block_size) have nothing to rotate, so the adapter changes nothing here",
    )
    stored = module.tensor(slot)
    count, elements = stored.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    module.require(size * (size - 1) // 2 == elements, f"{elements} is not the number of elements of an upper triangle")
    draft = module.draft
    terms = draft.whole("num_cayley_neumann_terms", 5) if draft.flag("use_cayley_neumann", True) else None
    bound = draft.number("eps", 6e-5) if draft.flag("coft") else None
    formula = partial(formulas.rotations, size, terms, bound, not embedding)
    return {"weight": Rotation(derived((count, size, size), formula, stored), shared=draft.flag("block_share"))}


def boft(module: Module) -> Updates:
    """One factor of blocks, then a scale for each row."""
    blocks, scale = module.tensor("boft_R", (4,)), module.tensor("boft_s")
    factors, count, size, _ = blocks.shape
    if factors > 1:
        raise UnsupportedError(
            "BOFT with several butterfly factors, which only PEFT's CUDA extension can compute; merge it in PEFT"
        )
    module.require(blocks.shape[3] == size, f"boft_R is {list(blocks.shape)}; its blocks are not square")
    convolution = scale.shape[0] == 1 and scale.shape[1] > 1
    rows = derived((math.prod(scale.shape),), formulas.flat, scale)
    rotation = Rotation(derived((count, size, size), formulas.butterfly, blocks))
    return {"weight": Chain(rotation, Scale(rows, dimensions=4 if convolution else 2))}


def miss(module: Module) -> Updates:
    """The form is that of the tensor, which init_weights names: `bat`, `mini`, or the standard one."""
    block, form = module.tensor("miss_block", (2, 3)), module.draft.config.get("init_weights", True)
    module.require(
        (len(block.shape) == 3) == (form == "bat"), f"miss_block is {list(block.shape)}, init_weights {printable(form)}"
    )
    if form == "bat":
        module.require(
            block.shape[1] == block.shape[2], f"miss_block is {list(block.shape)}; its blocks are not square"
        )
        return {"weight": BlockAffine(block)}
    return {"weight": Tiled(block, repeated=form == "mini")}


def fourierft(module: Module) -> Updates:
    spectrum, draft = module.tensor("fourierft_spectrum", (1,)), module.draft
    seed = draft.setting("random_loc_seed", 777, lambda value: type(value) is int, "a whole number")
    return {"weight": Spectrum(spectrum, draft.number("scaling", 150.0), seed)}


def shira(module: Module) -> Updates:
    if "shira_indices" not in module:
        raise UnsupportedError(
            "SHiRA without its shira_indices; save the adapter again with a newer PEFT, which stores them"
        )
    values, index = module.tensor("shira_weight", (1,)), module.indices("shira_indices", (2,))
    module.require(
        index.shape == (2, values.shape[0]), f"shira_indices has shape {list(index.shape)} for {values.shape[0]} values"
    )
    return {"weight": Scatter(index, values)}


def supertuning(module: Module) -> Updates:
    """Single elements by their numbers, and a low-rank update besides where the config has a rank."""
    if "supertuning_indices" not in module:
        raise UnsupportedError(
            "Super-Tuning without its supertuning_indices (save_precomputed_indices was false), and they depend on "
            f"the order of equal weights; {save_again('save_precomputed_indices')}"
        )
    values, index = module.tensor("supertuning_values", (1,)), module.indices("supertuning_indices", (1,))
    module.require(
        index.shape == values.shape, f"supertuning_indices has shape {list(index.shape)} for {values.shape[0]} values"
    )
    sparse = Scatter(index, values)
    if "supertuning_lora_A" not in module and "supertuning_lora_B" not in module:
        return {"weight": sparse}
    down, up = module.tensor("supertuning_lora_A"), module.tensor("supertuning_lora_B")
    scale = module.draft.number("lora_alpha", 2 * down.shape[0]) / down.shape[0]
    return {"weight": Both(sparse, low_rank(module, up, down, scale, turnable=False))}


def c3a(module: Module) -> Updates:
    return {"weight": Circulant(module.tensor("c3a_kernel", (3,)))}


def gralora(module: Module) -> Updates:
    """A grid of low-rank blocks, and a low-rank update of the whole beside it in its hybrid form."""
    a, b, draft = module.tensor("gralora_A", (3,)), module.tensor("gralora_B", (3,)), module.draft
    count, inputs, rank = a.shape
    module.require(
        b.shape[:2] == (count, rank) and rank % count == 0,
        f"gralora_A {list(a.shape)} and gralora_B {list(b.shape)} do not form a grid",
    )
    general = ("gralora_A_general", "gralora_B_general")
    beside = [module.tensor(slot) for slot in general] if any(slot in module for slot in general) else []
    scale = draft.number("alpha", 64) / (rank + (beside[0].shape[0] if beside else 0))
    grid = Grid(
        derived((count, b.shape[2], rank), formulas.transpose, b),
        derived((count, rank, inputs), formulas.transpose, a),
        scale,
    )
    if not beside:
        return {"weight": grid}
    down, up = beside
    return {"weight": Chain(grid, low_rank(module, up, down, scale))}


def hira(module: Module) -> Updates:
    if "hira_embedding_A" in module:
        down, up = module.tensor("hira_embedding_A"), module.tensor("hira_embedding_B")
        return {"weight": Modulated(low_rank(module, up, down, 1.0, turnable=False).turned)}
    down, up = module.tensor("hira_A", (2, 3, 4, 5)), module.tensor("hira_B", (2, 3, 4, 5))
    module.require(up.shape[1] == down.shape[0], "hira_A and hira_B have different ranks")
    if len(down.shape) == 2:
        return {"weight": Modulated(LowRank(up, down, 1.0, turnable=True))}
    rank, _, *kernel = down.shape
    flat = derived((rank, math.prod(down.shape[1:])), formulas.as_matrix, down)
    return {
        "weight": Modulated(LowRank(derived(up.shape[:2], formulas.as_matrix, up), flat, 1.0, kernel=tuple(kernel)))
    }


def ln_tuning(module: Module) -> Updates:
    """Norms that are saved whole, weight and bias."""
    names = {"ln_tuning_layers": "weight", "ln_tuning_layers.bias": "bias"}
    return {names[slot]: Replace(module.tensor(slot, ())) for slot in module.slots}


def vblora(module: Module) -> Updates:
    shared, draft = module.draft.modules.get(""), module.draft
    if shared is None or "vblora_vector_bank" not in shared:
        raise UnusableError(f"{module.shown}: vblora_vector_bank is missing")
    bank, first = shared.tensor("vblora_vector_bank"), draft.whole("topk", 2)
    found: list[tuple[tuple[int, ...], formulas.Formula, tuple[Any, ...]]] = []
    for side in "AB":
        logits = f"vblora_logits_{side}"
        if f"{logits}_topk_indices" in module:  # the adapter was saved for inference only
            index = module.indices(f"{logits}_topk_indices", (3,))
            weights = module.tensor(f"{logits}_topk_weights", ())
            module.require(
                weights.shape == (*index.shape[:2], index.shape[2] - 1), f"the weights of {logits} do not match"
            )
            found.append((index.shape, formulas.given, (weights, index, bank)))
        else:
            stored = module.tensor(logits, (3,))
            module.require(stored.shape[2] == bank.shape[0] >= first, f"{logits} does not match the vector bank")
            found.append((stored.shape, partial(formulas.chosen, first), (stored, bank)))
    (a, mix_a, of_a), (b, mix_b, of_b) = found
    length = bank.shape[1]
    down = derived((a[0], a[1] * length), partial(formulas.bank_rows, mix_a), *of_a)
    up = derived((b[0] * length, b[1]), partial(formulas.bank_columns, mix_b), *of_b)
    return {"weight": low_rank(module, up, down, 1.0)}


def beft(module: Module) -> Updates:
    stored = module.tensor("beft_bias")
    return {"bias": Add(derived((math.prod(stored.shape),), formulas.flat, stored))}


def no_layers(module: Module) -> Updates:
    raise UnusableError(f"{module.shown}: expected token rows only")


METHODS: Mapping[str, Method] = {
    "ADALORA": always(adalora, "lora_A", "lora_B", "lora_E", ignored=("ranknum",)),
    "BEFT": always(beft, "beft_bias"),
    "BOFT": always(boft, "boft_R", "boft_s"),
    "C3A": always(c3a, "c3a_kernel"),
    "DELORA": always(delora, "delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    "FOURIERFT": always(fourierft, "fourierft_spectrum"),
    "GRALORA": always(gralora, "gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
    "HIRA": always(hira, "hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    "HRA": always(hra, "hra_u"),
    "IA3": Method(("ia3_l",), lambda draft: partial(ia3, feedforward=feedforward(draft))),
    "LN_TUNING": always(ln_tuning, "ln_tuning_layers"),
    "LOHA": scaled(loha, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": scaled(lokr, "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "MISS": always(miss, "miss_block"),
    "OFT": always(oft, "oft_R", "oft_embedding_R", "oft_r", "oft_s"),
    "PVERA": always(
        partial(vera, prefix="pvera_", halved=True), "pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"
    ),
    "SHIRA": always(shira, "shira_weight", "shira_indices"),
    "SUPERTUNING": always(
        supertuning, "supertuning_values", "supertuning_indices", "supertuning_lora_A", "supertuning_lora_B"
    ),
    "TRAINABLE_TOKENS": always(no_layers),
    "VBLORA": always(
        vblora,
        "vblora_logits_A",
        "vblora_logits_B",
        "vblora_logits_A_topk_indices",
        "vblora_logits_A_topk_weights",
        "vblora_logits_B_topk_indices",
        "vblora_logits_B_topk_weights",
        "vblora_vector_bank",
    ),
    "VERA": always(partial(vera, prefix="vera_"), "vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
    **dependent.METHODS,
    **seeded.METHODS,
}
