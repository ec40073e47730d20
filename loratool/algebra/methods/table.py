"""All methods of `combine`: what each needs, and what its dials are when nobody turns them."""

from __future__ import annotations

from dataclasses import dataclass

GRAM, SPECTRAL, ELEMENTWISE, FACTORWISE = "gram", "spectral", "elementwise", "factorwise"
SPACES = ("dense", "core", "knots")  # in which elementwise methods may work

PICO = "pico"  # a step before another method, its rule


@dataclass(frozen=True)
class Method:
    """One row."""

    family: str
    title: str
    least: int = 1  # adapters it takes
    most: int = 1000
    density: float | None = None  # of entries kept; None where it has none
    normalize: bool = False  # divide by weights


METHODS: dict[str, Method] = {
    "linear": Method(GRAM, "Σ w ΔW, exact: ranks add up"),
    "cat": Method(GRAM, "the same, under PEFT's name"),
    "svd": Method(GRAM, "the same, truncated to the largest rank of the adapters or to --rank"),
    "slerp": Method(GRAM, "spherical interpolation between two", 2, 2),
    "nuslerp": Method(
        GRAM, "the same without the linear fallback; --row-wise treats each row of the weight separately", 2, 2
    ),
    "karcher": Method(GRAM, "the spherical mean of any number", 2),
    "model_stock": Method(GRAM, "the mean of several runs of one task, scaled by their cosine", 2),
    "ties": Method(ELEMENTWISE, "the largest entries with the majority sign, averaged", 1, 1000, 0.2, True),
    "dare_linear": Method(ELEMENTWISE, "entries kept at random, summed", 1, 1000, 0.9),
    "dare_ties": Method(ELEMENTWISE, "entries kept at random, with the majority sign", 1, 1000, 0.9, True),
    "della": Method(ELEMENTWISE, "the same, with a higher chance for large entries", 1, 1000, 0.7, True),
    "breadcrumbs": Method(ELEMENTWISE, "the sum without the largest and the smallest entries", 1, 1000, 0.9),
    "sce": Method(ELEMENTWISE, "the most different entries, weighted by energy, with one sign", 1, 1000, 1.0, True),
    "magnitude_prune": Method(ELEMENTWISE, "the sum of the largest entries", 1, 1000, 0.2),
    "tsv": Method(SPECTRAL, "singular vectors of all adapters, orthogonalised"),
    "iso_c": Method(SPECTRAL, "the sum with equal singular values; --iso-beta below 1 equalises them in part"),
    "iso_cts": Method(SPECTRAL, "common directions and each adapter's own, all equally strong", 2),
    "pico": Method(GRAM, "the same as --rule after turning down the output directions that many share"),
    "linear-factors": Method(FACTORWISE, "PEFT's linear: sums of A and of B, with cross terms"),
    "ties-factors": Method(FACTORWISE, "PEFT's ties", 1, 1000, 0.2),
    "dare_linear-factors": Method(FACTORWISE, "PEFT's dare_linear", 1, 1000, 0.9),
    "dare_ties-factors": Method(FACTORWISE, "PEFT's dare_ties", 1, 1000, 0.9),
    "magnitude_prune-factors": Method(FACTORWISE, "PEFT's magnitude_prune", 1, 1000, 0.2),
}
RULES = tuple(name for name, row in METHODS.items() if name != PICO and row.family != FACTORWISE)  # of Pico
