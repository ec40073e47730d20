"""What the tensors of a module do to its weight, each formula written out element by element in float64."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor


def lora(up: Tensor, down: Tensor, scale: float, mid: Tensor | None = None) -> Tensor:
    """ΔW of LoRA: as a convolution of kernels where `down` or `mid` has one, (out, in, *kernel)."""
    up, down = up.double().flatten(1), down.double()
    rank = up.shape[1]
    if mid is not None:
        wide, down = mid.double(), down.flatten(1)
        kernel = wide.shape[2:]
        change = torch.zeros(up.shape[0], down.shape[1], *kernel, dtype=torch.float64)
        for o, i, a, b in product(*map(range, change.shape[:2]), range(rank), range(down.shape[0])):
            change[o, i] += scale * up[o, a] * wide[a, b] * down[b, i]
        return change
    change = torch.zeros(up.shape[0], *down.shape[1:], dtype=torch.float64)
    for o, i, a in product(range(up.shape[0]), range(down.shape[1]), range(rank)):
        change[o, i] += scale * up[o, a] * down[a, i]
    return change


def dora(weight: Tensor, change: Tensor, lengths: Tensor, by_column: bool) -> Tensor:
    """W' of DoRA: every row of W + ΔW, or everything of one input channel, at its length."""
    moved = (weight + change).double()
    result = moved.clone()
    for at, length in enumerate(lengths.flatten().tolist()):
        part = moved[:, at] if by_column else moved[at]
        norm = math.sqrt(sum(x * x for x in part.flatten().tolist()))
        if by_column:
            result[:, at] = part * (length / norm)
        else:
            result[at] = part * (length / norm)
    return result


def product_of(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices, element by element."""
    result = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float64)
    for i, j in product(*map(range, result.shape)):
        result[i, j] = sum(float(left[i, k]) * float(right[k, j]) for k in range(left.shape[1]))
    return result


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ core[r, s] · a[r, o] · b[s, i], (out, in, *kernel)."""
    result = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for o, i, r, s in product(*map(range, (a.shape[1], b.shape[1], core.shape[0], core.shape[1]))):
        result[o, i] += core[r, s].double() * float(a[r, o]) * float(b[s, i])
    return result


def kronecker(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """ΔW of LoKr: row p·b + q and column c·d + e hold left[p, c] · right[q, e], `right` being (b, d, *kernel)."""
    (rows, columns), (b, d) = left.shape, right.shape[:2]
    change = torch.zeros(rows * b, columns * d, *right.shape[2:], dtype=torch.float64)
    for p, c, q, e in product(range(rows), range(columns), range(b), range(d)):
        change[p * b + q, c * d + e] = scale * left[p, c].double() * right[q, e].double()
    return change


def cayley(generator: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ of one skew-symmetric matrix."""
    identity = torch.eye(generator.shape[0], dtype=torch.float64)
    rotation: Tensor = (identity + generator) @ torch.linalg.inv(identity - generator)
    return rotation


def skew(blocks: Tensor, limit: float | None) -> Tensor:
    """X − Xᵀ of every block, all of them together no longer than `limit`."""
    generators = blocks.double() - blocks.double().transpose(-1, -2)
    length = math.sqrt(sum(x * x for x in generators.flatten().tolist()))
    return generators * (limit / length) if limit is not None and length > limit else generators


def oft(weight: Tensor, blocks: Tensor, limit: float | None = None, rescale: Tensor | None = None) -> Tensor:
    """W' of diag-OFT: output m of a block is Σ R[n, m] · W[n]."""
    result, size = torch.zeros_like(weight, dtype=torch.float64), blocks.shape[1]
    for number, generator in enumerate(skew(blocks, limit)):
        rotation = cayley(generator)
        for m, n in product(range(size), range(size)):
            result[number * size + m] += rotation[n, m] * weight[number * size + n].double()
    return result if rescale is None else result * rescale.double().reshape(-1, *[1] * (weight.dim() - 1))


def boft(weight: Tensor, blocks: Tensor, limit: float | None = None, rescale: Tensor | None = None) -> Tensor:
    """W' of BOFT: stage i takes rows in groups of size · 2^i, and of each group the halves in turn."""
    size, result = blocks.shape[2], weight.double()
    for stage, generators in enumerate(skew(blocks, limit)):
        half = size // 2 * 2**stage
        order = [
            start + side * half + at
            for start in range(0, weight.shape[0], 2 * half)
            for at in range(half)
            for side in (0, 1)
        ]
        after = result.clone()
        for number, generator in enumerate(generators):
            rotation = cayley(generator)
            for i in range(size):
                after[order[number * size + i]] = sum(
                    rotation[i, j] * result[order[number * size + j]] for j in range(size)
                )
        result = after
    return result if rescale is None else result * rescale.double().reshape(-1, *[1] * (weight.dim() - 1))


def oft_of_inputs(weight: Tensor, upper: Tensor, scaled: bool) -> Tensor:
    """W' of OFT of inputs: what a layer is given is multiplied by R first, and a kernel by R itself."""
    matrix = weight.double().flatten(1)
    size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
    result = torch.zeros_like(matrix)
    for at in range(0, matrix.shape[1], size):
        values = upper[min(at // size, upper.shape[0] - 1)].double() / (2 * math.sqrt(size - 1) if scaled else 1)
        q, numbers = torch.zeros(size, size, dtype=torch.float64), iter(values.tolist())
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j] = next(numbers)
                q[j, i] = -q[i, j]
        rotation = torch.eye(size, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        part = matrix[:, at : at + size]
        result[:, at : at + size] = part @ (rotation if weight.dim() > 2 else rotation.T)
    return result.reshape(weight.shape)


def glora(weight: Tensor, factors: tuple[Tensor, Tensor, Tensor, Tensor], scale: float) -> Tensor:
    """W' of GLoRA: what a layer is given is changed by a1 @ a2, and its weight by b1 @ b2."""
    a1, a2, b1, b2 = factors
    inputs = product_of(a1.flatten(1), a2.flatten(1))
    change = torch.zeros_like(weight, dtype=torch.float64)
    for o, i, j in product(range(weight.shape[0]), range(weight.shape[1]), range(weight.shape[1])):
        change[o, j] += weight[o, i].double() * inputs[i, j]
    own = product_of(b1.flatten(1), b2.flatten(1)).reshape(weight.shape)
    return weight.double() + scale * (change + own)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Other values for every shape."""
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator).to(dtype)
