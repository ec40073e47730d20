"""PEFT loads what every command makes of every type of adapter, key for key, and adds the ΔW that it should.

Rows are types and variants of adapters, columns are layers and commands. A type on all the layers that PEFT adapts with
it is one adapter, so that each cell is a look at one layer of an output.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft_methods import CASES
from peft_zoo import save_base
from safetensors.torch import save_file
from torch import Tensor, nn
from trained_adapters import LAYERS, PARAMETERS, changes, loaded, lora, make_model, trained

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Tensors = Mapping[str, Tensor]


# ---- what there is ----

ALONE = ("attention", "matrix", "batch")  # PEFT turns an out_proj beside a Conv1D; a weight has one update


def other(make: Callable[..., Any], layers: list[str], **settings: Any) -> Any:
    return make(target_modules=layers, **settings)


@dataclass(frozen=True)
class Kind:
    """A type or variant: its config, the layers that PEFT has it for, and what cannot be done to it."""

    config: Callable[[list[str]], Any]
    layers: tuple[str, ...]
    refused: Mapping[str, str] = frozenset()  # type: ignore[assignment]  # command → what is told
    whole: bool = False  # something beside the factors changes the layer too, and has no strength


ALL = ("linear", "square", "c_attn", "embed", "conv1", "conv2", "conv3", "attention")
MATRICES = ("linear", "square", "c_attn")
WITH_BIAS = ("linear", "c_attn", "conv1", "conv2", "conv3", "attention")
NO_ALPHA = {"rescale": "--bake", "rescale to an α": "--bake"}
MOVED = dict.fromkeys(
    ("rescale", "rescale to an α", "rescale, baked", "resize", "resize to more", "combine"),
    "training began by subtracting a part from the base",
)
DORA = {"combine": "DoRA divides by the norm"}
KINDS: dict[str, Kind] = {
    "LORA": Kind(lora, (*ALL, *PARAMETERS)),
    "rsLoRA": Kind(partial(lora, use_rslora=True), ("linear", "embed", "conv2", "experts", "attention")),
    "patterns": Kind(
        partial(lora, rank_pattern={"conv.": 2, "embed": 4}, alpha_pattern={"(c_attn|conv2)": 11}), ALL[:-1]
    ),
    "DoRA": Kind(partial(lora, use_dora=True), ALL[:-1], DORA),
    "lora_bias": Kind(partial(lora, lora_bias=True), WITH_BIAS),
    "trained biases": Kind(partial(lora, bias="lora_only"), WITH_BIAS, whole=True),
    "all biases, a module saved": Kind(partial(lora, bias="all", modules_to_save=["head"]), MATRICES, whole=True),
    "trained tokens": Kind(partial(lora, trainable_token_indices={"embed": [7, 2]}), MATRICES),
    "MiCA": Kind(partial(lora, init_lora_weights="mica"), (*MATRICES, "embed")),
    "PiSSA": Kind(partial(lora, init_lora_weights="pissa"), MATRICES, MOVED),
    "OLoRA": Kind(partial(lora, init_lora_weights="olora"), ("linear", "square"), MOVED),
    "KaSA": Kind(partial(lora, kasa_config=KasaConfig()), ("linear", "square"), MOVED),
    "VeLoRA": Kind(partial(lora, velora_config=VeloraConfig()), MATRICES),
    "MonteCLoRA": Kind(partial(lora, monteclora_config=MontecloraConfig()), ("linear", "square")),
    "BD-LoRA": Kind(
        partial(lora, r=4, use_bdlora=BdLoraConfig(target_modules_bd_b=["linear", "square"], nblocks=2)),
        ("linear", "square"),
    ),
    "ADALORA": Kind(partial(other, peft.AdaLoraConfig, init_r=4, target_r=2, lora_alpha=7, total_step=9), MATRICES),
    "DELORA": Kind(partial(other, peft.DeloraConfig, r=3), ("linear", "square"), NO_ALPHA),
    "VBLORA": Kind(partial(other, peft.VBLoRAConfig, r=3, num_vectors=7, vector_length=4, topk=3), MATRICES, NO_ALPHA),
    "VBLORA, stored for inference": Kind(
        partial(
            other, peft.VBLoRAConfig, r=3, num_vectors=7, vector_length=4, topk=3, save_only_topk_weights=True
        ),
        MATRICES,
        NO_ALPHA,
    ),
}  # fmt: skip


def adapters_of(kind: Kind) -> list[list[str]]:
    """The layers that are adapted together."""
    together = [layer for layer in kind.layers if layer not in ALONE]
    return [together, *([layer] for layer in kind.layers if layer in ALONE)]


# ---- what PEFT makes of a file ----


def nearest(change: Tensor, rank: int, turned: bool) -> Tensor:
    """The best approximation of a rank to a matrix, to a kernel seen as one, or to each of a batch (`turned`)."""
    flat = change if turned else change.reshape(change.shape[0], -1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    found: Tensor = ((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]).reshape(change.shape)
    return found


# ---- what the commands do ----

FACTOR, WEIGHTS, ALPHA = 0.5, (0.5, -0.75), 4.0
COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "rescale": lambda given, out: loratool.rescale(given / "one", out, scale=FACTOR),
    "rescale to an α": lambda given, out: loratool.rescale(given / "one", out, alpha=ALPHA),
    "rescale, baked": lambda given, out: loratool.rescale(given / "one", out, scale=FACTOR, bake=True),
    "resize": lambda given, out: loratool.resize(given / "one", out, rank=2),
    "resize to more": lambda given, out: loratool.resize(given / "one", out, rank=6, uniform=True),
    "combine": lambda given, out: loratool.combine(
        [given / "one", given / "two"], out, weights=list(WEIGHTS), saved="first"
    ),
    "extract": lambda given, out: loratool.extract(given / "base", given / "tuned", out, rank=99, exact=True),
}


@dataclass(frozen=True)
class Given:
    """Two adapters of a kind, the base, and the base as PEFT merges it with the first of them."""

    folder: Path
    one: Tensors  # what PEFT adds with it
    two: Tensors


SELDOM = ("rescale to an α", "resize to more")  # which differ from their neighbours for these kinds at most:
SELDOM_FOR = ("LORA", "patterns", "DoRA", "lora_bias", "ADALORA", "DELORA")
CELLS = [
    pytest.param(name, at, command, id=f"{name} on {'+'.join(layers)}, {command}")
    for name, kind in KINDS.items()
    for at, layers in enumerate(adapters_of(kind))
    for command in COMMANDS
    if command not in SELDOM or name in SELDOM_FOR
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Given]:
    """What the commands are given, made once."""
    made: dict[tuple[str, int], Given] = {}
    model = make_model()

    def make(name: str, at: int) -> Given:
        if (name, at) not in made:
            folder = tmp_path_factory.mktemp("given")
            config = partial(KINDS[name].config, adapters_of(KINDS[name])[at])
            for adapter, seed in (("one", 3), ("two", 4)):
                trained(folder / adapter, model, config(), seed)
            for checkpoint in ("base", "tuned"):
                save_base(folder / checkpoint, model)
            merged = loaded(model, folder / "one").merge_and_unload().state_dict()
            save_file({n: t.contiguous().clone() for n, t in merged.items()}, folder / "tuned" / "model.safetensors")
            one = {n: merged[n].double() - tensor.double() for n, tensor in model.state_dict().items()}
            made[name, at] = Given(folder, one, changes(model, loaded(model, folder / "two")))
        return made[name, at]

    return make


def expected(model: nn.Module, given: Given, command: str, layers: list[str]) -> Tensors:
    """What PEFT is to add with an output, from what it adds with the inputs."""
    if command in ("rescale", "rescale to an α", "rescale, baked"):
        before = loaded(model, given.folder / "one")
        if before.peft_config["default"].peft_type != "LORA" and command != "rescale to an α":
            return {name: FACTOR * change for name, change in given.one.items()}
        for module in before.modules():
            if "default" in getattr(module, "scaling", {}):
                by_alpha = command == "rescale to an α"
                module.scaling["default"] *= ALPHA / module.lora_alpha["default"] if by_alpha else FACTOR
        return changes(model, before)
    if command == "combine":
        return {name: WEIGHTS[0] * change + WEIGHTS[1] * given.two[name] for name, change in given.one.items()}
    if command == "resize":
        batches = {name for layer in layers if layer in ("experts", "batch") for name in LAYERS[layer]}
        weights = {name for layer in layers for name in LAYERS[layer]}
        return {n: nearest(change, 2, n in batches) if n in weights else change for n, change in given.one.items()}
    return given.one


@pytest.mark.parametrize(("name", "at", "command"), CELLS)
def test_peft_loads_every_output_and_adds_what_it_should(
    inputs: Callable[[str, int], Given], tmp_path: Path, name: str, at: int, command: str
) -> None:
    """Every key of an output is one that PEFT asks for, none is missing, and each layer's ΔW is the one computed from
    what PEFT adds with the inputs. What cannot be done to a type is refused, and nothing is written.
    """
    kind, model, given, out = KINDS[name], make_model(), inputs(name, at), tmp_path / "out"
    layers = adapters_of(kind)[at]
    if command in kind.refused:
        with pytest.raises((loratool.InputError, loratool.FitError), match=kind.refused[command]):
            COMMANDS[command](given.folder, out)
        assert not out.exists()
        return
    if command == "extract" and layers == ["attention"] and name in ("lora_bias", "trained biases"):
        with pytest.raises(loratool.FitError, match="its module is saved whole"):
            COMMANDS[command](
                given.folder, out
            )  # PEFT has no trained bias inside an attention: no factor would be left
        return
    COMMANDS[command](given.folder, out)
    found, wanted = changes(model, loaded(model, out)), expected(model, given, command, layers)
    for layer in layers:
        for weight in LAYERS[layer]:
            if name == "DoRA" and command == "resize":  # the norm is of W + ΔW at the new rank: another test's
                continue
            off = float((found[weight] - wanted[weight]).abs().max())
            assert off <= 3e-6, f"{layer}: {weight} is off by {off:.2g}"
    if not kind.whole:
        for other_name in set(found) - {weight for layer in layers for weight in LAYERS[layer]}:
            if command in ("resize", "resize to more", "extract"):
                assert float((found[other_name] - wanted[other_name]).abs().max()) <= 3e-6, other_name


# ---- types that are no product of two factors, and how the two meet ----

ALGEBRA = [command for command in COMMANDS if command not in ("extract", "combine", "resize to more")]


# layers whose kind no file of a type tells
UNTOLD = {"ADALORA": "conv2.weight", "TINYLORA": "embed.weight", "LOHA": "conv1.weight", "LOKR": "conv1.weight"}


@pytest.mark.parametrize("name", CASES)
def test_of_every_type_an_output_is_one_that_peft_loads_or_there_is_none(tmp_path: Path, name: str) -> None:
    """Whatever the type, a command writes what PEFT loads with no key too many or too few, or refuses with the reason
    and writes nothing. The outputs that PEFT cannot load are told: an AdaLoRA file does not say what is a Conv2d, nor one of
    LoHa or LoKr, and one of TinyLoRA not what is an embedding.
    """
    model = make_model()
    trained(tmp_path / "one", model, CASES[name].config())
    for command in ALGEBRA:
        out, refusal = tmp_path / command, ""
        try:
            report: Any = COMMANDS[command](tmp_path, out)
        except loratool.InputError as error:
            refusal = str(error)
        if refusal:
            assert refusal.splitlines()[-1].count(" ") > 3, "the reason is a sentence"
            assert not out.exists()
            continue
        untold = UNTOLD.get(re.split(",| with", name)[0])
        if untold in CASES[name].edited and command in ("rescale, baked", "resize"):  # layers that are not linear
            assert any(note.code == "layer-kind-unknown" for note in report.notes)
            continue
        loaded(model, out)


@pytest.mark.parametrize("name", ["ADALORA", "TINYLORA"])
def test_layers_of_a_kind_that_no_file_tells_become_lora_by_a_merge_and_an_extract(name: str, tmp_path: Path) -> None:
    """The way out that `resize`, `combine` and `rescale --bake` tell of AdaLoRA and TinyLoRA leads to an adapter that PEFT loads."""
    model = make_model()
    base, given = save_base(tmp_path / "base", model), tmp_path / "one"
    trained(given, model, CASES[name].config())
    loratool.merge(base, [given], tmp_path / "merged")
    loratool.extract(base, tmp_path / "merged", tmp_path / "out", rank=9, exact=True)
    found, wanted = (
        changes(model, PeftModel.from_pretrained(copy.deepcopy(model), path)) for path in (tmp_path / "out", given)
    )
    for weight in CASES[name].edited:
        torch.testing.assert_close(found[weight], wanted[weight], rtol=0, atol=3e-6)
    loaded(model, tmp_path / "out")


@pytest.mark.parametrize(
    "types", [("LORA", "DELORA"), ("DELORA", "ADALORA"), ("VBLORA", "LORA"), ("ADALORA", "rsLoRA")]
)
def test_adapters_of_several_types_become_one_that_peft_loads(tmp_path: Path, types: tuple[str, str]) -> None:
    """Adapters of two types are added up where both have a layer, and each alone where one has it."""
    model, given = make_model(), []
    for at, name in enumerate(types):
        layers = [layer for layer in ("linear", "square", "c_attn", "embed")[at:] if layer in KINDS[name].layers]
        given.append(trained(tmp_path / str(at), model, KINDS[name].config(layers), seed=at))
    loratool.combine(given, tmp_path / "out", weights=list(WEIGHTS))
    parts = [changes(model, loaded(model, folder)) for folder in given]
    found = changes(model, loaded(model, tmp_path / "out"))
    for name, change in found.items():
        wanted = WEIGHTS[0] * parts[0][name] + WEIGHTS[1] * parts[1][name]
        torch.testing.assert_close(change, wanted, rtol=0, atol=3e-6)
