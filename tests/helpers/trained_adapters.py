"""Adapters that PEFT trained on the zoo, and what PEFT adds to each weight when it loads one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from expert_models import FUSED, Experts
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights
from peft_zoo import make_zoo, shake
from torch import Tensor, nn


def make_model(_: str = "") -> nn.Module:
    """The zoo with experts; its three-dimensional kernel is one that PEFT can merge (it fails on 1 × 1 × k)."""
    model = make_zoo()
    torch.manual_seed(5)
    model.conv3 = nn.Conv3d(4, 4, (2, 1, 3))
    model.experts = Experts(FUSED, False)
    return model


LAYERS: dict[str, tuple[str, ...]] = {  # the weights that an adapter of a layer changes
    "linear": ("linear.weight",),
    "square": ("square.weight",),
    "c_attn": ("c_attn.weight",),  # a Conv1D
    "embed": ("embed.weight",),
    "conv1": ("conv1.weight",),
    "conv2": ("conv2.weight",),
    "conv3": ("conv3.weight",),
    "attention": ("attention.in_proj_weight", "attention.out_proj.weight"),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),  # parameters, as are those of the next two
    "matrix": ("linear.weight",),
    "batch": ("conv1.weight",),
}


PARAMETERS = {"experts": [*LAYERS["experts"]], "matrix": ["linear.weight"], "batch": ["conv1.weight"]}


def lora(layers: list[str], **settings: Any) -> LoraConfig:
    parameters = [name for layer in layers for name in PARAMETERS.get(layer, ())]
    modules = [layer for layer in layers if layer not in PARAMETERS]
    return LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": modules, "target_parameters": parameters or None, **settings}
    )


def trained(folder: Path, model: nn.Module, config: Any, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), config).eval()
        shake(wrapped, seed, 0.1)
        wrapped.save_pretrained(folder)
    return folder


def loaded(model: nn.Module, folder: Path) -> Any:
    """The model with an adapter, for which PEFT wants every tensor of the file, in its shape, and no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        found, wanted = load_peft_weights(folder, device="cpu"), get_peft_model_state_dict(wrapped)
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}
    return wrapped


def changes(model: nn.Module, wrapped: Any) -> dict[str, Tensor]:
    """What PEFT adds to every tensor when it merges."""
    before = model.state_dict()
    merged = wrapped.merge_and_unload().state_dict()
    return {name: merged[name].double() - tensor.double() for name, tensor in before.items()}
