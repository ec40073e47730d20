"""What is left where updates cancel is the rounding of their factors, and no command makes an adapter of it.

Each case is tried on many seeds, with inputs moved by one unit in the last place and their terms in another order, so
that it holds on any processor. The oracle is the dense sum in float64 and the stated floor, 1.5 √Σ (u |w| ‖ΔW‖)².
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import draw
from numpy.typing import NDArray
from paths import REAL
from peft_files import named_by_peft, save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.algebra.lowrank.joint import joint
from loratool.algebra.lowrank.noise import floor, floor_of, is_noise
from loratool.algebra.lowrank.products import Product
from loratool.algebra.methods.mixture import Mixture, mix
from loratool.algebra.methods.table import ELEMENTWISE, FACTORWISE, METHODS
from loratool.errors import FitError, UsageError
from loratool.results.facts import AdapterFacts
from loratool.reworking.combine_options import CombineOptions, combination_of

Array = NDArray[np.float64]
ROUNDING = {torch.bfloat16: 2.4e-3, torch.float16: 3e-4, torch.float32: 1e-6}  # as measured on real adapters
DTYPES = tuple(ROUNDING)
SEEDS = int(os.environ.get("LORATOOL_SEEDS", "100"))
METHOD: list[tuple[str, dict[str, Any]]] = [
    (name, {"space": space} if space else {})
    for name, row in METHODS.items()
    if row.family != FACTORWISE
    for space in (("dense", "core", "knots") if row.family == ELEMENTWISE else (None,))
] + [("nuslerp", {"row_wise": True}), ("iso_c", {"iso_beta": 0.5})]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"match_norm": "mean"},
    {"match_norm": "sum", "rank": 2},
    {"svc": True},
    {"svc": True, "match_norm": "max"},
    {"rank": 1, "rank_policy": "ctm"},
]
EVERY = [
    (method, {**dials, **setting})
    for method, dials in METHOD
    for setting in SETTINGS
    if not (setting.get("rank_policy") and dials.get("space") in ("dense", "knots"))
]


def told(method: str, dials: Mapping[str, Any]) -> str:
    return " ".join([method, *(f"{name}={value}" for name, value in dials.items())])


def some(seed: int, rank: int = 3, rows: int = 24, columns: int = 20) -> Product:
    """An update of norm 1."""
    up, down = draw(2 * seed, rows, rank), draw(2 * seed + 1, rank, columns)
    return Product(up / float((up @ down).norm()), down)


def rotated(product: Product, seed: int, sign: float = 1.0) -> Product:
    """`sign` times the same update by other factors."""
    turn = torch.linalg.qr(draw(10_000 + seed, product.rank, product.rank))[0]
    return Product(product.up @ turn * sign, turn.T @ product.down)


def stored(product: Product, dtype: torch.dtype) -> Product:
    """The update as who reads it from a file of this dtype has it."""
    return Product(product.up.to(dtype).double(), product.down.to(dtype).double(), ROUNDING[dtype])


def moved(product: Product, seed: int) -> Product:
    """Each number of its factors moved by one unit in the last place, up, down or not at all; terms in another order."""
    generator = np.random.default_rng(seed)

    def nudged(tensor: Tensor) -> Tensor:
        values = tensor.numpy()
        towards = values + generator.integers(-1, 2, values.shape) * np.abs(values)
        return torch.from_numpy(np.nextafter(values, towards))

    order = torch.from_numpy(generator.permutation(product.rank))
    return Product(nudged(product.up)[:, order], nudged(product.down)[order], product.rounding)


def dense(product: Product) -> Array:
    return np.asarray(product.up.double() @ product.down.double())


def mixed(method: str, dials: Mapping[str, Any], products: Sequence[Product], weights: Sequence[float]) -> Mixture:
    combination = combination_of(CombineOptions(method=method, **dials), len(products))
    return mix(joint(products), list(weights), combination)


def size(matrix: Array) -> float:
    return float(np.linalg.norm(matrix))


def off(found: Array, wanted: Array) -> float:
    return size(found - wanted) / size(wanted)


# ---- an update and its opposite ----


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_is_left_of_an_update_and_its_opposite_is_never_enlarged(seed: int) -> None:
    """Stored in two orders of addition and moved by one ulp, or by rotated factors in a narrower dtype: of the sum that
    is left no method makes more than it is, and it says what became of it. Each seed takes a share of all settings.
    """
    dtype = (*DTYPES, None)[seed % 4]
    one = some(seed, 1 + seed % 5)
    if dtype is None:
        pair = [moved(one, seed), moved(one.scaled(-1.0), seed + 1)]
    else:
        pair = [stored(one, dtype), stored(rotated(one, seed, -1.0), dtype)]
    left = size(dense(pair[0]) + dense(pair[1]))
    assert left <= 1.5 * math.hypot(1, 1) * (ROUNDING[dtype] if dtype else 1e-12)
    for method, dials in EVERY[seed // 4 :: SEEDS // 4]:
        found = mixed(method, dials, pair, [1.0, 1.0])
        shown = told(method, dials)
        assert size(dense(found.product)) <= left * (1 + 1e-6), shown
        assert found.cancels in ("zero", "unscaled"), shown
        assert found.whole <= left * (1 + 1e-6), shown
        assert found.lost <= 1 + 1e-9, shown


DIVIDING: list[tuple[str, dict[str, Any], tuple[float, float]]] = [
    ("model_stock", {"svc": True}, (0.0, 1.0)),
    ("linear", {"match_norm": "mean"}, (1.0, 1.0)),
]


@pytest.mark.parametrize("case", ["opposites", "zeros that cancel", "a zero that cancels", "two copies"])
def test_hard_cases_do_not_depend_on_the_last_digit(case: str) -> None:
    """Where arithmetic alone decides what is left, the result is no larger than a few times what went in, whatever the
    last digits of the inputs and the order of additions are: many seeds, each with the two combinations that divide most
    and one of all others.
    """
    for seed in range(SEEDS):
        one = some(seed, 2, 5, 4)
        up, down = draw(4 + seed, 5, 1), draw(5 + seed, 1, 4)
        nothing = Product(torch.cat([up, up / 3], 1), torch.cat([down / 3, -down]))
        pair = {
            "opposites": [one, one.scaled(-1.0)],
            "zeros that cancel": [nothing, nothing],
            "a zero that cancels": [one, nothing],
            "two copies": [one, one],
        }[case]
        pair = [moved(product, 2 * seed + at) for at, product in enumerate(pair)]
        largest = max(size(dense(product)) for product in pair)
        rounding = 1e-12 * max(size(product.up.numpy()) * size(product.down.numpy()) for product in pair)
        other = (*EVERY[seed % len(EVERY)], ((1.0, 1.0), (0.0, 1.0))[seed // 2 % 2])
        for method, dials, weights in (*DIVIDING, other):
            matrix = dense(mixed(method, dials, pair, weights).product)
            assert np.isfinite(matrix).all(), told(method, dials)
            assert size(matrix) <= 8 * largest + rounding, (seed, told(method, dials))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.3, -0.3)])
def test_plain_sums_are_left_as_they_are_and_other_methods_give_zero(
    weights: tuple[float, float], dtype: torch.dtype
) -> None:
    """The sum of linear is exact even there; a method that chooses directions has none to choose."""
    pair = [stored(some(1), dtype), stored(rotated(some(1), 1), dtype)]
    left = sum(w * dense(p) for w, p in zip(weights, pair, strict=True))
    assert isinstance(left, np.ndarray)
    found = mixed("linear", {"match_norm": "mean", "svc": True}, pair, weights)
    assert found.cancels == "unscaled"
    assert off(dense(found.product), left) < 1e-6
    for method in ("tsv", "iso_c", "iso_cts", "ties", "magnitude_prune", "dare_linear"):
        found = mixed(method, {}, pair, weights)
        assert (found.cancels, size(dense(found.product))) == ("zero", 0.0), method


# ---- a part that cancels beside one that does not ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dials", [{}, {"match_norm": "mean"}, {"svc": True}], ids=str)
@pytest.mark.parametrize("method", ["linear", "tsv", "iso_c", "iso_cts", "karcher", "ties"])
def test_a_pair_that_cancels_adds_no_noise_to_a_third(method: str, dials: dict[str, Any], dtype: torch.dtype) -> None:
    """The result is the one that exact opposites give, but for the rounding of what went in."""
    if method == "ties":
        dials = {**dials, "density": 1.0, "space": "core", "normalize": False}
    for seed in range(3):
        one, third = some(seed), some(seed + 500, 2)
        exact = [one, one.scaled(-1.0), third]
        given = [stored(one, dtype), stored(rotated(one, seed, -1.0), dtype), stored(third, dtype)]
        if method == "ties":  # whose signs are elected entry by entry: it is held to its size
            found = mixed(method, dials, given, [1.0] * 3)
            assert size(dense(found.product)) <= 3
            continue
        wanted = dense(mixed(method, dials, exact, [1.0] * 3).product)
        found = mixed(method, dials, given, [1.0] * 3)
        assert off(dense(found.product), wanted) < 30 * ROUNDING[dtype], seed
        assert found.cancels == ""


# ---- what is real stays ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("apart", [0.06, 0.02])
def test_a_difference_that_is_real_is_scaled_as_asked(apart: float, dtype: torch.dtype) -> None:
    """Two updates of norm 1 that are 6 % or 2 % apart are more than the rounding of any dtype."""
    for seed in range(10):
        one, noise = some(seed), some(seed + 1000)
        other = Product(torch.cat([one.up, noise.up * apart], 1), torch.cat([one.down, noise.down]))
        pair = [stored(one, dtype), stored(rotated(other, seed), dtype)]
        left = dense(pair[0]) - dense(pair[1])
        sizes = [size(dense(product)) for product in pair]
        found = mixed("linear", {"match_norm": "mean"}, pair, [1.0, -1.0])
        assert found.cancels == ""
        assert size(dense(found.product)) == pytest.approx(float(np.mean(sizes)), rel=1e-6)
        assert off(dense(found.product) * size(left) / float(np.mean(sizes)), left) < 1e-6
        for method in ("tsv", "iso_c", "iso_cts", "ties", "svd", "linear"):
            found = mixed(method, {}, pair, [1.0, -1.0])
            assert found.cancels == "", method
            assert size(dense(found.product)) > 0.2 * apart, method


def test_falling_singular_values_of_one_adapter_are_no_noise() -> None:
    """A single adapter does not cancel, however small its last singular values are: factors keep each of them exactly."""
    left, right = (torch.linalg.qr(draw(at, n, 6))[0] for at, n in enumerate((24, 20)))
    values = 10.0 ** -torch.arange(6, dtype=torch.float64)
    product = Product(left * values, right.T.contiguous(), 2.4e-3)
    for method in ("linear", "svd", "tsv"):
        found = mixed(method, {}, [product], [1.0])
        assert found.cancels == ""
        assert off(dense(found.product), dense(product)) < 5e-3
    assert not bool(is_noise(product))


# ---- the floor itself ----


def test_the_floor_is_the_stated_formula() -> None:
    """1.5 √Σ (uᵢ |wᵢ| ‖ΔWᵢ‖)², u by the dtype that the factors are stored in."""
    products = [stored(some(1), torch.bfloat16), stored(some(2, 1), torch.float16), stored(some(3, 1), torch.float32)]
    weights = [0.5, -2.0, 3.0]
    largest = 2.4e-3 * 0.5 * size(dense(products[0])) * 1.5
    wanted = 1.5 * math.sqrt(
        sum((u * w * size(dense(p))) ** 2 for u, w, p in zip((2.4e-3, 3e-4, 1e-6), weights, products, strict=True))
    )
    # terms that are not orthogonal may be larger than what they add up to
    assert wanted <= floor(products, weights) * (1 + 1e-9)
    assert floor(products, weights) < 2 * max(wanted, largest)
    rank_one = products[1:]
    exact = 1.5 * math.hypot(3e-4 * 2.0 * size(dense(rank_one[0])), 1e-6 * 3.0 * size(dense(rank_one[1])))
    assert floor(rank_one, weights[1:]) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_whose_terms_cancel_is_noise_and_one_that_is_small_is_not(dtype: torch.dtype) -> None:
    """What `combine -w 1 -w -1` writes is known for what it is, whatever its size; B = 0 is zero and not noise."""
    for seed in range(10):
        one, other = stored(some(seed), dtype), stored(rotated(some(seed), seed), dtype)
        rest = Product(torch.cat([one.up, -other.up], 1), torch.cat([one.down, other.down]), ROUNDING[dtype])
        for scale in (1e-12, 1.0, 1e12):
            assert bool(is_noise(rest.scaled(scale)))
            assert not bool(is_noise(one.scaled(scale)))
        assert not bool(is_noise(one.scaled(0.0)))
        batch = Product(torch.stack([rest.up, rest.up]), torch.stack([rest.down, 2 * rest.down]), ROUNDING[dtype])
        assert is_noise(batch).tolist() == [True, True]
        assert floor_of(batch)[1] == pytest.approx(2 * float(floor_of(batch)[0]))


def test_weights_that_cancel_but_for_decimals_are_no_divisor() -> None:
    """0.1 + 0.2 − 0.3 is 3·10⁻¹⁷ in floating point; dividing by it would enlarge an update 10¹⁶ times."""
    from loratool.algebra.methods.coefficients import cancel

    assert cancel([0.1, 0.2, -0.3])
    assert cancel([1.0, -1.0])
    assert not cancel([0.1, 0.2, -0.299])
    assert not cancel([1e-9])


# ---- files and commands ----

TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def write(folder: Path, products: Sequence[Product], dtype: torch.dtype) -> Path:
    """A PEFT adapter of one product for each target, α = r."""
    rank = products[0].rank
    factors = {target: (product.up, product.down) for target, product in zip(TARGETS, products, strict=True)}
    tensors = named_by_peft(factors, dtype)
    return save_peft(folder, tensors, r=rank, lora_alpha=rank, target_modules=["q_proj"])


def deltas(folder: Path) -> list[Array]:
    """α/r · BA of each target, by the file and its config alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = []
    for target in TARGETS:
        down, up = (tensors[f"base_model.model.{target}.lora_{side}.weight"].double() for side in "AB")
        patterns = (config.get("alpha_pattern") or {}, config.get("rank_pattern") or {})
        alpha, rank = (
            next((v for pattern, v in table.items() if re.search(rf"(^|\.)({pattern})$", target)), config[usual])
            for table, usual in zip(patterns, ("lora_alpha", "r"), strict=True)
        )
        found.append(np.asarray(up @ down) * (alpha / rank))
    return found


