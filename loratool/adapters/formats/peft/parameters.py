"""`target_parameters`: LoRA on parameters that are no layer's weight, such as those of all experts in one tensor.

A key names the module only. PEFT wraps a module once for each of its parameters, in the order in which the model
registers them: the first one lies innermost, behind the most `base_layer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from loratool.adapters.formats.peft import keys, packing
from loratool.adapters.formats.peft.draft import Draft, Module, UnusableError
from loratool.adapters.formats.peft.files import AGAINST_TENSORS, CONFIG
from loratool.adapters.formats.peft.scaling import Scaling
from loratool.adapters.patterns import match_patterns
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.experts import ExpertFactors
from loratool.errors import Problem, printable

# The order in which transformers registers the parameters of one module, for every such module it has.
REGISTERED = (
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "v1", "w2"),
    ("weight", "bias"),
)


def named(draft: Draft, module: str) -> dict[str, bool]:
    """The parameters of a module that the config may target: name → whether its entry names the module too.

    An entry is the tail of a parameter's path. One without a module, such as `down_proj`, names that parameter of
    every module that has one, and a file does not tell which modules do.
    """
    targets = draft.config.get("target_parameters") or []
    found: dict[str, bool] = {}
    for target in targets if isinstance(targets, list) else []:
        tail, _, parameter = str(target).rpartition(".")
        if not tail or module == tail or module.endswith(f".{tail}"):
            found[parameter] = found.get(parameter, False) or bool(tail)
    return found


def chosen(draft: Draft, module: str, count: int) -> set[str]:
    """The `count` parameters of a module that have factors; all that it may have where nothing tells which they are.

    PEFT's "all-linear" on a mixture of experts writes `gate.weight`, `gate_up_proj` and `down_proj`. The last two are
    no parameters of the router `gate`: those of one module are in one row of `REGISTERED`.
    """
    names = named(draft, module)
    explicit = {name for name, whole in names.items() if whole}
    rows = [names.keys() & set(row) for row in REGISTERED if explicit and explicit <= set(row)]
    return next((some for some in (set(names), *rows, explicit) if len(some) == count), set(names))


def layers(draft: Draft) -> set[str]:
    """The modules that `target_modules` names: layers, which have no such parameters, whatever a bare name may match."""
    targets = draft.config.get("target_modules") or []
    names = {module.name for module in draft.modules.values()}
    if not isinstance(targets, str):
        listed = {target for target in targets if isinstance(target, str)} if isinstance(targets, list) else set()
        return {name for name in names if not listed.isdisjoint(keys.tails(name))}
    try:
        return {name for name, matching in match_patterns([targets], names).items() if matching}
    except ValueError as error:
        draft.problems.append(Problem(f"{CONFIG}: target_modules: {error}", AGAINST_TENSORS))
        return names


def levels(draft: Draft) -> dict[str, dict[int, Module]]:
    """Module → depth → its factors there, for the modules of which parameters are adapted."""
    found: dict[str, dict[int, Module]] = {}
    if not draft.config.get("target_parameters"):
        return found
    passed_over = {"", *layers(draft)}
    for module in draft.modules.values():
        if (
            module.name not in passed_over
            and named(draft, module.name)
            and not module.slots.keys().isdisjoint({"lora_A", "lora_B"})
        ):
            parts = module.path.split(".")
            depth = len(parts) - len(module.name.split("."))
            found.setdefault(module.name, {})[depth] = module
    return found


def parameters_of(draft: Draft, module: str, wrapped: Mapping[int, Module]) -> dict[str, Module]:
    """Parameter → its factors, outermost last."""
    names = chosen(draft, module, len(wrapped))
    order = next((row for row in REGISTERED if names <= set(row)), None)
    if len(wrapped) != len(names) or sorted(wrapped) != list(range(len(wrapped))):
        raise UnusableError(
            f"{printable(module)}: has factors for {len(wrapped)} parameters, but {CONFIG} targets {len(names)} "
            f"({', '.join(map(printable, sorted(names)))})",
            AGAINST_TENSORS,
        )
    if len(names) > 1 and order is None:
        raise UnusableError(
            f"{printable(module)}: cannot determine which factors belong to "
            f"{', '.join(map(printable, sorted(names)))}; recognised are modules with "
            + ", with ".join("/".join(row) for row in REGISTERED)
        )
    in_order = sorted(names, key=order.index) if order else list(names)
    return {name: wrapped[depth] for name, depth in zip(in_order, sorted(wrapped, reverse=True), strict=True)}


def paths(draft: Draft, wrapped: Mapping[str, Mapping[int, Module]]) -> list[str]:
    """The paths that patterns are matched with: those of the parameters."""
    return [f"{module}.{name}" for module, by_depth in wrapped.items() for name in chosen(draft, module, len(by_depth))]


def read_parameters(draft: Draft, wrapped: Mapping[str, Mapping[int, Module]], scaling: Scaling) -> None:
    """Add the updates of all adapted parameters."""
    differing: set[str] = set()  # for which the order of columns makes a difference

    def read(factors: Module, name: str) -> dict[str, Update]:
        update = factors_of(factors, f"{factors.name}.{name}", scaling)
        if update.experts != 1 and update.ranks != (1,):
            differing.add(name)
        return {name: update}

    for module, by_depth in wrapped.items():
        with draft.noting():
            for name, factors in parameters_of(draft, module, by_depth).items():
                draft.attempt(factors, partial(read, name=name))
    packing.tell(draft, differing)
    if any(packing.is_grouped(draft, name) for name in differing):
        draft.packing = packing.GROUPED


def factors_of(module: Module, path: str, scaling: Scaling) -> ExpertFactors:
    a, b = module.tensor("lora_A"), module.tensor("lora_B")
    extra = set(module.slots) - {"lora_A", "lora_B"}
    module.require(not extra, f"{', '.join(sorted(extra))} on a parameter is not something PEFT makes")
    module.require(b.shape[1] == a.shape[0], rank_is_one(a.shape[0], b.shape[1]))
    ranks = scaling.expected(path)
    module.agree(
        not ranks or any(a.shape[0] % rank == 0 for rank in ranks),
        f"lora_A has {a.shape[0]} rows, which is not a multiple of the rank {min(ranks, default=0)} in {CONFIG}",
    )
    parameter = path.rpartition(".")[2]
    fitting = tuple(rank for rank in ranks if a.shape[0] % rank == 0)
    if count := packing.expert_count(module.draft.config, parameter):
        rank = a.shape[0] // count
        module.agree(
            a.shape[0] % count == 0 and (not fitting or rank in fitting),
            f"lora_A has {a.shape[0]} rows, but {CONFIG} says that there are {count} experts",
        )
        fitting = (rank,)
    alpha = scaling.alpha(path) if scaling.valid else 0.0
    return ExpertFactors(a, b, alpha, scaling.rslora, fitting, packing.is_grouped(module.draft, parameter))


def rank_is_one(rows: int, columns: int) -> str:
    return f"lora_A has {rows} rows and lora_B {columns} columns; both must equal the rank"
