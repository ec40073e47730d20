"""llama.cpp's adapters: what is read of them, and merges into bases of both kinds against float64 formulas."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf_bytes
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from merged_models import write_adapter, write_model
from numpy.typing import NDArray
from safetensors.torch import load_file

import loratool
from loratool.adapters.formats import is_adapter, read_adapter
from loratool.adapters.reading import Reading
from loratool.files.gguf import read_gguf
from loratool.publishing.selecting import select

Array = NDArray[Any]
HIDDEN, HEADS, KEY_HEADS, VOCABULARY, RANK = 16, 4, 2, 10, 2
KV = HIDDEN // HEADS * KEY_HEADS
SHAPES = {
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (KV, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, 24),
}
NAMES = {
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "token_embd.weight": "model.embed_tokens.weight",
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "tie_word_embeddings": False,
}


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_pairs(rows: Array, heads: int) -> Array:
    """`LlamaModel.permute` of llama.cpp's converter."""
    paired: Array = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2)
    return paired.reshape(rows.shape)


def heads_of(name: str) -> int:
    return {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KEY_HEADS}.get(name, 0)


def factors() -> dict[str, tuple[Array, Array]]:
    """A and B of each tensor, in the order of transformers."""
    made = {
        name: (random(RANK, i, seed=n), random(o, RANK, seed=n + 9)) for n, (name, (o, i)) in enumerate(SHAPES.items())
    }
    return {name: (a, b / 4) for name, (a, b) in made.items()}


def tensors_of(made: Mapping[str, tuple[Array, Array]]) -> dict[str, Array]:
    """The same as an adapter of llama.cpp's holds them."""
    found = {}
    for name, (a, b) in made.items():
        found[f"{name}.lora_a"] = a
        found[f"{name}.lora_b"] = to_pairs(b, heads_of(name)) if heads_of(name) else b
    return found


def write(
    path: Path,
    tensors: Mapping[str, Array],
    alpha: float | None = 1.0,
    more: tuple[bytes, ...] = (),
    kind: str = "llama",
) -> Path:
    entries = (
        gguf_bytes.words("general.architecture", kind),
        gguf_bytes.words("general.type", "adapter"),
        gguf_bytes.words("adapter.type", "lora"),
        gguf_bytes.words("general.base_model.0.repo_url", "https://huggingface.co/some/model"),
    )
    told = () if alpha is None else (gguf_bytes.entry("adapter.lora.alpha", 6, struct.pack("<f", alpha)),)
    path.write_bytes(gguf_bytes.whole_file((*entries, *told, *more), tensors))
    return path


def base_weights() -> dict[str, Array]:
    return {name: random(*shape, seed=50 + n) for n, (name, shape) in enumerate(SHAPES.items())}


