"""`combine` on adapters that PEFT saved: PEFT loads every result, and it does what the formula Σ w·ΔW says."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import BOTH, EXPERTS, FUSED, HIDDEN, INPUTS, Layers
from oracle import read_tensors
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft_files import edit_config
from peft_zoo import TOKENS, make_zoo, output_of, save_base, shake
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
START = "base_model.model."
# c_attn is a Conv1D, which makes PEFT take the projection of an attention after it for one that is stored (in, out)
ALL = ["embed", "linear", "attention", "square", "conv1", "conv2", "conv3"]
OTHERS = ["embed", "linear", "c_attn", "square", "conv1", "conv2", "conv3"]
DOUBLED = "attention.base_layer.out_proj"


def adapt(
    folder: Path, model: nn.Module, seed: int, fill: Callable[[nn.Module], None] | None = None, **config: Any
) -> Path:
    """An adapter for `model` as PEFT saves it, with random values in everything that is trained."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**config)).eval()
    shake(wrapped, seed, 0.2)
    if fill:
        fill(wrapped)
    wrapped.save_pretrained(folder)
    return folder


def loaded(folder: Path, model: nn.Module) -> nn.Module:
    """`model` with the adapter, of which PEFT finds every tensor and leaves none over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), PeftConfig.from_pretrained(folder)).eval()
        found = load_peft_weights(folder, device="cpu")
        wanted = get_peft_model_state_dict(wrapped)
        assert set(found) == set(wanted)
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}
        result = set_peft_model_state_dict(wrapped, found)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return wrapped  # type: ignore[no-any-return,unused-ignore]


def changes(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """ΔW of every weight by the formula in float64; the scaling is what PEFT's own layer says."""
    wrapped = loaded(folder, model)
    scales = {name: m.scaling["default"] for name, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    found = {}
    for name, stored in tensors.items():
        if not name.endswith((".lora_A.weight", ".lora_embedding_A")):
            continue
        path = name.removesuffix(".weight").rpartition(".lora_")[0]
        other = name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        down, up = stored.double(), tensors[other].double()
        module = path.removeprefix(START)
        inside = module.replace(".base_layer", "")
        target = f"{inside}.in_proj_weight" if f"{inside}.in_proj_weight" in weights else f"{inside}.weight"
        weight = weights[target]
        change = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
        if change.shape != weight.reshape(weight.shape[0], -1).shape or "embedding" in name or inside == "c_attn":
            change = change.T
        found[target] = scales[path] * (2 if module == DOUBLED else 1) * change.reshape(weight.shape)
    return found


def added_up(adapters: Sequence[Path], weights: Sequence[float], model: nn.Module) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, weight in zip(adapters, weights, strict=True):
        for target, change in changes(folder, model).items():
            total[target] = total.get(target, torch.zeros_like(change)) + weight * change
    return total


def assert_sum(
    out: Path, adapters: Sequence[Path], weights: Sequence[float], model: nn.Module, inputs: Tensor = TOKENS
) -> None:
    """The result is Σ w·ΔW, in its factors, in PEFT's forward, and in a merge."""
    wanted = added_up(adapters, weights, model)
    found = changes(out, model)
    assert set(found) == set(wanted)
    for target, change in wanted.items():
        torch.testing.assert_close(found[target], change, rtol=0, atol=1e-6 * float(change.abs().max()))
    assert_merged_alike(out, adapters, weights, model)
    moved = {name: t.double() + wanted.get(name, 0.0) for name, t in model.state_dict().items()}
    with torch.inference_mode():
        output = loaded(out, model)(inputs)
    expected = output_of(
        moved, copy.deepcopy(model).double(), inputs if inputs.dtype == torch.int64 else inputs.double()
    )
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5)


