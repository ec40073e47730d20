"""The options of `combine`, and the combination of updates that they mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.adapters.blocks import BlockWeights
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.writer import FactorOptions
from loratool.algebra.methods.elementwise import Setting
from loratool.algebra.methods.mixture import WEIGHTED_SUMS, Combination
from loratool.algebra.methods.table import ELEMENTWISE, FACTORWISE, GRAM, METHODS, PICO, RULES, SPACES
from loratool.errors import UsageError, printable
from loratool.files.untrusted import json_value
from loratool.options.described import FLAG, NUMBER, Choice, JsonFile, Kind, Number, option
from loratool.options.shared import BlockOption, DeviceOption, other_count
from loratool.options.writing import PublishOptions
from loratool.reworking.aligned_layers import SAVED, Weight
from loratool.reworking.dialects import OutputDialect

MATCHES = ("none", "mean", "max", "sum")
POLICIES = ("truncate", "ctm")
SIGNS = ("total", "frequency")
RANDOM = ("dare", "della")  # how the names of methods begin that keep entries at random


@dataclass(frozen=True)
class WeightOf(Kind):
    """A number, or numbers by pattern with "default" for what none matches: a mapping, or an object of JSON."""

    metavar = "FLOAT"

    annotation = "float | Mapping[str, float]"

    def taken(self, value: Any, flag: str) -> Any:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json_value(value.encode())
            except ValueError as error:
                raise UsageError(f"{flag} {printable(value)}: {error}") from None
        if not isinstance(value, Mapping):
            return NUMBER.taken(value, flag)
        return {
            str(pattern): NUMBER.taken(number, f"{flag} of {printable(pattern)}") for pattern, number in value.items()
        }

    def word(self, value: Any) -> str:
        return json.dumps(value) if isinstance(value, Mapping) else NUMBER.word(value)


@dataclass(frozen=True, kw_only=True)
class CombineOptions(BlockOption, FactorOptions, OutputDialect, ReadingOptions, DeviceOption, PublishOptions):
    """Of `combine`."""

    method: str = option(
        help="Combination method, listed above.",
        default="linear",
        kind=Choice(lambda: tuple(METHODS)),
        metavar="METHOD",
    )
    rule: str = option(
        help="pico: method that combines the updates afterwards.",
        default=RULES[0],
        kind=Choice(lambda: RULES),
        metavar="METHOD",
    )
    weights: tuple[Weight, ...] = option(
        "-w",
        "--weight",
        help="Weight, once per adapter in order, or as a comma-separated list [default: 1].",
        default=(),
        kind=WeightOf(),
        many=True,
        commas=True,
    )
    weights_file: Sequence[Weight] | None = option(
        "--weights",
        help='JSON list with one entry per adapter: a number, or an object that maps patterns and "default" to '
        "numbers.",
        kind=JsonFile(list),
    )
    space: str | None = option(
        help="Space in which entries are compared [default: dense].", kind=Choice(lambda: SPACES)
    )
    rank: int | None = option(
        help="Rank of the result, limited by each layer's shape [default: the rank the method gives].",
        kind=Number(whole=True, low=1),
    )
    rank_policy: str = option(
        help="truncate: truncate the result to --rank; ctm: first choose directions that keep a part of every adapter.",
        default=POLICIES[0],
        kind=Choice(lambda: POLICIES),
    )
    density: float | None = option(
        help="Fraction of the entries to keep, in (0, 1] [default: depends on the method].",
        kind=Number(above=0, high=1),
    )
    window: float = option(
        help="della: spread of the keep probability around --density.", default=Setting.window, kind=NUMBER
    )
    outliers: float = option(
        help="breadcrumbs: fraction of the largest entries to drop.", default=Setting.outliers, kind=NUMBER
    )
    factor: float = option("--lambda", help="Multiply the result by this.", default=1.0, kind=Number(zero=False))
    match_norm: str = option(
        help="Rescale each layer to the mean, max or sum of the weighted updates' norms (pico: mean unless another is "
        "given).",
        default=MATCHES[0],
        kind=Choice(lambda: MATCHES),
    )
    sign: str = option(
        help="Elect signs by total size or by number of adapters.", default=SIGNS[0], kind=Choice(lambda: SIGNS)
    )
    normalize: bool | None = option(
        "--normalize/--no-normalize",
        help="Whether to divide by the sum of the weights [default: depends on the method].",
        kind=FLAG,
    )
    iso_beta: float = option(
        help="iso_c: 0 is the sum, 1 equal singular values.", default=Combination.iso_beta, kind=Number(low=0, high=1)
    )
    row_wise: bool = option(help="nuslerp: interpolate each row separately.", default=False, kind=FLAG)
    svc: bool = option(
        help="After combining, calibrate the singular values so that shared directions count once.",
        default=False,
        kind=FLAG,
    )
    seed: int = option(help="Random seed.", default=0, kind=Number(whole=True))
    saved: str = option(
        help="What to do if adapters saved different values of the same tensor.",
        default=SAVED[0],
        kind=Choice(lambda: SAVED),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights and self.weights_file is not None:
            raise UsageError("-w and --weights are mutually exclusive")
        if self.weights_file is not None:
            if not self.weights_file:
                raise UsageError("--weights: the list is empty; it takes one weight per adapter")
            object.__setattr__(
                self, "weights", tuple(WeightOf().taken(each, "--weights") for each in self.weights_file)
            )
            object.__setattr__(self, "weights_file", None)

    @property
    def combining(self) -> str:
        """The method that makes one update of several: of Pico its rule."""
        return self.rule if self.method == PICO else self.method

    def adapter_weights(self, count: int) -> list[Weight]:
        """The weight of each of `count` adapters."""
        if self.weights and len(self.weights) != count:
            raise other_count(self.weights, count, "pass one weight per adapter, or omit -w")
        return list(self.weights) or [1.0] * count


def combination_of(options: CombineOptions, count: int) -> Combination:
    """What the options mean for `count` adapters; raises `UsageError` for the first that means nothing."""
    method, pico = options.combining, options.method == PICO
    row = METHODS[method]
    if not row.least <= count <= row.most:
        wanted = str(row.least) if row.least == row.most else f"{row.least} or more"
        raise UsageError(f"{method} takes {wanted} adapters (got {count})")
    refuse_at_odds(options)
    part = row.density or 1.0 if options.density is None else options.density
    if method == "della" and not (0 <= options.window < part and part + options.window <= 1):
        raise UsageError(
            f"--window {options.window:g}: keep probabilities around a density of {part:g} must stay in (0, 1]"
        )
    if method == "breadcrumbs" and not (options.outliers >= 0 and options.outliers + part <= 1):
        raise UsageError(f"--outliers {options.outliers:g} and a density of {part:g} are more than all entries")
    return Combination(
        method=method,
        space="core" if options.rank_policy == "ctm" else options.space or "dense",
        setting=Setting(
            density=part,
            window=options.window,
            outliers=options.outliers,
            by_count=options.sign == "frequency",
            normalize=row.normalize if options.normalize is None else options.normalize,
            key=str(options.seed),
        ),
        rank=options.rank,
        ctm=options.rank_policy == "ctm",
        svc=options.svc,
        pico=pico,
        iso_beta=options.iso_beta,
        row_wise=options.row_wise,
        factor=options.factor,
        match="mean" if pico and options.match_norm == MATCHES[0] else options.match_norm,
    )


def refuse_at_odds(options: CombineOptions) -> None:
    """Raise `UsageError` for options that the method cannot go with, or that would change nothing."""
    method, row = options.combining, METHODS[options.combining]
    by_factors, by_ctm = row.family == FACTORWISE, options.rank_policy == "ctm"
    ctm_lacks = options.rank is None or by_factors or options.space in ("dense", "knots")
    for is_wrong, why in (
        (
            options.space and row.family != ELEMENTWISE,
            f"--space does not apply to {method}, only to elementwise methods",
        ),
        (by_ctm and ctm_lacks, "--rank-policy ctm needs --rank, and --space core if one is given"),
        (
            options.density is not None and row.density is None,
            f"--density does not apply to {method}, which keeps all entries",
        ),
        *idle(options),
        (by_factors and options.match_norm != "none", "--match-norm does not apply to methods on factors"),
        (by_factors and options.svc, "--svc does not apply to methods on factors"),
    ):
        if is_wrong:
            raise UsageError(why)


def idle(options: CombineOptions) -> Iterator[tuple[bool, str]]:
    """Whether an option was set that would change nothing, and the sentence for it, of each such option."""
    yield (
        options.rule != RULES[0] and options.method != PICO,
        f"--rule applies only to {PICO} (the method is {options.method})",
    )
    elected = [name for name in METHODS if name.startswith(("ties", "dare_ties", "della", "sce"))]
    divided = [name for name, row in METHODS.items() if row.family == ELEMENTWISE or name in WEIGHTED_SUMS]
    for flag, is_set, methods in (
        ("--window", options.window != Setting.window, ["della"]),
        ("--outliers", options.outliers != Setting.outliers, ["breadcrumbs"]),
        ("--sign", options.sign != SIGNS[0], elected),
        ("--normalize", options.normalize is not None, divided),
        ("--iso-beta", options.iso_beta != Combination.iso_beta, ["iso_c"]),
        ("--row-wise", options.row_wise, ["nuslerp"]),
        ("--seed", options.seed != 0, [name for name in METHODS if name.startswith(RANDOM)]),
    ):
        yield (
            is_set and options.combining not in methods,
            f"{flag} applies only to {', '.join(methods)} (the method is {options.combining})",
        )


def told(combination: Combination, weights: Sequence[Weight], blocks: BlockWeights) -> dict[str, Any]:
    """The settings, as the record and reports name them."""
    method = METHODS[combination.method]
    table = {
        "method": combination.name,
        "weights": list(weights),
        "space": combination.space if method.family == ELEMENTWISE else None,
        "density": combination.setting.density if method.density is not None else None,
        "rule": combination.method if combination.pico else None,
        "rank": combination.rank,
        "rank_policy": "ctm" if combination.ctm else None,
        "window": combination.setting.window if combination.method == "della" else None,
        "outliers": combination.setting.outliers if combination.method == "breadcrumbs" else None,
        "lambda": combination.factor if combination.factor != 1 else None,
        "match_norm": combination.match if combination.match != "none" else None,
        "sign": "frequency" if combination.setting.by_count else None,
        "normalize": combination.setting.normalize if method.family in (ELEMENTWISE, GRAM) else None,
        "iso_beta": combination.iso_beta if combination.method == "iso_c" else None,
        "row_wise": combination.row_wise or None,
        "svc": combination.svc or None,
        "block_weights": dict(blocks.factors) or None,
        "seed": combination.setting.key if combination.method.startswith(RANDOM) else None,
    }
    return {name: value for name, value in table.items() if value is not None}