def test_an_adapter_merges_into_a_model_of_transformers_in_the_order_of_its_rows(tmp_path: Path) -> None:
    weights = {NAMES[name]: torch.from_numpy(values) for name, values in base_weights().items()}
    base = write_model(tmp_path / "base", weights, CONFIG)
    made = factors()
    loratool.merge(base, write(tmp_path / "a.gguf", tensors_of(made)), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, (a, b) in made.items():
        exact = base_weights()[name].astype(np.float64) + 0.5 * b.astype(np.float64) @ a.astype(np.float64)
        assert np.allclose(merged[NAMES[name]].numpy(), exact, rtol=1e-6, atol=1e-6)


def test_an_adapter_merges_into_a_gguf_model_as_it_lies_there(tmp_path: Path) -> None:
    stored = {n: to_pairs(w, heads_of(n)) if heads_of(n) else w for n, w in base_weights().items()}
    entries = (
        gguf_bytes.words("general.architecture", "llama"),
        gguf_bytes.number("llama.attention.head_count", HEADS),
        gguf_bytes.number("llama.attention.head_count_kv", KEY_HEADS),
    )
    (tmp_path / "base.gguf").write_bytes(gguf_bytes.whole_file(entries, stored))
    tensors = tensors_of(factors())
    loratool.merge(tmp_path / "base.gguf", write(tmp_path / "a.gguf", tensors), tmp_path / "out.gguf")
    exact = {n: w + 0.5 * tensors[f"{n}.lora_b"] @ tensors[f"{n}.lora_a"] for n, w in stored.items()}
    wanted = gguf_bytes.whole_file(entries, exact)
    found = (tmp_path / "out.gguf").read_bytes()
    assert len(found) == len(wanted)
    start = len(wanted) - sum(w.nbytes for w in stored.values())  # all of them fill whole multiples of 32 bytes
    assert found[:start] == wanted[:start]
    merged, exactly = (np.frombuffer(raw[start:], np.float32) for raw in (found, wanted))
    assert np.allclose(merged, exactly, rtol=1e-6, atol=1e-6)


ARRAY_OF_TWO = struct.pack("<IQII", 4, 2, 1, 2)


@pytest.mark.parametrize("alpha", [1.0, 0.0, None])
def test_another_strength_is_another_alpha_in_the_same_bytes(tmp_path: Path, alpha: float | None) -> None:
    """llama.cpp multiplies by α / rank, or by 1 without an α. Other metadata, of every type, and all tensors keep their
    bytes; no heads are needed. The file is marked as made here, so that --overwrite may replace it.
    """
    more = (gguf_bytes.number("general.file_type", 1), gguf_bytes.entry("x.list", gguf_bytes.ARRAY, ARRAY_OF_TWO))
    tensors = tensors_of(factors())
    given = write(tmp_path / "a.gguf", tensors, alpha, more)
    report = loratool.rescale(given, tmp_path / "out.gguf", scale=3.0)
    assert not report.baked
    before, after = read_gguf(given), read_gguf(tmp_path / "out.gguf")
    assert after.values["adapter.lora.alpha"] == 3.0 * (alpha or RANK)
    own = {"adapter.lora.alpha", "loratool"}
    assert {k: v for k, v in after.values.items() if k not in own} == {
        k: v for k, v in before.values.items() if k not in own
    }
    data = [file.path.read_bytes()[file.layout.data_start :] for file in (before, after)]
    assert data[0] == data[1]
    loratool.rescale(given, tmp_path / "out.gguf", alpha=7.0, overwrite=True)
    assert read_gguf(tmp_path / "out.gguf").values["adapter.lora.alpha"] == 7.0
    loratool.rescale(given, tmp_path / "folder", scale=3.0)
    assert read_gguf(tmp_path / "folder" / "adapter.gguf").values["adapter.lora.alpha"] == 3.0 * (alpha or RANK)
    for out in ("out.gguf", "folder"):
        assert read_adapter(tmp_path / out).updates.keys() == read_adapter(given).updates.keys()


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_updates_are_multiplied_by_1_and_a_note_says_it(tmp_path: Path, alpha: float | None) -> None:
    path = write(tmp_path / "a.gguf", tensors_of(factors()), alpha)
    adapter = read_adapter(path)
    assert "scale-assumed" in [note.code for note in adapter.notes]
    update: Any = adapter.updates[NAMES["blk.0.ffn_down.weight"]]
    assert update.scale == 1.0
    told: Any = read_adapter(path, Reading(input_alpha=4.0)).updates[NAMES["blk.0.ffn_down.weight"]]
    assert told.scale == 2.0


def test_what_the_file_says_of_itself_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tensors_of(factors()))
    adapter = read_adapter(path)
    assert (adapter.format, adapter.training.rank, adapter.training.base) == ("gguf", RANK, "some/model")
    assert is_adapter(path)
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "any name.gguf")
    assert read_adapter(tmp_path / "folder").updates.keys() == adapter.updates.keys()
    assert is_adapter(tmp_path / "folder")


