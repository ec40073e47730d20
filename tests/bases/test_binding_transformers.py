"""Every rename, every fusion and every tie that transformers registers, against the tables of layouts.

Each model that the installed transformers converts is built without memory, its names and shapes on disk are those
that transformers itself would save, and an adapter on every linear layer, embedding and expert parameter must find
the tensors that its conversion makes of that parameter. What the tables leave out is listed here with the reason.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from headers import Shape, adapter_of, base_of, experts, landed, lora
from packaging.version import Version
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.bases.binding import bind, template_of
from loratool.bases.tied_weights import find_ties

if TYPE_CHECKING:
    from loratool.algebra.updates.base import Update


def undocumented(decorated: Any = None, **_: Any) -> Any:
    return (lambda decorated: decorated) if decorated is None else decorated


# Docstrings, which transformers puts together while it imports a model's module.
transformers.utils.auto_docstring = undocumented

REORDERED = "rows are permuted for rotary positions"
NUMBERED = "entries of a Sequential, known by number, get names of their own"
IN_TURNS = "gate and up take turns in the rows"
ONE_FAMILY = "a part of a single family that adapters seldom target"

# (model or class, pattern of the adapter's names, why they are not found; each says --map or is refused with its reason)
UNCOVERED: tuple[tuple[str, str, str], ...] = (
    ("cosmos3_edge", r"language_model\.layers\.#\.mlp\.fc[12]", "another MLP than under the same name elsewhere"),
    ("inkling", r"experts\.gate_up_proj|shared_experts\.", IN_TURNS),
    ("inkling", r"mlp\.(gate|up)_proj", IN_TURNS),
    ("inkling", r"encoder_layers|embed_audio_tokens|position_embedding", ONE_FAMILY),
    ("NemotronH_Omni", r"multi_modal_projector", NUMBERED),
    ("kimi_k25", r"attn\.[qkv]_proj", REORDERED),
    ("kimi_k25", r"mm_projector", NUMBERED),
    ("step3p7", r"vision_model\.layers\.#\.self_attn\.[qkv]_proj", REORDERED),
    ("step3p7", r"position_embedding", "a parameter in the base, an embedding in memory"),
    ("Dots3Note", r"audio_tower|vision_tower", ONE_FAMILY),
    ("ernie4_5_vl_moe", r"text_moe|vision_moe", "text and vision experts share a list in the base"),
    ("ernie4_5_vl_moe", r"resampler_model", NUMBERED),
    ("RfDetr", r"", ONE_FAMILY),
    ("(Conditional)?DetrForSegmentation", r"bbox_attention", ONE_FAMILY),  # with transformers 5.17
    ("d_fine", r"mlp\.layers", NUMBERED),
    ("cohere_asr", r"pos_emb", ONE_FAMILY),
    ("qianfan_ocr", r"multi_modal_projector", NUMBERED),
    ("qianfan_ocr", r"projection_layer", ONE_FAMILY),
    ("unlimited_ocr", r"vision_encoder", ONE_FAMILY),
    ("tipsv2|Tipsv2", r"", "one class's prefix is put before another's"),
    ("UltraVBert", r"projection_head", ONE_FAMILY),
    ("gradium_phonon_tts", r"[qkv]_proj", REORDERED),
    ("nemo_speechlm", r"mlp\.fc[12]", NUMBERED),
    ("nemo_speechlm", r"word_timestamp|diarization", ONE_FAMILY),
    ("mistral_large4", r"vision_tower\.transformer\.layers\.#\.attention\.[qk]_proj", REORDERED),
    ("qwen3_omni_moe_thinker", r"experts", "transformers writes one prefix twice when it saves this class"),
)
if Version(transformers.__version__) < Version("5.13"):
    # these releases do not undo their renames exactly, so that they save names which no other release reads or writes
    UNCOVERED += (
        ("nemotron_h", r"embeddings\.weight", "saved as embedding.weight, without the s of the published base"),
        ("deepseek_v4", r"compressor\.indexer\.(gate|kv)_proj", "saved with some of its renames undone only"),
    )
FEWEST = 60  # models that must have been built, lest the test says nothing


def conversions() -> dict[str, Any]:
    return conversion_mapping._build_checkpoint_conversion_mapping()  # type: ignore[no-any-return]


def classes_of(key: str) -> list[Any]:
    """The classes that an entry is for: the one it names, or those of a model type."""
    if hasattr(transformers, key):
        return [getattr(transformers, key)]
    if key not in CONFIG_MAPPING:
        return []
    config = CONFIG_MAPPING[key]
    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_MAPPING,
    )
    found = [table[config] for table in tables if config in table]
    return list(dict.fromkeys(c[0] if isinstance(c, tuple) else c for c in found))


def shortened(config: Any, depth: int = 0) -> Any:
    """The config with few layers."""
    for name, value in list(vars(config).items()):
        if name in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "depth"):
            if type(value) is int and value > 4:
                setattr(config, name, 4)
        elif name == "num_frames" and type(value) is int:
            setattr(config, name, 2)  # of a table of positions that is worked out in Python
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            setattr(config, name, value[:4])
        elif isinstance(value, transformers.PretrainedConfig) and depth < 3:
            shortened(value, depth + 1)
    return config


class Reversed:
    """A conversion that is turned round once, and not again for every tensor."""

    def __init__(self, conversion: Any) -> None:
        self.reversed = conversion.reverse_transform()

    def reverse_transform(self) -> Any:
        return self.reversed


def build(cls: Any) -> Any:
    """A model without memory; None where its default config makes none, or a package is not there."""
    for short in (True, False):
        try:
            config = cls.config_class()
            with torch.device("meta"), no_init_weights():
                return cls(shortened(config) if short else config)
        except Exception:
            continue
    return None


def targets_of(model: Any) -> Iterator[tuple[str, Update]]:
    """An update for every linear layer, embedding and expert parameter."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and name:
            shape: Shape = tuple(module.weight.shape)
            yield f"{name}.weight", lora(shape[::-1] if isinstance(module, Conv1D) else shape)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            count, rows, columns = parameter.shape
            yield name, experts(count, columns, rows)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns of transformers, which are more than Python remembers, are compiled for one model of all only."""
    monkeypatch.setattr("re._MAXCACHE", 100_000)


@cache
def built() -> set[str]:
    return set()


ENTRIES = [key for key in conversions() if key not in conversion_mapping._MODEL_TO_CONVERSION_PATTERN]


def reason_for(key: str, cls: str, template: str) -> str:
    return next(
        (
            reason
            for model, pattern, reason in UNCOVERED
            if re.match(model, key) or re.match(model, cls)
            if re.search(pattern, template)
        ),
        "",
    )


@pytest.mark.parametrize("key", ENTRIES)
def test_a_model_that_transformers_renames_or_fuses_is_covered_by_the_tables(key: str) -> None:
    models = {cls.__name__: model for cls in classes_of(key) if (model := build(cls)) is not None}
    if not models:
        pytest.skip("its default config builds no model here")
    for cls, model in models.items():
        conversions = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = list(map(Reversed, conversions))
        memory = dict(model.state_dict())
        disk = {name: tuple(t.shape) for name, t in revert_weight_conversion(model, dict(memory)).items()}
        adapter = adapter_of(dict(targets_of(model)))
        bound = bind(adapter, base_of(disk, **model.config.to_dict()))
        lost = {template_of(t)[0] for t in bound.problems if t not in bound.missing}
        assert {t for t in lost if not reason_for(key, cls, t)} == set(), f"{cls}: neither found nor listed"
        built().add(cls)
        seen = set()
        for target, tensors in landed(bound).items():
            if (template := template_of(target)[0]) in seen:
                continue
            seen.add(template)
            try:
                wanted = set(revert_weight_conversion(model, {target: memory[target]}))
            except Exception:
                continue
            if wanted <= set(disk):  # else it is the name of a part
                assert tensors == wanted, target


def test_enough_models_were_built_to_say_something() -> None:
    assert len(built()) >= FEWEST or len(built()) == 0, "run together with the test above"


# -- embeddings and heads that are one tensor ---------------------------------------------------------

# Classes that the table leaves out.
NOT_COVERED = {
    "BltForCausalLM": "its config never ties",
    "FlavaForPreTraining": "biases of heads over other things than tokens",
    "LukeForMaskedLM": "its head over entities",
    "NeoMMEForMaskedLM": "two tensors make up its head: refused",
    "T5Gemma2ForConditionalGeneration": "its embedding has more than a weight: refused",
    "UdopForConditionalGeneration": "refused, since its config always ties",
    "ZambaForCausalLM": "refused, since its layers are tied as well",
    "Zamba2ForCausalLM": "refused, since its layers are tied as well",
}
if getattr(transformers.CpmAntForCausalLM, "_tied_weights_keys", None):
    NOT_COVERED["CpmAntForCausalLM"] = "later releases of transformers do not tie it"
ON_DISK = {"GPTNeoXForCausalLM": ("lm_head.", "embed_out.")}  # in memory, on disk
LAYERS_OF_CONFIGS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers")
MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "PRETRAINING")


EVERY = "LORATOOL_TEST_EVERY_CLASS"  # set by `make acceptance`: all classes, and not only those that people use most
OFTEN = (
    *("LlamaForCausalLM", "Gemma3ForConditionalGeneration", "GPT2LMHeadModel", "Qwen2ForCausalLM", "BertForMaskedLM"),
    *("T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration"),
    *("GPTNeoXForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "DistilBertForMaskedLM", "MistralForCausalLM"),
    *("Qwen2VLForConditionalGeneration", "Phi3ForCausalLM", "GptOssForCausalLM", "FlavaForPreTraining"),
)


def classes_that_tie() -> list[str]:
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in MAPPINGS]
    named = {n for mapping in mappings for v in mapping.values() for n in ([v] if isinstance(v, str) else v)}
    return sorted(n for n in named if getattr(getattr(transformers, n, None), "_tied_weights_keys", None))


def empty_model(name: str) -> Any:
    """A model of few layers and no memory; None where its config wants more than defaults."""
    made = getattr(transformers, name)
    try:
        config = made.config_class()
        for part in filter(
            None, (config, getattr(config, "text_config", None), getattr(config, "vision_config", None))
        ):
            part.tie_word_embeddings = True
            for key in LAYERS_OF_CONFIGS:
                if isinstance(getattr(part, key, None), int):
                    setattr(part, key, 2)
        with torch.device("meta"), no_init_weights():
            return made(config)
    except Exception:  # each config has checks of its own
        return None


def test_the_table_names_what_transformers_ties_in_every_class_with_a_head_over_tokens(tmp_path: Path) -> None:
    wrong, built = {}, 0
    every = classes_that_tie()
    chosen = every if EVERY in os.environ else [name for name in every if name in OFTEN]
    for name in chosen:
        if (model := empty_model(name)) is None:
            continue
        built += 1
        ties = model.get_expanded_tied_weights_keys(all_submodels=True)
        memory, disk = ON_DISK.get(name, ("", ""))
        folder = tmp_path / name
        folder.mkdir()
        table = {
            key: {"dtype": "F32", "shape": [0, *tensor.shape], "data_offsets": [0, 0]}
            for key, tensor in model.state_dict().items()
            if key not in ties
        }
        text = json.dumps(table).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        config = {**json.loads(model.config.to_json_string()), "architectures": [name]}
        (folder / "config.json").write_text(json.dumps(config))
        found = find_ties(loratool.open_checkpoint(folder), [])
        told = {tensor: group.names[0] for group in found.groups for tensor in group.missing}
        wanted = {key.replace(memory, disk) if memory else key: source for key, source in ties.items()}
        if told != wanted:
            wrong[name] = {
                key: source
                for key, source in {**told, **wanted}.items()
                if (key, source) not in told.items() & wanted.items()
            }
    assert built > (150 if chosen is every else 12)
    assert {name: ties for name, ties in wrong.items() if name not in NOT_COVERED} == {}
    assert set(wrong) == {name for name in NOT_COVERED if hasattr(transformers, name) and name in chosen}
