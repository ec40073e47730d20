"""The most common edits are merged by numpy: exact values rounded once, and torch is not imported for them."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactly import exact_products, nearest_value, spelled
from merged_models import CONFIG, Scene, rounded, scene, write_adapter, write_model
from safetensors.torch import load_file
from working_plans import working_plan

import loratool
from loratool.bases.weights import widen
from loratool.devices import resident_memory, runtime_memory
from loratool.errors import FitError
from loratool.merging import numpy_sums, numpy_worker, resources
from loratool.merging.numpy_rounding import RESULTS
from loratool.merging.numpy_sums import Added, Tiles
from loratool.merging.numpy_worker import NumpyWorker

ROWS, COLUMNS, RANK = 12, 32, 3
ODD = "model.layers.0.self_attn.v_proj.weight"
KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MERGE = """
import sys, loratool
report = loratool.merge(*sys.argv[1:3], sys.argv[3], device="cpu")
print("torch" in sys.modules, report.gain, *(name for name in sys.modules if name.startswith("loratool.")))
"""
# What a merge of a plain model on this disk does without: each takes time at every start.
NEEDLESS = {
    *("adapters.formats.named.reading", "adapters.formats.named.writing", "adapters.formats.gguf_writing"),
    *(f"adapters.formats.{name}" for name in ("gguf", "litgpt", "loralib", "megatron", "mlx", "torchtune")),
    *("adapters.blocks", "adapters.writer", "bases.binding.named", "files.gguf", "files.tensor_writer", "layouts.gguf"),
    *("bases.codecs.known", "fetching.client", "inspecting", "lineage", "merging.in_parts", "merging.row_blocks"),
    *("pictures", "publishing.streaming", "reworking", "results.facts", "stores.client", "verifying"),
}


def numbers(*shape: int, seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def as_bits(values: torch.Tensor) -> np.ndarray:
    found: np.ndarray = values.contiguous().view(torch.uint8).numpy().reshape(-1)
    return found


def read(weight: torch.Tensor, kind: str, values: np.ndarray, first: int) -> None:
    widen(values.reshape(-1), as_bits(weight[first : first + len(values)]), kind)


def merged(weight: torch.Tensor, kind: str, added: Added, into: str = "BF16") -> torch.Tensor | None:
    """W + ΔW in bfloat16 or float32, in blocks of some rows; None where numpy leaves it to torch."""
    result = RESULTS[into]
    after, tiles = np.zeros(weight.shape, result.bits), Tiles(weight.shape[1], result)
    for first in range(0, len(weight), 5):
        rows = after[first : first + 5]
        if tiles.merge(added, partial(read, weight, kind), first, rows, 2, look=True) is None:
            return None
    return torch.from_numpy(after.view(f"int{8 * result.itemsize}")).view(KINDS[into])


@pytest.mark.parametrize("scale", [2.0, 0.3], ids=str)
@pytest.mark.parametrize(("kind", "into"), [*((kind, "BF16") for kind in KINDS), ("BF16", "F32"), ("F32", "F32")])
@pytest.mark.parametrize("size", [0.01, 1e-7])
def test_every_element_is_the_exact_sum_rounded_once(
    kind: str, into: str, scale: float, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros, sums that cancel, ties, and what lies next to one are among them; a tile is two rows."""
    monkeypatch.setattr(numpy_sums, "TILE", 2 * COLUMNS)
    monkeypatch.setattr(numpy_sums, "MANY", 1)
    up, down = numbers(ROWS, RANK, seed=1, size=size), numbers(RANK, COLUMNS, seed=2)
    up[0], up[3:5], down[:, 0] = 0, torch.tensor([[2.0**-9, 2.0**-60, 0], [2.0**-9, -(2.0**-60), 0]]), 1
    left, right = (factor.numpy().astype(RESULTS[into].work) for factor in (up, down))
    added = Added(left, right, scale)
    weight = numbers(ROWS, COLUMNS, seed=3, size=0.02).to(KINDS[kind])
    exact = [
        [exact_products(up[row].tolist(), down[:, column].tolist(), scale) for column in range(COLUMNS)]
        for row in range(ROWS)
    ]
    weight[0, :2] = torch.tensor([0.0, -0.0])
    weight[3:5] = 1  # next to a tie of bfloat16 by less than float64 keeps, where the scale is 2
    for column in range(COLUMNS):
        weight[5, column] = -float(exact[5][column])  # cancels but for what rounding took from it
        weight[7, column] = float(Fraction(257, 256) - exact[7][column])  # next to a tie
    got = merged(weight, kind, added, into)
    assert got is not None
    for row in range(ROWS):
        for column in range(COLUMNS):
            before = float(weight[row, column])
            value = Fraction(before) + exact[row][column]
            wanted = nearest_value(value, KINDS[into]) if value else before if before == 0 else 0.0
            assert spelled(float(got[row, column])) == spelled(wanted), (row, column)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 3e38, 1e-39])