def assert_merged_alike(out: Path, adapters: Sequence[Path], weights: Sequence[float], model: nn.Module) -> None:
    """Merging the result is merging all that went in."""
    base = out.parent / "base"
    if not base.exists():
        save_base(base, model)
    loratool.merge(base, [out], out.parent / f"{out.name}-merged")
    loratool.merge(base, list(adapters), out.parent / f"{out.name}-both", weights=list(weights))
    one, both = (read_tensors(out.parent / f"{out.name}-{end}") for end in ("merged", "both"))
    assert set(one) == set(both)
    for name, tensor in both.items():
        torch.testing.assert_close(one[name], tensor, rtol=2e-6, atol=2e-6)


# ---- layers of every kind ----

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same modules": ({"r": 2, "target_modules": ALL}, {"r": 2, "target_modules": ALL}),
    "layers of GPT-2": ({"r": 2, "target_modules": OTHERS}, {"r": 3, "target_modules": OTHERS}),
    "other ranks": ({"r": 2, "target_modules": ALL}, {"r": 3, "lora_alpha": 2, "target_modules": ALL}),
    "rsLoRA in one": (
        {"r": 2, "target_modules": ALL},
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ALL},
    ),
    "modules missing from either": (
        {"r": 2, "target_modules": ["embed", "linear", "conv2", "square"]},
        {"r": 2, "target_modules": ["linear", "conv1", "c_attn", "conv3"]},
    ),
    "patterns": (
        {"r": 2, "target_modules": ALL, "rank_pattern": {"linear": 4, "conv2": 1}, "alpha_pattern": {"square": 5}},
        {"r": 2, "target_modules": ALL, "alpha_pattern": {"embed": 3, "attention": 7, "conv.": 1}},
    ),
    "a regular expression": (
        {"r": 2, "target_modules": "conv[12]|linear"},
        {"r": 2, "target_modules": ["conv1", "conv3"]},
    ),
    "an attention in one": ({"r": 2, "target_modules": ["attention"]}, {"r": 3, "target_modules": ["linear"]}),
}


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_every_kind_are_added_up(tmp_path: Path, name: str) -> None:
    model, weights = make_zoo(), [0.8, -1.5]
    each = [adapt(tmp_path / f"in{at}", model, at + 1, **config) for at, config in enumerate(KINDS[name])]
    loratool.combine(each, tmp_path / "out", weights=weights)
    assert_sum(tmp_path / "out", each, weights, model)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("svd", {}),
    ("slerp", {}),
    ("nuslerp", {"row_wise": True}),
    ("karcher", {}),
    *((name, {"space": space}) for name in ("ties", "dare_ties", "sce") for space in ("dense", "core", "knots")),
    ("della", {}),
    ("breadcrumbs", {"rank": 3}),
    ("tsv", {"svc": True}),
    ("iso_c", {"iso_beta": 0.5}),
    ("iso_cts", {}),
    ("linear", {"rank": 3, "rank_policy": "ctm"}),
    ("linear-factors", {}),
    ("ties-factors", {}),
]


@pytest.mark.parametrize(("method", "dials"), METHODS)
def test_peft_loads_the_result_of_every_method(tmp_path: Path, method: str, dials: dict[str, Any]) -> None:
    """And runs it as the merged model runs: layers of other ranks each have their own."""
    model = make_zoo()
    each = [adapt(tmp_path / name, model, at, r=3, target_modules=ALL) for at, name in enumerate("ab")]
    report = loratool.combine(each, tmp_path / "out", method=method, **dials)
    wrapped = loaded(tmp_path / "out", model)
    base = save_base(tmp_path / "base", model)
    loratool.merge(base, [tmp_path / "out"], tmp_path / "merged")
    with torch.inference_mode():
        output = wrapped(TOKENS)
    merged = output_of(read_tensors(tmp_path / "merged"), model)
    torch.testing.assert_close(output, merged, rtol=0, atol=2e-5 * max(1.0, float(merged.abs().max())))
    # the norms that the report tells are those that PEFT has
    for target, change in changes(tmp_path / "out", model).items():
        assert float(change.norm()) == pytest.approx(report.modules[target].norm, rel=1e-5)


