"""LoRA from its formula, to see how it works and for small experiments: y = W₀x + s·B(Ax), s = α/r.

Hu et al. 2021, arXiv:2106.09685, section 4.1; s = α/√r is rsLoRA, Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import json
import math
import os
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from loratool.adapters.adapter import load_update
from loratool.adapters.formats import WRITTEN, read_adapter
from loratool.adapters.layers import Kind
from loratool.adapters.training import Training
from loratool.algebra.updates.additive import LowRank
from loratool.errors import FitError, InputError, UsageError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def also_called(**names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give parameters of a function a second name, by which they may be passed as keywords."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def called(*places: Any, **words: Any) -> None:
            function(*places, **{names.get(word, word): value for word, value in words.items()})

        return called

    return decorate


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, as PEFT's method of this name does for its models."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    every, trainable = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    print(f"trainable params: {trainable:,} || all params: {every:,} || trainable%: {100 * trainable / every:.4f}")  # noqa: T201


class LoRALinear(nn.Module):
    """A weight W₀ (d, k) that stays as it is, and a product B A that is trained: B (d, r), A (r, k).

    y (…, d) = x W₀ᵀ + bias + s · dropout(x) Aᵀ Bᵀ for x (…, k), with s = α/r. W₀ is `weight`, drawn as `nn.Linear`
    draws it; A is `lora_A`, drawn from N(0, `sigma`²) or, without `sigma`, from Kaiming's uniform distribution as in
    PEFT; B is `lora_B`, and zero, so that training starts from W₀. A and B are float32 or wider.

    `LoRALinear(weight, bias)` adapts a weight that exists, and so does `from_linear`. `rank` is another name of r.
    Raises `UsageError` for a rank below 1 and for other settings that make no layer.
    """

    unmerged: Tensor | None  # W₀ while the weight is W₀ + s·BA

    @also_called(weight="d", bias="k", rank="r")
    def __init__(
        self,
        d: int | Tensor,
        k: int | Tensor | None = None,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
        sigma: float | None = None,
    ) -> None:
        super().__init__()
        weight, bias = (d, k) if isinstance(d, Tensor) else (new_weight(d, k), None)
        matrix = weight.is_floating_point() and weight.dim() == 2
        if r < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1 or not matrix:
            wanted = "expected rank >= 1, alpha > 0, 0 <= dropout < 1 and a float matrix"
            raise UsageError(
                f"rank {r}, alpha {alpha}, dropout {dropout}, weight {tuple(weight.shape)} of {weight.dtype}: {wanted}"
            )
        self.rank, self.alpha, self.rslora, self.dropout = r, float(alpha), rslora, nn.Dropout(dropout)
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        self.weight = nn.Parameter(weight.data, requires_grad=False)  # (d, k)
        self.bias = nn.Parameter(bias.data, requires_grad=False) if isinstance(bias, Tensor) else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(weight.new_empty(r, weight.shape[1], dtype=wide))  # (r, k)
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], r, dtype=wide))  # (d, r)
        if sigma is None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=sigma)
        self.register_buffer("unmerged", None, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> LoRALinear:
        """LoRA on the weight of `linear`, which is shared, not copied. `settings` are those of `LoRALinear`."""
        return cls(linear.weight, linear.bias, **settings)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """ΔW = s·BA (d, k), what merging adds to W₀."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:  # (…, in) → (…, out)
        y = functional.linear(x, self.weight, self.bias)
        if self.unmerged is not None:
            return y
        inner = functional.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (…, r)
        return (y + self.scale * functional.linear(inner, self.lora_B)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Make W₀ + s·BA the weight, rounded once. W₀ is kept, so memory for one more weight is used."""
        if self.unmerged is None:
            self.unmerged = self.weight.data
            self.weight.data = (self.unmerged + self.delta()).to(self.weight.dtype)

    def unmerge(self) -> None:
        """Make W₀ the weight again: the one that was kept, for taking s·BA away would leave a rounding error."""
        if self.unmerged is not None:
            self.weight.data, self.unmerged = self.unmerged, None

    print_trainable_parameters = print_trainable_parameters  # of this layer


def new_weight(d: int, k: Any) -> Tensor:
    """W₀ (d, k), with the values that a new `nn.Linear(k, d)` has."""
    if not all(type(size) is int and size > 0 for size in (d, k)):
        raise UsageError(f"d {d} and k {k} must be whole numbers of at least 1, or a weight and its bias")
    return nn.Linear(k, d, bias=False).weight


def apply_lora(model: nn.Module, targets: str | Iterable[str], **settings: Any) -> dict[str, LoRALinear]:
    """Freeze `model`, and put a `LoRALinear` in the place of each `nn.Linear` whose path is a target or ends in one.

    `settings` are those of `LoRALinear`. Returns the new layers by path. Raises `UsageError` for targets that name no
    such layer. `nn.TransformerEncoderLayer` reads weights past its layers when it does not train; after
    `torch.backends.mha.set_fastpath_enabled(False)` it does not.
    """
    wanted, linears = [targets] if isinstance(targets, str) else list(targets), linears_of(model)
    found = {target: [path for path in linears if f".{path}".endswith(f".{target}")] for target in wanted}
    names = sorted({path.rpartition(".")[2] for path in linears})
    near = {target: get_close_matches(target, names) or names[:9] for target in wanted if not found[target]}
    if near or not wanted:
        problems = (f"{printable(t)}: the closest are {', '.join(map(printable, n))}" for t, n in near.items())
        raise UsageError("every target must be the name of an nn.Linear of the model:", problems)
    return put(model, {p: LoRALinear.from_linear(linears[p], **settings) for each in found.values() for p in each})


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in model.named_modules() if path and type(layer) is nn.Linear}


def put(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, LoRALinear]:
    model.requires_grad_(False)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return layers


def save_adapter(model: nn.Module, folder: str | Path, base: str | None = None) -> None:
    """Write the model's LoRA as PEFT does; `base` is the name or path of the model without it.

    Raises `UsageError` where the model has no LoRA, or the folder has an adapter.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    home, one = Path(folder), next(iter(layers.values()), None)
    there = os.path.lexists(home / WRITTEN.config_name) or os.path.lexists(home / WRITTEN.weights_name)
    if one is None or any(layer.rslora != one.rslora for layer in layers.values()) or there:
        wanted = "expected a model with LoRA layers, rsLoRA in all of them or in none, and a folder without an adapter"
        raise UsageError(f"{printable(home)}: {wanted}")
    tails = any(p.endswith(f".{path}") for path in layers for p, _ in model.named_modules() if p not in layers)
    training = Training(base=base or "", rslora=one.rslora, dropout=one.dropout.p)
    strengths = {path: (layer.rank, layer.alpha) for path, layer in layers.items()}
    config = WRITTEN.plain_config(training, strengths, whole_paths=tails)
    names = WRITTEN.spelling({f"{path}.weight": Kind.LINEAR for path in layers})
    factors = {
        name: factor
        for path, layer in layers.items()
        for name, factor in zip(names.factors(f"{path}.weight"), (layer.lora_A, layer.lora_B), strict=True)
    }
    tensors = {name: factor.detach().cpu().contiguous() for name, factor in factors.items()}
    home.mkdir(parents=True, exist_ok=True)
    (home / WRITTEN.weights_name).write_bytes(save(tensors, {"format": "pt"}))
    (home / WRITTEN.config_name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, LoRALinear]:
    """Freeze `model` and give it the LoRA in `folder`, as PEFT or `save_adapter` wrote it. Returns its layers by path.

    Raises `InputError` for what is more than LoRA of linear layers, `FitError` for layers that the model has not so.
    """
    adapter, linears = read_adapter(folder), linears_of(model)
    updates = {target.removesuffix(".weight"): update for target, update in adapter.updates.items()}
    more = [path for path, update in updates.items() if type(update) is not LowRank or not update.turnable]
    if more or adapter.unsupported or adapter.unused:
        others = map(printable, (*adapter.unsupported, *adapter.unused, *more))
        raise InputError(f"{printable(folder)}: contains more than LoRA on linear layers:", others)
    shapes = {path: tuple(linear.weight.shape) for path, linear in linears.items()}
    if wrong := [path for path, update in updates.items() if update.shape != shapes.get(path)]:
        found = {path: shapes.get(path, "missing") for path in wrong}
        problems = (f"{printable(p)}: update is {updates[p].shape}, nn.Linear is {found[p]}" for p in wrong)
        raise FitError(f"{printable(folder)}: does not fit this model:", problems)
    dropout, rslora = adapter.training.dropout, adapter.training.rslora
    layers: dict[str, LoRALinear] = {}
    for path, stored in updates.items():
        update = cast("LowRank", load_update(stored, torch.device("cpu"), torch.float32))
        alpha = update.scale * (math.sqrt(update.rank) if rslora else update.rank)
        layers[path] = LoRALinear.from_linear(
            linears[path], rank=update.rank, alpha=alpha, dropout=dropout, rslora=rslora
        )
        layers[path].load_state_dict({"lora_A": update.down, "lora_B": update.up}, strict=False)
    return put(model, layers)