def codes(report: Any) -> set[str]:
    return {note.code for note in report.notes}


@pytest.fixture(params=DTYPES, ids=str)
def twins(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, torch.dtype]:
    """An adapter, and the same update by rotated factors, both stored in a dtype."""
    dtype: torch.dtype = request.param
    one = [some(70), some(71)]
    other = [rotated(product, at) for at, product in enumerate(one)]
    return write(tmp_path / "one", one, dtype), write(tmp_path / "other", other, dtype), dtype


@pytest.mark.parametrize(
    "options",
    [
        {"match_norm": "mean"},
        {"method": "svd", "match_norm": "max"},
        {"method": "tsv"},
        {"method": "iso_c"},
        {"method": "ties", "density": 1.0},
        {"method": "linear", "svc": True, "rank": 2},
        {"method": "linear", "rank": 2, "rank_policy": "ctm"},
    ],
    ids=str,
)
def test_an_adapter_less_itself_is_no_adapter_of_noise(
    options: dict[str, Any], twins: tuple[Path, Path, torch.dtype], tmp_path: Path
) -> None:
    """Of ‖ΔW‖ = 1 at most the rounding of the stored factors is left, the report names what became of the layers, and
    so does loratool.json.
    """
    one, other, dtype = twins
    report = loratool.combine([one, other], tmp_path / "out", weights=[1, -1], dtype="float32", **options)
    left = [size(a - b) for a, b in zip(deltas(one), deltas(other), strict=True)]
    for found, rest in zip(deltas(tmp_path / "out"), left, strict=True):
        assert size(found) <= rest * (1 + 1e-3) + 1e-7 < 3 * ROUNDING[dtype]
    assert codes(report) & {"layers-cancel-to-zero", "layers-cancel-unscaled"}
    recorded = json.loads((tmp_path / "out" / "loratool.json").read_text())["notes"]
    assert {note["code"] for note in recorded} == codes(report)


