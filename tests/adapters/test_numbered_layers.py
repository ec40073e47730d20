"""cloneofsimo's lora_diffusion numbers layers as it meets them: each number is the layer that a walk of torch meets there."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from walked_models import TextEncoder, UNet, walk

import loratool
from loratool.adapters.adapter import load_update
from loratool.adapters.formats import read_adapter
from loratool.cli import run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

PLAIN = ["CrossAttention", "Attention", "GEGLU"]
WALKS: dict[str, tuple[list[str], bool, tuple[str, ...]]] = {
    "attention and GEGLU": (PLAIN, False, ("attn1", "ff", "attn2")),
    "with ResNets": (["ResnetBlock2D", *PLAIN], True, ("attn1", "ff", "attn2")),
    "ResNets without convolutions": (["ResnetBlock2D", *PLAIN], False, ("attn1", "ff", "attn2")),
    "since diffusers 0.15": (PLAIN, False, ("attn1", "attn2", "ff")),
    "attention alone": (["CrossAttention"], False, ("attn1", "ff", "attn2")),
}


def factors(component: str, layers: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file for some layers, numbered, and ΔW of each by its name in float64."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for number, (name, layer) in enumerate(layers.items()):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        ones = (1,) * (weight.dim() - 2)
        down = torch.randn(2, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), 2, *ones, generator=generator)
        tensors |= {f"{component}:{number}:up": up, f"{component}:{number}:down": down}
        changes[f"{component}.{name}.weight"] = (up.flatten(1).double() @ down.flatten(1).double()).view(weight.shape)
    return tensors, changes


def saved(folder: Path, tensors: Mapping[str, Tensor], classes: list[str]) -> Path:
    header = {"unet": json.dumps(classes), "text_encoder": json.dumps(["CLIPAttention"])}
    save_file(dict(tensors), folder / "lora.safetensors", header)
    return folder / "lora.safetensors"


@pytest.mark.parametrize("name", WALKS)
def test_every_number_is_the_layer_that_the_walk_meets(name: str, tmp_path: Path) -> None:
    """With scale 1, in a U-Net of the order in which diffusers made it."""
    classes, convolutions, order = WALKS[name]
    tensors, changes = factors("unet", dict(walk(UNet(order), classes, convolutions)))
    adapter = read_adapter(saved(tmp_path, tensors, classes))
    assert {note.code for note in adapter.notes} == {"numbered-layers", "alpha-missing"}
    assert set(adapter.updates) == set(changes)
    for target, update in adapter.updates.items():
        delta = load_update(update, torch.device("cpu"), torch.float64).delta(torch.zeros_like(changes[target]))
        torch.testing.assert_close(delta.view(changes[target].shape), changes[target], rtol=1e-6, atol=1e-6)


def test_both_components_merge_and_what_is_not_in_the_walk_stays_as_it_is(tmp_path: Path) -> None:
    unet, text = UNet(), TextEncoder()
    found = factors("unet", dict(walk(unet, PLAIN, False)))
    more = factors("text_encoder", dict(walk(text, ["CLIPAttention"], False)))
    before = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    before |= {f"text_encoder.{k}": v for k, v in text.state_dict().items()}
    save_file(before, tmp_path / "base.safetensors")
    adapter = saved(tmp_path, found[0] | more[0], PLAIN)
    loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", device="cpu")
    merged, changes = load_file(tmp_path / "out.safetensors"), found[1] | more[1]
    for weight, old in before.items():
        wanted = (old.double() + changes[weight]).float() if weight in changes else old
        torch.testing.assert_close(merged[weight], wanted, rtol=1e-6, atol=1e-6)


def test_a_dialect_is_named_and_its_layers_in_words_of_the_model(tmp_path: Path) -> None:
    tensors, changes = factors("text_encoder", dict(walk(TextEncoder(), ["CLIPAttention"], False)))
    adapter = read_adapter(saved(tmp_path, tensors, PLAIN))
    assert adapter.dialects == ("cloneofsimo",)
    assert set(adapter.updates) == set(changes)


def cut(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("classes", "lost", "told"),
    [
        (
            PLAIN,
            ("unet:143:up", "unet:143:down"),
            "143 layers of unet in Attention, CrossAttention, GEGLU fit no known",
        ),
        (["MyAttention"], (), "144 layers of unet in MyAttention fit no known way"),
        (PLAIN, ("unet:7:up", "unet:7:down"), "unet:7 is missing"),
        (PLAIN, ("unet:7:up",), "unet:7: lora_up.weight is missing"),
    ],
)
def test_numbers_whose_layers_are_unknown_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: list[str], lost: tuple[str, ...], told: str
) -> None:
    unet = UNet()
    tensors, _ = factors("unet", dict(walk(unet, PLAIN, False)))
    adapter = saved(tmp_path, cut(tensors, *lost), classes)
    save_file({f"unet.{k}": v for k, v in unet.state_dict().items()}, tmp_path / "base.safetensors")
    words = [str(tmp_path / "base.safetensors"), str(adapter), "-o", str(tmp_path / "out")]
    assert run(["merge", *words]) == 3
    assert told in " ".join(capsys.readouterr().err.split())


def test_shapes_that_contradict_the_order_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layers of a model whose middle block comes before those on the way up."""
    layers = list(walk(UNet(), PLAIN, False))
    inner = [pair for pair in layers if pair[0].startswith("mid_block")]
    at = next(number for number, (name, _) in enumerate(layers) if name.startswith("up_blocks"))
    tensors, _ = factors("unet", dict([*layers[:at], *inner, *layers[at : -len(inner)]]))
    adapter = saved(tmp_path, tensors, PLAIN)
    assert run(["resize", str(adapter), "-o", str(tmp_path / "out"), "--rank", "1"]) == 3
    assert "fit no known way" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["lora.pt", "lora.text_encoder.pt"])
