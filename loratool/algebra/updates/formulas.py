"""How the factors of updates are worked out of what files hold; each works on loaded tensors.

What a formula takes besides tensors comes first, so that `functools.partial` makes one for an adapter's settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

from loratool.errors import FitError
from loratool.lazy import Tensor, torch

Formula = Callable[..., "Tensor"]
SMALLEST_NORM = 1e-4  # of DeLoRA


def as_matrix(factor: Tensor) -> Tensor:
    """(r, channels, *kernel) or (out, r, 1, …) as a matrix."""
    return factor.reshape(factor.shape[0], -1)


def flat(vector: Tensor) -> Tensor:
    """(1, n, 1, …) as (n,)."""
    return vector.reshape(-1)


def part_of_rows(part: int, parts: int, factor: Tensor) -> Tensor:
    """One of several equal shares of a tensor's rows."""
    return factor.chunk(parts, dim=0)[part]


def of_ranks(dimension: int, parts: int, *ranks: Tensor) -> Tensor:
    """A tensor of which processes hold slices along a dimension; of several parts each holds its own slice."""
    return torch.cat([rank.chunk(parts, dimension)[part] for part in range(parts) for rank in ranks], dimension)


def scaled_columns(matrix: Tensor, factors: Tensor) -> Tensor:
    """The product matrix · diag(factors)."""
    return matrix * factors.reshape(1, -1)


def scaled_rows(matrix: Tensor, factors: Tensor) -> Tensor:
    """The product diag(factors) · matrix."""
    return matrix * factors.reshape(-1, 1)


def product(one: Tensor, other: Tensor) -> Tensor:
    return one @ other


def along_kernel(core: Tensor, channels: Tensor) -> Tensor:
    """Tucker core (p, r, *kernel) and (r, channels) as (p, channels · kernel): LoHa and LoRA on a convolution."""
    return torch.einsum("ij...,jc->ic...", core, channels).flatten(1)