def test_the_doubled_projection_of_an_attention_stays_what_its_release_makes_of_it(tmp_path: Path) -> None:
    """PEFT up to 0.21.2 applies it twice. A later adapter is stored for the first one's release."""
    model = make_zoo()
    each = [adapt(tmp_path / name, model, at + 1, r=2, target_modules=["attention"]) for at, name in enumerate("ab")]
    base = save_base(tmp_path / "base", model)
    edit_config(each[1], peft_version="0.99.0")
    loratool.merge(base, each, tmp_path / "both")
    for name, order in (("old", each), ("new", each[::-1])):
        loratool.combine(order, tmp_path / name)
        loratool.merge(base, [tmp_path / name], tmp_path / f"{name}-merged")
        for tensor, wanted in zip(
            read_tensors(tmp_path / f"{name}-merged").values(), read_tensors(tmp_path / "both").values(), strict=True
        ):
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=2e-6)


def test_a_trained_bias_inside_an_attention_is_found_again_by_peft(tmp_path: Path) -> None:
    model = make_zoo()
    one, other = (
        adapt(tmp_path / name, model, at + 1, r=2, target_modules=["attention"], bias="lora_only")
        for at, name in enumerate("ab")
    )
    loratool.combine([one, other], tmp_path / "out", saved="first")
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, tmp_path / "out"))
    biases = {name for name in wanted if name.endswith("bias")}
    assert biases
    assert biases == {name for name in found if name.endswith("bias")}
    assert all(torch.equal(found[name], wanted[name]) for name in biases)
    loaded(tmp_path / "out", model)


# ---- what PEFT combines itself ----


def both_in_peft(tmp_path: Path, targets: list[str], ranks: Sequence[int] = (3, 3)) -> tuple[Any, list[Path]]:
    """A model with two adapters, and the folders that PEFT saves them in."""
    torch.manual_seed(1)
    wrapped = get_peft_model(
        make_zoo(), LoraConfig(r=ranks[0], lora_alpha=5, target_modules=targets), adapter_name="one"
    )
    wrapped.add_adapter("other", LoraConfig(r=ranks[1], lora_alpha=4, target_modules=targets, use_rslora=False))
    for name in ("one", "other"):
        wrapped.set_adapter(name)
        shake(wrapped, len(name), 0.2)
    wrapped.save_pretrained(tmp_path / "in")
    return wrapped.eval(), [tmp_path / "in" / "one", tmp_path / "in" / "other"]


def of_peft(wrapped: Any) -> dict[str, Tensor]:
    """ΔW of the adapter that PEFT made."""
    found = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "get_delta_weight") and "made" in getattr(module, "scaling", {}):
            found[f"{name.removeprefix(START)}.weight"] = module.get_delta_weight("made").detach()
    return found


PARITY = ["embed", "linear", "square", "conv2"]
FACTORS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {}),
    ("ties", {"density": 0.6}, {}),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}, {"sign": "frequency"}),
    ("ties", {"density": 1.0}, {}),
    ("magnitude_prune", {"density": 0.4}, {}),
]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.6], [-0.2, -0.5]])
@pytest.mark.parametrize(("kind", "peft_dials", "dials"), FACTORS)
def test_methods_on_factors_are_pefts(
    tmp_path: Path, kind: str, peft_dials: dict[str, Any], dials: dict[str, Any], weights: list[float]
) -> None:
    wrapped, each = both_in_peft(tmp_path, PARITY)
    wrapped.add_weighted_adapter(["one", "other"], weights, "made", combination_type=kind, **peft_dials)
    if "density" in peft_dials:
        dials = {**dials, "density": peft_dials["density"]}
    loratool.combine(each, tmp_path / "out", method=f"{kind}-factors", weights=weights, **dials)
    wanted, found = of_peft(wrapped), changes(tmp_path / "out", make_zoo())
    assert set(found) == set(wanted)
    for target, change in wanted.items():
        torch.testing.assert_close(found[target].float(), change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.6]])