def test_pickled_lists_are_refused_with_the_line_that_makes_them_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Older files are lists of up and down in turn, whose component is in the file's name."""
    component, model = ("text_encoder", TextEncoder()) if "text" in name else ("unet", UNet())
    classes = ["CLIPAttention"] if "text" in name else PLAIN
    tensors, changes = factors(component, dict(walk(model, classes, False)))
    torch.save([torch.nn.Parameter(tensor) for tensor in tensors.values()], tmp_path / name)
    with pytest.raises(loratool.InputError, match="never loads pickled") as caught:
        loratool.inspect(tmp_path / name)
    code = re.search(r'python -c "(.*)"', str(caught.value))
    assert code
    monkeypatch.chdir(tmp_path)
    exec(code[1], {})
    adapter = read_adapter((tmp_path / name).with_suffix(".safetensors"))
    assert set(adapter.updates) == set(changes)


def test_learned_tokens_of_pivotal_tuning_are_refused_with_the_line_that_saves_them_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header marks them, whatever they are called; the LoRA is read without them, and diffusers loads each of them."""
    tensors, changes = factors("text_encoder", dict(walk(TextEncoder(), ["CLIPAttention"], False)))
    tokens = {"<s1>": torch.ones(8), "my style": torch.zeros(8)}
    header = {"text_encoder": json.dumps(["CLIPAttention"]), **dict.fromkeys(tokens, "<embed>")}
    save_file(tensors | tokens, tmp_path / "style.safetensors", header)
    adapter = read_adapter(tmp_path / "style.safetensors")
    assert (adapter.unused, set(adapter.updates)) == ((), set(changes))
    (reason,) = adapter.unsupported
    assert "new tokens" in reason
    code = re.search(r'python -c "(.*)"', reason)
    assert code
    monkeypatch.chdir(tmp_path)
    exec(code[1], {})
    plain = read_adapter(tmp_path / "style-lora.safetensors")
    assert (plain.unsupported, plain.unused, set(plain.updates)) == ((), (), set(changes))
    assert [*load_file("style-0.safetensors"), *load_file("style-1.safetensors")] == [*tokens]
