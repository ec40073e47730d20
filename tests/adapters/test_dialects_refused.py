"""Files of dialects that are malformed, contradict themselves, or are no adapters of weights: refused with the name of what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool.adapters.formats import read_adapter
from loratool.cli import run

KOHYA = "lora_unet_mid_block_attn_to_q"
DIFFUSERS = "unet.mid_block.attn.to_q"
DOWN, UP = torch.ones(2, 4), torch.ones(6, 2)


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, dict(metadata or {}) or None)


def kohya(module: str = KOHYA, **changed: Tensor | None) -> dict[str, Tensor]:
    """A sound module, with some of its tensors changed or left out."""
    roles = {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(1.0)}
    roles |= {role.replace("__", "."): tensor for role, tensor in changed.items()}  # type: ignore[misc]
    return {f"{module}.{role}": tensor for role, tensor in roles.items() if tensor is not None}


def peft(module: str = DIFFUSERS) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP}


def in_header(**fields: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in fields.items()})}


LONG = "lora_unet_" + "x" * 10_000
# name → (tensors, header, what is said)
BROKEN: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str], str]] = {
    "a half is missing": (kohya(lora_up__weight=None), {}, rf"{KOHYA}: lora_up\.weight is missing"),
    "ranks differ": (kohya(lora_up__weight=torch.ones(6, 3)), {}, rf"{KOHYA}.*their ranks differ"),
    "alpha is no number": (kohya(alpha=torch.tensor(float("nan"))), {}, rf"{KOHYA}\.alpha is nan"),
    "alpha is infinite": (kohya(alpha=torch.tensor(1e5).half()), {}, rf"{KOHYA}\.alpha is inf"),
    "alpha is negative": (kohya(alpha=torch.tensor(-1.0)), {}, rf"{KOHYA}\.alpha is -1"),
    "alpha has several values": (kohya(alpha=torch.ones(2)), {}, rf"{KOHYA}\.alpha is \[2\]"),
    "integers": (kohya(lora_down__weight=DOWN.to(torch.int8)), {}, rf"{KOHYA}\.lora_down\.weight is stored as I8"),
    "alpha of the header is a text": (peft(), in_header(r=2, lora_alpha="x"), r"lora_alpha is 'x'"),
    "rank of the header is another": (peft(), in_header(r=3, lora_alpha=1), r"header, unet says r = 3, but .* rank 2"),
    "header that is no table": (peft(), {"lora_adapter_metadata": "{"}, r"lora_adapter_metadata in the header"),
    "header of many digits": (peft(), {"lora_adapter_metadata": "[" * 5000}, r"lora_adapter_metadata in the header"),
    "alpha twice": (
        {**peft(), f"{DIFFUSERS}.alpha": torch.tensor(1.0)},
        in_header(r=2, lora_alpha=4),
        r"has an alpha of its own",
    ),
    "two spellings of one factor": (
        {**kohya(), f"{KOHYA}.lora_A.weight": DOWN},
        {},
        r"two spellings of the same tensor",
    ),
    "one weight in two dialects": (
        {**kohya(), **peft()},
        {},
        r"lora_unet_mid_block_attn_to_q.*means the same weight as unet\.mid_block\.attn\.to_q",
    ),
    "one weight under two words for its component": (
        {**peft("unet.mid_block.a"), **peft("transformer.mid_block.a")},
        {},
        r"unet\.mid_block\.a\..*means the same weight as transformer\.mid_block\.a",
    ),
    "two methods in one module": (
        {**kohya(), f"{KOHYA}.hada_w1_a": DOWN},
        {},
        rf"{KOHYA}: has tensors of LoRA .* and LoHa",
    ),
    "rows that do not share": (
        {
            "single_blocks.0.processor.qkv_lora.down.weight": DOWN,
            "single_blocks.0.processor.qkv_lora.up.weight": torch.ones(7, 2),
        },
        {},
        r"single_blocks\.0\.processor\.qkv.*has 7 rows",
    ),
    "a name of ten thousand letters": (
        kohya(LONG, lora_up__weight=None),
        {},
        r"lora_unet_x+…x+: lora_up\.weight is missing",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_the_tensor_and_what_is_wrong(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata, said = BROKEN[name]
    save(tensors, tmp_path / "toy.safetensors", metadata)
    save({"unet.mid_block.attn.to_q.weight": torch.ones(6, 4)}, tmp_path / "base.safetensors")
    words = [
        "merge",
        str(tmp_path / "base.safetensors"),
        str(tmp_path / "toy.safetensors"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert run(words) == 3
    told = capsys.readouterr()
    assert re.search(said, told.err), told.err
    assert len(told.err) < 3000
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_no_dialect_is_named_and_nothing_is_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save({**kohya(), "something.else": DOWN}, tmp_path / "toy.safetensors")
    save({"unet.mid_block.attn.to_q.weight": torch.ones(6, 4)}, tmp_path / "base.safetensors")
    assert read_adapter(tmp_path / "toy.safetensors").unused == ("something.else",)
    words = [
        "merge",
        str(tmp_path / "base.safetensors"),
        str(tmp_path / "toy.safetensors"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert run(words) in (3, 4)
    assert "something.else" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# What no reader covers: name of a tensor → (what inspect calls it, a word of the reason)
NOT_READ: dict[str, tuple[str, str]] = {
    "emb_params": ("textual-inversion", "new tokens"),
    "<my-token>": ("textual-inversion", "new tokens"),
    "clip_g": ("textual-inversion", "new tokens"),
    "bundle_emb.token.clip_l": ("embeddings", "new tokens"),
    "lllite_unet_input_blocks_4_1.down.0.weight": ("controlnet-lllite", "control image"),
    "lora_controlnet": ("control-lora", "ControlNet"),
    "ip_adapter.1.to_k_ip.weight": ("ip-adapter", "image prompt"),
    "lora_unet_mid_block_attn_to_q.lambda_layer": ("t-lora", "time step"),
    "w_a_000": ("numbered", "which layers"),
}


@pytest.mark.parametrize("tensor", NOT_READ)
def test_what_no_reader_covers_is_recognised_and_refused_by_name(
    tensor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, reason = NOT_READ[tensor]
    save({tensor: torch.ones(2, 4)}, tmp_path / "toy.safetensors")
    save({"unet.mid_block.attn.to_q.weight": torch.ones(6, 4)}, tmp_path / "base.safetensors")
    words = [str(tmp_path / "base.safetensors"), str(tmp_path / "toy.safetensors"), "-o", str(tmp_path / "out")]
    assert run(["merge", *words]) == 3
    assert reason in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "toy.safetensors"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert (found["format"], found["modules"]) == (kind, [])


@pytest.mark.parametrize("role", ["lora_E", "vera_lambda_b"])
def test_methods_whose_scale_is_in_a_config_are_refused_without_it(
    role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save({**peft(), f"{DIFFUSERS}.{role}": torch.ones(2, 1)}, tmp_path / "toy.safetensors")
    save({"unet.mid_block.attn.to_q.weight": torch.ones(6, 4)}, tmp_path / "base.safetensors")
    words = [str(tmp_path / "base.safetensors"), str(tmp_path / "toy.safetensors"), "-o", str(tmp_path / "out")]
    assert run(["merge", *words]) == 3
    assert "adapter_config.json" in capsys.readouterr().err


def test_a_model_whose_names_begin_as_those_of_dialects_is_no_adapter(tmp_path: Path) -> None:
    """No tensor of it has a role."""
    names = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "unet.conv_in.weight",
    )
    save({name: torch.ones(2, 4) for name in names}, tmp_path / "model.safetensors")
    assert run(["inspect", str(tmp_path / "model.safetensors")]) == 0
    from loratool.adapters.formats import is_adapter

    assert not is_adapter(tmp_path / "model.safetensors")


def test_a_config_in_the_same_folder_is_believed_where_names_are_those_of_peft(tmp_path: Path) -> None:
    """`base_model.model.…` is Hunyuan's too, without a config; with one the scale is the config's."""
    save(peft("base_model.model.transformer_blocks.0.attn.to_q"), tmp_path / "adapter_model.safetensors")
    (update,) = read_adapter(tmp_path / "adapter_model.safetensors").updates.values()
    assert update.scale == 1.0  # type: ignore[attr-defined]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path / "adapter_model.safetensors")
    (update,) = adapter.updates.values()
    assert (adapter.format, update.scale) == ("peft", 4.0)  # type: ignore[attr-defined]


def test_several_adapters_in_one_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        save(kohya(), tmp_path / f"{name}.safetensors")
    assert run(["rescale", str(tmp_path), "-o", str(tmp_path / "out"), "--scale", "2"]) == 3
    assert "one.safetensors, two.safetensors" in capsys.readouterr().err
