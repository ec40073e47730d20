"""Merges into quantised bases of every kind: what is edited becomes plain or is packed anew, all else stays bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from oracle import nearest
from packed_affine import quanto, torchao
from packed_bnb import int8_of, nf4
from packed_hqq import Hqq, hqq
from packed_models import open_packed, save_packed
from peft_files import save_peft
from quantised_models import FAMILIES, MATRICES, Quantised
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.bases.weights import Room

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS, COLUMNS = 32, 64
BLOCK = "model.layers.0"
EDITED = f"{BLOCK}.mlp.down_proj.weight"
OTHERS = tuple(f"model.layers.{layer}.{name}.weight" for layer, name in ((1, "mlp.down_proj"), (0, "self_attn.o_proj")))
NORM = "model.norm.weight"
KINDS: dict[str, Callable[..., Quantised]] = {
    **FAMILIES,
    **MATRICES,
    "nf4": nf4,
    "bitsandbytes int8": int8_of,
    "HQQ": partial(hqq, packing="4bit_u8", group=16, axis=1),
    "torchao int8": partial(torchao, kind="Int8Tensor", columns=32),
    "quanto int8": partial(quanto, axis=0),
}
STRONG = 8.0  # makes ΔW as large as W, so that something is left of it in every format


def plain_weights(*names: str) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return {name: torch.randn(ROWS, COLUMNS, generator=numbers) * 0.05 for name in names}


def save_base(folder: Path, kind: str, *names: str) -> Quantised:
    made = KINDS[kind](plain_weights(*names))
    rest = {NORM: torch.ones(COLUMNS).bfloat16()}
    save_packed(folder, {**rest, **made.tensors}, made.config, made.metadata, tie_word_embeddings=False)
    for name, content in made.files.items():
        (folder / name).write_text(json.dumps(content))
    return made


def save_adapter(folder: Path, *targets: str) -> dict[str, Tensor]:
    """An adapter of rank 2, and its changes in float64."""
    numbers = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for target in targets:
        up, down = torch.randn(ROWS, 2, generator=numbers) / 16, torch.randn(2, COLUMNS, generator=numbers) / 16
        module = f"base_model.model.{target.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        changes[target] = up.double() @ down.double()
    save_peft(folder, tensors, r=2, lora_alpha=2)
    return changes


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def raw(tensor: Tensor) -> bytes:
    values: NDArray[Any] = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return values.tobytes()


def config_in(folder: Path) -> Mapping[str, Any]:
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_is_listed_on_the_page_of_what_is_supported(kind: str, tmp_path: Path) -> None:
    """docs/supported.md has a row for each class of weights that a codec names, and says by it what can be packed anew."""
    save_base(tmp_path / "base", kind, EDITED)
    base = open_packed(tmp_path / "base")
    (model,) = base.models
    assert {type(weight) for weight in base.weights.values()} <= {each for _, each in model.codec.kinds}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_edited_becomes_plain(kind: str, tmp_path: Path) -> None:
    made = save_base(tmp_path / "base", kind, EDITED, *OTHERS)
    changes = save_adapter(tmp_path / "adapter", EDITED)
    report = loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", device="cpu")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert same_bytes(after.pop(EDITED), nearest(made.values[EDITED].double() + changes[EDITED], torch.bfloat16))
    stem = EDITED.removesuffix("weight")
    kept = {name for name in before if not name.startswith(stem)}
    assert after.keys() == kept
    assert all(same_bytes(after[name], before[name]) for name in kept)
    assert report.edited == 1
    base, merged = open_packed(tmp_path / "base"), open_packed(tmp_path / "out")
    assert merged.weights.keys() == base.weights.keys() - {EDITED}
    config = config_in(tmp_path / "out")
    assert EDITED.removesuffix(".weight") in json.dumps(config["quantization_config"]).replace("\\\\.", ".")
    assert {**config, "quantization_config": 0} == {**config_in(tmp_path / "base"), "quantization_config": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_all_becomes_plain_on_request(kind: str, tmp_path: Path) -> None:
    made = save_base(tmp_path / "base", kind, EDITED, *OTHERS)
    with pytest.raises(loratool.UsageError, match="needs an ADAPTER as well as a BASE; pass --dequantize"):
        loratool.merge(tmp_path / "base", [], tmp_path / "out", device="cpu")
    loratool.merge(tmp_path / "base", [], tmp_path / "out", device="cpu", dequantize=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == {NORM, EDITED, *OTHERS}
    assert all(same_bytes(after[name], nearest(made.values[name].double(), torch.bfloat16)) for name in made.values)
    assert "quantization_config" not in config_in(tmp_path / "out")
    assert not {*made.files} & {path.name for path in (tmp_path / "out").iterdir()}


def test_hqq_is_packed_anew(tmp_path: Path) -> None:
    packed = Hqq((ROWS, COLUMNS), "8bit_u8", 16, 1)
    save_packed(tmp_path / "base", packed.tensors(EDITED.removesuffix(".weight")), {"quant_method": "hqq"})
    change = save_adapter(tmp_path / "adapter", EDITED)[EDITED]
    inputs = tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"
    report = loratool.merge(*inputs, weights=[100.0], device="cpu", requantize=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert [(n, t.dtype, t.shape) for n, t in after.items()] == [(n, t.dtype, t.shape) for n, t in before.items()]
    stem = EDITED.removesuffix("weight")
    scale, zero = (after[f"{stem}{part}"].double() for part in ("scale", "zero"))
    found = ((after[f"{stem}W_q"].double().view(-1, 16) - zero) * scale).view(ROWS, COLUMNS)
    exact = torch.from_numpy(packed.values()).double() + 100 * change
    error = torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(100 * change)
    assert error == pytest.approx(report.error_added, rel=1e-3)
    assert error < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_edited_weights_go_back_into_the_format_on_request(kind: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base", kind, EDITED, *OTHERS)
    changes = save_adapter(tmp_path / "adapter", EDITED)
    merge = {"weights": [STRONG], "device": "cpu", "requantize": True, "accept_loss": True}
    inputs = tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"
    report = loratool.merge(*inputs, **merge)  # type: ignore[arg-type]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert [(n, t.dtype, t.shape) for n, t in after.items()] == [(n, t.dtype, t.shape) for n, t in before.items()]
    stem = EDITED.removesuffix("weight")
    assert all(same_bytes(after[name], before[name]) for name in before if not name.startswith(stem))
    assert config_in(tmp_path / "out") == config_in(tmp_path / "base")
    old, new = (
        open_packed(tmp_path / name).weights[EDITED].rows(0, ROWS, torch.device("cpu"), torch.float64, Room())
        for name in ("base", "out")
    )
    change = STRONG * changes[EDITED]
    wanted = old + change
    assert (new - wanted).norm() < (old - wanted).norm()
    gain = float(((new - old) * change).sum() / change.norm() ** 2)
    assert report.gain == pytest.approx(gain, abs=1e-4)
    error = float((new - wanted).norm() / change.norm())
    assert report.error_added == pytest.approx(error, abs=1e-4)
    assert list(report.errors_added.values()) == [report.error_added]


def test_a_requantised_update_that_is_mostly_lost_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "int4 groups", EDITED)
    save_adapter(tmp_path / "adapter", EDITED)
    inputs = tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"
    with pytest.raises(loratool.FitError, match=r"leave out --requantize[\s\S]*down_proj") as caught:
        loratool.merge(*inputs, weights=[0.5], device="cpu", requantize=True)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    report = loratool.merge(*inputs, weights=[0.5], device="cpu", requantize=True, accept_loss=True)
    assert report.error_added is not None
    assert report.error_added > 1 or (report.gain is not None and report.gain < 0.5)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_requantised_weight_has_the_same_bytes_for_any_workers_and_blocks(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "base", "fp8 blocks", EDITED, *OTHERS)
    save_adapter(tmp_path / "adapter", EDITED, *OTHERS)
    outs = []
    for name, block in (("whole", 1 << 20), ("small", 512)):
        monkeypatch.setattr("loratool.merging.resources.CPU_BLOCK", block)
        loratool.merge(
            tmp_path / "base",
            [tmp_path / "adapter"],
            tmp_path / name,
            device="cpu",
            requantize=True,
            workers=workers,
            weights=[STRONG],
        )
        outs.append((tmp_path / name / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


@pytest.mark.parametrize("size", ["600B", "1kB", "3kB"])
def test_a_requantised_weight_whose_scales_get_another_file_keeps_those(size: str, tmp_path: Path) -> None:
    """Only what lies in one file with the packed values can be made anew with them."""
    save_base(tmp_path / "base", "int4 groups", EDITED, *OTHERS)
    save_adapter(tmp_path / "adapter", EDITED)
    inputs = tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"
    report = loratool.merge(*inputs, weights=[STRONG], device="cpu", requantize=True, accept_loss=True, shard_size=size)
    before = load_file(tmp_path / "base" / "model.safetensors")
    files = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    after = {name: value for file in files for name, value in file.items()}
    assert after.keys() == before.keys()
    stem = EDITED.removesuffix("weight")
    (home,) = (file for file in files if f"{stem}weight_packed" in file)
    assert not same_bytes(home[f"{stem}weight_packed"], before[f"{stem}weight_packed"])
    for name in before:
        if not name.startswith(stem) or name not in home:
            assert same_bytes(after[name], before[name])
    assert report.error_added is not None


def test_siblings_that_servers_fuse_become_plain_together(tmp_path: Path) -> None:
    names = [f"{BLOCK}.self_attn.{part}_proj.weight" for part in "qkvo"]
    made = save_base(tmp_path / "base", "int4 groups", *names, EDITED)
    save_adapter(tmp_path / "adapter", names[0])
    report = loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", device="cpu")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in names[1:3]:
        assert same_bytes(after[name], nearest(made.values[name].double(), torch.bfloat16))
    assert {*open_packed(tmp_path / "out").weights} == {names[3], EDITED}
    (note,) = (note for note in report.notes if note.code == "siblings-plain")
    assert "k_proj" in str(note)
    assert "v_proj" in str(note)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A base like Kimi-K2-Thinking: int4 experts in groups of 32, two in each of two layers, and plain attention."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in (0, 1)
        for expert in (0, 1)
        for part in ("gate", "up", "down")
    ]
    made = KINDS["int4 groups"](plain_weights(*names))
    attention = {name: value.bfloat16() for name, value in plain_weights(f"{BLOCK}.self_attn.o_proj.weight").items()}
    return save_packed(tmp_path / "base", {**attention, **made.tensors}, made.config, model_type="deepseek_v3")


def test_an_adapter_on_plain_attention_leaves_packed_experts_as_they_are(mixture: Path, tmp_path: Path) -> None:
    name = f"{BLOCK}.self_attn.o_proj.weight"
    change = save_adapter(tmp_path / "adapter", name)[name]
    for way in ("touched", "requantize"):
        loratool.merge(mixture, tmp_path / "adapter", tmp_path / way, device="cpu", requantize=way == "requantize")
        before, after = (load_file(folder / "model.safetensors") for folder in (mixture, tmp_path / way))
        assert same_bytes(after.pop(name), nearest(before.pop(name).double() + change, torch.bfloat16))
        assert after.keys() == before.keys()
        assert all(same_bytes(after[other], before[other]) for other in before)
        assert config_in(tmp_path / way) == config_in(mixture)


def test_one_edited_expert_makes_those_of_its_layer_plain_unless_it_is_packed_anew(
    mixture: Path, tmp_path: Path
) -> None:
    """Servers hold the experts of a layer as one weight."""
    edited = f"{BLOCK}.mlp.experts.1.down_proj.weight"
    save_adapter(tmp_path / "adapter", edited)
    every = {*open_packed(mixture).weights}
    report = loratool.merge(mixture, tmp_path / "adapter", tmp_path / "out", device="cpu")
    assert {*open_packed(tmp_path / "out").weights} == {name for name in every if "layers.1" in name}
    (note,) = (note for note in report.notes if note.code == "siblings-plain")
    assert "experts.0" in str(note)
    assert loratool.verify(tmp_path / "out", mixture, tmp_path / "adapter", device="cpu").verdict == "proven"
    anew: dict[str, Any] = {"requantize": True, "accept_loss": True}
    loratool.merge(mixture, tmp_path / "adapter", tmp_path / "anew", device="cpu", **anew)
    assert {*open_packed(tmp_path / "anew").weights} == every


def test_the_weights_that_lose_most_by_packing_come_first(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "int4 groups", EDITED, *OTHERS)
    save_adapter(tmp_path / "adapter", EDITED, *OTHERS)
    anew: dict[str, Any] = {"requantize": True, "accept_loss": True, "weights": [STRONG]}
    report = loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cpu", **anew)
    worst = sorted(report.errors_added, key=lambda name: -report.errors_added[name])
    places = [str(report).index(f"{report.errors_added[name]:.3f}  {name}") for name in worst]
    assert len(places) == 3
    assert places == sorted(places)


def test_scales_of_what_stays_packed_keep_their_dtype(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "GPTQ 4 bits", EDITED, *OTHERS)
    save_adapter(tmp_path / "adapter", EDITED)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", device="cpu", dtype="float32")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after[EDITED].dtype == after[NORM].dtype == torch.float32
    assert after[f"{OTHERS[0].removesuffix('weight')}scales"].dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dequantize": True, "requantize": True}, "are mutually exclusive"),
        ({"requantize": True, "rounding": "stochastic"}, "--rounding cannot be used"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base", "int4 groups", EDITED)
    save_adapter(tmp_path / "adapter", EDITED)
    with pytest.raises(loratool.UsageError, match=told):
        loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", device="cpu", **options)


def test_a_plain_base_is_not_dequantised(tmp_path: Path) -> None:
    save_packed(tmp_path / "base", plain_weights(EDITED), None)
    with pytest.raises(loratool.UsageError, match="is not quantised"):
        loratool.merge(tmp_path / "base", [], tmp_path / "out", device="cpu", dequantize=True)


def test_a_dry_run_names_what_becomes_plain(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "int4 groups", EDITED, *OTHERS)
    save_adapter(tmp_path / "adapter", EDITED)
    plan = loratool.plan(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert plan.plain == (EDITED,)
    assert "stay as they are: 2" in str(plan)
    assert f"1 in BF16: {EDITED}" in str(plan)
    assert plan.to_dict()["plain"] == [EDITED]


def test_dora_takes_the_lengths_of_the_decoded_rows(tmp_path: Path) -> None:
    """W' = m · (W + BA) / ‖W + BA‖ by rows, in float64 of what the format means."""
    made = save_base(tmp_path / "base", "int4 groups", EDITED, *OTHERS)
    changes = save_adapter(tmp_path / "adapter", EDITED)
    lengths = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) + 0.5
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    module = f"base_model.model.{EDITED.removesuffix('.weight')}"
    save_file({**load_file(path), f"{module}.lora_magnitude_vector": lengths}, path)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", device="cpu")
    summed = made.values[EDITED].double() + changes[EDITED]
    wanted = lengths.double()[:, None] * summed / summed.norm(dim=1, keepdim=True)
    found = load_file(tmp_path / "out" / "model.safetensors")[EDITED]
    assert same_bytes(found, nearest(wanted, torch.bfloat16))


