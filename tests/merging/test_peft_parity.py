"""Merged models against PEFT's own merge, against the float64 formula, and as transformers runs them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matrix_models import why_not_here
from oracle import (
    assert_exact_merge,
    exact_merge,
    nearest,
    picture,
    raw_tensors,
    read_tensors,
    same_bits,
    steps,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft_files import edit_config
from tiny_models import (
    FAMILIES,
    LAYERS,
    RENAMED,
    Case,
    Family,
    adapt,
    build_base,
    build_case,
    is_conv1d,
    llama_config,
    load,
    output_of,
    randomise,
    rename_keys,
)

import loratool
from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LLAMA = FAMILIES["llama"]
HALVES = [torch.bfloat16, torch.float16]


def assert_like_peft(merged: Path, by_peft: Path) -> None:
    """Every float32 tensor is within 1e-6 of its largest value of what PEFT saved."""
    ours, theirs = read_tensors(merged), read_tensors(by_peft)
    assert set(ours) == set(theirs)
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype
        error = float((ours[name] - wanted).abs().max())
        assert error <= 1e-6 * float(wanted.abs().max()), f"{name}: off by {error}"


def assert_speaks_like(merged: Path, case: Case) -> None:
    """transformers loads the merged model whole, and it says what the unmerged adapter said."""
    found = output_of(load(case.family, merged), case.family.inputs())
    largest = float(case.unmerged.abs().max())
    assert float((found - case.unmerged).abs().max()) <= 1e-5 * largest
    assert float((case.plain - case.unmerged).abs().max()) > 0.01 * largest, "the adapter says nothing"


# -- every family ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case(tmp_path_factory.mktemp("family"), FAMILIES[request.param])


@pytest.fixture(scope="module")
def merged(case: Case) -> Path:
    out = case.base.parent / "merged"
    report = loratool.merge(case.base, [case.adapter], out)
    assert report.edited == case.family.edited
    assert report.edited + report.copied == len(raw_tensors(case.base))
    return out


def test_every_tensor_is_what_peft_saves_after_its_own_merge(case: Case, merged: Path) -> None:
    assert_like_peft(merged, case.by_peft)


def test_every_tensor_is_the_float64_formula_rounded_once(case: Case, merged: Path) -> None:
    base = read_tensors(case.base)
    exact = exact_merge(base, (case.adapter, 1.0), name=case.family.on_disk, in_out=case.family.in_out)
    assert len(exact) == case.family.edited
    assert_exact_merge(merged, base, exact)


def test_transformers_runs_the_merged_model_as_peft_runs_the_adapter(case: Case, merged: Path) -> None:
    assert_speaks_like(merged, case)


def test_output_has_the_shards_and_the_index_of_the_base(case: Case, merged: Path) -> None:
    before = {p.name for p in case.base.iterdir()}
    assert {p.name for p in merged.iterdir()} == before | {"README.md", "loratool.json"}
    for name in before - {p.name for p in case.base.glob("*.safetensors")}:
        assert (merged / name).read_bytes() == (case.base / name).read_bytes()


def test_taking_the_adapter_out_again_returns_to_the_base_within_rounding(case: Case, merged: Path) -> None:
    out = case.base.parent / "unmerged"
    if case.family.targets.get("modules_to_save"):  # what was replaced is gone
        with pytest.raises(loratool.FitError, match=r"classifier\.weight.*cannot undo"):
            loratool.merge(merged, [case.adapter], out, weights=[-1.0])
        return
    report = loratool.merge(merged, [case.adapter], out, weights=[-1.0])
    assert "not-taken-out" not in {note.code for note in report.notes}
    after = read_tensors(out)
    for name, before in read_tensors(case.base).items():
        assert float((after[name] - before).abs().max()) <= 1e-6 * max(1.0, float(before.abs().max())), name


@pytest.mark.parametrize("name", RENAMED)
def test_modules_that_transformers_renames_in_memory_are_found_by_their_names_on_disk(
    tmp_path: Path, name: str
) -> None:
    if reason := why_not_here(name):
        pytest.skip(reason)
    case = build_case(tmp_path, RENAMED[name])
    disk, memory = set(raw_tensors(case.base)), {key.partition(".lora_")[0] for key in read_tensors(case.adapter)}
    assert not {f"{module.removeprefix('base_model.model.')}.weight" for module in memory} <= disk
    report = loratool.merge(case.base, [case.adapter], tmp_path / "out")
    assert report.edited == case.family.edited
    assert_like_peft(tmp_path / "out", case.by_peft)
    assert_speaks_like(tmp_path / "out", case)


def test_a_gpt2_in_a_single_file_is_merged_though_no_config_says_that_it_is_one(tmp_path: Path) -> None:
    family = FAMILIES["gpt2"]
    case = build_case(tmp_path, dataclasses.replace(family, shard_size="5GB"))
    for flag in (True, False):
        edit_config(case.adapter, fan_in_fan_out=flag)
        out = tmp_path / f"out-{flag}"
        loratool.merge(case.base / "model.safetensors", [case.adapter], out)
        assert_like_peft(out, case.by_peft)


@pytest.mark.parametrize("flag", [True, False])
def test_square_conv1d_weights_alone_go_by_the_architecture_not_by_the_flag(tmp_path: Path, flag: bool) -> None:
    case = build_case(tmp_path, FAMILIES["gpt2"], target_modules=["attn.c_proj"])
    edit_config(case.adapter, fan_in_fan_out=flag)
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    assert_like_peft(tmp_path / "out", case.by_peft)
    assert_speaks_like(tmp_path / "out", case)


# -- what an adapter may say -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("llama") / "base", LLAMA)


def check(case: Case, out: Path, **oracle: Any) -> None:
    """Merge, and hold the result to all three oracles."""
    loratool.merge(case.base, [case.adapter], out)
    base = read_tensors(case.base)
    exact = exact_merge(base, (case.adapter, 1.0), **oracle)
    assert exact
    assert_exact_merge(out, base, exact)
    assert_like_peft(out, case.by_peft)
    assert_speaks_like(out, case)


def test_rslora_divides_alpha_by_the_root_of_the_rank(llama: Path, tmp_path: Path) -> None:
    check(build_case(tmp_path, LLAMA, llama, use_rslora=True, r=9), tmp_path / "out", scale=lambda _: 6 / 3)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")  # one is to match nothing
def test_rank_and_alpha_patterns_are_matched_as_peft_matches_them(llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5, r"model\.layers\.0\.self_attn\.[kv]_proj": 3},
        "alpha_pattern": {"v_proj": 9, "self_attn.o_proj": 1.5, "^model.layers.1.self_attn.q_proj": 20, "_proj": 99},
    }
    ranks = {"q_proj": 2, "1.mlp.down_proj": 5, "0.self_attn.k_proj": 3, "0.self_attn.v_proj": 3}
    alphas = {"v_proj": 9, "o_proj": 1.5, "1.self_attn.q_proj": 20}

    def scale(module: str) -> float:
        rank = next((r for tail, r in ranks.items() if module.endswith(tail)), 4)
        return next((a for tail, a in alphas.items() if module.endswith(tail)), 6.0) / rank

    check(build_case(tmp_path, LLAMA, llama, **settings), tmp_path / "out", scale=scale)


def test_dora_is_not_taken_out_again_and_that_is_said(llama: Path, tmp_path: Path) -> None:
    """Its lengths are those of the rows of the weight that it is merged into."""
    case = build_case(tmp_path, LLAMA, llama, use_dora=True)
    loratool.merge(llama, [case.adapter], tmp_path / "merged")
    report = loratool.merge(tmp_path / "merged", [case.adapter], tmp_path / "out", weights=[-1.0])
    (note,) = (note for note in report.notes if note.code == "not-taken-out")
    assert "layers.{0-1}.self_attn.q_proj" in note.text
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(read_tensors(tmp_path / "out")[name], read_tensors(llama)[name], atol=1e-3)


def test_all_linear_adapts_every_linear_layer_but_the_head(llama: Path, tmp_path: Path) -> None:
    case = build_case(tmp_path, LLAMA, llama, target_modules="all-linear")
    check(case, tmp_path / "out")
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    assert len(read_tensors(case.adapter)) == 2 * 7 * LAYERS, config["target_modules"]


def test_a_saved_head_replaces_the_head_of_the_base(llama: Path, tmp_path: Path) -> None:
    case = build_case(tmp_path, LLAMA, llama, modules_to_save=["lm_head"])
    check(case, tmp_path / "out")
    saved = read_tensors(case.adapter)["base_model.model.lm_head.weight"]
    assert same_bits(read_tensors(tmp_path / "out")["lm_head.weight"], saved)


def test_lora_on_an_embedding_table_is_turned(llama: Path, tmp_path: Path) -> None:
    targets = ["model.embed_tokens", "q_proj"]  # named by its full path, PEFT does not save the table besides
    case = build_case(tmp_path, LLAMA, llama, target_modules=targets)
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in read_tensors(case.adapter)
    check(case, tmp_path / "out")


def test_lora_on_an_embedding_table_merges_when_peft_saved_the_table_besides(llama: Path, tmp_path: Path) -> None:
    case = build_case(tmp_path, LLAMA, llama, target_modules=["embed_tokens", "q_proj"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in read_tensors(case.adapter)
    check(case, tmp_path / "out")


def test_lora_on_an_untied_head_merges(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head", "v_proj"])
    wrapped = get_peft_model(load(LLAMA, llama), config).eval()
    randomise(wrapped, 0)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loratool.merge(llama, [tmp_path / "adapter"], tmp_path / "out")
    base = read_tensors(llama)
    exact = exact_merge(base, (tmp_path / "adapter", 1.0))
    assert set(exact) == {"lm_head.weight", *(f"model.layers.{n}.self_attn.v_proj.weight" for n in range(LAYERS))}
    assert_exact_merge(tmp_path / "out", base, exact)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_merges(llama: Path, tmp_path: Path, init: str) -> None:
    check(build_case(tmp_path, LLAMA, llama, init_lora_weights=init), tmp_path / "out")


@pytest.fixture(scope="module")
def adapted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The Llama with a plain adapter."""
    return build_case(tmp_path_factory.mktemp("adapted"), LLAMA, llama)


