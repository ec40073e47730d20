"""Updates that are larger than what they change."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.templates import listed

LARGEST_RATIO = 1.0  # ‖ΔW‖/‖W‖; fine-tuning stays far below it


def larger(ratios: Mapping[str, float]) -> str:
    """What to say of updates that are larger than their weights; `ratios` are ‖ΔW‖/‖W‖ by name."""
    return (
        f"‖ΔW‖ is up to {max(ratios.values()):.3g} times ‖W‖ in {listed(ratios)}; alpha or the scaling is probably "
        "wrong, or this is not the base the adapter was trained on"
    )
