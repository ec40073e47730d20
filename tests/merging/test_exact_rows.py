"""Every element of a merge is the exact value rounded once: rational numbers are the oracle, on files and on sums."""

from __future__ import annotations

import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from exactly import exact_products, nearest_value, spelled
from peft_files import save_peft
from safetensors.torch import load_file, save_file

import loratool
from loratool.merging import exact_rows, resources
from loratool.merging.addends import ALL, Addend, Place
from loratool.merging.exact_rows import ExactSum, Scratch

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here, or LORATOOL_TEST_CUDA=1 is not set"
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
ROWS, COLUMNS = 24, 20


def made(*shape: int, seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def some_parts(stored: torch.dtype, scale: float) -> list[Addend]:
    """Two products for all of the weight, one for every other column of some rows, and a difference in full."""
    held = torch.float64 if stored == torch.float64 else torch.float32
    up, down = made(ROWS, 4, seed=1, size=0.01).to(stored).to(held), made(4, COLUMNS, seed=2).to(stored).to(held)
    up[0] = 0
    everywhere = Place(0, ROWS, ALL, COLUMNS)
    some = Place(5, 10, slice(0, None, 2), COLUMNS // 2)
    return [
        Addend(everywhere, up, down, scale),
        Addend(everywhere, up.flip(0), down, 0.7 * scale),
        Addend(some, up[:10], down[:, : COLUMNS // 2].contiguous(), -scale),
        Addend(everywhere, made(ROWS, COLUMNS, seed=3, size=0.001).to(stored).to(held), None, scale),
    ]


def exact_change(parts: list[Addend], row: int, column: int) -> Fraction:
    total = Fraction(0)
    for part in parts:
        columns = list(range(COLUMNS))[part.place.columns]
        if not (part.place.first <= row < part.place.first + part.place.rows and column in columns):
            continue
        own, across = row - part.place.first, columns.index(column)
        if part.down is None:
            total += Fraction(float(part.up[own, across])) * Fraction(part.scale)
        else:
            total += exact_products(part.up[own].tolist(), part.down[:, across].tolist(), part.scale)
    return total


@cache
def changes(stored: torch.dtype, scale: float) -> list[list[Fraction]]:
    """What `some_parts` add to each element."""
    parts = some_parts(stored, scale)
    return [[exact_change(parts, row, column) for column in range(COLUMNS)] for row in range(ROWS)]


def merged_rows(weight: torch.Tensor, parts: list[Addend], target: torch.dtype, rows: int) -> torch.Tensor:
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = ExactSum(parts, COLUMNS, target, exact, ROWS)
    after = torch.empty(ROWS, COLUMNS, dtype=target)
    scratch = Scratch(torch.device("cpu"), ROWS * COLUMNS, 8)
    for at in range(0, ROWS, 7):
        total.merge(weight[at : at + 7], at, after[at : at + 7], scratch, rows)
    return after


@pytest.mark.parametrize("small", [1 << 15, 0], ids=["float64", "float32"])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_zeros_of_a_block_that_has_nothing_else_keep_their_signs(
    target: torch.dtype, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of −0 and of +0 is +0, and no size of a block tells how far that may be from the exact value."""
    monkeypatch.setattr(exact_rows, "SMALL", small)
    weight = torch.zeros(ROWS, COLUMNS)
    weight[:, ::2] = -0.0
    part = Addend(Place(0, ROWS, ALL, COLUMNS), torch.zeros(ROWS, 2), torch.ones(2, COLUMNS), 1.0)
    got = merged_rows(weight, [part], target, rows=3)
    assert torch.equal(got.signbit(), weight.signbit())


@pytest.mark.parametrize(("scale", "size"), [(2.0**-59, 2.0**100), (2.0**40, 2.0**118)], ids=["small", "large"])
def test_weights_and_scales_far_from_each_other_are_added_in_float64(
    scale: float, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the error of a large sum over a small scale is infinite."""
    monkeypatch.setattr(exact_rows, "SMALL", 0)
    weight = (made(ROWS, COLUMNS, seed=4) * size).bfloat16()
    up, down = made(ROWS, 4, seed=1), made(4, COLUMNS, seed=2)
    part = Addend(Place(0, ROWS, ALL, COLUMNS), up, down, scale)
    assert torch.equal(merged_rows(weight, [part], torch.bfloat16, rows=3), weight)


@pytest.mark.parametrize(
    ("rows", "columns", "scale", "size"),
    [
        (1e-200, 1e199, 0.3, 0.02),
        (1e-170, 1e150, 3e19, 0.02),
        (1e-170, 1e150, 3e19, 0),
        (2.0**-150, 2.0**58, 2.0**58, 0.0),
        (1e-200, 1e-200, 1, 0),
    ],
)
@pytest.mark.parametrize(
    ("target", "small"),
    [(torch.bfloat16, 1 << 15), (torch.bfloat16, 0), (torch.float16, 1 << 15), (torch.float64, 0)],
    ids=str,
)
def test_factors_whose_squares_float64_does_not_hold_are_exact_too(
    rows: float,
    columns: float,
    scale: float,
    size: float,
    target: torch.dtype,
    small: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor float32 the factors themselves. Where all elements are undecided, rows without any update keep what they have."""
    monkeypatch.setattr(exact_rows, "SMALL", small)
    weight = (made(ROWS, COLUMNS, seed=4).abs() * size).bfloat16()
    up, down = (
        made(ROWS, 2, seed=1).double().clamp(-1, 1) * rows,
        made(2, COLUMNS, seed=2).double().clamp(-1, 1) * columns,
    )
    got = merged_rows(weight, [Addend(Place(0, ROWS, ALL, COLUMNS), up, down, scale)], target, rows=3)
    for row in range(ROWS):
        for column in range(COLUMNS):
            exact = exact_products(up[row].tolist(), down[:, column].tolist(), scale) + Fraction(
                float(weight[row, column])
            )
            wanted = nearest_value(exact, target)
            assert spelled(float(got[row, column])) == spelled(math.copysign(wanted, -1 if exact < 0 else 1))


FLOATS = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = [(stored, target) for stored in FLOATS if stored != torch.float16 for target in FLOATS]
NARROW = [(stored, target) for stored, target in KINDS if stored != torch.float64 and target.itemsize == 2]


@pytest.mark.parametrize(
    ("factors", "scale"),
    [(torch.bfloat16, 2.0), (torch.bfloat16, 0.3), (torch.float32, 0.3), (torch.float64, 0.3)],
    ids=str,
)
@pytest.mark.parametrize(
    ("stored", "target", "small"), [(*kind, True) for kind in KINDS] + [(*kind, False) for kind in NARROW], ids=str
)
def test_every_element_is_the_exact_sum_rounded_once(
    stored: torch.dtype,
    target: torch.dtype,
    factors: torch.dtype,
    scale: float,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Small weights are computed in float64, and larger ones in float32 where the output has 16 bits."""
    if not small:
        monkeypatch.setattr(exact_rows, "SMALL", 0)
    parts, change = some_parts(factors, scale), changes(factors, scale)
    weight = made(ROWS, COLUMNS, seed=4, size=0.02).to(stored)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-40, -1e-30])
    for column in range(COLUMNS):  # cancels but for what rounding took from it
        weight[2, column] = -float(change[2][column])
    weight[1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    got = merged_rows(weight, parts, target, rows=3)
    for row in range(ROWS):
        for column in range(COLUMNS):
            before, value = float(weight[row, column]), float(got[row, column])
            if not math.isfinite(before):
                assert spelled(value) == spelled(before)
                continue
            exact = Fraction(before) + change[row][column]
            wanted = nearest_value(exact, target) if exact else before if before == 0 else 0.0
            assert spelled(value) == spelled(wanted), (row, column)
    assert torch.equal(merged_rows(weight, parts, target, rows=1).view(torch.uint8), got.view(torch.uint8))


def write_pair(
    folder: Path, weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, alpha: float, rslora: bool = False
) -> tuple[Path, Path]:
    base, adapter = folder / "base", folder / "adapter"
    for each in (base, adapter):
        each.mkdir(parents=True)
    save_file({"q.weight": weight}, base / "model.safetensors")
    factors = {"base_model.model.q.lora_A.weight": down, "base_model.model.q.lora_B.weight": up}
    save_peft(adapter, factors, r=down.shape[0], lora_alpha=alpha, use_rslora=rslora)
    return base, adapter


@pytest.mark.parametrize("small", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("factors", "rank", "alpha", "rslora", "weight"),
    [
        (torch.bfloat16, 1, 2, False, 1.0),
        (torch.bfloat16, 16, 32, False, 1.0),
        (torch.float32, 16, 24, True, 0.7),
        (torch.float16, 3, 1, False, -1.5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merged_files_hold_the_exact_values_rounded_once(
    tmp_path: Path,
    dtype: torch.dtype,
    factors: torch.dtype,
    rank: int,
    alpha: int,
    rslora: bool,
    weight: float,
    device: str,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16-bit factors with a power of two for a scale make many exact ties. A width of 63 does not go with eight bytes."""
    monkeypatch.setattr(exact_rows, "SMALL", exact_rows.SMALL if small else 0)
    width, scale = 64 if rank > 1 else 63, alpha / (math.sqrt(rank) if rslora else rank) * weight
    before = made(96, width, seed=5, size=0.02).to(dtype)
    up, down = made(96, rank, seed=6, size=0.01).to(factors), made(rank, width, seed=7, size=0.1).to(factors)
    up[5] = 0
    before[10] = -(scale * up.double() @ down.double())[10].to(dtype)  # cancels but for what rounding took from it
    before[15, :3] = torch.tensor([0.0, -0.0, 1e-8])
    base, adapter = write_pair(tmp_path, before, up, down, alpha, rslora)
    loratool.merge(base, [adapter], tmp_path / "out", weights=[weight], device=device)
    got = load_file(tmp_path / "out" / "model.safetensors")["q.weight"].double().tolist()
    lefts, rights = up.double().tolist(), down.double().T.tolist()
    for row in range(0, 96, 5):
        for column in range(width):
            stored = float(before[row, column])
            exact = Fraction(stored) + exact_products(lefts[row], rights[column], scale)
            wanted = nearest_value(exact, dtype) if exact else stored if stored == 0 else 0.0
            assert spelled(got[row][column]) == spelled(wanted), (row, column)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_and_workers_do_not_show_in_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    before = made(370, 640, seed=5, size=0.02).bfloat16()
    up, down = made(370, 16, seed=6, size=0.01), made(16, 640, seed=7, size=0.1)
    base, adapter = write_pair(tmp_path, before, up, down, 32)
    found = set()
    for rows in (1, 37, 370):
        for workers in (1, 16):
            monkeypatch.setattr(resources, "CPU_BLOCK", rows * 640 * 2)
            monkeypatch.setattr(resources, "CUDA_BLOCK", rows * 640 * 2)
            out = tmp_path / f"out-{rows}-{workers}"
            loratool.merge(base, [adapter], out, workers=workers, device=device)
            found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript is not maintained for this Python")
def test_torchscript_takes_the_kernels() -> None:
    """Otherwise a merge would be as right, and slower on many cores."""
    from loratool.merging import kernels

    for function in (
        kernels.sum_within_margins,
        kernels.settle,
        kernels.sum_and_round_wide,
        kernels.decide_wide,
        kernels.kept_in_rows,
    ):
        assert isinstance(kernels.script_of(function), torch.jit.ScriptFunction)


def test_kernels_are_compiled_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 fails where two threads parse source at once, which TorchScript does."""
    from loratool.merging import kernels

    at_once: list[int] = []
    busy = threading.Semaphore(4)

    def script(_function: object) -> None:
        with busy:
            at_once.append(4 - busy._value)
            time.sleep(0.005)

    monkeypatch.setattr(torch.jit, "script", script)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(kernels.compiled, [lambda: None for _ in range(4)]))
    assert at_once == [1, 1, 1, 1]


def test_the_bytes_are_the_same_without_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.merging import kernels

    before = made(370, 640, seed=5, size=0.02).bfloat16()
    up, down = made(370, 16, seed=6, size=0.01), made(16, 640, seed=7, size=0.1)
    base, adapter = write_pair(tmp_path, before, up, down, 32)
    loratool.merge(base, [adapter], tmp_path / "script", device="cpu")
    monkeypatch.setattr(kernels, "script_of", lambda _: None)
    loratool.merge(base, [adapter], tmp_path / "plain", device="cpu")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("script", "plain"))
    assert one == other


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_gpu_gives_the_bytes_of_a_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    before = made(3000, 700, seed=5, size=0.02).to(dtype)
    before[7, :2] = torch.tensor([math.nan, -0.0])
    up, down = made(3000, 16, seed=6, size=0.01).bfloat16(), made(16, 700, seed=7, size=0.1).bfloat16()
    base, adapter = write_pair(tmp_path, before, up, down, 32)
    for device in ("cpu", "cuda"):
        loratool.merge(base, [adapter], tmp_path / device, device=device)
    one, other = ((tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "cuda"))
    assert one == other


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_two_million_elements_are_exact(tmp_path: Path, dtype: torch.dtype, bits: int, device: str) -> None:
    """All numbers are multiples of powers of two, so that whole numbers of 64 bits hold every sum; many are ties."""
    before = (made(2048, 1024, seed=8, size=0.02) * 2**18).round().div(2**18).to(dtype)
    up = (made(2048, 8, seed=9, size=0.01) * 2**12).round()
    down = (made(8, 1024, seed=10, size=0.1) * 2**16).round()
    base, adapter = write_pair(tmp_path, before, up / 2**12, down / 2**16, 8)
    loratool.merge(base, [adapter], tmp_path / "out", device=device)
    got = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    exact = (before.double() * 2**28).long() + up.long() @ down.long()
    size = exact.abs()
    cut = (torch.frexp(size.double()).exponent - bits).clamp(min=28 - 24 if dtype == torch.float16 else 0).long()
    kept, rest, half = size >> cut, size & ((1 << cut) - 1), (1 << cut) >> 1
    kept += (rest > half) | ((rest == half) & (cut > 0) & (kept % 2 == 1))
    assert int(((rest == half) & (cut > 0)).sum()) > 50
    assert torch.equal(got.double(), (kept << cut).double() * exact.sign() / 2**28)
