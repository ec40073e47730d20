"""The contender: PEFT as its documentation merges, load ▸ merge_and_unload ▸ save.

python benchmarks/peft_merge.py BASE ADAPTER OUT [DEVICE]
"""

from __future__ import annotations

import sys


def merge(base: str, adapter: str, out: str, device: str = "cpu") -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device})
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    merge(*sys.argv[1:])
