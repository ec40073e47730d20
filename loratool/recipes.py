"""The recipe that the words of `combine` mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratool.errors import UsageError, printable
from loratool.gathering import SAVED
from loratool.methods.elementwise import Setting
from loratool.methods.mixture import WEIGHTED_SUMS, Recipe
from loratool.methods.table import ELEMENTWISE, FACTORWISE, GRAM, METHODS, SPACES

if TYPE_CHECKING:
    from loratool.gathering import Weight

MATCHES = ("none", "mean", "max", "sum")
POLICIES = ("truncate", "ctm")
SIGNS = ("total", "frequency")


def make_recipe(
    method: str,
    count: int,
    space: str | None,
    rank: int | None,
    rank_policy: str,
    density: float | None,
    window: float,
    outliers: float,
    factor: float,
    match_norm: str,
    sign: str,
    normalize: bool | None,
    iso_beta: float,
    row_wise: bool,
    svc: bool,
    seed: int,
    saved: str,
) -> Recipe:
    """The recipe that the arguments mean; raises `UsageError` for the first that means nothing."""
    if method not in METHODS:
        raise UsageError(f"--method must be one of {', '.join(METHODS)} (got {printable(method)})")
    row = METHODS[method]
    if not row.least <= count <= row.most:
        wanted = str(row.least) if row.least == row.most else f"{row.least} or more"
        raise UsageError(f"{method} takes {wanted} adapters (got {count})")
    if not count:
        raise UsageError("no adapter is given")
    for name, value, known in (
        ("space", space, (None, *SPACES)),
        ("rank-policy", rank_policy, POLICIES),
        ("match-norm", match_norm, MATCHES),
        ("sign", sign, SIGNS),
        ("saved", saved, SAVED),
    ):
        if value not in known:
            raise UsageError(f"--{name} must be one of {', '.join(k for k in known if k)} (got {printable(value)})")
    if space and row.family != ELEMENTWISE:
        raise UsageError(f"--space is for methods that look at entries; {method} does not")
    if rank_policy == "ctm" and (rank is None or row.family == FACTORWISE or space in ("dense", "knots")):
        raise UsageError(
            "--rank-policy ctm chooses that many directions in core space first: it needs --rank and no other space"
        )
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank}: must be a whole number of at least 1")
    if density is not None and row.density is None:
        raise UsageError(f"--density is for methods that drop entries; {method} keeps all")
    part = row.density or 1.0 if density is None else density
    if not 0 < part <= 1:
        raise UsageError(f"--density {part:g}: must be a part of the entries in (0, 1]")
    if method == "della" and not (0 <= window < part and part + window <= 1):
        raise UsageError(f"--window {window:g}: chances around a density of {part:g} have to stay in (0, 1]")
    if method == "breadcrumbs" and not (outliers >= 0 and outliers + part <= 1):
        raise UsageError(f"--outliers {outliers:g} and a density of {part:g} are more than all entries")
    if not math.isfinite(factor) or factor == 0:
        raise UsageError(f"--lambda {factor:g}: must be a finite number other than 0")
    if not 0 <= iso_beta <= 1:
        raise UsageError(f"--iso-beta {iso_beta:g}: must be between 0 and 1")
    refuse_idle(method, window, outliers, sign, normalize, iso_beta, row_wise)
    if row.family == FACTORWISE and match_norm != "none":
        raise UsageError("--match-norm is for methods on updates, not on factors")
    if row.family == FACTORWISE and svc:
        raise UsageError("--svc is for methods on updates, not on factors")
    return Recipe(
        method=method,
        space="core" if rank_policy == "ctm" else space or "dense",
        setting=Setting(
            density=part,
            window=window,
            outliers=outliers,
            by_count=sign == "frequency",
            normalize=row.normalize if normalize is None else normalize,
            key=str(seed),
        ),
        rank=rank,
        ctm=rank_policy == "ctm",
        svc=svc,
        iso_beta=iso_beta,
        row_wise=row_wise,
        factor=factor,
        match=match_norm,
    )


def refuse_idle(
    method: str, window: float, outliers: float, sign: str, normalize: bool | None, iso_beta: float, row_wise: bool
) -> None:
    """Raise `UsageError` for an option that was set and would change nothing."""
    elected = [name for name in METHODS if name.startswith(("ties", "dare_ties", "della", "sce"))]
    divided = [name for name, row in METHODS.items() if row.family == ELEMENTWISE or name in WEIGHTED_SUMS]
    for option, is_set, methods in (
        ("--window", window != Setting.window, ["della"]),
        ("--outliers", outliers != Setting.outliers, ["breadcrumbs"]),
        ("--sign", sign != SIGNS[0], elected),
        ("--normalize", normalize is not None, divided),
        ("--iso-beta", iso_beta != Recipe.iso_beta, ["iso_c"]),
        ("--row-wise", row_wise, ["nuslerp"]),
    ):
        if is_set and method not in methods:
            raise UsageError(f"{option} is for {', '.join(methods)}; {method} has no use for it")


def told(recipe: Recipe, weights: Sequence[Weight]) -> dict[str, Any]:
    """The recipe as provenance and reports name it."""
    table: dict[str, Any] = {"method": recipe.method, "weights": list(weights)}
    method = METHODS[recipe.method]
    if method.family == ELEMENTWISE:
        table["space"] = recipe.space
    if method.density is not None:
        table["density"] = recipe.setting.density
    shown = {
        "rank": recipe.rank,
        "rank_policy": "ctm" if recipe.ctm else None,
        "window": recipe.setting.window if recipe.method == "della" else None,
        "outliers": recipe.setting.outliers if recipe.method == "breadcrumbs" else None,
        "lambda": recipe.factor if recipe.factor != 1 else None,
        "match_norm": recipe.match if recipe.match != "none" else None,
        "sign": "frequency" if recipe.setting.by_count else None,
        "normalize": recipe.setting.normalize if method.family in (ELEMENTWISE, GRAM) else None,
        "iso_beta": recipe.iso_beta if recipe.method == "iso_c" else None,
        "row_wise": recipe.row_wise or None,
        "svc": recipe.svc or None,
        "seed": recipe.setting.key if recipe.method.startswith(("dare", "della")) else None,
    }
    return table | {name: value for name, value in shown.items() if value is not None}