def test_an_adapter_with_a_name_is_found_in_its_subfolder(llama: Path, adapted: Case, tmp_path: Path) -> None:
    wrapped = adapt(load(LLAMA, llama), adapter_name="style", **LLAMA.targets)
    wrapped.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir() if p.is_dir()) == ["style"]
    for number, path in enumerate([tmp_path / "saved", tmp_path / "saved" / "style"]):
        loratool.merge(llama, [path], tmp_path / f"out{number}")
        assert_speaks_like(tmp_path / f"out{number}", adapted)


def test_several_named_adapters_in_one_folder_are_not_guessed_between(llama: Path, tmp_path: Path) -> None:
    wrapped = adapt(load(LLAMA, llama), adapter_name="style", **LLAMA.targets)
    wrapped.add_adapter("facts", LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "saved")
    with pytest.raises(loratool.InputError, match=r"facts.*style"):
        loratool.merge(llama, [tmp_path / "saved"], tmp_path / "out")


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda key: key.removeprefix("base_model.model.model."),
    ],
    ids=["lack PEFT's prefix", "with the adapter's name", "without the model's own prefix"],
)
def test_keys_of_a_raw_state_dict_merge_to_the_same_bytes(
    llama: Path, adapted: Case, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    loratool.merge(llama, [adapted.adapter], tmp_path / "wanted")
    shutil.copytree(adapted.adapter, tmp_path / "raw")
    rename_keys(tmp_path / "raw", rename)
    loratool.merge(llama, [tmp_path / "raw"], tmp_path / "found")
    assert raw_tensors(tmp_path / "found") == raw_tensors(tmp_path / "wanted")


# -- precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_a_half_precision_base_gets_the_float64_formula_rounded_once(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    family = FAMILIES[name]
    case = build_case(tmp_path, family, dtype=dtype)
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    base = read_tensors(case.base)
    assert {t.dtype for t in base.values()} == {dtype}
    exact = exact_merge(base, (case.adapter, 1.0), name=family.on_disk, in_out=family.in_out)
    assert_exact_merge(tmp_path / "out", base, exact)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.9999), (torch.float16, 0.9998)], ids=str)
