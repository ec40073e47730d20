"""Methods that look at every entry of the updates: what to keep, whose sign counts, and what the sum is.

A method goes through a stack once or more for what it must know of all entries, and gives a function of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loratool.algebra.methods.chance import of_each
from loratool.algebra.methods.stacks import Stack
from loratool.lazy import Tensor, torch

Rule = Callable[[int, "Tensor"], "Tensor"]  # (first row, (n, rows, columns) tile) → (rows, columns)


@dataclass(frozen=True)
class Setting:
    """The dials of these methods."""

    density: float = 1.0  # part of the entries that is kept
    window: float = 0.15  # of DELLA: how far the smallest and the largest entries' chances lie from `density`
    outliers: float = 0.01  # of breadcrumbs: part of the entries, the largest ones, that is dropped
    by_count: bool = False  # each update has one voice for the sign, whatever its size
    normalize: bool = True  # divide by the weights of those that agree
    key: str = ""  # of the random numbers


def ties(stack: Stack, weights: Tensor, setting: Setting) -> Rule:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): the largest entries, the sign of the majority, the mean of those."""
    keep = largest_entries(stack, setting.density)
    return lambda first, tile: agreed(keep(first, tile), weights, setting)


def magnitude_prune(stack: Stack, weights: Tensor, setting: Setting) -> Rule:
    """The sum of the largest entries of each."""
    keep = largest_entries(stack, setting.density)
    return lambda first, tile: summed(keep(first, tile), weights, setting)


def breadcrumbs(stack: Stack, weights: Tensor, setting: Setting) -> Rule:
    """Model Breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795): the sum without outliers and small entries."""
    count, total = stack.shape[0], stack.shape[1] * stack.shape[2]
    dropped = int(setting.outliers * total)
    limits = [min(total, max(1, dropped + round(setting.density * total)))] * count
    least = stack.largest(magnitudes, limits)
    most = stack.largest(magnitudes, [dropped] * count) if dropped else None

    def rule(_: int, tile: Tensor) -> Tensor:
        size = tile.abs()
        kept = size >= least[:, None, None]
        if most is not None:
            kept &= size < most[:, None, None]
        return summed(tile * kept, weights, setting)

    return rule


def dare_linear(_: Stack, weights: Tensor, setting: Setting) -> Rule:
    """DARE (Yu et al. 2023, arXiv:2311.03099): entries kept at random and made larger for it, then the sum."""
    return lambda first, tile: summed(kept_by_chance(first, tile, setting), weights, setting)


def dare_ties(_: Stack, weights: Tensor, setting: Setting) -> Rule:
    """DARE, then the sign of the majority as in TIES."""
    return lambda first, tile: agreed(kept_by_chance(first, tile, setting), weights, setting)


def della(_: Stack, weights: Tensor, setting: Setting) -> Rule:
    """DELLA (Deep et al. 2024, arXiv:2406.11617): DARE with better chances for the larger entries of a row, then TIES."""

    def rule(first: int, tile: Tensor) -> Tensor:
        places = tile.abs().argsort(stable=True, dim=-1).argsort(-1).to(tile.dtype)  # 0 for a row's smallest
        part = places / max(1, tile.shape[-1] - 1)
        chances = setting.density - setting.window + 2 * setting.window * part
        return agreed(kept_by_chance(first, tile, setting, chances), weights, setting)

    return rule


def sce(stack: Stack, weights: Tensor, setting: Setting) -> Rule:
    """SCE (Wan et al. 2024, arXiv:2408.07990): where updates differ most, weighted by their energy there, one sign."""
    total = stack.shape[1] * stack.shape[2]
    least = stack.largest(variances, [max(1, round(setting.density * total))]) if setting.density < 1 else None

    def select(_: int, tile: Tensor) -> Tensor:
        return tile if least is None else tile * (variances(0, tile) >= least[:, None, None])

    energies = torch.zeros(stack.shape[0], dtype=torch.float64, device=stack.device)
    for first, tile in stack.tiles():
        energies += select(first, tile).double().square().sum((1, 2))
    shares = (energies / energies.sum().clamp_min(1e-300)).to(weights.dtype)
    return lambda first, tile: agreed(select(first, tile), weights, setting, shares)


METHODS: dict[str, Callable[[Stack, Tensor, Setting], Rule]] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "sce": sce,
    "magnitude_prune": magnitude_prune,
}


def magnitudes(_: int, tile: Tensor) -> Tensor:
    return tile.abs()


def variances(_: int, tile: Tensor) -> Tensor:
    return tile.var(0, correction=0)[None]


def largest_entries(stack: Stack, density: float) -> Rule:
    """Keep the part `density` of each matrix' entries, the largest; the others become zero."""
    count, total = stack.shape[0], stack.shape[1] * stack.shape[2]
    if density >= 1:
        return lambda _, tile: tile
    least = stack.largest(magnitudes, [max(1, int(density * total))] * count)
    return lambda _, tile: tile * (tile.abs() >= least[:, None, None])


def kept_by_chance(first: int, tile: Tensor, setting: Setting, chances: Tensor | None = None) -> Tensor:
    """Entries kept with their chance and divided by it, so that each is right in the mean."""
    chance = setting.density if chances is None else chances
    return tile * (of_each(setting.key, first, tile).to(tile.dtype) < chance) / chance


def summed(kept: Tensor, weights: Tensor, setting: Setting) -> Tensor:
    """Σ w·kept, over Σ w where that is asked for."""
    total = (kept * weights[:, None, None].to(kept.dtype)).sum(0)
    return total / float(weights.sum()) if setting.normalize and bool(weights.any()) else total


def agreed(kept: Tensor, weights: Tensor, setting: Setting, after: Tensor | None = None) -> Tensor:
    """The sum, or the weighted mean, of the entries whose sign is that of the majority; where none is, plus counts.

    The majority is that of the weighted entries, as in mergekit; PEFT leaves the weights out of it. Weights `after` the
    election count in the mean only.
    """
    shares = weights[:, None, None].to(kept.dtype)
    weighted = kept * shares
    votes = weighted.sign().sum(0) if setting.by_count else weighted.sum(0)
    majority = votes >= 0
    agree = ((weighted > 0) & majority) | ((weighted < 0) & ~majority)
    if after is not None:
        second = after[:, None, None].to(kept.dtype)
        shares, weighted = shares * second, weighted * second
    total = (weighted * agree).sum(0)
    if not setting.normalize:
        return total
    return total / (shares.abs() * agree).sum(0).clamp_min(1e-38)


@dataclass(frozen=True)
class Merged:
    """What a rule makes of a stack, some rows at a time."""

    stack: Stack
    rule: Rule

    @property
    def shape(self) -> tuple[int, int]:
        return self.stack.shape[1:]

    @property
    def device(self) -> torch.device:
        return self.stack.device

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        for first, tile in self.stack.tiles():
            yield first, self.rule(first, tile)

    def whole(self) -> Tensor:
        """All rows: of what is held in memory."""
        return torch.cat([tile for _, tile in self.tiles()])