def rebuilt(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Tucker core (r, r, *kernel), (r, p) and (r, q) as (p, q, *kernel): LoKr on a convolution."""
    return torch.einsum("ij...,ip,jq->pq...", core, left, right)


def diagonal(blocks: Iterable[Tensor]) -> Tensor:
    """One matrix with these on its diagonal."""
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def block_diagonal(blocks: int, factor: Tensor) -> Tensor:
    """Pieces of the first dimension on the diagonal: BD-LoRA (Wang et al. 2025)."""
    return diagonal(factor.chunk(blocks, dim=0))


def first_rows(rows: int, shared: Tensor, factors: Tensor) -> Tensor:
    """The product diag(factors) · the first rows of a shared matrix: VeRA's B.

    Of the factors the first ones count as well: PVeRA's A has its means before its variances.
    """
    return scaled_rows(shared[:rows], factors[:rows])


def normalised_left(up: Tensor, down: Tensor, strength: Tensor) -> Tensor:
    """DeLoRA's B · diag(λ / (r ‖a_i‖ ‖b_i‖)) (Bini et al. 2025, arXiv:2503.18225)."""
    norms = down.norm(dim=1).clamp(min=SMALLEST_NORM) * up.norm(dim=0).clamp(min=SMALLEST_NORM)
    return scaled_columns(up, strength / down.shape[0] / norms)


def chosen(first: int, logits: Tensor, bank: Tensor) -> Tensor:
    """Vectors of a bank mixed by the softmax of the `first` largest logits.

    VB-LoRA (Li et al. 2024, arXiv:2405.15179).
    """
    largest, index = logits.topk(first, dim=-1)
    return mixed(largest.softmax(-1), index, bank)


def given(weights: Tensor, index: Tensor, bank: Tensor) -> Tensor:
    """The same from weights that are stored, but for the last one, with the numbers of the vectors."""
    last = 1 - weights.sum(-1, keepdim=True)
    return mixed(torch.cat([weights, last], dim=-1), index, bank)


def mixed(weights: Tensor, index: Tensor, bank: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * bank[index.long()]).sum(-2)


def bank_rows(formula: Formula, *parts: Tensor) -> Tensor:
    """A of VB-LoRA, (r, in): its vectors side by side."""
    return as_matrix(formula(*parts))


def bank_columns(formula: Formula, *parts: Tensor) -> Tensor:
    """B of VB-LoRA, (out, r): its vectors below each other."""
    return transpose(formula(*parts)).flatten(0, 1)


def skew(upper: Tensor, size: int) -> Tensor:
    """(n, size(size − 1)/2) as n skew-symmetric matrices, their upper triangles by rows."""
    matrix = upper.new_zeros(upper.shape[0], size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    matrix[:, rows, columns] = upper
    return matrix - transpose(matrix)


def cayley(skewed: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹ of skew-symmetric matrices, in float64, for a rotation ought to be one."""
    q = skewed.double()
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    result: Tensor = torch.linalg.solve(identity + q, identity - q, left=False)
    return result


def output_rotations(generators: Tensor, limit: float | None, inverse: bool) -> Tensor:
    """(I + Q)(I − Q)⁻¹ of Q = X − Xᵀ as (stages, n, size, size), or its `inverse`: OFT of LyCORIS and kohya.

    `limit` is the most that all Q together may measure.
    """
    blocks = generators.double().reshape(-1, *generators.shape[-2:])  # changed in place: they may be large
    squared = 0.0
    for block in blocks:
        block.sub_(block.T.clone())
        squared += float(block.square().sum())
    norm = math.sqrt(squared)
    factor = limit / norm if limit is not None and norm > limit else 1.0
    for block in blocks:
        block.copy_(cayley(block.mul_(factor if inverse else -factor)))
    return blocks.reshape(-1, *generators.shape[-3:])


def neumann(skewed: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Q^(terms − 1): the Cayley transform by a truncated Neumann series, its last term once.

    As PEFT sums it, so that the square is there from three terms on even where it is the last.
    """
    total: Tensor = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device).expand(skewed.shape).clone()
    if terms > 1:
        total += 2 * skewed
    if terms > 2:
        power = skewed @ skewed
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skewed
            total += 2 * power
        total += power @ skewed
    return total


def rotations(size: int, terms: int | None, bound: float | None, transposed: bool, upper: Tensor) -> Tensor:
    """OFT's blocks out of their upper triangles: a Cayley transform, exact without `terms`.

    `bound` is the most that a block's generator may measure (constrained OFT). For a linear layer, whose weight is
    multiplied by the transpose, the blocks come `transposed`.
    """
    q = skew(upper, size)
    if bound is not None:
        limit = bound / math.sqrt(q.shape[0])
        q = q * (limit / q.norm(dim=(1, 2), keepdim=True).clamp(min=limit))
    blocks = cayley(q) if terms is None else neumann(q, terms)
    return transpose(blocks) if transposed else blocks


def transpose(blocks: Tensor) -> Tensor:
    """(…, p, q) as (…, q, p)."""
    return blocks.transpose(-1, -2)


def butterfly(factor: Tensor) -> Tensor:
    """BOFT's blocks of one factor (1, n, size, size), transposed (Liu et al. 2023, arXiv:2311.06243)."""
    return transpose(cayley(0.5 * (factor[0] - transpose(factor[0]))))


def units(vectors: Tensor) -> Tensor:
    """Columns at length 1; a column of zeros stays as it is and reflects nothing."""
    norms: Tensor = vectors.norm(dim=0)
    return vectors / norms.masked_fill(norms == 0, 1.0)


def orthogonal_units(vectors: Tensor) -> Tensor:
    """Columns made orthogonal to those before them, at length 1 (Gram-Schmidt)."""
    found: list[Tensor] = []
    for vector in vectors.T:
        rest = vector
        for unit in found:
            rest = rest - (unit @ rest) * unit
        found.append(units(rest[:, None])[:, 0])
    return torch.stack(found, dim=1)


def same(tensor: Tensor) -> Tensor:
    return tensor


def one_more(vector: Tensor) -> Tensor:
    """(1, n, 1, …) as (n,), each number greater by 1."""
    return flat(vector) + 1


def unsigned(index: Tensor) -> Tensor:
    """Whole numbers of 16 bits as they were before they were stored as signed ones."""
    return index.long() % (1 << 16)


def positive(tensor: Tensor) -> Tensor:
    return tensor.clamp(min=0)


def times(factor: float, tensor: Tensor) -> Tensor:
    """The product with a number."""
    return tensor * factor


def orthogonal(directions: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix: Q of its QR decomposition, worked out in float32 as PEFT does."""
    found: Tensor = torch.linalg.qr(directions.float())[0]
    return found.to(directions.dtype)


def flat_product(one: Tensor, other: Tensor) -> Tensor:
    """(n, r) @ (r, 1) as (n,)."""
    return (one @ other).reshape(-1)


def stacked(*layers: Tensor) -> Tensor:
    return torch.stack(layers)


def first_bases(count: int, shared: Tensor) -> Tensor:
    """RandLoRA's B, (longest side, bases, r), as a matrix of its first bases."""
    return shared[:, :count].flatten(1)


def scaled_bases(shared: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """RandLoRA's A, (r, 1, longest of shorter sides), as (r · bases, side): base j with diagonals left[:, j], right[j]."""
    return (left[:, :, None] * shared[:, :, : right.shape[1]] * right[None]).flatten(0, 1)


def mixed_projections(
    layer: str, seed: int, layers: int, each: int, projections: Tensor, down: Tensor, *vectors: Tensor
) -> Tensor:
    """The product (Σ vᵢ Pᵢ) @ A of TinyLoRA, v being the vector of the layer's group of `each`.

    Which of `layers` the layer is, its P tells: that of layer n is what torch draws from `seed` + n.
    """
    number: int | None = 0
    if len(vectors) > 1:
        number = next((n for n in range(layers) if is_projection(projections, seed + n)), None)
    if number is None:
        raise FitError(
            f"{layer}: its tinylora_P does not match projection_seed in the adapter's config for any layer, so "
            "its vector in tinylora_v cannot be determined"
        )
    vector = vectors[min(number // each, len(vectors) - 1)]
    return torch.einsum("i,ijk->jk", vector, projections) @ down


def is_projection(stored: Tensor, seed: int) -> bool:
    """Whether P is what TinyLoRA draws from a seed, as far as the dtype in which it was saved tells."""
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.normal(0.0, stored.shape[-1] ** -0.5, tuple(stored.shape), generator=generator)
    return bool((fresh - stored.float().cpu()).abs().max() <= 2**-7 * fresh.abs().max())


def picked(vector: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """The elements of a vector at `index`, each times its scale: a factor of Uni-LoRA."""
    return vector[index.long()] * scale


ROAD_ROWS = {"road_1": 2.0, "road_2": 1.0, "road_4": 0.5}  # rows of the weight for an angle, by variant


def turns(variant: str, size: int, function: str, angles: Tensor, lengths: Tensor) -> Tensor:
    """RoAd's factor of each row, length · cos(angle), or with `function` "sin" that of its partner.

    In variant 1 the two halves of a group of `size` rows have their angles in common, in variant 2 each row has its
    own, and in variant 4 cosines and sines are of different ones.
    """

    def of_rows(each: Tensor) -> Tensor:
        if variant == "road_1":
            return each.reshape(-1, size // 2).repeat_interleave(2, dim=0).flatten()
        return each if variant == "road_2" else each.reshape(-1, 2, size)[:, 0 if function == "cos" else 1].flatten()

    angle = of_rows(angles)
    return of_rows(lengths) * (torch.cos(angle) if function == "cos" else torch.sin(angle))


def activated(function: str, tensor: Tensor, **settings: object) -> Tensor:
    """What a function of torch.nn.functional gives."""
    result: Tensor = getattr(torch.nn.functional, function)(tensor, **settings)
    return result


# As transformers names them.
ACTIVATIONS: dict[str, Formula] = {
    "relu": partial(activated, "relu"),
    "relu6": partial(activated, "relu6"),
    "leaky_relu": partial(activated, "leaky_relu"),
    "gelu": partial(activated, "gelu"),
    "gelu_new": partial(activated, "gelu", approximate="tanh"),
    "gelu_pytorch_tanh": partial(activated, "gelu", approximate="tanh"),
    "silu": partial(activated, "silu"),
    "swish": partial(activated, "silu"),
    "mish": partial(activated, "mish"),
    "sigmoid": partial(activated, "sigmoid"),
    "tanh": partial(activated, "tanh"),
    "linear": same,
}