CODECS = ("fp8 blocks", "int4 groups", "modelopt NVFP4", "GPTQ 4 bits", "AWQ", "nf4", "bitsandbytes int8", "HQQ")


@pytest.mark.parametrize("kind", [*CODECS, "torchao int8", "quanto int8"])
def test_an_update_of_all_experts_goes_to_those_that_are_packed_one_by_one(kind: str, tmp_path: Path) -> None:
    """PEFT's factors of a stack: of expert e, rows e·r … of A and every E-th column of B from e on; gate is the upper half."""
    experts, middle, rank = 2, 24, 2
    layer, numbers = f"{BLOCK}.mlp.experts", torch.Generator().manual_seed(4)
    names = [f"{layer}.{e}.{part}_proj.weight" for e in range(experts) for part in ("gate", "up")]
    made = KINDS[kind]({name: torch.randn(middle, COLUMNS, generator=numbers) * 0.05 for name in names})
    model = {"model_type": "qwen3_moe", "num_experts": experts, "tie_word_embeddings": False}
    save_packed(tmp_path / "base", made.tensors, made.config, made.metadata, **model)
    for name, content in made.files.items():
        (tmp_path / "base" / name).write_text(json.dumps(content))
    down = torch.randn(experts * rank, COLUMNS, generator=numbers) / 4
    up = torch.randn(2 * middle, experts * rank, generator=numbers) / 4
    factors = {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up}
    targets = ["mlp.experts.gate_up_proj"]
    save_peft(tmp_path / "adapter", factors, r=rank, lora_alpha=rank, target_parameters=targets)
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {*names}
    for number, name in enumerate(names):
        e, half = number // 2, slice(middle * (number % 2), middle * (number % 2 + 1))
        change = up.double()[half, e::experts] @ down.double()[e * rank : (e + 1) * rank]
        assert same_bytes(found[name], nearest(made.values[name].double() + change, torch.bfloat16))