@pytest.fixture
def leftover(twins: tuple[Path, Path, torch.dtype], tmp_path: Path) -> Path:
    """An adapter whose first update is what is left of a twin less the other, and whose second one is real."""
    one, other, dtype = twins
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    name = f"base_model.model.{TARGETS[0]}.lora_{{}}.weight".format
    ups, downs = ([tensors[name(side)].double() for tensors in (a, b)] for side in "BA")
    rest = Product(torch.cat([ups[0], -ups[1]], 1), torch.cat(downs))
    return write(tmp_path / "leftover", [rest, some(72, rest.rank)], dtype)


@pytest.mark.parametrize("asked", [{"frobenius": 5.0}, {"spectral": 5.0}], ids=str)
@pytest.mark.parametrize("bake", [False, True])
def test_rescale_gives_no_norm_to_rounding(asked: dict[str, Any], bake: bool, leftover: Path, tmp_path: Path) -> None:
    """With --each the update that is rounding keeps its strength, and the other one gets the norm that was asked for."""
    report = loratool.rescale(leftover, tmp_path / "out", each=True, bake=bake, **asked)
    before, after = deltas(leftover), deltas(tmp_path / "out")
    assert size(after[0]) == pytest.approx(size(before[0]), rel=1e-2)
    reached = size(after[1]) if "frobenius" in asked else float(np.linalg.norm(after[1], 2))
    assert reached == pytest.approx(5.0, rel=1e-2)
    assert "update-is-rounding" in codes(report)


