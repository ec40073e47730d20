"""PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`, as PEFT 0.21 names, scales and applies it.

`support` is the table of what is merged. What is not is refused by its name, and a tensor that nothing recognises is
reported as unused.
"""

from __future__ import annotations

from loratool.adapters.formats.peft.format import Peft

__all__ = ["PEFT"]

PEFT = Peft()
