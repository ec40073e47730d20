"""A row of `people.py`: the pages that `--html` writes, how large they are, and when a browser has painted them.

Their commands are given a model of 2,002 small weights, which is made here, and adapters of all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from findings import Finding, at_most, kilobytes, seconds
from painting import first_paint
from running import apart, run_quickly
from shapes import Tensor, adapter_config, nbytes, write_header, write_json

LARGEST, PAINTED = 1.5e6, 1.0  # bytes, seconds
COMPARED = 50  # adapters in one matrix
LAYERS, SIZE, RANK = 286, 32, 16
KINDS = (
    *(f"self_attn.{kind}_proj" for kind in "qkvo"),
    *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
)
MODULES = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS]


def pages(folder: Path, options: argparse.Namespace, make_headers: Callable[..., None]) -> list[Finding]:
    """Of every kind of result: a fleet of `--count` adapters, a matrix of 50, and the commands of the model."""
    many = folder / "fleet"
    apart(make_headers, many, options.count, True)
    apart(make_model, folder)
    loratool("demo", folder / "demo", "-q")
    (folder / "alike").mkdir()
    for number in range(COMPARED):
        out = folder / "alike" / str(number)
        loratool("rescale", folder / "demo" / "adapter", "-o", out, "--scale", str(1 + number), "-q")
    base, one, two, three = (folder / name for name in ("base", "one", "two", "three"))
    merged = folder / "merged"
    commands: dict[str, tuple[str | Path, ...]] = {
        f"inspect {options.count} adapters": ("inspect", many),
        f"compare {COMPARED} adapters": ("compare", *sorted((folder / "alike").iterdir())),
        "compare 3 adapters": ("compare", one, two, three),
        "inspect": ("inspect", one, "--values"),
        "plan": ("plan", base, one),
        "merge": ("merge", base, one, "-o", merged),
        "verify": ("verify", merged, "--base", base, "--adapter", one),
        "resize": ("resize", one, "-o", folder / "resized", "--rank", "2"),
        "combine": ("combine", one, two, "-o", folder / "combined"),
        "extract": ("extract", base, merged, "-o", folder / "extracted", "--rank", "4"),
        "estimate": ("estimate", base, "--rank", "8", "--target", "all-linear"),
    }
    return [
        found
        for name, words in commands.items()
        for found in judged(name, folder / f"{name}.html", words, options.turns)
    ]


def judged(name: str, page: Path, words: tuple[str | Path, ...], turns: int) -> Iterator[Finding]:
    """What a page was promised to be, and is; its time is left out where there is no browser."""
    loratool(*words, "--html", page, "-q")
    yield at_most(f"page of `{name}`: size", page.stat().st_size, LARGEST, kilobytes)
    if (painted := first_paint(page, turns)) is not None:
        yield at_most(f"page of `{name}`: first paint in chromium", painted, PAINTED, seconds)


def loratool(*words: str | Path) -> None:
    run_quickly(["-m", "loratool", *map(str, words)])


def make_model(folder: Path) -> None:
    """A model of many small weights, and three adapters of it."""
    weights: list[Tensor] = [(f"{module}.weight", "F32", (SIZE, SIZE)) for module in MODULES]
    write_values(folder / "base" / "model.safetensors", weights, 0)
    write_json(folder / "base" / "config.json", {"model_type": "toy"})
    factors: list[Tensor] = []
    for module in MODULES:
        factors.append((f"base_model.model.{module}.lora_A.weight", "F32", (RANK, SIZE)))
        factors.append((f"base_model.model.{module}.lora_B.weight", "F32", (SIZE, RANK)))
    config = adapter_config(sorted(kind.rpartition(".")[2] for kind in KINDS))
    for number, name in enumerate(("one", "two", "three"), 1):
        write_values(folder / name / "adapter_model.safetensors", factors, number)
        write_json(folder / name / "adapter_config.json", {**config, "r": RANK, "lora_alpha": RANK})


def write_values(path: Path, tensors: Sequence[Tensor], seed: int) -> None:
    """A file of small random values in float32."""
    path.parent.mkdir(parents=True)
    values = 0.1 * np.random.default_rng(seed).standard_normal(sum(map(nbytes, tensors)) // 4)
    with open(path, "wb") as stream:
        write_header(stream, tensors)
        stream.write(values.astype("<f4").tobytes())