def test_an_update_of_an_embedding_makes_a_packed_one_plain(tmp_path: Path) -> None:
    """Its factors are the other way round: W + (B·A)ᵀ."""
    name = "model.embed_tokens.weight"
    made = save_base(tmp_path / "base", "torchao int8", name, EDITED)
    numbers = torch.Generator().manual_seed(5)
    down, up = torch.randn(2, ROWS, generator=numbers) / 4, torch.randn(COLUMNS, 2, generator=numbers) / 4
    module = "base_model.model.model.embed_tokens.lora_embedding_"
    save_peft(tmp_path / "adapter", {f"{module}A": down, f"{module}B": up}, r=2, lora_alpha=2)
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert same_bytes(found, nearest(made.values[name].double() + (up.double() @ down.double()).T, torch.bfloat16))
    assert {*open_packed(tmp_path / "out").weights} == {EDITED}


@pytest.mark.parametrize("requantize", [False, True])
def test_a_saved_head_takes_the_place_of_a_quantised_one(requantize: bool, tmp_path: Path) -> None:
    """It is written as it was saved, or goes into the format as whatever else is edited."""
    save_base(tmp_path / "base", "int8 packed, rows", "lm_head.weight", EDITED, *OTHERS)
    save_adapter(tmp_path / "adapter", EDITED)
    head = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)).bfloat16()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": head}, path)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    loratool.merge(
        tmp_path / "base",
        [tmp_path / "adapter"],
        tmp_path / "out",
        device="cpu",
        requantize=requantize,
        accept_loss=requantize,
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    packed = open_packed(tmp_path / "out").weights
    if requantize:
        assert {*packed} == {"lm_head.weight", EDITED, *OTHERS}
        stored = packed["lm_head.weight"].rows(0, ROWS, torch.device("cpu"), torch.float32, Room())
        assert (stored - head.float()).norm() < 0.01 * head.float().norm()  # 255 steps from the least to the largest
    else:
        assert {*packed} == {*OTHERS}
        assert same_bytes(found["lm_head.weight"], head)


