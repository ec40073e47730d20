"""What `demo --learn` needs besides commands: a matrix to calculate by hand, an adapter that is trained, and measurements."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles

from loratool.adapters.formats import WRITTEN
from loratool.adapters.layers import Kind
from loratool.adapters.training import Training
from loratool.demo import made_in, make_base, ordered, tensors_of, write_lora, write_tensors
from loratool.errors import VerificationError
from loratool.lazy import Tensor, torch
from loratool.results.lesson import Latency, Nearness

MATRIX = "layer.weight"
W0 = ((4, 0, 2, -1), (0, 3, 1, 0), (2, -1, 4, 1), (1, 1, -2, 3), (0, 2, 1, 4), (-1, 0, 3, 2))  # (6, 4)
A = ((1, 0, -1, 2), (0, 1, 1, -1))  # (r = 2, 4)
B = ((0.5, 0), (0, 0.5), (0.5, 0.5), (0, -0.5), (0.5, 0), (-0.5, 0.5))  # (6, r = 2)
MATRIX_ALPHA = 4  # so that s = 4 / 2 = 2

RANK, ALPHA = 16, 16
NEEDED = (0.8, 0.6, 0.3, 0.1)  # singular values of the change that each layer should learn
EXAMPLES, ROUNDS, RATE = 512, 60, 0.02  # of the training
TARGETS = ("self_attn.q_proj", "self_attn.v_proj")
TOKENS, TIMINGS = 16, 400  # of the timing, which is short, so that other work of the machine spoils few rounds


def prepare(home: Path, overwrite: bool) -> None:
    """Make `home` with the base, the trained adapter, and the matrix with its adapter in it."""
    with made_in(home, overwrite):
        for name in ("matrix", "matrix-adapter", "base", "adapter"):
            (home / name).mkdir()
        make_matrix(home / "matrix", home / "matrix-adapter")
        make_base(home / "base")
        train(home / "base", home / "adapter")


def make_matrix(base: Path, adapter: Path) -> None:
    """A model of one 6 × 4 weight, and LoRA of rank 2 for it, in numbers that one can multiply by hand."""
    write_tensors({MATRIX: torch.tensor(W0, dtype=torch.float32)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"architectures": ["OneLayer"]}) + "\n", newline="\n")
    factors = torch.tensor(A, dtype=torch.float32), torch.tensor(B, dtype=torch.float32)
    write_lora(adapter, {MATRIX: factors}, MATRIX_ALPHA, Training())


def train(base: Path, adapter: Path) -> None:
    """LoRA of rank 16 on q_proj and v_proj of every layer, trained until each has learnt a change of its weight.

    The change C that a layer should learn has the singular values `NEEDED`, so rank 4 would do. The loss is
    ‖x(s·BA − C)ᵀ‖² over examples x; all layers of one shape are trained at once.
    """
    generator = torch.Generator().manual_seed(2)
    weights = tensors_of(base)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for target in TARGETS:
        names = [name for name in weights if name.endswith(f".{target}.weight")]
        out, into = weights[names[0]].shape
        left, right = (
            torch.linalg.qr(torch.randn(len(names), n, len(NEEDED), generator=generator))[0] for n in (out, into)
        )
        change = left * torch.tensor(NEEDED) @ right.mT  # (layers, out, in)
        x = torch.randn(EXAMPLES, into, generator=generator)
        down = (2 * torch.rand(len(names), RANK, into, generator=generator) - 1) / into**0.5  # A, as PEFT draws it
        up = torch.zeros(len(names), out, RANK)  # B
        learn(down, up, change, x.T @ x / EXAMPLES)
        factors |= {name: (down[n].clone(), up[n].clone()) for n, name in enumerate(names)}
    write_lora(adapter, dict(sorted(factors.items())), ALPHA, Training())


def learn(down: Tensor, up: Tensor, change: Tensor, second_moment: Tensor) -> None:
    """Change A and B in place by Adam (Kingma and Ba 2015, arXiv:1412.6980): ∂L/∂B = s·G Aᵀ and ∂L/∂A = s·Bᵀ G.

    G = 2 (s·BA − C) xᵀx / n is the gradient of the mean loss with respect to the whole weight.
    """
    scale = ALPHA / RANK
    moments = [(torch.zeros_like(factor), torch.zeros_like(factor)) for factor in (down, up)]
    for number in range(1, ROUNDS + 1):
        whole = 2 * (scale * up @ down - change) @ second_moment  # G (layers, out, in)
        gradients = scale * up.mT @ whole, scale * whole @ down.mT
        for factor, gradient, (first, second) in zip((down, up), gradients, moments, strict=True):
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            step = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
            factor.sub_(step, alpha=RATE)


def by_hand(home: Path) -> str:
    """The calculation on the 6 × 4 matrix as text, from the files."""
    down, up = factors_of(home / "matrix-adapter", MATRIX)
    rows = [
        ("A (r × k = 2 × 4)", down),
        ("B (d × r = 6 × 2)", up),
        ("BA (6 × 4)", up @ down),
        ("ΔW = s·BA, s = α/r = 4/2 = 2", MATRIX_ALPHA / len(down) * up @ down),
        ("W₀ (d × k = 6 × 4)", tensors_of(home / "matrix")[MATRIX]),
    ]
    return "\n\n".join(f"{name}\n{numbers(matrix)}" for name, matrix in rows)


def merged_matrix(home: Path) -> str:
    """The matrix that the merge wrote, as text; raises `VerificationError` where it is not W₀ + s·BA."""
    down, up = factors_of(home / "matrix-adapter", MATRIX)
    merged = tensors_of(home / "matrix-merged")[MATRIX]
    if not torch.equal(merged, tensors_of(home / "matrix")[MATRIX] + MATRIX_ALPHA / len(down) * up @ down):
        raise VerificationError(f"{MATRIX}: the merged matrix is not W₀ + s·BA")
    return numbers(merged)


def numbers(matrix: Tensor) -> str:
    return "\n".join("  " + " ".join(f"{value:5g}" for value in row) for row in matrix.tolist())


def factors_of(adapter: Path, weight: str) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) as they are stored."""
    down, up = WRITTEN.spelling({weight: Kind.LINEAR}).factors(weight)
    tensors = tensors_of(adapter)
    return tensors[down], tensors[up]