def test_rare_weights_are_left_to_torch(odd: float) -> None:
    weight = numbers(ROWS, COLUMNS, seed=3).bfloat16()
    weight[4] = odd
    added = Added(np.full((ROWS, RANK), 1e-45, np.float32), np.ones((RANK, COLUMNS), np.float32), 1.0)
    assert merged(weight, "BF16", added) is None


def test_rows_to_which_nothing_is_added_stay_as_they_are() -> None:
    """Zeros of either sign and the smallest numbers among them, in float32 rounded to the nearest."""
    weight, up = numbers(ROWS, COLUMNS, seed=3), numbers(ROWS, RANK, seed=1)
    weight[2:9], up[2:9] = 0, 0
    weight[3], weight[4], weight[5] = -0.0, 1e-45, 1 + 2.0**-8
    got = merged(weight, "F32", Added(up.numpy(), numbers(RANK, COLUMNS, seed=2).numpy(), 1.0))
    assert got is not None
    assert torch.equal(got[2:9].view(torch.int16), weight[2:9].bfloat16().view(torch.int16))


def test_bits_of_numbers_are_read_as_they_are() -> None:
    for kind, dtype in KINDS.items():
        values = torch.cat([numbers(500, seed=4), torch.tensor([0.0, -0.0, 1e-40, math.inf])]).to(dtype)
        found = np.empty(len(values), np.float32)
        widen(found, as_bits(values), kind)
        assert np.array_equal(found.view(np.int32), values.float().numpy().view(np.int32))


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("scene"))