def test_next_to_all_of_half_a_million_elements_are_nearest_to_the_formula(
    tmp_path: Path, dtype: torch.dtype, share: float
) -> None:
    wide = Family(
        lambda: llama_config(hidden_size=256, intermediate_size=512, num_hidden_layers=1),
        "LlamaForCausalLM",
        {"target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "r": 16},
    )
    case = build_case(tmp_path, wide, dtype=dtype)
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    base, after = read_tensors(case.base), read_tensors(tmp_path / "out")
    exact = exact_merge(base, (case.adapter, 1.0))
    off = torch.cat([steps(after[name], nearest(e.value, dtype)).flatten() for name, e in exact.items()])
    assert off.numel() > 500_000
    assert int(off.max()) <= 1
    assert int((off == 0).sum()) >= share * off.numel()


def test_half_precision_factors_are_multiplied_in_float32(llama: Path, adapted: Case, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapted.adapter, tmp_path / "half")
    path = tmp_path / "half" / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    loratool.merge(llama, [tmp_path / "half"], tmp_path / "out")
    base = read_tensors(llama)
    assert_exact_merge(tmp_path / "out", base, exact_merge(base, (tmp_path / "half", 1.0)))


def test_a_float64_base_is_merged_in_float64(tmp_path: Path) -> None:
    case = build_case(tmp_path, LLAMA, dtype=torch.float64)
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    base, after = read_tensors(case.base), read_tensors(tmp_path / "out")
    exact = exact_merge(base, (case.adapter, 1.0))
    assert len(exact) == LLAMA.edited
    for name, wanted in exact.items():
        assert after[name].dtype == torch.float64
        assert float(((after[name] - wanted.value).abs() / wanted.terms).max()) <= 1e-15, name


# -- several adapters --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of different ranks and targets, two of which meet on the same weights."""
    home = tmp_path_factory.mktemp("three")
    settings: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 4},
        {"target_modules": ["q_proj", "down_proj"], "r": 8, "lora_alpha": 4, "use_rslora": True},
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 1},
    ]
    for number, setting in enumerate(settings):
        adapt(load(LLAMA, llama), seed=number, **setting).save_pretrained(home / str(number))
    return [home / str(number) for number in range(len(settings))]


