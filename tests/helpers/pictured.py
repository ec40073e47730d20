"""A small adapter that has something to show: its updates grow from layer to layer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft_files import save_peft
from safetensors.numpy import load_file
from safetensors.torch import save_file

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERS, RANK = 12, 4


def write_adapter(
    folder: Path, layers: int = LAYERS, names: Sequence[str] = NAMES, seed: int = 0, **config: Any
) -> Path:
    """A small adapter whose updates grow from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for at, name in enumerate(names):
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, 16, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(24, RANK, generator=generator) * (1 + layer + 3 * at)
    return save_peft(
        folder, tensors, **{"r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "some/base", **config}
    )


def delta(folder: Path, layer: int, name: str) -> np.ndarray:
    """B·A of a module, in float64; alpha is the rank."""
    tensors = load_file(folder / "adapter_model.safetensors")
    module = f"base_model.model.model.layers.{layer}.{name}"
    product: np.ndarray = tensors[f"{module}.lora_B.weight"].astype(np.float64) @ tensors[f"{module}.lora_A.weight"]
    return product


def write_base(folder: Path, layers: int = LAYERS, names: Sequence[str] = NAMES) -> Path:
    """The base of that adapter in bfloat16, with a norm per layer and embeddings that no adapter changes."""
    generator = torch.Generator().manual_seed(1)
    tensors = {"model.embed_tokens.weight": torch.randn(32, 16, generator=generator).bfloat16()}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(16, dtype=torch.bfloat16)
        for name in names:
            weight = torch.randn(24, 16, generator=generator).bfloat16()
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return folder


class Tables(HTMLParser):
    """The tables of a page as lists of rows of cells, the headings first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[list[str]]] = []
        self.open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.found.append([])
        elif tag == "tr":
            self.found[-1].append([])
        elif tag in ("td", "th"):
            self.found[-1][-1].append("")
        self.open = tag in ("td", "th", "button") or (self.open and tag not in ("tr", "tbody", "caption"))

    def handle_endtag(self, tag: str) -> None:
        self.open = self.open and tag not in ("table", "tr", "th", "caption")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.found[-1][-1][-1] += data.strip()


def table_of(page: str, first: str) -> dict[str, dict[str, str]]:
    """The table of a page whose first heading is given: name of a row → heading → cell."""
    parser = Tables()
    parser.feed(page)
    (table,) = (table for table in parser.found if table[0][0] == first)
    return {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}


def tiles_of(page: str) -> dict[str, str]:
    """The numbers that a page begins with."""
    tiles = page.partition('class="tiles"')[2].partition("</dl>")[0]
    return {unescape(name): unescape(value) for name, value in re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", tiles)}
