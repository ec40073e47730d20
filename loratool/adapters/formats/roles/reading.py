"""Which method the tensors of a module belong to, and the updates that they make together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from loratool.adapters.adapter import Derived, StoredTensor
from loratool.adapters.formats.found import MISSING_PARTNER
from loratool.adapters.formats.roles import lycoris, names
from loratool.adapters.formats.roles.factors import low_rank
from loratool.adapters.formats.roles.module import Found, Module, Slots
from loratool.algebra.updates import formulas
from loratool.algebra.updates.additive import Add
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.compound import Both
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.replacing import Replace
from loratool.algebra.updates.sparse import Scatter
from loratool.files.open_sources import OpenSources


@dataclass(frozen=True)
class Family:
    """A method: its roles, what makes an update of the weight of them, and what that is."""

    name: str
    method: str  # what PEFT calls it, or would
    roles: tuple[str, ...]
    read: Callable[[Slots], Update]
    formula: str  # of the merged weight
    test: str  # of tests/adapters/test_roles.py, that holds it to the formula


FAMILIES = (
    Family(
        "LoRA",
        "LORA",
        names.LORA,
        low_rank,
        "W + α/r · BA, on convolutions too; a Tucker core becomes part of A",
        "test_all_spellings_of_the_two_factors_are_lora",
    ),
    Family(
        "LoHa",
        "LOHA",
        names.LOHA,
        lycoris.loha,
        "W + α/r · (w1a·w1b) ⊙ (w2a·w2b), each with a Tucker core or without",
        "test_loha_is_the_product_of_two_products",
    ),
    Family(
        "LoKr",
        "LOKR",
        names.LOKR,
        lycoris.lokr,
        "W + α/r · w1 ⊗ w2, each whole, a product, or with a Tucker core; without α where both are whole",
        "test_lokr_is_a_kronecker_product",
    ),
    Family(
        "(IA)³",
        "IA3",
        names.IA3,
        lycoris.ia3,
        "W + W ⊙ w, with a value for each output or each input",
        "test_ia3_adds_its_share_of_each_row_or_column",
    ),
    Family(
        "GLoRA",
        "GLORA",
        names.GLORA,
        lycoris.glora,
        "W + α/r · (b1·b2 + W·a1·a2), or with both pairs swapped, as an older LyCORIS has them",
        "test_glora_changes_the_weight_and_what_it_is_given",
    ),
    Family(
        "OFT of outputs, BOFT",
        "OFT",
        names.OFT,
        lycoris.oft,
        "rescale ⊙ (Q·W), with blocks on the diagonal of Q or in a butterfly; α limits the rotation",
        "test_oft_rotates_blocks_of_outputs",
    ),
    Family(
        "OFT of inputs",
        "OFT",
        names.OFT_OF_INPUTS,
        lycoris.oft_of_inputs,
        "W · blockdiag(R)ᵀ, and W · blockdiag(R) for a convolution",
        "test_oft_of_inputs_rotates_what_a_layer_is_given",
    ),
)
FAMILY_OF = {role: family for family in FAMILIES for role in family.roles}


def methods_of(roles: Iterable[str]) -> set[str]:
    """What PEFT calls the methods that some roles belong to, however they are spelled."""
    return {FAMILY_OF[role].method for role in map(names.canonical, roles) if role in FAMILY_OF}


IN_FULL = frozenset((*names.SPARSE, *names.WHOLE))
# What goes with any of them, or alone.
COMMON = IN_FULL.union((names.ALPHA, *names.MAGNITUDES))


@dataclass
class Changes:
    """The changes of each parameter of a module, and the roles that each is made of."""

    updates: dict[str, list[Update]] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)

    def add(self, parameter: str, update: Update, *roles: str) -> None:
        self.updates.setdefault(parameter, []).append(update)
        self.used.setdefault(parameter, []).extend(roles)


def found_in(module: Module, sources: OpenSources | None = None) -> Found:
    """The updates that the tensors of a module make; `sources` keeps its file open for the scalars that are read.

    Raises `RoleProblem` where a half is missing, shapes do not multiply, dtypes are no floats, or roles contradict
    each other.
    """
    slots = Slots(module, sources)
    if foreign := sorted({names.FOREIGN[role] for role in slots.spelled if role in names.FOREIGN}):
        way_out = "merge it with the tool that trained it, then extract LoRA from the merged model"
        return Found({}, {}, unsupported=tuple(f"{name} ({slots.shown}); {way_out}" for name in foreign))
    family, changes = family_of(slots), Changes()
    if family is not None:
        update, own = family.read(slots), [role for role in family.roles if role in slots and role != names.UP_BIAS]
        if (magnitude := magnitude_role(slots)) is not None:
            update = with_magnitude(slots, magnitude, update)
            own.append(magnitude)
        changes.add("weight", update, *own)
    add_whole(slots, changes)
    add_bias(slots, changes)
    used = {role for roles in changes.used.values() for role in roles}
    idle = [role for role in slots.spelled if role not in used and role not in names.WITHOUT_CHANGE]
    if idle or not changes.updates:
        shown = ", ".join(map(slots.name, idle or slots.spelled))
        slots.fail(f"{shown}: nothing in the module that this belongs to", MISSING_PARTNER)
    next(iter(changes.used.values())).extend(role for role in slots.spelled if role not in used)
    return Found(
        {parameter: together(updates) for parameter, updates in changes.updates.items()},
        {parameter: tuple(slots.spelled[role] for role in roles) for parameter, roles in changes.used.items()},
        slots.rank,
        tuple(slots.notes),
        tuple(slots.unsupported),
    )


def family_of(slots: Slots) -> Family | None:
    """The method of a module; None where nothing but whole changes are there."""
    found = {family.name: family for role in slots.spelled if (family := FAMILY_OF.get(role)) is not None}
    if len(found) > 1:
        there = [family for family in FAMILIES if family.name in found]
        shown = " and ".join(
            f"{family.name} ({slots.name(next(role for role in family.roles if role in slots))})" for family in there
        )
        slots.fail(f"has tensors of {shown}; expected those of one method")
    if strange := [role for role in slots.spelled if role not in FAMILY_OF and role not in COMMON]:
        slots.fail(f"{', '.join(map(slots.name, strange))}: no method has such a tensor")
    return next(iter(found.values()), None)


def together(updates: list[Update]) -> Update:
    """Several changes of one parameter as one."""
    first, *others = updates
    for other in others:
        first = Both(first, other)
    return first


def add_whole(slots: Slots, changes: Changes) -> None:
    """Changes that are stored in full."""
    if IN_FULL.isdisjoint(slots.spelled):  # as in most modules
        return
    for role, parameter in (("diff", "weight"), ("w_norm", "weight"), ("diff_b", "bias"), ("b_norm", "bias")):
        if role in slots:
            changes.add(parameter, Add(slots.tensor(role, ())), role)
    if any(role in slots for role in names.SPARSE):
        changes.add("weight", residual(slots), *(role for role in names.SPARSE if role in slots))
    if "set_weight" in slots:
        slots.require("weight" not in changes.updates, f"{slots.name('set_weight')} replaces what others change")
        changes.add("weight", Replace(slots.tensor("set_weight", ())), "set_weight")


def residual(slots: Slots) -> Update:
    """What LyCORIS keeps of the difference that its factors leave, where it was extracted: single elements of a matrix."""
    index, values = slots.indices("bias_indices", (2,)), slots.tensor("bias_values", (1,))
    slots.require(
        index.shape == (2, values.shape[0]),
        f"{slots.name('bias_indices')} is {list(index.shape)} for {values.shape[0]} values",
    )
    if index.info.dtype == "I16":
        index = Derived(index.shape, (index,), formulas.unsigned)
    return Scatter(index, values)


def add_bias(slots: Slots, changes: Changes) -> None:
    """What the second factor adds to the output, scaled like its product."""
    if names.UP_BIAS in slots:
        bias = slots.tensor(names.UP_BIAS, (1,))
        rows = slots.tensor(names.UP, ()).shape[0]
        slots.require(
            bias.shape[0] == rows,
            f"{slots.name(names.UP_BIAS)} has {bias.shape[0]} values; expected {rows}, one per row",
        )
        changes.add("bias", Add(bias, slots.scale(slots.rank)), names.UP_BIAS)


def magnitude_role(slots: Slots) -> str | None:
    """The role of DoRA's lengths; None where it is not DoRA."""
    there = [role for role in names.MAGNITUDES if role in slots]
    if len(there) > 1:
        slots.fail(f"{' and '.join(map(slots.name, there))} are two spellings of the same tensor")
    return there[0] if there else None


def with_magnitude(slots: Slots, role: str, update: Update) -> Update:
    """The update as DoRA applies it: with lengths of output rows, or of input columns, which their shape tells.

    (rows, 1, …) are those of rows, (1, columns, 1, …) those of columns, and one dimension those of rows; PEFT keeps
    those of a convolution's rows as (1, rows, 1, 1).
    """
    stored: StoredTensor = slots.tensor(role, (1, 2, 3, 4, 5))
    rows, columns, *_ = update.shape
    shape, count = stored.shape, max(stored.shape)
    alone = sum(size > 1 for size in shape) <= 1
    like_peft = role.startswith("lora_magnitude_vector") and len(shape) > 2
    by_row = count == rows and (len(shape) == 1 or shape[0] == rows or (like_peft and shape[1] == rows))
    # the columns of flat factors of a convolution are those of its kernel too
    by_column = not by_row and len(shape) > 1 and shape[1] == count and columns % count == 0
    slots.require(
        alone and (by_row or by_column),
        f"{slots.name(role)} is {list(shape)}; expected {rows} values for the rows, or {columns} for the columns",
    )
    return Magnitude(update, Derived((count,), (stored,), formulas.flat), by_column)  # type: ignore[arg-type]  # loaded later