def test_weighted_adapters_add_up_and_are_rounded_once(llama: Path, three: list[Path], tmp_path: Path) -> None:
    weights = [0.7, -1.25, 2.0]
    loratool.merge(llama, three, tmp_path / "out", weights=weights)
    base = read_tensors(llama)
    exact = exact_merge(base, *zip(three, weights, strict=True))
    assert len(exact) == 7 * LAYERS
    assert_exact_merge(tmp_path / "out", base, exact)


def test_weighted_adapters_in_half_precision_are_rounded_once_too(three: list[Path], tmp_path: Path) -> None:
    base_folder = build_base(tmp_path / "base", LLAMA, torch.bfloat16)
    weights = [0.7, -1.25, 2.0]
    loratool.merge(base_folder, three, tmp_path / "out", weights=weights)
    base = read_tensors(base_folder)
    assert_exact_merge(tmp_path / "out", base, exact_merge(base, *zip(three, weights, strict=True)))


def test_several_adapters_speak_as_peft_lets_them_speak_together(
    llama: Path, three: list[Path], tmp_path: Path
) -> None:
    loratool.merge(llama, three, tmp_path / "out")
    wrapped = PeftModel.from_pretrained(load(LLAMA, llama), three[0], adapter_name="0")
    for number in (1, 2):
        wrapped.load_adapter(three[number], adapter_name=str(number))
    wrapped.base_model.set_adapter(["0", "1", "2"])
    wanted = output_of(wrapped.eval(), LLAMA.inputs())
    found = output_of(load(LLAMA, tmp_path / "out"), LLAMA.inputs())
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_merging_one_after_the_other_comes_to_the_same(llama: Path, three: list[Path], tmp_path: Path) -> None:
    loratool.merge(llama, three[:2], tmp_path / "together")
    loratool.merge(llama, three[0], tmp_path / "first")
    loratool.merge(tmp_path / "first", three[1], tmp_path / "second")
    together = read_tensors(tmp_path / "together")
    for name, after in read_tensors(tmp_path / "second").items():
        assert float((after - together[name]).abs().max()) <= 1e-6, name


