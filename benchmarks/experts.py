"""How much memory a merge takes whose one big tensor holds the matrices of all experts.

    python benchmarks/experts.py

A base with one fused parameter of 256 experts, 1.6 GB in bfloat16, and an adapter on it as PEFT saves one with
`target_parameters`. It is made below `--where` and removed again. Each line is a process of its own: the largest
resident set that the kernel saw, beside the limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from running import cost_of, run, set_cache
from shapes import (
    RANK,
    Tensor,
    adapter_config,
    bf16_pool,
    nbytes,
    write_adapter,
    write_header,
    write_json,
    write_values,
)

LIMIT = 450_000_000  # bytes resident
EXPERTS, ROWS, COLUMNS = 256, 1536, 2048  # of gate and up, stored as (experts, out, in)
PARAMETER = "model.layers.0.mlp.experts.gate_up_proj"


def make(folder: Path, rank: int) -> int:
    """`folder/base` and `folder/adapter`; the bytes of the fused parameter."""
    tensors: list[Tensor] = [
        ("model.embed_tokens.weight", "BF16", (64, COLUMNS)),
        (PARAMETER, "BF16", (EXPERTS, ROWS, COLUMNS)),
    ]
    pool = bf16_pool(1 << 22)
    (folder / "base").mkdir(parents=True)
    with open(folder / "base/model.safetensors", "wb", buffering=0) as stream:
        write_header(stream, tensors)
        for number, tensor in enumerate(tensors):
            write_values(stream, tensor, pool, number)
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False}
    write_json(folder / "base/config.json", config)
    module = f"base_model.model.{PARAMETER.rpartition('.')[0]}"
    factors: list[Tensor] = [
        (f"{module}.lora_A.weight", "F32", (EXPERTS * rank, COLUMNS)),
        (f"{module}.lora_B.weight", "F32", (ROWS, rank * EXPERTS)),
    ]
    write_adapter(folder / "adapter", factors, [])
    settings = {"r": rank, "target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": "0.21.2"}
    write_json(folder / "adapter/adapter_config.json", {**adapter_config([]), **settings})
    return nbytes(tensors[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--where", type=Path, help="folder for the files, 4 GB of them")
    parser.add_argument("--rank", type=int, default=RANK, help="of each expert's factors")
    arguments = parser.parse_args()
    missed = False
    with tempfile.TemporaryDirectory(prefix="loratool-experts-", dir=arguments.where) as made:
        folder, out = Path(made), Path(made) / "out"
        size = make(folder, arguments.rank)
        print(f"one parameter of {size / 1e9:.2f} GB, {EXPERTS} experts, rank {arguments.rank}")
        set_cache(folder, warm=False)
        words = [
            sys.executable,
            "-m",
            "loratool",
            "merge",
            str(folder / "base"),
            str(folder / "adapter"),
            "-o",
            str(out),
        ]
        for options in ([], ["--max-memory", str(LIMIT)]):
            measured, said, _ = run([*words, "--device", "cpu", "--json", *options])
            report = json.loads(said)
            assert report["edited"] == 1
            peak = max(measured.peak_memory, cost_of(report)["peak_memory"])
            missed = missed or peak > LIMIT
            print(
                f"{' '.join(options) or 'as it is':24}  {measured.wall:6.1f} s  {report['workers']} workers  "
                f"{peak / 1e6:4.0f} MB of {LIMIT / 1e6:.0f}: {'missed' if peak > LIMIT else 'met'}"
            )
            shutil.rmtree(out)
    sys.exit(missed)


if __name__ == "__main__":
    main()