def time_layers(home: Path) -> dict[str, Latency]:
    """Seconds of all adapted layers one after the other: of the base, with the adapter unmerged, and merged.

    In float32 on one thread of the CPU, on 16 tokens.
    """
    base, merged, adapter = (tensors_of(home / name) for name in ("base", "merged", "adapter"))
    layers = []
    for name in base:
        if name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
            down, up = (adapter[f] for f in WRITTEN.spelling({name: Kind.LINEAR}).factors(name))
            layers.append((base[name].float(), merged[name].float(), down, ALPHA / RANK * up))
    x = torch.randn(TOKENS, layers[0][0].shape[1], generator=torch.Generator().manual_seed(3))
    linear = torch.nn.functional.linear

    passes: dict[str, Callable[[], object]] = {
        "base": lambda: [linear(x, weight) for weight, *_ in layers],
        "base + adapter": lambda: [linear(x, weight) + linear(linear(x, down), up) for weight, _, down, up in layers],
        "merged": lambda: [linear(x, weight) for _, weight, *_ in layers],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return measured(passes)
    finally:
        torch.set_num_threads(threads)


def measured(passes: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
    """Medians and quartiles of one call, and of its ratio to the first function's in the same round.

    Every round calls all of them, and begins with another one than the round before.
    """
    names = list(passes)
    for name in names * 3:
        passes[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(TIMINGS):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            started = time.perf_counter()
            passes[name]()
            times[name].append(time.perf_counter() - started)
    found = {}
    for name in names:
        low, middle, high = quantiles(times[name], n=4)
        ratios = [one / base for one, base in zip(times[name], times[names[0]], strict=True)]
        found[name] = Latency(middle, low, high, median(ratios))
    return found


def nearness(home: Path) -> Nearness:
    """How the weights of `unmerged` compare with the base's, for those that the adapter changes."""
    base, unmerged = tensors_of(home / "base"), tensors_of(home / "unmerged")
    weights = equal = one_step = 0
    largest = 0.0
    for name, before in base.items():
        if name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
            steps = (ordered(before) - ordered(unmerged[name])).abs()
            weights += steps.numel()
            equal += int((steps == 0).sum())
            one_step += int((steps == 1).sum())
            largest = max(largest, float((before.float() - unmerged[name].float()).abs().max()))
    return Nearness(weights, equal, one_step, weights - equal - one_step, largest)