# -- bases saved with another head than the adapter was trained under --------------------------------


def test_a_gpt2_saved_without_its_head_takes_an_adapter_of_the_whole_model(tmp_path: Path) -> None:
    family = FAMILIES["gpt2"]
    headless = build_base(tmp_path / "headless", family, model="GPT2Model")
    assert "h.0.attn.c_attn.weight" in raw_tensors(headless)
    model = family.cls.from_pretrained(headless).eval()  # its head is tied, so that nothing is missing
    wrapped = adapt(model, **family.targets)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert all(".transformer.h." in key for key in read_tensors(tmp_path / "adapter"))
    wanted = output_of(wrapped, family.inputs())
    loratool.merge(headless, [tmp_path / "adapter"], tmp_path / "out")
    base = read_tensors(headless)
    exact = exact_merge(
        base,
        (tmp_path / "adapter", 1.0),
        name=lambda module: f"{module.removeprefix('transformer.')}.weight",
        in_out=is_conv1d,
    )
    assert len(exact) == family.edited
    assert_exact_merge(tmp_path / "out", base, exact)
    found = output_of(family.cls.from_pretrained(tmp_path / "out").eval(), family.inputs())
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("model", ["BertForSequenceClassification", "BertForMaskedLM", "BertForQuestionAnswering"])
def test_an_adapter_of_a_bare_bert_fits_a_bert_with_any_head(tmp_path: Path, model: str) -> None:
    import transformers

    family = FAMILIES["bert classifier"]
    base_folder = build_base(tmp_path / "base", family, model=model)
    bare = transformers.BertModel.from_pretrained(base_folder, add_pooling_layer=False)
    adapt(bare, target_modules=["query", "value"]).save_pretrained(tmp_path / "adapter")
    assert "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight" in read_tensors(tmp_path / "adapter")
    loratool.merge(base_folder, [tmp_path / "adapter"], tmp_path / "out")
    base = read_tensors(base_folder)
    exact = exact_merge(base, (tmp_path / "adapter", 1.0), name=lambda module: f"bert.{module}.weight")
    assert len(exact) == 2 * LAYERS
    assert_exact_merge(tmp_path / "out", base, exact)


def test_an_adapter_of_a_classifier_fits_a_bare_bert_where_it_changes_the_body_only(tmp_path: Path) -> None:
    family = FAMILIES["bert classifier"]
    bare = build_base(tmp_path / "bare", family, model="BertModel")
    whole = build_base(tmp_path / "whole", family)
    adapt(load(family, whole), target_modules=["query", "value"]).save_pretrained(tmp_path / "adapter")
    loratool.merge(bare, [tmp_path / "adapter"], tmp_path / "out")
    base = read_tensors(bare)
    exact = exact_merge(base, (tmp_path / "adapter", 1.0), name=lambda module: f"{module.removeprefix('bert.')}.weight")
    assert len(exact) == 2 * LAYERS
    assert_exact_merge(tmp_path / "out", base, exact)


