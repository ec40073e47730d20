"""Adapters and checkpoints in real shapes, with singular values that fall as those of trained ones do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from shapes import SHAPES, Shape, make_base
from torch import Tensor

PREFIX = "base_model.model."
Sizes = Mapping[str, tuple[int, int]]  # module → (out, in)


def linear_layers(shape: Shape, layers: int | None = None) -> dict[str, tuple[int, int]]:
    """Every linear layer of a model's blocks, by its full name."""
    return {
        f"model.layers.{layer}.{name}": size
        for layer in range(layers or shape.layers)
        for name, size in shape.linear.items()
    }


def factors(rows: int, columns: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B and A; the k-th direction counts 1/√k."""
    spread = torch.arange(1, rank + 1).float().rsqrt()
    b = torch.randn(rows, rank, generator=generator) * 0.02
    a = torch.randn(rank, columns, generator=generator) * (spread / columns**0.5)[:, None]
    return b, a


def write_adapter(folder: Path, sizes: Sizes, rank: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """An adapter as PEFT saves it, with α = 2r."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for module, (rows, columns) in sizes.items():
        b, a = factors(rows, columns, rank, generator)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in sizes}),
        "base_model_name_or_path": "base",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_steep(folder: Path, sizes: Sizes, rank: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The same, but each singular value is 0.7 of the one before: what a cut leaves out is small."""
    write_adapter(folder, sizes, rank, seed, dtype)
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    falling = 0.7 ** torch.arange(rank).double()
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensors[name] = (torch.linalg.qr(tensor.double()).Q * falling).to(dtype).contiguous()
        else:
            tensors[name] = torch.linalg.qr(tensor.double().T).Q.T.to(dtype).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def deltas(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Module and ΔW in float64, by the formula; what was extracted may have ranks of its own."""
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                a, b = file.get_tensor(name).double(), file.get_tensor(name.replace("lora_A", "lora_B")).double()
                alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
                yield module, (b @ a) * (alpha / a.shape[0])


def write_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A base and a fine-tune of it: every linear layer moves by a rank of 32 and a little noise, rounded to bfloat16."""
    shape, generator = SHAPES[name], torch.Generator().manual_seed(1)
    base, tuned = folder / "base", folder / "tuned"
    make_base(shape, base)
    tuned.mkdir()
    linear = linear_layers(shape)
    for path in sorted(base.iterdir()):
        if path.suffix != ".safetensors":
            (tuned / path.name).write_bytes(path.read_bytes())
            continue
        tensors: dict[str, Tensor] = {}
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(key)
                if (size := linear.get(key.removesuffix(".weight"))) is not None:
                    b, a = factors(*size, 32, generator)
                    noise = torch.randn(size, generator=generator) * 1e-4
                    tensor = (tensor.float() + 6 * b @ a + noise).to(tensor.dtype)
                tensors[key] = tensor
        save_file(tensors, tuned / path.name, metadata={"format": "pt"})
    return base, tuned


def differences(base: Path, tuned: Path, modules: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Module and W_tuned − W_base in float32."""
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as before, safe_open(tuned / path.name, "pt") as after:
            for key in before.keys():  # noqa: SIM118 (no mapping)
                if (module := key.removesuffix(".weight")) in modules:
                    yield module, after.get_tensor(key).float() - before.get_tensor(key).float()