def test_a_merge_takes_no_torch(of: Scene, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MERGE, *map(str, (of.base, of.adapter, tmp_path / "merged"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert done[0] == "False"
    assert {f"loratool.{name}" for name in NEEDLESS}.isdisjoint(done[2:])
    found = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = of.merged()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name


def both(base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Reports of a merge as it is, and of one by torch."""
    reports = [loratool.merge(base, adapter, out / "numpy", device="cpu", **options)]
    monkeypatch.setattr(resources, "suits", lambda span: False)
    return [*reports, loratool.merge(base, adapter, out / "torch", device="cpu", **options)]


def test_both_ways_say_the_same_of_a_merge(of: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a layer whose update is zero do not change, in either report."""
    one, other = both(of.base, of.adapter, tmp_path, monkeypatch)
    assert one.digests == other.digests
    assert one.gain == pytest.approx(other.gain, abs=1e-5)
    assert one.gains == pytest.approx(other.gains, abs=1e-4)
    assert one.relative_norms == pytest.approx(other.relative_norms, rel=1e-5)
    assert one.adapters == other.adapters
    records = [(tmp_path / each / "loratool.json").read_bytes() for each in ("numpy", "torch")]
    assert records[0] == records[1]


@pytest.mark.parametrize("odd", [None, math.nan])
def test_compensated_sums_of_both_ways_are_alike(
    odd: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a weight has a NaN, and torch does for numpy what is left; one update is of zeros, a width is odd."""
    shapes = {ODD: (64, 47), ODD.replace("0", "1"): (96, 128), ODD.replace("0", "2"): (8, 4100)}
    weights = {name: numbers(*shape, seed=n, size=0.02).bfloat16() for n, (name, shape) in enumerate(shapes.items())}
    if odd is not None:
        weights[ODD][3, 5] = odd
    factors = {
        name: (numbers(RANK, columns, seed=7), numbers(rows, RANK, seed=8, size=1e-5))
        for name, (rows, columns) in shapes.items()
    }
    last = ODD.replace("0", "3")
    weights[last], factors[last] = weights[ODD].nan_to_num(), (numbers(RANK, 47, seed=7), torch.zeros(64, RANK))
    write_model(tmp_path / "base", weights, CONFIG)
    write_adapter(tmp_path / "adapter", factors, torch.float32, r=RANK, lora_alpha=RANK, target_modules=["v_proj"])
    if odd is None:
        monkeypatch.setattr(NumpyWorker, "by_torch", None)
    one, other = both(tmp_path / "base", tmp_path / "adapter", tmp_path, monkeypatch, rounding="compensated")
    assert (one.digests, one.nonfinite) == (other.digests, other.nonfinite)
    assert one.gains == pytest.approx(other.gains, abs=1e-4)
    assert one.gains[ODD.replace("0", "1")] == pytest.approx(1, abs=0.05)
    assert one.relative_norms == pytest.approx(other.relative_norms, rel=1e-5)
    found = load_file(tmp_path / "numpy" / "model.safetensors")
    assert torch.equal(found[last], weights[last])


def test_weights_that_are_not_finite_are_carried_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of several has a NaN; the merge counts it, as one by torch does."""
    weights = {ODD: numbers(64, 48, seed=5).bfloat16(), ODD.replace("0", "1"): numbers(64, 48, seed=6).bfloat16()}
    weights[ODD][3, 5] = math.nan
    factors = {name: (numbers(RANK, 48, seed=7), numbers(64, RANK, seed=8, size=0.01)) for name in weights}
    write_model(tmp_path / "base", weights, CONFIG)
    write_adapter(tmp_path / "adapter", factors, torch.float32, r=RANK, lora_alpha=RANK, target_modules=["v_proj"])
    one, other = both(tmp_path / "base", tmp_path / "adapter", tmp_path, monkeypatch)
    assert (one.digests, one.nonfinite) == (other.digests, other.nonfinite)
    assert one.nonfinite == {ODD: 1}
    found = load_file(tmp_path / "numpy" / "model.safetensors")
    for name, weight in weights.items():
        down, up = factors[name]
        wanted = rounded(weight.double() + up.double() @ down.double(), torch.bfloat16)
        assert torch.equal(found[name].nan_to_num(0), wanted.nan_to_num(0))


@pytest.mark.parametrize("spare", [0, 1 << 40])
def test_a_limit_that_leaves_no_memory_for_torch_is_told_where_it_takes_torch(
    spare: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight is infinite."""
    weights = {ODD: numbers(64, 48, seed=5).bfloat16()}
    weights[ODD][3, 5] = math.inf
    write_model(tmp_path / "base", weights, CONFIG)
    factors = {ODD: (numbers(RANK, 48, seed=7), numbers(64, RANK, seed=8, size=0.01))}
    write_adapter(tmp_path / "adapter", factors, torch.float32, r=RANK, lora_alpha=RANK, target_modules=["v_proj"])
    limit: dict[str, Any] = {"max_memory": resident_memory() + (200 << 20)}
    monkeypatch.setattr(numpy_worker, "runtime_memory", lambda: (300 << 20) - spare)
    monkeypatch.setattr(numpy_worker, "has_torch", lambda: False)
    if spare:
        loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cpu", **limit)
        return
    with pytest.raises(loratool.UsageError, match=rf"{ODD} has values that only torch can compute, .* at least \d+ MB"):
        loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cpu", **limit)


def test_many_cores_compute_by_numpy_where_a_limit_leaves_little_for_torch(
    of: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = working_plan(of.base, of.adapter).spans
    monkeypatch.setattr(resources, "cores", lambda: 64)
    monkeypatch.setattr(resources, "FEW_ELEMENTS", 0)
    assert not resources.by_numpy(spans, "cpu")
    assert not resources.by_numpy(spans, "cpu", 8 << 30)
    assert resources.by_numpy(spans, "cpu", 200 << 20)
    few = runtime_memory() + resources.Resources(("cpu",), resources.NUMPY_WORKERS, resources.LARGE_BLOCK).memory(spans)
    assert resources.by_numpy(spans, "cpu", few - 1)
    assert not resources.by_numpy(spans, "cpu", few)


def test_numpy_has_few_workers_on_many_cores_unless_more_are_asked_for(
    of: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = working_plan(of.base, of.adapter).spans
    monkeypatch.setattr(resources, "cores", lambda: 64)
    found = {
        (workers, has_torch): resources.choose_resources(spans, ("cpu",), workers, None, 0, has_torch=has_torch).workers
        for workers in (None, 20)
        for has_torch in (False, True)
    }
    assert found == {
        (None, False): resources.NUMPY_WORKERS,
        (None, True): resources.MOST_WORKERS,
        (20, False): 20,
        (20, True): 20,
    }


@pytest.mark.parametrize("into", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_without_an_update_are_rounded_too(
    dtype: torch.dtype, into: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm, a matrix with ties, numbers below the normal ones and one that is none, next to an edited matrix."""
    weights = {
        ODD: numbers(64, 48, seed=5).to(dtype),
        "model.layers.0.mlp.up_proj.weight": (1 + torch.arange(48 * 64) * 2.0**-9).reshape(64, 48).to(dtype),
        "model.layers.1.mlp.up_proj.weight": (torch.arange(48 * 8) * 2.0**-24).reshape(8, 48).to(dtype),
        "model.norm.weight": numbers(4097, seed=6).to(dtype),
        "lm_head.weight": torch.full((64, 48), math.inf).to(dtype),
    }
    factors = {ODD: (numbers(RANK, 48, seed=7), numbers(64, RANK, seed=8, size=0.01))}
    write_model(tmp_path / "base", weights, CONFIG)
    write_adapter(tmp_path / "adapter", factors, torch.float32, r=RANK, lora_alpha=RANK, target_modules=["v_proj"])
    one, other = both(tmp_path / "base", tmp_path / "adapter", tmp_path, monkeypatch, dtype=into)
    assert (one.digests, one.nonfinite) == (other.digests, other.nonfinite)
    found = load_file(tmp_path / "numpy" / "model.safetensors")
    for name in weights.keys() - {ODD}:
        assert torch.equal(found[name].view(torch.int16), weights[name].to(into).view(torch.int16)), name


def test_models_in_float32_take_no_torch(of: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of a base in bfloat16, and that of a base in float32, which is this output."""
    monkeypatch.setattr(NumpyWorker, "by_torch", lambda *_: pytest.fail("torch was asked"))
    before = {name: weight.float() for name, weight in of.weights.items()}
    base, settings = of.base, {"device": "cpu", "dtype": "float32"}
    for out in ("wide", "twice"):
        report = loratool.merge(base, of.adapter, tmp_path / out, **settings)  # type: ignore[arg-type]
        assert max(report.gains.values()) == pytest.approx(1, abs=1e-5)
        found, base = load_file(tmp_path / out / "model.safetensors"), tmp_path / out
        for name, value in before.items():
            exact = value.double() + (of.change(name) if name in of.factors else 0)
            assert torch.equal(found[name], exact.float()), name
        before = found


@pytest.mark.parametrize("size", [1e-25, 1e12])
def test_factors_beyond_what_float32_computes_with_are_left_to_torch(
    size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A and B are small and large for each other."""
    weights = {ODD: numbers(64, 48, seed=5).bfloat16()}
    factors = {ODD: (numbers(RANK, 48, seed=7) * size, numbers(64, RANK, seed=8) * (0.01 / size))}
    write_model(tmp_path / "base", weights, CONFIG)
    write_adapter(tmp_path / "adapter", factors, torch.float32, r=RANK, lora_alpha=RANK, target_modules=["v_proj"])
    one, other = both(tmp_path / "base", tmp_path / "adapter", tmp_path, monkeypatch)
    assert one.digests == other.digests


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1)], ids=["large", "cancels"])
def test_sums_beyond_the_largest_number_are_refused(
    signs: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one row of many; float32 has infinities there, or a NaN where two of them cancel."""
    weights = {ODD: numbers(64, 48, seed=5).bfloat16()}
    down, up = numbers(RANK, 48, seed=7).abs() * 2.0**49, numbers(64, RANK, seed=8, size=0.01)
    up[5] = torch.tensor(signs) * 2.0**50
    write_model(tmp_path / "base", weights, CONFIG)
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": RANK * 2.0**30, "target_modules": ["v_proj"]}
    write_adapter(tmp_path / "adapter", {ODD: (down, up)}, torch.float32, **settings)
    for by_numpy in (True, False):
        if not by_numpy:
            monkeypatch.setattr(resources, "suits", lambda span: False)
        with pytest.raises(FitError, match="exceed the range"):
            loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cpu")


def test_blocks_of_gguf_are_decoded_by_both_ways_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix of a layer is in a type of its own; rows of queries and keys are stored in another order."""
    pytest.importorskip("gguf")
    from gguf_models import Kind, llama_weights, write_llama

    weights = llama_weights(hidden=256, mlp=256)
    types = {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "attn_output": "Q4_K", "ffn_down": "BF16"}
    kinds = {f"blk.0.{name}.weight": Kind[kind] for name, kind in types.items()}
    base = write_llama(tmp_path / "base.gguf", weights, Kind.Q8_0, kinds)
    names = [name for name in weights if "self_attn" in name or "mlp" in name]
    factors = {
        name: (numbers(RANK, weights[name].shape[1], seed=7), numbers(len(weights[name]), RANK, seed=8, size=0.01))
        for name in names
    }
    targets = sorted({name.split(".")[-2] for name in names})
    write_adapter(tmp_path / "adapter", factors, torch.bfloat16, r=RANK, lora_alpha=RANK, target_modules=targets)
    one, other = both(base, tmp_path / "adapter", tmp_path, monkeypatch)
    assert one.digests == other.digests
    assert one.relative_norms == pytest.approx(other.relative_norms, rel=1e-5)


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("shape", [(300, 16, 4096), (70, 3, 1023), (5, 256, 64)])
def test_products_in_pieces_are_the_product(
    shape: tuple[int, int, int], threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the pieces are, the products of all of them are that of the whole, which float64 gives."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
    rows, rank, width = shape
    random = np.random.default_rng(0)
    left, right = (random.standard_normal(each, np.float32) for each in ((rows, rank), (rank, width)))
    out, most = np.empty((rows, width), np.float32), numpy_sums.alone()
    numpy_sums.multiply(left, numpy_sums.in_parts(right, rows, most), out, most)
    expected = left.astype(float) @ right.astype(float)
    assert abs(out - expected).max() <= 1e-5 * rank
