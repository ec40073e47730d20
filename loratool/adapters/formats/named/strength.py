"""The strength of adapters without a config: α where a module has one, else one of its factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Scaled
from loratool.adapters.formats.named.header import CONFIGS
from loratool.adapters.formats.named.writing import only
from loratool.adapters.formats.roles.names import ALPHA, DOWN, UP, UP_BIAS, canonical, split
from loratool.adapters.layers import Contents
from loratool.errors import BAKE, InputError, printable
from loratool.files.model_files import RECORD_KEY
from loratool.files.tensor_writer import OF_DATA

HASHES = ("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", RECORD_KEY)  # of one file alone
RANKED = (DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # roles whose first dimension is the rank that α is divided by
SCALED = (UP, "hada_w1_a", "lokr_w1", "lokr_w1_a")  # roles that take a factor where there is no α


def roles_of(adapter: Adapter, target: str) -> dict[str, str]:
    """The tensors of a target by the one name of their role."""
    found = ((split(name), name) for name in adapter.sources[target])
    return {canonical(parts[1]): name for parts, name in found if parts}


def rank_in(adapter: Adapter, roles: Mapping[str, str]) -> int:
    """The rank that α is divided by; 0 for LoKr of two whole factors, which has none."""
    return next((adapter.file.tensors[roles[role]].shape[0] for role in RANKED if role in roles), 0)


def alpha_of(contents: Contents, target: str) -> float:
    """α of a layer, as its file has it or would have it."""
    if target not in contents.adapter.sources:  # but a name that another dialect has for it
        return contents.layers[target].scale * contents.layers[target].rank
    rank = rank_in(contents.adapter, roles_of(contents.adapter, target))
    if not rank:
        raise InputError(f"{printable(target)}: LoKr with both factors whole has no alpha; pass --scale")
    return contents.layers[target].scale * rank


def scaled(contents: Contents, factors: Mapping[str, float], scales: Mapping[str, float]) -> Scaled:
    """The tensors of a file under which its updates are stronger by `factors`, and layers have the scaling `scales`.

    Raises `InputError` where two layers of one tensor are to have different ones.
    """
    found: dict[str, float] = {}
    odd: list[str] = []
    for target, factor in factors.items():
        own = (
            dict(numbers_of_layer(contents.adapter, target, factor, scales[target]))
            if target in contents.layers
            else dict.fromkeys((n for n in contents.adapter.sources[target] if not is_alpha(n)), factor)
        )
        odd += [printable(name) for name, number in own.items() if found.get(name, number) != number]
        found |= own
    if odd:
        raise InputError("layers that share these tensors cannot have different strengths; pass --bake:", odd, BAKE)
    alphas = {name: number for name, number in found.items() if is_alpha(name)}
    return Scaled(
        {name: number for name, number in found.items() if not is_alpha(name) and number != 1},
        alphas,
        header(contents.adapter, alphas),
    )


def is_alpha(name: str) -> bool:
    return name.endswith(f".{ALPHA}")


def numbers_of_layer(adapter: Adapter, target: str, factor: float, scale: float) -> Iterator[tuple[str, float]]:
    """α of a layer at a scaling, and what its first factor is multiplied by, where it can have no α the whole scaling."""
    roles = roles_of(adapter, target)
    rank = rank_in(adapter, roles)
    first = next(role for role in SCALED if role in roles)
    if rank and (ALPHA in roles or roles[first].endswith(f".{UP}")):  # whose readers look for it
        yield roles.get(ALPHA, f"{roles[first].removesuffix(f'.{UP}')}.{ALPHA}"), abs(scale) * rank
        rest = -1.0 if factor < 0 else 1.0
    else:
        rest = factor if CONFIGS in adapter.config or not rank else scale
    yield from ((roles[role], rest) for role in (first, UP_BIAS) if role in roles)


def header(adapter: Adapter, alphas: Mapping[str, float]) -> dict[str, str]:
    """What the header of the same file says of other strengths."""
    own = adapter.config
    kept = {key: value for key, value in own.items() if key not in HASHES}
    if alphas:
        kept["ss_network_alpha"] = only(alphas.values())
    if "sshs_model_hash" in own:
        kept["sshs_model_hash"] = OF_DATA
    return kept