@pytest.mark.parametrize("kind", ["cat", "svd", "svd of rank 2"])
def test_cat_and_svd_are_pefts(tmp_path: Path, kind: str, weights: list[float]) -> None:
    wrapped, each = both_in_peft(tmp_path, PARITY if kind != "cat" else ["embed", "linear", "square"], (2, 4))
    method, rank = kind.split()[0], 2 if "rank" in kind else None
    dials = {"svd_rank": rank} if rank else {}
    wrapped.add_weighted_adapter(["one", "other"], weights, "made", combination_type=method, **dials)
    loratool.combine(each, tmp_path / "out", method=method, weights=weights, rank=rank)
    wanted, found = of_peft(wrapped), changes(tmp_path / "out", make_zoo())
    assert set(found) == set(wanted)
    for target, change in wanted.items():
        torch.testing.assert_close(found[target].float(), change, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_one_adapter_is_itself_where_pefts_is_not(tmp_path: Path, config: dict[str, Any]) -> None:
    """huggingface/peft #3761: √r too strong, biases lost, magnitudes made anew."""
    model = make_zoo()
    given = adapt(tmp_path / "in", model, 4, r=4, target_modules=["linear", "conv2"], **config)
    loratool.combine(given, tmp_path / "out")
    with torch.inference_mode():
        output = loaded(tmp_path / "out", model)(TOKENS)
        wanted = loaded(given, model)(TOKENS)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-5)


# ---- what stands beside the factors ----


def outputs(model: nn.Module, folder: Path) -> Tensor:
    """What PEFT says with the adapter, which a merge says too."""
    base = folder.parent / "base"
    if not base.exists():
        save_base(base, model)
    loratool.merge(base, [folder], folder.parent / f"{folder.name}-merged")
    with torch.inference_mode():
        found: Tensor = loaded(folder, model)(TOKENS)
    merged = output_of(read_tensors(folder.parent / f"{folder.name}-merged"), model)
    torch.testing.assert_close(found, merged, rtol=0, atol=2e-5)
    return found