def test_rescale_refuses_an_adapter_that_is_rounding_altogether(leftover: Path, tmp_path: Path) -> None:
    """No factor makes an adapter of it."""
    path = leftover / "adapter_model.safetensors"
    tensors = load_file(path)
    for side in "AB":
        first, second = (f"base_model.model.{target}.lora_{side}.weight" for target in TARGETS)
        tensors[second] = tensors[first].clone()
    save_file(tensors, path)
    every: list[dict[str, Any]] = [{"frobenius": 1.0}, {"spectral": 1.0}, {"frobenius": 1.0, "each": True}]
    for asked in every:
        with pytest.raises(FitError, match="no larger than the rounding of its stored factors"):
            loratool.rescale(leftover, tmp_path / "out", **asked)
        assert not (tmp_path / "out").exists()


def test_other_commands_say_that_an_update_is_rounding(
    leftover: Path, twins: tuple[Path, Path, torch.dtype], tmp_path: Path
) -> None:
    """compare has no cosine or angle of it, inspect no rank, resize says that its errors mean nothing, and combine takes
    it for zero where directions count.
    """
    one, _, _ = twins
    compared = loratool.compare([leftover, one])
    (first,) = compared.modules[f"{TARGETS[0]}.weight"].values()
    (second,) = compared.modules[f"{TARGETS[1]}.weight"].values()
    assert (first.cosine, first.overlap_out, first.angles_out) == (None, None, ())
    assert second.cosine is not None
    assert "update-is-rounding" in codes(compared)

    facts = loratool.inspect(leftover, values=True)
    assert isinstance(facts, AdapterFacts)
    values = facts.values
    assert values is not None
    assert [module.stable_rank is None for module in values.modules] == [True, False]
    assert "update-is-rounding" in codes(values)

    resized = loratool.resize(leftover, tmp_path / "resized", rank=2)
    assert "update-is-rounding" in codes(resized)

    loratool.combine([leftover, one], tmp_path / "out", method="tsv", dtype="float32")
    alone = deltas(one)[0]
    assert off(deltas(tmp_path / "out")[0], alone) < 1e-2


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_published_seeds_that_differ_by_6_percent_are_not_zeroed(dtype: torch.dtype, tmp_path: Path) -> None:
    """Their difference is real in every dtype that they may be stored in: it gets the norm that was asked for."""
    each = []
    for seed in (42, 123):
        folder = tmp_path / str(seed)
        shutil.copytree(REAL / f"gemma3-270m-svg-seed{seed}", folder)
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
        each.append(folder)
    report = loratool.combine(each, tmp_path / "out", weights=[1, -1], match_norm="mean", dtype="float32")
    assert not codes(report) & {"layers-cancel-to-zero", "layers-cancel-unscaled", "layers-zero"}
    for layer in report.modules.values():
        norms = [part.norm for part in layer.parts.values()]
        assert layer.norm == pytest.approx(sum(norms) / 2, rel=1e-4)
    turned = loratool.combine(each, tmp_path / "tsv", method="tsv", weights=[1, -1], dry_run=True)
    assert not any(layer.cancels for layer in turned.modules.values())
    assert all(layer.norm > 0 for layer in turned.modules.values())


def test_weights_of_files_that_cancel_but_for_decimals_are_refused(
    twins: tuple[Path, Path, torch.dtype], tmp_path: Path
) -> None:
    """Normalising divides by the sum of the weights, and 0.1 + 0.2 − 0.3 is zero."""
    one, other, _ = twins
    with pytest.raises(UsageError, match="sum of the weights, which is 0"):
        loratool.combine([one, other, one], tmp_path / "out", weights=[0.1, 0.2, -0.3], normalize=True)
