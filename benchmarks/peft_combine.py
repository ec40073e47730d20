"""PEFT as its documentation combines: load adapters into a model, `add_weighted_adapter`, save.

python benchmarks/peft_combine.py CONFIG.json OUT RANK full|reduced ADAPTER... prints the seconds of the call as JSON.
PEFT's own default is `full`: all singular vectors, most of which it then drops.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM


def main(config: str, out: str, rank: str, kind: str, *adapters: str) -> None:
    with open(config) as stream:
        model = LlamaForCausalLM(LlamaConfig(**json.load(stream))).to(torch.bfloat16)
    # an adapter called "0" would take layer 0 out of what PEFT saves
    names = [f"part{number}" for number in range(len(adapters))]
    wrapped = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, path in zip(names[1:], adapters[1:], strict=True):
        wrapped.load_adapter(path, adapter_name=name)
    started = time.perf_counter()
    wrapped.add_weighted_adapter(
        names,
        [1.0] * len(names),
        "combined",
        combination_type="svd",
        svd_rank=int(rank),
        svd_full_matrices=kind == "full",
    )
    seconds = time.perf_counter() - started
    wrapped.save_pretrained(out, selected_adapters=["combined"])
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
