"""How the weights of a checkpoint are packed, and whether an adapter can be merged into them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from loratool.bases.codecs import decoded, models_in
from loratool.bases.decoded import Decoded
from loratool.bases.packed import Packed
from loratool.bases.packing_settings import settings_in
from loratool.errors import InputError, folded, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES, TensorInfo
from loratool.grouping import by_key
from loratool.layouts.architectures import PACKED_ENDS, PACKED_WEIGHTS, PACKED_WITHIN
from loratool.results.facts import PackingFacts, SchemeFacts
from loratool.templates import grouped

UNNAMED = "a method that is not named"
INTEGERS = ("I64", "BOOL")  # of positions and masks, which are no weights
MOST_PROBLEMS = 3  # of a checkpoint that cannot be decoded, before the rest is counted


def unpacked(checkpoint: Checkpoint) -> tuple[Checkpoint, PackingFacts | None]:
    """The checkpoint with its packed weights decoded where they can be, and how they are packed; None where none are.

    Only headers are read, and small tensors that say how others are packed.
    """
    try:
        seen = decoded(checkpoint)
    except InputError as error:
        return checkpoint, cannot(method_of(checkpoint), why(error))
    if isinstance(seen, Decoded):
        return seen, facts_of(seen) if seen.weights else cannot(method_of(seen), not_read(seen.unread.values()))
    method = method_of(checkpoint)
    if any(map(looks_packed, checkpoint.tensors.values())):
        return checkpoint, cannot(method, not_read([method]))
    if method != UNNAMED:
        reason = f"its config says that it is quantised by {method}, but none of its tensors are"
        return checkpoint, PackingFacts(method, (), None, None, None, None, None, (), True, reason)
    return checkpoint, None


def facts_of(base: Decoded) -> PackingFacts:
    """What is told of a checkpoint whose packed weights can be decoded."""
    by_scheme = by_key((weight.scheme, name) for name, weight in base.weights.items())
    schemes = tuple(scheme_facts(base, scheme, names) for scheme, names in by_scheme.items())
    parameters, packed, scales = (
        sum(getattr(each, field) for each in schemes) for field in ("parameters", "packed_bytes", "scale_bytes")
    )
    others = (info for name, info in base.tensors.items() if name not in base.weights)
    plain = [info.name for info in others if info.dtype in FLOAT_NAMES and len(info.shape) > 1]
    unread = base.unread
    except_for = f"; but {not_read(unread.values())}" if unread else ""
    dtypes = ", ".join(dict.fromkeys(weight.dtype for weight in base.weights.values()))
    return PackingFacts(
        family=" and ".join(dict.fromkeys(each.codec.name for each in base.models)),
        schemes=schemes,
        parameters=parameters,
        packed_bytes=packed,
        scale_bytes=scales,
        plain_bytes=sum(info.nbytes for info in base.stored.values()) - packed - scales,
        bits=8 * (packed + scales) / max(parameters, 1),
        plain=tuple(map(printable, grouped(name.removesuffix(".weight") for name in plain))),
        mergeable=True,
        reason=f"what an adapter changes becomes plain {dtypes}, all else stays as it is{except_for}",
    )


def not_read(kinds: Iterable[str]) -> str:
    """Why weights that no codec decodes cannot be edited."""
    names = " or ".join(dict.fromkeys(kinds))
    return f"weights packed with {names} are not read; pass the unquantised model, or edit plain modules only"


def scheme_facts(base: Decoded, scheme: str, names: Sequence[str]) -> SchemeFacts:
    """All weights of one scheme."""
    weights: list[Packed] = [base.weights[name] for name in names]
    parameters = sum(math.prod(weight.shape) for weight in weights)
    packed = sum(weight.tensors[0].info.nbytes for weight in weights)
    scales = sum(map(base.bytes_of, names)) - packed
    return SchemeFacts(scheme, len(weights), parameters, packed, scales, 8 * (packed + scales) / max(parameters, 1))


def cannot(method: str, reason: str) -> PackingFacts:
    """What is told of a checkpoint whose packed weights cannot be decoded."""
    return PackingFacts(method, (), None, None, None, None, None, (), False, reason)


def why(error: InputError) -> str:
    """An error in one line."""
    problems = [text for text, _ in folded(error.problems)]
    more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
    return " ".join(
        filter(
            None, [error.message.removesuffix(":") + ":" * bool(problems), "; ".join(problems[:MOST_PROBLEMS]) + more]
        )
    )


def method_of(checkpoint: Checkpoint) -> str:
    """How a checkpoint's config says that it is quantised."""
    try:
        said = [setting.values for _, model in models_in(checkpoint) for setting in settings_in(model)]
    except InputError:
        return UNNAMED
    names = (values.get(key) for values in said for key in ("quant_method", "quant_algo"))
    return next((printable(name) for name in names if isinstance(name, str) and name), UNNAMED)


def looks_packed(info: TensorInfo) -> bool:
    """Whether a tensor can only be a packed weight, or a part of one."""
    leaf = info.name.rpartition(".")[2]
    if leaf in PACKED_WEIGHTS or leaf.endswith(PACKED_ENDS) or PACKED_WITHIN in info.name:
        return True
    return len(info.shape) in (2, 3) and info.dtype not in FLOAT_NAMES and info.dtype not in INTEGERS