def test_biases_of_some_adapters_are_added_up(tmp_path: Path) -> None:
    model, weights = make_zoo(), [0.8, -1.5, 0.6]
    each = [
        adapt(tmp_path / "a", model, 1, r=2, target_modules=["linear", "conv1"], lora_bias=True),
        adapt(tmp_path / "b", model, 2, r=3, target_modules=["linear", "conv2"]),
        adapt(tmp_path / "c", model, 3, r=3, target_modules=["linear"], use_rslora=True, lora_bias=True),
    ]
    loratool.combine(each, tmp_path / "out", weights=weights)
    assert_merged_alike(tmp_path / "out", each, weights, model)
    with torch.inference_mode():
        output = loaded(tmp_path / "out", model)(TOKENS)
    torch.testing.assert_close(output, output_of(read_tensors(tmp_path / "out-merged"), model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("other", ["square", "c_attn"], ids=["a layer without a bias", "a Conv1D"])
def test_biases_beside_layers_that_have_none_are_zeros(tmp_path: Path, other: str) -> None:
    model = make_zoo()
    each = [
        adapt(tmp_path / "a", model, 1, r=2, target_modules=["linear"], lora_bias=True),
        adapt(tmp_path / "b", model, 2, r=2, target_modules=["linear", other]),
    ]
    loratool.combine(each, tmp_path / "out")
    outputs(model, tmp_path / "out")


def test_biases_beside_an_embedding_are_refused(tmp_path: Path) -> None:
    """PEFT has no lora_bias there."""
    model = make_zoo()
    each = [
        adapt(tmp_path / "a", model, 1, r=2, target_modules=["linear"], lora_bias=True),
        adapt(tmp_path / "b", model, 2, r=2, target_modules=["linear", "embed"]),
    ]
    with pytest.raises(loratool.FitError, match=r"(?s)lora_bias.*embed\.weight"):
        loratool.combine(each, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SAVED: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["head"]},
    "two of them": {"modules_to_save": ["head", "norm"]},
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "token rows": {"trainable_token_indices": {"embed": [3, 7]}},
}


def same_beside(model: nn.Module, seed: int) -> Callable[[nn.Module], None]:
    """Gives all that is trained beside the factors the same values for every adapter."""

    def fill(wrapped: nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(wrapped.named_parameters()):
                if parameter.requires_grad and "lora_" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    return fill


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_beside_the_factors_stays_where_adapters_agree_about_it(tmp_path: Path, name: str) -> None:
    model, targets = make_zoo(), ["linear", "conv1"]
    fill = same_beside(model, 5)
    each = [
        adapt(tmp_path / n, model, at + 1, fill, r=2, target_modules=targets, **SAVED[name])
        for at, n in enumerate("ab")
    ]
    without = adapt(tmp_path / "c", model, 3, r=3, target_modules=["linear", "square"])
    beside = {n: t for n, t in load_file(each[0] / "adapter_model.safetensors").items() if "lora_" not in n}
    assert beside
    for at, chosen in enumerate((each, [each[0], without], [without, each[1]])):
        loratool.combine(chosen, tmp_path / f"out{at}")
        found = load_file(tmp_path / f"out{at}" / "adapter_model.safetensors")
        kept = {n: t for n, t in found.items() if "lora_" not in n}
        assert set(beside) <= set(kept)
        assert all(torch.equal(kept[n], t) for n, t in beside.items())
        outputs(model, tmp_path / f"out{at}")


@pytest.mark.parametrize("name", SAVED)
def test_what_adapters_saved_differently_is_refused_or_decided(tmp_path: Path, name: str) -> None:
    model, targets = make_zoo(), ["linear", "conv1"]
    each = [
        adapt(tmp_path / n, model, at + 1, same_beside(model, at), r=2, target_modules=targets, **SAVED[name])
        for at, n in enumerate("ab")
    ]
    with pytest.raises(loratool.FitError, match="--saved first or --saved mean"):
        loratool.combine(each, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = [load_file(folder / "adapter_model.safetensors") for folder in each]
    for policy, shares in (("first", (1.0, 0.0)), ("mean", (0.25, 0.75))):
        loratool.combine(each, tmp_path / policy, saved=policy, weights=[0.5, 1.5])
        found = load_file(tmp_path / policy / "adapter_model.safetensors")
        for tensor in (n for n in before[0] if "lora_" not in n):
            wanted = shares[0] * before[0][tensor] + shares[1] * before[1][tensor]
            torch.testing.assert_close(found[tensor], wanted)
        outputs(model, tmp_path / policy)


# ---- parameters of experts ----


def expert_changes(model: nn.Module, adapter: Path, out: Path) -> dict[str, Tensor]:
    """What a merge by PEFT changes."""
    wrapped = loaded(adapter, model)
    merged: Any = wrapped.merge_and_unload()  # type: ignore[operator]
    before = model.state_dict()
    return {n: t.double() - before[n].double() for n, t in merged.state_dict().items() if not torch.equal(t, before[n])}


def experts(
    tmp_path: Path, *targets: list[str], sizes: Any = FUSED, transposed: bool = False
) -> tuple[Layers, list[Path]]:
    torch.manual_seed(5)
    model = Layers(sizes, transposed).eval()
    each = [
        adapt(tmp_path / f"in{at}", model, at + 1, r=at + 2, lora_alpha=3, target_modules=[], target_parameters=found)
        for at, found in enumerate(targets)
    ]
    return model, each


@pytest.mark.parametrize(
    "targets",
    [
        (BOTH, BOTH),
        (["experts.down_proj"], BOTH),
        (BOTH, ["experts.gate_up_proj"]),
        (["experts.down_proj"], ["experts.gate_up_proj"]),
        (["layers.0.experts.down_proj"], ["experts.down_proj"]),
    ],
    ids=["both in both", "one in the first", "one in the second", "one each", "one layer"],
)
def test_parameters_of_experts_are_added_up_whatever_their_nesting(tmp_path: Path, targets: Any) -> None:
    model, each = experts(tmp_path, *targets)
    weights = [0.8, -1.5]
    loratool.combine(each, tmp_path / "out", weights=weights)
    parts = [expert_changes(model, folder, tmp_path) for folder in each]
    found = expert_changes(model, tmp_path / "out", tmp_path)
    assert set(found) == set(parts[0]) | set(parts[1])
    for name, change in found.items():
        wanted = sum(w * p[name] for w, p in zip(weights, parts, strict=True) if name in p)
        torch.testing.assert_close(change, wanted, rtol=0, atol=2e-6)
    assert_merged_alike(tmp_path / "out", each, weights, model)


@pytest.mark.parametrize("method", ["ties", "tsv", "karcher", "svd", "dare_linear", "iso_c"])
def test_each_expert_is_a_weight_of_its_own(tmp_path: Path, method: str) -> None:
    model, each = experts(tmp_path, BOTH, BOTH)
    report = loratool.combine(each, tmp_path / "out", method=method, rank=3)
    found = expert_changes(model, tmp_path / "out", tmp_path)
    for name, change in found.items():
        assert change.shape[0] == EXPERTS
        assert max(int(torch.linalg.matrix_rank(matrix, rtol=1e-4)) for matrix in change) <= 3
        assert float(change.norm()) == pytest.approx(report.modules[name].norm, rel=1e-4)
        assert 0 <= report.modules[name].error < 1


def test_the_error_of_experts_is_that_of_all_together(tmp_path: Path) -> None:
    model, each = experts(tmp_path, BOTH, BOTH)
    for policy in ("truncate", "ctm"):
        report = loratool.combine(each, tmp_path / policy, rank=2, rank_policy=policy)
        parts = [expert_changes(model, folder, tmp_path) for folder in each]
        for name, change in expert_changes(model, tmp_path / policy, tmp_path).items():
            whole = parts[0][name] + parts[1][name]
            error = float((change - whole).norm() / whole.norm())
            assert report.modules[name].error == pytest.approx(error, rel=1e-4)


def turned(folder: Path, to: Path, version: str, *parameters: str) -> Path:
    """The same adapter as PEFT before 0.19.1 stores it: A acts on the other side.

    Of `parameters` with two of them adapted, the first registered stands inside.
    """
    found = load_file(folder / "adapter_model.safetensors")
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    after = dict(found)
    for name, down in found.items():
        if ".lora_A." in name:
            other = name.replace("lora_A", "lora_B")
            a = down.reshape(EXPERTS, rank, -1)
            b = found[other].reshape(-1, rank, EXPERTS)
            after[name] = b.permute(2, 1, 0).reshape(EXPERTS * rank, -1).contiguous()
            after[other] = a.permute(2, 1, 0).reshape(-1, rank * EXPERTS).contiguous()
    to.mkdir()
    save_file(after, to / "adapter_model.safetensors")
    (to / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    edit_config(to, peft_version=version)
    return to


SQUARE = {"gate_up_proj": (EXPERTS, 2 * HIDDEN, HIDDEN), "down_proj": (EXPERTS, HIDDEN, HIDDEN)}


@pytest.mark.parametrize("sizes", [FUSED, SQUARE], ids=["not square", "one of them square"])
@pytest.mark.parametrize("old", [0, 1])
def test_factors_that_an_old_release_swapped_meet_those_of_a_new_one(tmp_path: Path, sizes: Any, old: int) -> None:
    model, each = experts(tmp_path, BOTH, BOTH, sizes=sizes)
    loratool.combine(each, tmp_path / "wanted")
    mixed = list(each)
    mixed[old] = turned(each[old], tmp_path / "old", "0.18.1")
    loratool.combine(mixed, tmp_path / "out")
    base = save_base(tmp_path / "base", model)
    (base / "config.json").write_text('{"model_type": "mixtral"}')
    for name in ("wanted", "out"):
        loratool.merge(base, [tmp_path / name], tmp_path / f"{name}-merged")
    one, other = (read_tensors(tmp_path / f"{name}-merged") for name in ("out", "wanted"))
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=2e-6, atol=2e-6)


GPT_OSS = {"gate_up_proj": (EXPERTS, HIDDEN, 2 * HIDDEN), "down_proj": (EXPERTS, HIDDEN, HIDDEN)}


def test_square_experts_of_a_class_that_no_release_swapped_are_not_swapped(tmp_path: Path) -> None:
    """gpt-oss: 0.18 and 0.21 store it alike, which gate_up_proj shows; down_proj is square."""
    _, each = experts(tmp_path, BOTH, BOTH, sizes=GPT_OSS, transposed=True)
    loratool.combine(each, tmp_path / "wanted")
    edit_config(each[1], peft_version="0.18.1")
    loratool.combine(each, tmp_path / "out")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "wanted"))
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor)


