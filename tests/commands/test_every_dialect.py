"""Every command on every dialect, as a user would run it: what comes out means what the formulas of the tools say.

Files are made with safetensors, and outputs are read with it: ΔW of a module is worked out here, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from checkpoints import numbers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import read_adapter
from loratool.cli import run
from loratool.errors import FitError, InputError

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{Q.replace('.', '_')}"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
FLUX = "transformer.transformer_blocks.0.attn"


def lora(down: str, up: str, seed: int = 1, rows: int = 8, columns: int = 6) -> dict[str, Tensor]:
    return {down: numbers(2, columns, seed=seed), up: numbers(rows, 2, seed=seed + 50)}


def of_kohya(module: str, seed: int = 1, rows: int = 8, columns: int = 6, alpha: float | None = 1) -> dict[str, Tensor]:
    tensors = lora(f"{module}.lora_down.weight", f"{module}.lora_up.weight", seed, rows, columns)
    return tensors if alpha is None else {**tensors, f"{module}.alpha": torch.tensor(float(alpha))}


def of_peft(module: str, seed: int = 1, rows: int = 8, columns: int = 6) -> dict[str, Tensor]:
    return lora(f"{module}.lora_A.weight", f"{module}.lora_B.weight", seed, rows, columns)


@dataclass(frozen=True)
class File:
    tensors: Mapping[str, Tensor]
    module: str  # what outputs call the module
    dialect: str  # that inspect tells
    scale: float = 0.5  # of the factors, where no tensor holds α
    header: Mapping[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = (8, 6)


HADA = {f"hada_w{n}_{s}": numbers(*size, seed=n) for n in (1, 2) for s, size in (("a", (8, 2)), ("b", (2, 6)))}
FILES = {
    "kohya": File(of_kohya(KOHYA), KOHYA, "kohya"),
    "kohya without alpha": File(of_kohya(KOHYA, alpha=None), KOHYA, "kohya", 1.0),
    "text encoder": File(of_kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "lora_te1_text_model_encoder_layers_0_mlp_fc1", "kohya"),
    "convolution": File(
        {
            f"{CONV}.lora_down.weight": numbers(2, 4, 3, 3, seed=1),
            f"{CONV}.lora_up.weight": numbers(8, 2, 1, 1, seed=2),
            f"{CONV}.alpha": torch.tensor(1, dtype=torch.int64),
        },
        CONV,
        "kohya",
        shape=(8, 36),
    ),
    "wan-fun": File(of_kohya("lora_unet__blocks_0_cross_attn_k"), "lora_unet_blocks_0_cross_attn_k", "wan-fun"),
    "onetrainer": File(
        of_kohya("lora_transformer_transformer_blocks_0_attn_to_out_0"),
        "lora_unet_double_blocks_0_img_attn_proj",
        "onetrainer",
    ),
    "lycoris wrapper": File(
        of_kohya("lycoris_transformer_blocks_0_attn_to_q"), "lycoris_transformer_blocks_0_attn_to_q", "lycoris"
    ),
    "LoHa": File({**{f"{KOHYA}.{k}": v for k, v in HADA.items()}, f"{KOHYA}.alpha": torch.tensor(1.0)}, KOHYA, "lycoris"),
    "LoHa without alpha": File({f"{KOHYA}.{k}": v for k, v in HADA.items()}, KOHYA, "lycoris", 1.0),
    "LoKr": File(
        {
            f"{KOHYA}.lokr_w1": numbers(2, 2, seed=1),
            f"{KOHYA}.lokr_w2_a": numbers(4, 2, seed=2),
            f"{KOHYA}.lokr_w2_b": numbers(2, 3, seed=3),
            f"{KOHYA}.alpha": torch.tensor(1.0),
        },
        KOHYA,
        "lycoris",
    ),
    "LoKr of whole factors": File(
        {
            f"{KOHYA}.lokr_w1": numbers(2, 2, seed=1),
            f"{KOHYA}.lokr_w2": numbers(4, 3, seed=2),
            f"{KOHYA}.alpha": torch.tensor(99.0),
        },
        KOHYA,
        "lycoris",
        1.0,
    ),
    "diffusers": File(
        of_peft(f"unet.{Q}"),
        f"unet.{Q}",
        "diffusers",
        header={"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})},
    ),
    "diffusers without header": File(of_peft(f"unet.{Q}"), f"unet.{Q}", "diffusers", 1.0),
    "old diffusers": File(
        lora(
            f"unet.{Q[:-5]}.processor.to_q_lora.down.weight", f"unet.{Q[:-5]}.processor.to_q_lora.up.weight"
        ),
        f"unet.{Q}",
        "diffusers",
        1.0,
    ),
    "ai-toolkit": File(
        of_peft(f"{FLUX}.to_q"), f"{FLUX}.to_q", "ai-toolkit", 1.0, {"software": '{"name": "ai-toolkit"}'}
    ),
    "comfy": File(
        of_kohya("diffusion_model.double_blocks.0.img_attn.proj"), "diffusion_model.double_blocks.0.img_attn.proj", "comfy"
    ),
    "bfl": File(
        of_peft("final_layer.adaLN_modulation.1"), "diffusion_model.final_layer.adaLN_modulation.1", "bfl", 1.0
    ),
    "xlabs": File(
        lora("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight", rows=18),
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "xlabs",
        1.0,
        shape=(18, 6),
    ),
}  # fmt: skip


def saved(file: File, path: Path) -> Path:
    save_file(dict(file.tensors), path, dict(file.header) or None)
    return path


def meaning(tensors: Mapping[str, Tensor], module: str = "", scale: float | None = None) -> Tensor:
    """ΔW of a module as a matrix: α/r of its factors, by the formulas of kohya's tools and LyCORIS; 1 without α."""
    own = {name: tensor.double() for name, tensor in tensors.items() if name.startswith(module)}

    def role(*ends: str) -> Tensor | None:
        return next((tensor for name, tensor in own.items() if name.endswith(ends)), None)

    def product(up: str, down: str) -> Tensor:
        one, other = role(up), role(down)
        assert one is not None
        assert other is not None
        return one.flatten(1) @ other.flatten(1)

    rank, whole = 2, role("lokr_w2") is not None
    if role("hada_w1_a") is not None:
        change = product("hada_w1_a", "hada_w1_b") * product("hada_w2_a", "hada_w2_b")
    elif (first := role("lokr_w1")) is not None:
        second = role("lokr_w2") if whole else product("lokr_w2_a", "lokr_w2_b")
        assert second is not None
        change = torch.kron(first, second)
    else:
        ups, downs = ("up.weight", "lora_B.weight"), ("down.weight", "lora_A.weight")
        up, down = role(*ups), role(*downs)
        assert up is not None
        assert down is not None
        rank, change = down.shape[0], up.flatten(1) @ down.flatten(1)
    alpha = role("alpha")
    said = 1.0 if alpha is None or whole else float(alpha) / rank
    return (said if scale is None or whole else scale) * change


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_inspect_tells_the_dialect_and_what_it_would_find(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = FILES[name]
    path = saved(file, tmp_path / "lora.safetensors")
    assert run(["inspect", str(path), "--values", "--check", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["results"]
    assert told["format"] == file.dialect
    (module,) = told["values"]["modules"]
    assert module["norm"] == pytest.approx(float(meaning(file.tensors, scale=file.scale).norm()), rel=1e-5)
    assert run(["inspect", str(path), "--values", "--check"]) == 0
    assert file.dialect in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
def test_rescale_changes_the_strength_and_nothing_else(name: str, tmp_path: Path) -> None:
    """α takes the factor where there is one, else B or the first factor of LyCORIS; names and all other tensors stay."""
    file = FILES[name]
    path = saved(file, tmp_path / "lora.safetensors")
    loratool.rescale(path, tmp_path / "out", scale=3.0)
    after = tensors_in(tmp_path / "out")
    scale = file.scale if file.header else None
    close(meaning(after, scale=scale), 3 * meaning(file.tensors, scale=file.scale))
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, file.tensors.get(key, torch.zeros(())))}
    assert len(changed) == 1
    assert after.keys() - changed == file.tensors.keys() - changed
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as written:
        assert written.metadata().items() >= dict(file.header).items()


@pytest.mark.parametrize("name", FILES)
def test_resize_gives_the_nearest_update_in_the_same_dialect(name: str, tmp_path: Path) -> None:
    file = FILES[name]
    path = saved(file, tmp_path / "lora.safetensors")
    loratool.resize(path, tmp_path / "out", rank=1, device="cpu")
    after = tensors_in(tmp_path / "out")
    left, values, right = torch.linalg.svd(meaning(file.tensors, scale=file.scale), full_matrices=False)
    close(meaning(after, file.module), values[0] * left[:, :1] @ right[:1])
    assert all(key.startswith(f"{file.module}.") for key in after)
    base = based_on(tmp_path / "out", file, tmp_path / "base.safetensors")
    loratool.merge(base, tmp_path / "out", tmp_path / "merged", device="cpu")


def based_on(adapter: Path, file: File, path: Path) -> Path:
    """A base that has the module of an adapter."""
    (target,) = read_adapter(adapter).updates
    save_file({target: torch.zeros((8, 4, 3, 3) if file.shape == (8, 36) else file.shape)}, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_compare_and_combine_take_it(name: str, tmp_path: Path) -> None:
    file = FILES[name]
    path = saved(file, tmp_path / "lora.safetensors")
    whole = meaning(file.tensors, scale=file.scale)
    report = loratool.compare([path, path], device="cpu")
    (pair,) = report.totals.values()
    assert pair.cosine == pytest.approx(1)
    assert report.norms["lora"] == pytest.approx(float(whole.norm()), rel=1e-5)
    loratool.combine([path, path], tmp_path / "out", weights=[1, 0.5], normalize=False, device="cpu")
    close(meaning(tensors_in(tmp_path / "out"), file.module), 1.5 * whole)


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({f"{KOHYA}.weight": torch.ones(8), f"{KOHYA}.on_input": torch.tensor(0)}, "Scale"),
        ({f"{KOHYA}.oft_blocks": numbers(4, 2, 2, seed=1), f"{KOHYA}.alpha": torch.tensor(0.0)}, "RowRotation"),
    ],
    ids=["(IA)³", "OFT"],
)
def test_what_is_no_product_is_refused_with_the_way_out(
    tensors: dict[str, Tensor], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    for words in (["rescale", "--scale", "2"], ["resize", "--rank", "1"], ["combine"]):
        assert run([words[0], str(tmp_path / "a.safetensors"), *words[1:], "-o", str(tmp_path / "out")]) == 3
        told = capsys.readouterr().err
        assert word in told
        assert "loratool extract" in told


# Two dialects of one base


def in_flux(folder: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """One update of Flux as diffusers has it, with q, k and v apart, and as kohya's tools have it, in one layer."""
    parts = {part: of_peft(f"{FLUX}.to_{part}", seed=n, rows=6) for n, part in enumerate("qkv", 2)}
    tensors = {name: tensor for part in parts.values() for name, tensor in part.items()}
    save_file(tensors, folder / "diffusers.safetensors")
    downs, ups = ([t for name, t in tensors.items() if f"lora_{side}" in name] for side in "AB")
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    fused = {
        f"{module}.lora_down.weight": torch.cat(downs),
        f"{module}.lora_up.weight": torch.block_diag(*ups),  # type: ignore[no-untyped-call]
        f"{module}.alpha": torch.tensor(6.0),
    }
    save_file(fused, folder / "kohya.safetensors", {"ss_base_model_version": "flux1"})
    return folder / "kohya.safetensors", folder / "diffusers.safetensors", fused


def in_sd15(folder: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """The same of Stable Diffusion 1.5, with a projection that one has as a convolution, and α in other places."""
    q, proj = of_kohya(KOHYA, 3, 6, 6), of_kohya("lora_unet_mid_block_attentions_0_proj_in", 4, 6, 6)
    te = of_kohya("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 5, 6, 6)
    theirs: dict[str, Tensor] = {}
    for tensors, module in (
        (q, f"unet.{Q}"),
        (proj, "unet.mid_block.attentions.0.proj_in"),
        (te, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
    ):
        down, up, _ = tensors.values()
        theirs |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up * 0.5}
    name = "lora_unet_mid_block_attentions_0_proj_in.lora"
    proj[f"{name}_down.weight"] = proj[f"{name}_down.weight"][:, :, None, None]
    proj[f"{name}_up.weight"] = proj[f"{name}_up.weight"][:, :, None, None]
    save_file(theirs, folder / "diffusers.safetensors")
    save_file({**q, **proj, **te}, folder / "kohya.safetensors", {"ss_base_model_version": "sd_v1"})
    return folder / "kohya.safetensors", folder / "diffusers.safetensors", {**q, **proj, **te}


@pytest.mark.parametrize("make", [in_flux, in_sd15])
def test_one_update_in_two_dialects_is_equal_to_itself(make: object, tmp_path: Path) -> None:
    kohya, diffusers, _ = make(tmp_path)  # type: ignore[operator]
    for order in ([kohya, diffusers], [diffusers, kohya]):
        (pair,) = loratool.compare(order, device="cpu").totals.values()
        assert pair.cosine == pytest.approx(1, abs=1e-6)
        assert pair.norm_ratio == pytest.approx(1, abs=1e-6)
        assert not loratool.compare(order, device="cpu").alone


@pytest.mark.parametrize("make", [in_flux, in_sd15])
def test_two_dialects_are_combined_in_the_words_of_the_first(make: object, tmp_path: Path) -> None:
    kohya, diffusers, tensors = make(tmp_path)  # type: ignore[operator]
    loratool.combine(
        [kohya, diffusers], tmp_path / "out.safetensors", weights=[1, -0.25], normalize=False, device="cpu"
    )
    after = load_file(tmp_path / "out.safetensors")
    modules = {name.partition(".")[0] for name in tensors}
    assert {name.partition(".")[0] for name in after} == modules
    for module in modules:
        close(meaning(after, module), 0.75 * meaning(tensors, module))


def test_adapters_of_different_models_are_told_apart(tmp_path: Path) -> None:
    save_file(of_kohya("lora_unet_double_blocks_0_img_attn_proj"), tmp_path / "flux.safetensors")
    save_file(of_peft(f"unet.{Q}"), tmp_path / "sd.safetensors")
    adapters = [tmp_path / "flux.safetensors", tmp_path / "sd.safetensors"]
    with pytest.raises(FitError, match="belong to different models"):
        loratool.combine(adapters, tmp_path / "out", device="cpu")
    with pytest.raises(FitError, match="no architecture that is known"):
        loratool.compare(adapters, device="cpu")


# Rules for ranks

SPECTRUM = (1, 0.9, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001)


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        ({"energy": 0.9**2}, 2),  # sv_fro 0.9
        ({"energy": 0.99**2}, 4),
        ({"ratio": 4}, 3),  # values above a quarter of the first
        ({"ratio": 9}, 4),
        ({"cumulative": 0.9}, 4),  # of 2.811: 1, 1.9, 2.4, 2.65
        ({"cumulative": 0.85}, 3),
    ],
)
def test_rules_of_kohya_hold_their_definitions(rule: dict[str, float], rank: int, tmp_path: Path) -> None:
    """sv_fro p is the first n with Σ S²/Σ S² ≥ p², sv_ratio counts S > S₀/p, sv_cumulative is the first n with ΣS/ΣS ≥ p."""
    left, right = (torch.linalg.qr(numbers(12, 8, seed=seed).double())[0] for seed in (1, 2))
    tensors = {
        f"{KOHYA}.lora_up.weight": (left * torch.tensor(SPECTRUM, dtype=torch.float64)).float().contiguous(),
        f"{KOHYA}.lora_down.weight": right.mT.contiguous().float(),
        f"{KOHYA}.alpha": torch.tensor(8.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    loratool.resize(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", device="cpu", **rule)  # type: ignore[arg-type]
    assert load_file(tmp_path / "out.safetensors")[f"{KOHYA}.lora_down.weight"].shape[0] == rank


def test_ranks_of_their_own_are_worth_a_note_where_servers_take_one_rank_alone(tmp_path: Path) -> None:
    """Files of image models have a rank for each module; PEFT's config needs a pattern that some servers ignore."""
    one, other = of_kohya(KOHYA), of_kohya("lora_unet_mid_block_attentions_0_proj_in", 2)
    one = {name: tensor * (torch.tensor([[1.0], [0.0]]) if "lora_down" in name else 1) for name, tensor in one.items()}
    save_file({**one, **other}, tmp_path / "lora.safetensors")
    for dialect, told in ((None, False), ("peft", True)):
        out = tmp_path / f"out-{dialect}"
        report = loratool.resize(tmp_path / "lora.safetensors", out, energy=1.0, to=dialect, device="cpu")
        assert {layer.rank for layer in report.modules.values()} == {1, 2}
        assert ("ranks-differ" in {note.code for note in report.notes}) is told


def test_negative_strengths_turn_a_factor_and_keep_alpha_positive(tmp_path: Path) -> None:
    path = saved(FILES["kohya"], tmp_path / "lora.safetensors")
    loratool.rescale(path, tmp_path / "out.safetensors", scale=-2.0)
    after = load_file(tmp_path / "out.safetensors")
    close(meaning(after), -2 * meaning(FILES["kohya"].tensors))
    assert float(after[f"{KOHYA}.alpha"]) == 2


def test_alpha_is_set_for_every_module_whatever_its_method(tmp_path: Path) -> None:
    for name in ("kohya", "kohya without alpha", "LoHa", "LoKr"):
        path = saved(FILES[name], tmp_path / "lora.safetensors")
        loratool.rescale(path, tmp_path / "out.safetensors", alpha=3.0, overwrite=True)
        close(meaning(load_file(tmp_path / "out.safetensors")), meaning(FILES[name].tensors, scale=1.5))
    path = saved(FILES["LoKr of whole factors"], tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="has no alpha; pass --scale"):
        loratool.rescale(path, tmp_path / "out.safetensors", alpha=3.0, overwrite=True)


def test_changes_in_full_are_rescaled_and_carried_but_not_combined(tmp_path: Path) -> None:
    tensors = {**of_kohya(KOHYA), f"{CONV}.diff": numbers(8, 4, 3, 3, seed=9), f"{CONV}.diff_b": numbers(8, seed=8)}
    save_file(tensors, tmp_path / "lora.safetensors")
    report = loratool.rescale(tmp_path / "lora.safetensors", tmp_path / "scaled.safetensors", scale=2.0)
    assert "changes        × 2 in 2 stored in full" in str(report)
    loratool.rescale(tmp_path / "lora.safetensors", tmp_path / "baked.safetensors", scale=2.0, bake=True)
    loratool.resize(tmp_path / "lora.safetensors", tmp_path / "resized.safetensors", rank=1, device="cpu")
    for name, factor in (("scaled", 2), ("baked", 2), ("resized", 1)):
        after = load_file(tmp_path / f"{name}.safetensors")
        for role in ("diff", "diff_b"):
            assert torch.equal(after[f"{CONV}.{role}"], factor * tensors[f"{CONV}.{role}"])
    with pytest.raises(FitError, match="stored in full"):
        loratool.combine([tmp_path / "lora.safetensors"], tmp_path / "out", device="cpu")
