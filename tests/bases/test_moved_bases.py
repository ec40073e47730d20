"""Adapters that took a part out of the base before they were trained: what their algebra means, and how to get to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.config import KasaConfig
from peft_zoo import save_base
from trained_adapters import changes, loaded, lora, make_model, trained

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
KINDS: dict[str, Callable[[list[str]], Any]] = {
    "PiSSA": partial(lora, init_lora_weights="pissa"),
    "OLoRA": partial(lora, init_lora_weights="olora"),
    "KaSA": partial(lora, kasa_config=KasaConfig()),
}
LAYERS = ["linear", "square"]


@pytest.mark.parametrize("name", KINDS)
def test_a_merge_and_an_extract_give_lora_that_adds_up(name: str, tmp_path: Path) -> None:
    """`combine` refuses two such adapters and names the way out; followed to its end, it gives two plain adapters of
    the base at twice the rank whose sum is the sum of what PEFT's own merges change, which PEFT loads.
    """
    model, weights = make_model(), (0.5, 0.75)
    base = save_base(tmp_path / "base", model)
    given = [trained(tmp_path / f"given{seed}", model, KINDS[name](LAYERS), seed) for seed in (3, 4)]
    with pytest.raises(loratool.InputError, match="loratool merge BASE ADAPTER -o MERGED, then loratool extract"):
        loratool.combine(given, tmp_path / "sum", weights=list(weights))
    plain = []
    for at, adapter in enumerate(given):
        loratool.merge(base, [adapter], tmp_path / f"merged{at}")
        report = loratool.extract(base, tmp_path / f"merged{at}", tmp_path / f"plain{at}", rank=6, exact=True)
        assert report.totals.achieved < 1e-5, "twice the rank is without loss"
        plain.append(tmp_path / f"plain{at}")
    loratool.combine(plain, tmp_path / "sum", weights=list(weights))
    found = changes(model, loaded(model, tmp_path / "sum"))
    one, two = (changes(model, loaded(model, adapter)) for adapter in given)
    for layer in LAYERS:
        key = f"{layer}.weight"
        wanted = weights[0] * one[key] + weights[1] * two[key]
        torch.testing.assert_close(found[key], wanted, rtol=0, atol=5e-6)
