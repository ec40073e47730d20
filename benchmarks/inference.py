"""What LoRA costs at inference, before it is merged and after.

    python benchmarks/inference.py
    python benchmarks/inference.py --device cuda --dtype bfloat16 --width 4096

Four linear layers, each with a weight of its own: plain, plain again, with LoRA merged, and with LoRA beside it. In
every round each is timed once, in an order that changes from round to round, and its time is divided by the plain
layer's of the same round. A line shows the median of these ratios and the middle half of them. What the second plain
layer shows is the noise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from findings import Finding, finding_table, write_result
from machine import describe
from torch import Tensor, nn

from loratool.nn import LoRALinear

TOLERANCE = 0.05  # how far from 1 a median may lie, or as far as the plain layer's against itself
LEAST_SECONDS = 0.02  # of one timing: the layer is called as often as that takes

Layer = Callable[[Tensor], Tensor]


def layers(width: int, rank: int, device: str, dtype: torch.dtype) -> dict[str, Layer]:
    plain, again, for_merged, for_beside = (
        nn.Linear(width, width, bias=False, device=device, dtype=dtype) for _ in range(4)
    )
    merged, beside = (LoRALinear.from_linear(linear, rank=rank).eval() for linear in (for_merged, for_beside))
    for layer in (merged, beside):
        layer.lora_B.data.normal_(std=0.02)
    merged.merge()
    found: dict[str, Any] = {"plain": plain, "plain again": again, "merged": merged, "unmerged": beside}
    place = torch.empty(len(found), width, width, device=device, dtype=dtype)
    for layer, own in zip(found.values(), place, strict=True):  # where a weight lies changes how fast it is read
        layer.weight.data = own.copy_(layer.weight.data)
    return found


def seconds(layer: Layer, x: Tensor, calls: int) -> float:
    """Time of one call by the clock on a GPU, and of processors on a CPU, which other programs change less."""
    clock = time.perf_counter if x.is_cuda else time.process_time
    started = clock()
    for _ in range(calls):
        layer(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (clock() - started) / calls


def measure(contenders: dict[str, Layer], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call, round by round."""
    for layer in contenders.values():
        seconds(layer, x, 3)
    calls = max(1, round(LEAST_SECONDS / seconds(contenders["plain"], x, 3)))
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number // 2 % len(names)
        order = [*names[first:], *names[:first]]
        for name in reversed(order) if number % 2 else order:
            times[name].append(seconds(contenders[name], x, calls))
    return times


def ratios(times: dict[str, list[float]], name: str) -> list[float]:
    return [one / plain for one, plain in zip(times[name], times["plain"], strict=True)]


def spread(values: Sequence[float]) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.3f} ({low:.3f} to {high:.3f})"


def findings(tokens: int, times: dict[str, list[float]]) -> list[Finding]:
    noise = abs(median(ratios(times, "plain again")) - 1)
    limit = max(TOLERANCE, noise)
    found = []
    for name in ("plain again", "merged", "unmerged"):
        values = ratios(times, name)
        middle = median(values)
        target, met = (f"1.00 ± {limit:.2f}", abs(middle - 1) <= limit) if name == "merged" else ("", None)
        found.append(
            Finding(f"{tokens} token{'s' * (tokens > 1)}: {name} / plain", spread(values), middle, target, met)
        )
    found[0] = Finding(
        found[0].what, found[0].measured, found[0].value, note=f"plain: {1e6 * median(times['plain']):.0f} µs"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=2048, help="inputs and outputs of the layer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, action="append", help="rows of the input; may be repeated")
    parser.add_argument("--rounds", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    contenders = layers(arguments.width, arguments.rank, arguments.device, dtype)
    print(
        f"one layer of {arguments.width} × {arguments.width} in {arguments.dtype} on {arguments.device}, rank "
        f"{arguments.rank}, {torch.get_num_threads()} threads, {arguments.rounds} rounds"
    )
    result: list[Finding] = []
    with torch.inference_mode():
        for tokens in arguments.tokens or [1, 16, 256]:
            x = torch.randn(tokens, arguments.width, device=arguments.device, dtype=dtype)
            result += findings(tokens, measure(contenders, x, arguments.rounds))
    print(finding_table(result))
    with tempfile.TemporaryDirectory() as folder:
        facts = describe(Path(folder), load)
    write_result(arguments.json, facts, result)
    print(", ".join(f"{name} {facts[name]}" for name in ("processor", "GPU", "torch", "load before")))
    sys.exit(any(found.met is False for found in result))


if __name__ == "__main__":
    main()
