"""α of a PEFT adapter: what its config gives each layer, and a config that gives them others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loratool.adapters.formats.peft import packing
from loratool.adapters.formats.peft.describing import patterns_for
from loratool.adapters.formats.peft.experts import stacked_by_peft
from loratool.adapters.formats.peft.spelling import Names
from loratool.adapters.layers import Contents, adapted_module
from loratool.algebra.updates.experts import ExpertFactors
from loratool.errors import BAKE, InputError, printable


def divisors(contents: Contents, names: Names) -> dict[str, float]:
    """What α of each layer is divided by: its rank, or the root of that with rsLoRA, and less where PEFT applies it twice."""
    ranks = {target: layer.rank for target, layer in contents.layers.items()}
    return {t: (math.sqrt(r) if contents.training.rslora else r) / names.times(t) for t, r in ranks.items()}


def alphas(contents: Contents, divisors: Mapping[str, float]) -> dict[str, float]:
    """α of each layer, as the config has it."""
    config = contents.adapter.config
    if config.get("peft_type") == "ADALORA":  # which takes init_r for an α that is not positive
        alpha = float(config.get("lora_alpha", 8))
        return dict.fromkeys(contents.layers, alpha if alpha > 0 else float(config.get("init_r", 12)))
    return {
        target: layer.update.alpha if isinstance(layer.update, ExpertFactors) else layer.scale * divisors[target]
        for target, layer in contents.layers.items()
    }


def rescaled(contents: Contents, names: Names, factors: Mapping[str, float | None], one_alpha: bool) -> dict[str, Any]:
    """The config under which layers are as many times as strong as `factors` say, None where they had no strength.

    With `one_alpha` the patterns that there were are given up. Raises `InputError` where no config does that.
    """
    kind = contents.training.method
    known = {factor for factor in factors.values() if factor is not None}
    uneven = max(known) - min(known) > 1e-12 * abs(max(known, key=abs))
    if kind != "LORA" and (kind != "ADALORA" or uneven):
        raise InputError(
            f"{printable(contents.adapter.file.path)}: peft_type {printable(kind)} has no alpha per module; pass "
            "--bake to write it as plain LoRA",
            hint=BAKE,
        )
    config = {name: value for name, value in contents.adapter.config.items() if name not in packing.FIELDS}
    patterns = config.get("alpha_pattern") or {}
    if not uneven and not one_alpha:
        factor = next(iter(known))
        config["lora_alpha"] = tidy(float(config.get("lora_alpha", 8)) * factor)
        config["alpha_pattern"] = {pattern: tidy(alpha * factor) for pattern, alpha in patterns.items()}
        return config
    own = alphas(contents, divisors(contents, names))
    found: dict[str, float | int] = {}  # by module
    torn: list[str] = []
    for target, change in factors.items():
        module = adapted_module(target, contents.layers[target].kind)
        if names.inside_attention(target):
            module = module.removesuffix(".out_proj")  # whose α PEFT takes
        wanted = own[target] * (change or 1.0)
        if not math.isclose(found.setdefault(module, tidy(wanted)), wanted, rel_tol=1e-8):
            torn.append(printable(target))
    if torn:
        raise InputError(
            "PEFT has one alpha for all weights of a module, but these need different ones; pass --bake "
            "to put the strength into the factors:",
            torn,
            BAKE,
        )
    stacked = {found[adapted_module(t, contents.layers[t].kind)] for t in stacked_by_peft(contents.layers)}
    if len(stacked) > 1:
        raise InputError(
            f"PEFT has one alpha for all experts of a model, but these need {len(stacked)} different ones; pass "
            "--bake to put the strength into the factors",
            hint=BAKE,
        )
    usual = stacked.pop() if stacked else Counter(found.values()).most_common(1)[0][0]
    config["lora_alpha"], pattern_of = usual, patterns_for(found)
    config["alpha_pattern"] = {pattern_of(m): a for m, a in sorted(found.items()) if a != usual}
    return config


def tidy(alpha: float) -> float | int:
    """α as configs have it: a whole number where it is one."""
    near = round(alpha)
    return near if abs(alpha - near) <= 1e-9 * abs(alpha) else alpha