@pytest.mark.parametrize("kind", ["int8 (W8A8)", "GPTQ 4 bits"])
def test_a_gain_that_noise_hides_is_told_as_how_small_the_update_is(kind: str, tmp_path: Path) -> None:
    """W₀ lies between values of BF16 and is rounded anyhow: none of that is the gain of an update 10⁹ times smaller.

    How many times a step is larger than ΔW is √12 times the error that rounding makes, over ‖ΔW‖.
    """
    made = save_base(tmp_path / "base", kind, EDITED, *OTHERS)
    change = 1e-9 * save_adapter(tmp_path / "adapter", EDITED)[EDITED]
    inputs = tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"
    plan = loratool.plan(*inputs, weights=[1e-9], device="cpu")
    report = loratool.merge(*inputs, weights=[1e-9], device="cpu")
    (note,) = (note for note in report.notes if note.code in ("gain-not-measurable", "update-lost-in-rounding"))
    assert (note.code, report.gain, report.gains) == ("gain-not-measurable", None, {})
    exact = made.values[EDITED].double()
    error = (nearest(exact, torch.bfloat16).double() - exact).norm() / change.norm()
    found = float(note.text.split("; the update is ")[1].split(" times")[0])
    assert found == pytest.approx(12**0.5 * float(error), rel=0.3)
    assert note in plan.notes
    assert plan.gain_forecast is None


@pytest.mark.parametrize(("kind", "other"), [("GPTQ 4 bits", "fp8 blocks"), ("fp8 blocks", "int4 groups")])
def test_a_model_is_not_called_dequantised_while_weights_of_another_kind_are_packed(
    kind: str, other: str, tmp_path: Path
) -> None:
    """A config has one kind. Weights of another one would stay packed in an output whose config says nothing of them."""
    made = save_base(tmp_path / "base", kind, EDITED)
    path = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(path), **KINDS[other](plain_weights(OTHERS[0])).tensors}, path)
    change = save_adapter(tmp_path / "adapter", EDITED)[EDITED]
    inputs = tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"
    with pytest.raises(loratool.InputError, match="cannot decode this") as caught:
        loratool.merge(*inputs, device="cpu", dequantize=True)
    assert OTHERS[0].removesuffix("weight") in str(caught.value)
    loratool.merge(*inputs, device="cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")[EDITED]
    assert same_bytes(found, nearest(made.values[EDITED].double() + change, torch.bfloat16))
