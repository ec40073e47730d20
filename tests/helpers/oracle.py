"""What a merge must give, worked out without loratool.

Tensors are read by the safetensors package, headers by `struct` and `json`. The formula
W + Σ w·s·BA is computed in float64 from the files, and rounded once at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors import SafetensorError, deserialize, safe_open
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A\.weight|lora_A|lora_embedding_A)")
ORACLE_ERROR = 256 * torch.finfo(torch.float64).eps  # of a sum in float64, relative to the size of its terms
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def always(_: str) -> bool:
    return True


def never(_: str) -> bool:
    return False


def weight_of(module: str) -> str:
    """The tensor of a module whose name is the same on disk and in memory."""
    return f"{module}.weight"


def weight_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors")) if model.is_dir() else [model]


def read_tensors(model: Path, wanted: Callable[[str], bool] = always) -> dict[str, Tensor]:
    """The tensors of a folder or a file, by name."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(model):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                assert name not in tensors, f"{name} is there twice"
                if wanted(name):
                    tensors[name] = file.get_tensor(name)
    return tensors


def header_bytes(path: Path) -> bytes:
    """The length prefix and the JSON that follows it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", prefix := file.read(8))
        return prefix + file.read(length)


def header(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(header_bytes(path)[8:])
    return table


def raw_tensors(model: Path) -> dict[str, bytes]:
    """Every tensor's bytes, of any dtype."""
    found: dict[str, bytes] = {}
    for path in weight_files(model):
        content = path.read_bytes()
        start = len(header_bytes(path))
        for name, entry in header(path).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = content[start + first : start + last]
    return found


def config_scale(adapter: Path) -> float:
    """α/r, or α/√r with rsLoRA, of an adapter without patterns. AdaLoRA divides by the rank it began with."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config["peft_type"] == "ADALORA":
        return float(config["lora_alpha"]) / (int(config["init_r"]) + 1e-5)
    alpha, rank = float(config["lora_alpha"]), int(config["r"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass(frozen=True)
class Exact:
    """One tensor of the merged model in float64, before it is rounded."""

    value: Tensor
    terms: Tensor  # |W| + Σ |w·s·B||A|: what an error of float64 arithmetic is relative to


def unchanged(weight: Tensor) -> Exact:
    return Exact(weight.double(), weight.double().abs())


def exact_merge(
    base: Mapping[str, Tensor],
    *adapters: tuple[Path, float],
    name: Callable[[str], str] = weight_of,
    in_out: Callable[[str], bool] = never,
    scale: Callable[[str], float] | None = None,
) -> dict[str, Exact]:
    """The edited tensors of `base` + Σ weight · adapter; `base` may hold some of the model's tensors only.

    `name` gives the tensor of a module as the adapter calls it, `in_out` tells which modules' weights
    are stored (in, out), and `scale` gives a module's scaling where it is not the config's α/r.
    """
    edited: dict[str, Exact] = {}
    for path, weight in adapters:
        tensors = read_tensors(path / "adapter_model.safetensors")
        default = config_scale(path)
        for key, saved in tensors.items():
            if "lora_" not in key:  # saved whole: takes the base tensor's place
                target = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                edited[target] = unchanged(saved)
        for key, down in tensors.items():
            if not (match := FACTOR.fullmatch(key.removeprefix(PREFIX))):
                continue
            module, target = match["module"], name(match["module"])
            if target not in base:
                continue
            up = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            if (values := tensors.get(key.replace("lora_A", "lora_E"))) is not None and values is not down:
                down = down.double() * values.double()  # AdaLoRA: B diag(E) A
            turned = in_out(module) or "embedding" in match["kind"]
            factor = weight * (scale(module) if scale else default)
            before = edited.get(target) or unchanged(base[target])
            change, terms = product(up, down, turned)
            edited[target] = Exact(before.value + factor * change, before.terms + abs(factor) * terms)
    return edited


def product(up: Tensor, down: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """BA and |B||A| in float64, transposed where the weight is stored (in, out)."""
    change, terms = up.double() @ down.double(), up.double().abs() @ down.double().abs()
    return (change.T, terms.T) if turned else (change, terms)


def steps(found: Tensor, wanted: Tensor) -> Tensor:
    """How many representable values lie between two tensors of one dtype, element by element."""
    assert found.dtype == wanted.dtype, f"{found.dtype} is not {wanted.dtype}"
    assert found.shape == wanted.shape, f"{list(found.shape)} is not {list(wanted.shape)}"
    return (ordered(found) - ordered(wanted)).abs()


def ordered(values: Tensor) -> Tensor:
    """Floats as integers in the order of their size, so that neighbours differ by 1 and −0 is 0."""
    integer = INTEGERS[values.dtype]
    bits = values.contiguous().view(integer).to(torch.int32 if integer == torch.int16 else torch.int64)
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)


def nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded once to `dtype`; torch itself goes by way of float32 and so rounds twice.

    On that way an inexact value is cut off and made odd, which is no middle of two narrower neighbours.
    """
    if dtype in (torch.float32, torch.float64):
        return exact.to(dtype)
    between = exact.to(torch.float32)
    cut = between.view(torch.int32) - (between.double().abs() > exact.abs()).int()
    return (cut | (between.double() != exact).int()).view(torch.float32).to(dtype)


def assert_single_rounding(found: Tensor, exact: Exact, name: str = "") -> None:
    """Every element of `found` is the exact value rounded once.

    The oracle's float64 has errors of its own, far below any dtype's steps. Where these leave open on which side of the
    middle between two neighbours a value lies, either of them passes.
    """
    assert found.shape == exact.value.shape, f"{name}: {list(found.shape)} is not {list(exact.value.shape)}"
    error = ORACLE_ERROR * exact.terms
    least, most = (ordered(nearest(exact.value + sign * error, found.dtype)) for sign in (-1, 1))
    off = (ordered(found) < least) | (ordered(found) > most)
    assert not off.any(), f"{name}: {int(off.sum())} of {off.numel()} elements are not the nearest to the exact value"


def assert_exact_merge(merged: Path, base: Mapping[str, Tensor], exact: Mapping[str, Exact]) -> None:
    """Every edited tensor of `merged` is the formula rounded once, every other one is the base's, bit for bit."""
    after = read_tensors(merged)
    assert set(after) == set(base)
    for name, before in base.items():
        if name in exact:
            assert after[name].dtype == before.dtype
            assert_single_rounding(after[name], exact[name], name)
        else:
            assert same_bits(after[name], before), f"{name} should be an exact copy"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality that takes NaN for equal to itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def picture(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a folder: mode, time of change, and content."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def needs(package: str, lowest: str, because: str) -> None:
    """Skip a test that compares with what only later releases of a package do."""
    if Version(found := version(package)) < Version(lowest):
        pytest.skip(f"{package} {found} {because}")


def needs_dtypes(*dtypes: str) -> None:
    """Skip a test where the safetensors package is of a release that does not know one of these dtypes."""
    for dtype in dtypes:
        header = json.dumps({"x": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
        try:
            deserialize(len(header).to_bytes(8, "little") + header)  # type: ignore[no-untyped-call]
        except SafetensorError:
            pytest.skip(f"safetensors {version('safetensors')} does not know {dtype}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def off(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """‖found − wanted‖ / ‖wanted‖ of finite numbers."""
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-300))