def test_an_embedding_is_a_times_b_transposed(tmp_path: Path) -> None:
    a, b = random(VOCABULARY, RANK), random(HIDDEN, RANK, seed=1)
    tensors = {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b}
    weights = {"model.embed_tokens.weight": torch.from_numpy(random(VOCABULARY, HIDDEN, seed=2))}
    weights["lm_head.weight"] = torch.from_numpy(random(VOCABULARY, HIDDEN, seed=3))
    base = write_model(tmp_path / "base", weights, CONFIG)
    loratool.merge(base, write(tmp_path / "a.gguf", tensors), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    exact = weights["model.embed_tokens.weight"].double().numpy() + 0.5 * a.astype(np.float64) @ b.T.astype(np.float64)
    assert np.allclose(merged.numpy(), exact, rtol=1e-6, atol=1e-6)


def test_norms_are_ignored_with_a_note_as_llama_cpp_ignores_them(tmp_path: Path) -> None:
    tensors = {**tensors_of(factors()), "blk.0.attn_norm.weight": random(HIDDEN)}
    adapter = read_adapter(write(tmp_path / "a.gguf", tensors))
    assert adapter.unused == ()
    assert [note.code for note in adapter.notes] == ["norms-ignored"]


def test_rows_in_another_order_take_a_config_that_tells_the_heads(tmp_path: Path) -> None:
    weights = {NAMES[name]: torch.from_numpy(values) for name, values in base_weights().items()}
    base = write_model(tmp_path / "base", weights, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(loratool.LoratoolError, match="model's config is needed"):
        loratool.merge(base, write(tmp_path / "a.gguf", tensors_of(factors())), tmp_path / "out")
    assert not (tmp_path / "out").exists()


DOWN = "blk.0.ffn_down.weight"
MALFORMED: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "half a pair": ({f"{DOWN}.lora_a": random(2, 24)}, {}, f"{DOWN}.lora_b is missing"),
    "ranks": ({f"{DOWN}.lora_a": random(2, 24), f"{DOWN}.lora_b": random(16, 3)}, {}, r"expected \(rank, in\)"),
    "empty": ({f"{DOWN}.lora_a": random(0, 24), f"{DOWN}.lora_b": random(16, 0)}, {}, "factors with values"),
    "alpha": (tensors_of(factors()), {"alpha": float("nan")}, "adapter.lora.alpha is nan"),
    "alpha of text": (
        tensors_of(factors()),
        {"alpha": None, "more": (gguf_bytes.words("adapter.lora.alpha", "16"),)},
        "expected a number",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_adapters_are_refused_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    tensors, settings, said = MALFORMED[case]
    with pytest.raises(loratool.InputError) as refused:
        read_adapter(write(tmp_path / "a.gguf", tensors, **settings))
    assert any(re.search(said, problem) for problem in refused.value.problems), refused.value.problems


def test_what_llama_cpp_would_not_apply_to_every_token_is_not_merged(tmp_path: Path) -> None:
    tokens = gguf_bytes.entry("adapter.alora.invocation_tokens", gguf_bytes.ARRAY, ARRAY_OF_TWO)
    adapter = read_adapter(write(tmp_path / "a.gguf", tensors_of(factors()), more=(tokens,)))
    assert any("activated LoRA" in reason for reason in adapter.unsupported)
    adapter = read_adapter(write(tmp_path / "b.gguf", tensors_of(factors()), kind="rwkv7"))
    assert any("architecture 'rwkv7'" in reason for reason in adapter.unsupported)


def test_a_model_is_not_an_adapter(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes.whole_file((gguf_bytes.words("general.architecture", "llama"),), base_weights()))
    assert not is_adapter(path)
    assert not is_adapter(tmp_path)
    with pytest.raises(loratool.InputError, match="so it is a model"):
        read_adapter(path)


def peft_adapter(folder: Path, **settings: Any) -> Path:
    made = {NAMES[name]: (torch.from_numpy(a), torch.from_numpy(b)) for name, (a, b) in factors().items()}
    modules = ["q_proj", "k_proj", "down_proj"]
    known = {"base_model_name_or_path": "some/model", "r": RANK, "lora_alpha": 1, "target_modules": modules}
    return write_adapter(folder, made, **{**known, **settings})


def model(folder: Path, **config: Any) -> Path:
    weights = {NAMES[name]: torch.from_numpy(values) for name, values in base_weights().items()}
    return write_model(folder, weights, {**CONFIG, **config})


def test_an_adapter_is_written_as_the_formulas_of_the_converter_have_it_and_read_back_to_the_bit(
    tmp_path: Path,
) -> None:
    base, adapter, out = model(tmp_path / "base"), peft_adapter(tmp_path / "peft"), tmp_path / "a.gguf"
    loratool.convert(adapter, out, to="gguf", base=base)
    written = read_gguf(out)
    assert written.values["adapter.lora.alpha"] == 1.0
    assert written.text("general.base_model.0.repo_url") == "https://huggingface.co/some/model"
    wanted = tensors_of(factors())
    assert written.tensors.keys() == wanted.keys()
    raw = out.read_bytes()
    for name, info in written.tensors.items():
        at = written.position(info)
        assert (info.dtype, info.shape, raw[at : at + info.nbytes]) == (
            "F32",
            wanted[name].shape,
            wanted[name].tobytes(),
        )
    loratool.convert(out, tmp_path / "back", to="peft", base=base)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loratool.convert(adapter, out, to="gguf", base=base, overwrite=True)
    assert out.read_bytes() == raw


def test_a_file_has_one_alpha_so_that_patterns_and_a_scale_of_0_go_into_the_factors(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "peft", use_rslora=True, alpha_pattern={"down_proj": 8})
    loratool.convert(adapter, tmp_path / "a.gguf", to="gguf", base=base)
    written, raw = read_gguf(tmp_path / "a.gguf"), (tmp_path / "a.gguf").read_bytes()
    alpha = written.values["adapter.lora.alpha"]
    assert isinstance(alpha, float)
    assert alpha != 0
    for name, (a, b) in factors().items():
        infos = [written.tensors[f"{name}{slot}"] for slot in (".lora_a", ".lora_b")]
        starts = [written.position(info) for info in infos]
        down, up = (
            np.frombuffer(raw[at : at + info.nbytes], np.float32).reshape(info.shape).astype(np.float64)
            for at, info in zip(starts, infos, strict=True)
        )
        scale = (8 if name == "blk.0.ffn_down.weight" else 1) / RANK**0.5
        rows = to_pairs(b, heads_of(name)) if heads_of(name) else b
        assert np.allclose(alpha / RANK * up @ down, scale * rows.astype(np.float64) @ a, rtol=1e-5, atol=1e-6)


def test_what_llama_cpp_cannot_load_is_not_written(tmp_path: Path) -> None:
    base, adapter = model(tmp_path / "base", tie_word_embeddings=True), peft_adapter(tmp_path / "peft")
    with pytest.raises(loratool.InputError, match="--base"):
        loratool.convert(adapter, tmp_path / "a.gguf", to="gguf")
    with pytest.raises(loratool.InputError, match="type rwkv is not supported"):
        loratool.convert(adapter, tmp_path / "a.gguf", to="gguf", base=model(tmp_path / "other", model_type="rwkv"))
    head = {"lm_head.weight": (torch.ones(RANK, HIDDEN), torch.ones(VOCABULARY, RANK))}
    of_head = write_adapter(tmp_path / "head", head, r=RANK, lora_alpha=1, target_modules=["lm_head"])
    with pytest.raises(loratool.FitError, match="ties its head"):
        loratool.convert(of_head, tmp_path / "a.gguf", to="gguf", base=base)
    strange = {"model.layers.0.mixer.weight": (torch.ones(RANK, HIDDEN), torch.ones(HIDDEN, RANK))}
    unknown = write_adapter(tmp_path / "strange", strange, r=RANK, lora_alpha=1, target_modules=["mixer"])
    with pytest.raises(loratool.FitError, match="no llama weights of these names"):
        loratool.convert(unknown, tmp_path / "a.gguf", to="gguf", base=base)
    assert not (tmp_path / "a.gguf").exists()


def test_the_card_links_the_base_that_the_file_names(tmp_path: Path) -> None:
    """Of a folder that is pushed, and of one that is written; the Hub's client finds both sound."""
    (tmp_path / "made").mkdir()
    write(tmp_path / "made" / "adapter.gguf", tensors_of(factors()))
    sent = {upload.name: upload for upload in select(tmp_path / "made", (), (), False, "me/made").uploads}
    base, adapter = model(tmp_path / "base"), peft_adapter(tmp_path / "peft")
    loratool.convert(adapter, tmp_path / "out", to="gguf", base=base)
    for content in ((sent["README.md"].content or b"").decode(), (tmp_path / "out" / "README.md").read_text()):
        found: dict[str, Any] = ModelCard(content).data.to_dict()  # type: ignore[no-untyped-call]
        assert found == {
            "base_model": ["some/model"],
            "base_model_relation": "adapter",
            "tags": ["loratool", "lora", "gguf", "llama-cpp"],
        }