def test_square_experts_that_nothing_tells_about_are_refused(tmp_path: Path) -> None:
    _, each = experts(tmp_path, ["experts.down_proj"], ["experts.down_proj"], sizes=SQUARE)
    loratool.combine(each, tmp_path / "same-release")
    edit_config(each[1], peft_version="0.18.1")
    with pytest.raises(loratool.FitError, match=r"(?s)layers\.0\.experts\.down_proj.*0\.18\.1"):
        loratool.combine(each, tmp_path / "out")


def test_biases_beside_parameters_are_refused(tmp_path: Path) -> None:
    """PEFT has no lora_bias there."""
    model, each = experts(tmp_path, BOTH)
    each.append(adapt(tmp_path / "b", model, 7, r=2, target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(loratool.FitError, match=r"(?s)lora_bias.*experts\.down_proj"):
        loratool.combine(each, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_beside_layers_are_added_up(tmp_path: Path) -> None:
    model, each = experts(tmp_path, BOTH)
    each.append(adapt(tmp_path / "b", model, 7, r=3, target_modules=["q_proj", "gate"]))
    loratool.combine(each, tmp_path / "out", weights=[2, -1])
    with torch.inference_mode():
        assert bool(loaded(tmp_path / "out", model)(INPUTS).isfinite().all())
    assert_merged_alike(tmp_path / "out", each, [2, -1], model)


# ---- what the config says ----


class Blocks(nn.Module):
    """Three layers of two modules each."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(6, 8), "down_proj": nn.Linear(8, 6)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.model.layers
        for layer in layers:
            x = x + layer["down_proj"](torch.tanh(layer["up_proj"](x)))
        return x


LIMITED: dict[str, list[dict[str, Any]]] = {
    "other layers": [
        {"target_modules": ["up_proj"], "layers_to_transform": [0]},
        {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1, 2]},
    ],
    "the same layers": [
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    ],
    "one is limited": [
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["down_proj"]},
    ],
    "something is left out": [
        {"target_modules": ["up_proj", "down_proj"], "exclude_modules": ["layers.0.up_proj"]},
        {"target_modules": ["up_proj"], "layers_to_transform": 2},
    ],
    "all linear layers": [{"target_modules": "all-linear"}, {"target_modules": ["up_proj"]}],
    "whole names": [{"target_modules": ["layers.0.up_proj"]}, {"target_modules": ["layers.2.up_proj"]}],
    "expressions": [{"target_modules": r".*\.0\.up_proj"}, {"target_modules": r".*\.[12]\.down_proj"}],
}


def adapted(wrapped: nn.Module) -> set[str]:
    return {name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("name", LIMITED)
def test_what_peft_adapts_with_the_result_is_what_any_adapter_adapts(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    model, x = Blocks().eval(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    each = [adapt(tmp_path / f"in{at}", model, at, r=2, **config) for at, config in enumerate(LIMITED[name])]
    loratool.combine(each, tmp_path / "out", weights=[1, -0.5])
    wrapped = loaded(tmp_path / "out", model)
    assert adapted(wrapped) == set[str]().union(*(adapted(loaded(folder, model)) for folder in each))
    assert_sum(tmp_path / "out", each, [1, -0.5], model, x)
