"""Merged weights compute what the forward passes of lycoris-lora compute with the same tensors.

Its own merges are no oracle: those of LoHa and LoKr multiply by the scale twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loratool.adapters.adapter import StoredTensor, load_update
from loratool.adapters.formats.roles.module import Module
from loratool.adapters.formats.roles.names import grouped
from loratool.adapters.formats.roles.reading import found_in
from loratool.files.safefile import read_safefile

modules = pytest.importorskip("lycoris.modules")

KINDS: dict[str, Any] = {
    "linear": lambda: nn.Linear(24, 36),
    "square": lambda: nn.Linear(24, 24),
    "kernel of 1": lambda: nn.Conv2d(12, 20, 1),
    "kernel of 3": lambda: nn.Conv2d(12, 20, 3, padding=1),
    "one dimension": lambda: nn.Conv1d(12, 20, 3),
    "power of 2": lambda: nn.Linear(24, 32),
}
USUAL = ("linear", "square", "kernel of 1", "kernel of 3", "one dimension")
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "core": {"use_tucker": True},
    "rank-stabilised": {"rs_lora": True},
    "dora of outputs": {"weight_decompose": True, "wd_on_out": True},
    "dora of inputs": {"weight_decompose": True, "wd_on_out": False},
}
LOKR: dict[str, dict[str, Any]] = {
    **LORA,
    "factor 4": {"factor": 4},
    "both halves products": {"decompose_both": True, "factor": 4, "lora_dim": 1},
    "whole": {"full_matrix": True},
    "unbalanced": {"factor": 2, "unbalanced_factorization": True},
}
OFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "limited": {"constraint": 0.01},
    "rescaled": {"rescaled": True},
    "rescaled and limited": {"rescaled": True, "constraint": 0.01},
}
# sizes of blocks that BOFT can make of the outputs
BLOCKS = {"linear": 18, "square": 6, "power of 2": 4, "kernel of 1": 10, "kernel of 3": 10, "one dimension": 10}
CASES = [
    *[("locon", "LoConModule", kind, name, more) for kind in USUAL for name, more in LORA.items()],
    *[("loha", "LohaModule", kind, name, more) for kind in USUAL for name, more in LORA.items()],
    *[("lokr", "LokrModule", kind, name, more) for kind in USUAL for name, more in LOKR.items()],
    *[("diag_oft", "DiagOFTModule", kind, name, more) for kind in USUAL for name, more in OFT.items()],
    *[
        ("boft", "ButterflyOFTModule", kind, name, {"lora_dim": size, **more})
        for kind, size in BLOCKS.items()
        for name, more in OFT.items()
    ],
    *[("glora", "GLoRAModule", kind, "plain", {}) for kind in USUAL],
    *[("ia3", "IA3Module", kind, "outputs", {}) for kind in USUAL],
    *[("ia3", "IA3Module", kind, "inputs", {"train_on_input": True}) for kind in USUAL],
]


@pytest.mark.parametrize(
    ("file", "name", "kind", "more"),
    [(file, name, kind, more) for file, name, kind, _, more in CASES],
    ids=[f"{file}, {kind}, {case}" for file, _, kind, case, _ in CASES],
)
def test_a_merged_weight_computes_what_the_forward_pass_does(
    tmp_path: Path, file: str, name: str, kind: str, more: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer: Any = KINDS[kind]()
    method = getattr(__import__(f"lycoris.modules.{file}", fromlist=[name]), name)
    # a rank for which halves of LoKr are products; α is not the rank, so that a scale that is forgotten shows
    lycoris = method("x", layer, **{"multiplier": 1.0, "lora_dim": 2, "alpha": 3, "bypass_mode": False, **more})
    with torch.no_grad():
        for parameter in lycoris.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.1 if parameter.numel() < 50 else torch.randn_like(parameter))
    inputs = torch.randn(2, 24) if isinstance(layer, nn.Linear) else torch.randn(2, 12, *[6] * (layer.weight.dim() - 2))
    wanted = lycoris(inputs).detach()
    tensors = {f"x.{key}": value.detach().clone().contiguous() for key, value in lycoris.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_safefile(tmp_path / "x.safetensors")
    groups = grouped(read.tensors)
    assert groups.rest == ()
    stored = {role: StoredTensor(read, read.tensors[tensor]) for role, tensor in groups.modules["x"].items()}
    found = found_in(Module("x", stored))
    merge(layer, found.updates["weight"])
    torch.testing.assert_close(layer(inputs).detach(), wanted, rtol=2e-5, atol=2e-5)
    assert set(found.updates) == {"weight"}


def merge(layer: Any, given: Any) -> None:
    """Change the layer's weight by an update, in blocks of three rows."""
    weight = layer.weight.detach().double()
    fitted = given.fit(tuple(weight.shape))
    assert fitted is not None
    update, before = load_update(fitted, torch.device("cpu"), torch.float64), weight.flatten(1)

    def rows(first: int = 0, count: int | None = None) -> Any:
        stop = before.shape[0] if count is None else first + count
        return ((at, before[at : min(at + 3, stop)]) for at in range(first, stop, 3))

    update = update.prepared(rows) if update.needs_weight else update
    after = before.clone()
    for at in range(0, after.shape[0], 3):
        update.add_rows(after[at : at + 3], at, 1.0, before[at : at + 3])
    layer.weight.data.copy_(after.reshape(weight.shape))