def test_a_saved_classifier_is_refused_by_a_base_that_has_none(tmp_path: Path) -> None:
    family = FAMILIES["bert classifier"]
    bare = build_base(tmp_path / "bare", family, model="BertModel")
    whole = build_base(tmp_path / "whole", family)
    adapt(load(family, whole), **family.targets).save_pretrained(tmp_path / "adapter")
    with pytest.raises(loratool.FitError, match=r"classifier\.weight"):
        loratool.merge(bare, [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- what is refused ---------------------------------------------------------------------------------


def refusal(base: Path, adapter: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of the command line; inputs must be as they were."""
    before = picture(base), picture(adapter)
    capsys.readouterr()
    code = run(["merge", str(base), str(adapter), "-o", str(out)])
    assert (picture(base), picture(adapter)) == before
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


# -- every type and option of PEFT -------------------------------------------------------------------

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
TOKENS_OF_A_PROMPT: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
DOWN: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
PARAMETERS: dict[str, Any] = {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]}
# what PEFT can train on the Llama, and what merging its files must reproduce
MERGED: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: LoraConfig(use_dora=True, **DOWN),
    "DoRA and rsLoRA": lambda: LoraConfig(use_dora=True, use_rslora=True, **QV),
    "lora_bias": lambda: LoraConfig(lora_bias=True, **QV),
    "bias='all'": lambda: LoraConfig(bias="all", **QV),
    "bias='lora_only'": lambda: LoraConfig(bias="lora_only", **QV),
    "target_parameters": lambda: LoraConfig(**PARAMETERS),
    "trainable tokens": lambda: LoraConfig(trainable_token_indices=[5, 1], **QV),
    "BD-LoRA": lambda: LoraConfig(use_bdlora=peft.BdLoraConfig(["q_proj"], ["v_proj"], nblocks=2), **QV),
    "KaSA": lambda: LoraConfig(kasa_config=peft.tuners.lora.config.KasaConfig(), r=4, **QV),
    "VeLoRA": lambda: LoraConfig(velora_config=peft.tuners.lora.config.VeloraConfig(), **QV),
    "MonteCLoRA": lambda: LoraConfig(monteclora_config=peft.tuners.lora.config.MontecloraConfig(), **QV),
    "PiSSA": lambda: LoraConfig(init_lora_weights="pissa", r=4, lora_alpha=6, **DOWN),
    "OLoRA": lambda: LoraConfig(init_lora_weights="olora", r=4, lora_alpha=6, **DOWN),
    "MiCA": lambda: LoraConfig(init_lora_weights="mica", **QV),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, init_r=6, target_r=3, **QV),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **QV),
    "C3A": lambda: peft.C3AConfig(block_size=8, **QV),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, **QV),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20, **QV),
    "GraLoRA": lambda: peft.GraloraConfig(r=8, **QV),
    "HiRA": lambda: peft.HiraConfig(r=4, **QV),
    "HRA": lambda: peft.HRAConfig(r=4, **QV),
    "(IA)3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, **DOWN),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=6, **DOWN),
    "MiSS": lambda: peft.MissConfig(r=4, **DOWN),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, **QV),
    "OFT, exact": lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **QV),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, **QV),
    "RoAd": lambda: peft.RoadConfig(group_size=8, **QV),
    "SHiRA": lambda: peft.ShiraConfig(r=2, **QV),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[2, 1], target_modules=["embed_tokens"]),
    "VB-LoRA": lambda: peft.VBLoRAConfig(num_vectors=16, vector_length=8, topk=2, r=2, **QV),
    "VeRA": lambda: peft.VeraConfig(r=4, **QV),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=20, **QV),
}
# what cannot be merged from its files: (its name in the message, its config)
REFUSED: dict[str, Callable[[], Any]] = {
    "layer_replication": lambda: LoraConfig(layer_replication=[[0, 2], [0, 2]], **QV),
    "aLoRA": lambda: LoraConfig(alora_invocation_tokens=[1], task_type="CAUSAL_LM", **QV),
    "pissa_niter_4": lambda: LoraConfig(init_lora_weights="pissa_niter_4", r=4, **QV),
    "P_TUNING": lambda: peft.PromptEncoderConfig(**TOKENS_OF_A_PROMPT),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**TOKENS_OF_A_PROMPT),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**TOKENS_OF_A_PROMPT),
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose attention has biases, so that those can be trained too."""
    family = Family(lambda: llama_config(attention_bias=True), "LlamaForCausalLM", {})
    return build_base(tmp_path_factory.mktemp("biased") / "base", family)


def trained(base: Path, config: Any, folder: Path) -> Any:
    """The base under an adapter of any type, moved away from where it began, and saved."""
    torch.manual_seed(0)
    wrapped = get_peft_model(load(LLAMA, base), config).eval()
    randomise(wrapped, 0)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("name", MERGED)
def test_every_type_that_its_files_determine_merges_to_what_the_adapter_said(
    biased: Path, tmp_path: Path, name: str
) -> None:
    plain = output_of(load(LLAMA, biased), LLAMA.inputs())
    wrapped = trained(biased, MERGED[name](), tmp_path / "adapter")
    # as a user would: PEFT begins anew from the files
    reloaded = PeftModel.from_pretrained(load(LLAMA, biased), tmp_path / "adapter").eval()
    said = output_of(reloaded, LLAMA.inputs())
    assert float((said - output_of(wrapped, LLAMA.inputs())).abs().max()) <= 1e-5, "PEFT itself does not come back"
    loratool.merge(biased, tmp_path / "adapter", tmp_path / "out")
    found = output_of(load(LLAMA, tmp_path / "out"), LLAMA.inputs())
    largest = float(said.abs().max())
    assert float((found - said).abs().max()) <= 1e-5 * largest
    assert float((plain - said).abs().max()) > 1e-3 * largest, "the adapter says nothing"
    reloaded.merge_and_unload().save_pretrained(tmp_path / "by-peft")
    ours, theirs = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "by-peft")
    assert set(ours) == set(theirs)
    for tensor, wanted in theirs.items():
        assert float((ours[tensor] - wanted).abs().max()) <= 1e-5, tensor


@pytest.mark.parametrize("name", REFUSED)
def test_what_its_files_do_not_determine_is_refused_by_its_name(
    biased: Path, tmp_path: Path, unwritten: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    trained(biased, REFUSED[name](), tmp_path / "adapter")
    code, message = refusal(biased, tmp_path / "adapter", unwritten, capsys)
    assert code in (3, 4)
    assert name in message


def test_lora_on_the_patches_of_a_vit_merges(tmp_path: Path) -> None:
    case = build_case(tmp_path, FAMILIES["vit"], target_modules=["projection", "q_proj"])
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    assert_like_peft(tmp_path / "out", case.by_peft)
    assert_speaks_like(tmp_path / "out", case)


def test_dora_on_weights_stored_the_other_way_round_takes_the_norm_of_columns(tmp_path: Path) -> None:
    case = build_case(tmp_path, FAMILIES["gpt2"], use_dora=True)
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    assert_like_peft(tmp_path / "out", case.by_peft)
    assert_speaks_like(tmp_path / "out", case)


def test_dora_on_an_embedding_takes_the_norm_over_the_vocabulary(llama: Path, tmp_path: Path) -> None:
    case = build_case(tmp_path, LLAMA, llama, use_dora=True, target_modules=["model.embed_tokens", "q_proj"])
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    assert_like_peft(tmp_path / "out", case.by_peft)
    assert_speaks_like(tmp_path / "out", case)


def test_several_dora_adapters_each_take_the_norm_of_the_unmerged_weight(llama: Path, tmp_path: Path) -> None:
    for number in range(2):
        wrapped = adapt(load(LLAMA, llama), seed=number, use_dora=True, **QV)
        wrapped.save_pretrained(tmp_path / str(number))
    together = PeftModel.from_pretrained(load(LLAMA, llama), tmp_path / "0", adapter_name="0")
    together.load_adapter(tmp_path / "1", adapter_name="1")
    together.base_model.set_adapter(["0", "1"])
    said = output_of(together.eval(), LLAMA.inputs())
    loratool.merge(llama, [tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    found = output_of(load(LLAMA, tmp_path / "out"), LLAMA.inputs())
    assert float((found - said).abs().max()) <= 1e-5 * float(said.abs().max())


# -- what does not fit -------------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_refused_with_every_tensor_that_has_no_place(
    llama: Path, tmp_path: Path, unwritten: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES["t5"]
    base = build_base(tmp_path / "t5", family)
    adapt(load(family, base), **family.targets).save_pretrained(tmp_path / "adapter")
    code, message = refusal(llama, tmp_path / "adapter", unwritten, capsys)
    assert code == 4
    assert "encoder.block.{0-1}.layer.0.SelfAttention.q.weight" in message


def test_an_adapter_that_was_never_trained_is_refused_since_it_changes_nothing(
    llama: Path, tmp_path: Path, unwritten: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get_peft_model(load(LLAMA, llama), LoraConfig(**LLAMA.targets)).save_pretrained(tmp_path / "adapter")
    code, message = refusal(llama, tmp_path / "adapter", unwritten, capsys)
    assert code == 4
    assert "zero" in message
