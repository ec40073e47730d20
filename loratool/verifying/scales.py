"""Scales, zero points and the like of a quantised tensor: whether they are those that its values should have.

Values that are the nearest ones for their scales prove nothing where a scale is another one: a group whose scale is next
to 0 has no value near the formula's, and all that it has are equally near. So parameters are held to the base's own and
to those that the format's quantiser gives for the formula's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loratool.algebra.rounding import bits_of
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room, StoredWeight
from loratool.lazy import Tensor, torch

MOST = 0.1  # of the parameters of one tensor: where more are no known ones, another tool chose all of them
FEWEST = 4  # of which one may be unlike all others
NEAR = 2.0  # times a scale of the quantiser: what a tool may choose most of whose scales are the quantiser's
FAR = 8.0  # what any other tool may choose, such as one that searches for the best scales
USUAL = 64.0  # times most scales of a tensor, or less by as much: others may be those of groups of zeros
STEPS = 4  # the difference of exponents by which powers of two are far apart
NESTED = "absmax"  # of bitsandbytes, whose bytes are numbers of values around an offset that each tool works out
ONE = 127  # the byte that stands for 2^0, and for a block of zeros
SHIFTS = ("zero", "shift")  # in the names of parameters that are no scales


@dataclass
class Measured:
    """What blocks of the formula's values tell of the ranges of groups."""

    blocks: dict[int, Tensor] = field(default_factory=dict)  # by the first row

    def note(self, weight: Requantizable, formula: Tensor, first: int) -> None:
        """Account for rows from row `first` on, (n, width) of float32."""
        self.blocks[first] = weight.measure(formula.reshape(-1, weight.line)).cpu()

    def unlike(self, weight: Requantizable, base: StoredWeight) -> dict[str, int]:
        """Tensor of parameters of a merged weight → how many of them are none that it should have; all blocks are noted.

        Args:
            weight: of the merged model.
            base: the same of the base, packed in the same way or not.
        """
        theirs = weight.parameters(Room())
        own = parameters_of(base, weight)
        if own is not None and all(bool(equal(theirs[name], own[name]).all()) for name in theirs):
            return {}
        new = weight.new_parameters(torch.cat([self.blocks[first] for first in sorted(self.blocks)]), theirs)
        found = {n: odd_ones(n, value, own[n] if own else None, new[n]) for n, value in theirs.items()}
        return {name: count for name, count in found.items() if count}


def parameters_of(base: StoredWeight, weight: Requantizable) -> Mapping[str, Tensor] | None:
    """The base's parameters by the names that the merged weight has for them; None where it is packed otherwise."""
    if not isinstance(base, Requantizable) or base.scheme != weight.scheme or len(base.tensors) != len(weight.tensors):
        return None
    pairs = [(one.info, other.info) for one, other in zip(base.tensors[1:], weight.tensors[1:], strict=True)]
    if any((one.dtype, one.shape) != (other.dtype, other.shape) for one, other in pairs):
        return None
    own = base.parameters(Room())
    return {other.name: own[one.name] for one, other in pairs if one.name in own}


def odd_ones(name: str, theirs: Tensor, own: Tensor | None, new: Tensor) -> int:
    """How many elements of one tensor of parameters are off.

    Where nearly all are the base's, any other one is, unless it is the quantiser's. Scales that are not the base's may be
    those of any tool: those are off that are far from the quantiser's, and farther than most others.
    """
    if not theirs.numel():
        return 0
    copied = new is theirs  # what the quantiser does not choose
    kept = equal(theirs, own) if own is not None else torch.zeros(theirs.shape, dtype=torch.bool)
    known = kept if copied else kept | equal(theirs, new)
    if mostly(kept):
        return int((~known).sum())
    leaf = name.rpartition(".")[2]
    if copied or any(word in leaf for word in SHIFTS):
        return 0
    if theirs.dtype == torch.uint8:
        far = (theirs.int() - new.int()).abs() >= STEPS
        return int((far & (new != ONE)).sum()) if leaf != NESTED else 0
    if not theirs.dtype.is_floating_point:
        return 0
    one, other = theirs.double(), new.double()
    ratio, middle = one / other, other.median()
    ratio = ratio / ratio.median()
    factor = NEAR if mostly(known) else FAR
    off = (ratio > factor) | (ratio < 1 / factor)
    usual = (other > middle / USUAL) & (other < middle * USUAL) & (other != 1)  # of groups of zeros it is often 1
    return int((~known & off & usual).sum())


def equal(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of one dtype have the same bits."""
    return bits_of(one) == bits_of(other)


def mostly(which: Tensor) -> bool:
    """Whether nearly all of some elements are meant: all but a few, or but one of at least four."""
    count = which.numel()
    return count - int(which.sum()) <= max(int(count >= FEWEST), MOST * count)
