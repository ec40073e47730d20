"""Kinds of quantised checkpoints that nobody here decodes. They are named, so that an edit can be refused by name.

Most are laid out for one kernel (EETQ shuffles its values for one kind of GPU, AQLM and VPTQ look up vectors in
codebooks, SpQR keeps outliers apart), and their libraries decode on a GPU alone. Their tensors can be copied.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratool.bases.packed import Codec, Packing
from loratool.bases.packing_settings import Settings
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES

# quant_method of a config → what it is called
METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fouroversix": "Four Over Six",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's own quantisation",
    "higgs": "HIGGS",
    "metal": "the Metal format of transformers",
    "quark": "Quark",
    "quip": "QuIP",
    "quip-sharp": "QuIP#",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "squeezellm": "SqueezeLLM",
    "vptq": "VPTQ",
}


class Unreadable(Codec):
    """All kinds that are known by name only."""

    name, title = "unreadable", "a kind that is not read"

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        title = METHODS.get(settings.method, "")
        if not settings.method and isinstance(base.config.get("quantization"), Mapping):
            title = "MLX"  # which names no method
        packed = {name: title for name, info in base.tensors.items() if info.dtype not in FLOAT_NAMES}
        return Packing({}, unread=packed) if title and packed else None
