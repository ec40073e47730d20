"""Take docs/pictures/inspect.png, merge.png and their dark ones anew: pages about an adapter in the shape of an 8B model's.

python docs/generate_pictures.py

Its values are made up: norms that rise towards the middle layers, singular values that fall like a geometric sequence; so
are the numbers of the merge, which rounds small updates of the first layers away. It needs 1.5 GB of temporary disk, a minute or two, and a chromium that `tests/pictures` would use.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from safetensors.torch import save_file

import loratool
from loratool.results.base import Cost
from loratool.results.merge import AdapterEffect, MergeReport

PICTURES = Path(__file__).parent / "pictures"
RANK, LAYERS = 64, 32
MODULES = {  # (out, in) of Llama-3-8B, and how large an update is
    "self_attn.q_proj": (4096, 4096, 0.3),
    "self_attn.k_proj": (1024, 4096, 0.12),
    "self_attn.v_proj": (1024, 4096, 0.2),
    "self_attn.o_proj": (4096, 4096, 0.28),
    "mlp.gate_proj": (14336, 4096, 0.8),
    "mlp.up_proj": (14336, 4096, 0.9),
    "mlp.down_proj": (4096, 14336, 0.6),
}


def write_adapter(folder: Path) -> None:
    """An adapter of rank 64 on every linear layer."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        middle = torch.exp(torch.tensor(-(((layer - 16) / 9) ** 2) / 2))
        for name, (rows, columns, size) in MODULES.items():
            jitter, fall = (torch.rand(2, generator=random) * torch.tensor([0.5, 0.05])).tolist()
            values = size * (0.6 + 2 * float(middle)) * (0.75 + jitter) * (0.88 + fall) ** torch.arange(RANK)
            module = f"base_model.model.model.layers.{layer}.{name}"
            up = torch.randn(rows, RANK, generator=random) / rows**0.5
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=random) / columns**0.5
            tensors[f"{module}.lora_B.weight"] = up * values / 2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge_of_8b() -> MergeReport:
    """What a merge of such an adapter might have done."""
    random = torch.Generator().manual_seed(1)
    norms, gains = {}, {}
    for layer in range(LAYERS):
        for name, (_, _, large) in MODULES.items():
            target = f"model.layers.{layer}.{name}.weight"
            middle = math.exp(-(((layer - 16) / 9) ** 2) / 2)
            norms[target] = 0.004 * large * (0.2 + 2 * middle) * (0.75 + float(torch.rand(1, generator=random)))
            gains[target] = 1 - math.exp(-norms[target] * 4e3)  # updates below half a unit of rounding are lost
    return MergeReport(
        out=Path("style-8b-merged"),
        edited=len(norms),
        adapters=(AdapterEffect("style-8b", 1.0, len(norms), ()),),
        copied=67,
        converted=0,
        bytes_read=16_396_000_000,
        bytes_written=16_060_000_000,
        workers=8,
        relative_norms=norms,
        gain=0.991,
        gains=gains,
        cost=Cost("cpu", 8.1, 1.2, 900_000_000),
    )


def take(page: Path, name: str) -> None:
    """A picture in either scheme, with the pointer on a cell."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for end, scheme in (("", "light"), ("-dark", "dark")):
            view = browser.new_page(viewport={"width": 1180, "height": 932}, color_scheme=scheme)  # type: ignore[arg-type]
            view.goto(page.as_uri())
            view.mouse.move(811, 444)
            view.wait_for_timeout(500)
            view.screenshot(path=PICTURES / f"{name}{end}.png")
        browser.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "style-8b"
        write_adapter(adapter)
        page = Path(folder) / "report.html"
        for name, result in (("inspect", loratool.inspect(adapter, values=True)), ("merge", merge_of_8b())):
            loratool.write_page(result, page, overwrite=True)
            take(page, name)


if __name__ == "__main__":
    main()
