"""Merged tensors in memory are those of the files that `merge` writes, in the base's order, a few blocks at a time."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from oracle import header, read_tensors, same_bits, weight_files
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.files import digests
from loratool.merging import in_memory, resources
from loratool.merging.in_memory import Filling
from loratool.merging.options import DTYPES, ChangeOptions
from loratool.options.described import Choice, described_by

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here, or LORATOOL_TEST_CUDA=1 is not set"
)
CHOICES = [  # every option that is one of some words, but that of GGUF, which is no model in memory
    (name, value)
    for name, (described, _) in described_by(ChangeOptions).items()
    if isinstance(described.kind, Choice) and not described.many and name != "gguf_type"
    for value in described.kind.names()
]
LAYER = "model.layers.0"
EXPERTS, INNER, HIDDEN, VOCABULARY = 3, 24, 40, 50
FILES = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")


def some(*shape: int, seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size).to(dtype)


def base_tensors() -> dict[str, dict[str, Tensor]]:
    """Three files with tensors of many dtypes and numbers of dimensions, one of them without elements."""
    bf16, fp16 = torch.bfloat16, torch.float16
    first = {
        "model.embed_tokens.weight": some(VOCABULARY, HIDDEN, seed=0, dtype=bf16),
        f"{LAYER}.self_attn.q_proj.weight": some(64, HIDDEN, seed=1, dtype=bf16),
        f"{LAYER}.self_attn.q_proj.bias": some(64, seed=2, dtype=bf16),
        f"{LAYER}.self_attn.k_proj.weight": some(56, HIDDEN, seed=3, dtype=fp16),
    }
    second = {
        f"{LAYER}.mlp.experts.gate_up_proj": some(EXPERTS, HIDDEN, 2 * INNER, seed=4, dtype=bf16),
        f"{LAYER}.mlp.experts.down_proj": some(EXPERTS, INNER, HIDDEN, seed=5, dtype=bf16),
        f"{LAYER}.self_attn.o_proj.weight": some(HIDDEN, 64, seed=6),
        f"{LAYER}.input_layernorm.weight": some(HIDDEN, seed=7, dtype=torch.float64),
    }
    third = {
        "counts": torch.arange(12).reshape(3, 4),
        "flags": torch.tensor([True, False, True]),
        "packed": torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(4, 4),
        "scalar": torch.tensor(2.5, dtype=bf16),
        "empty": torch.empty(0, 7, dtype=bf16),
        "lm_head.weight": some(VOCABULARY, HIDDEN, seed=8, dtype=bf16),
    }
    return dict(zip(FILES, (first, second, third), strict=True))


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    return save_peft(
        folder,
        {f"base_model.model.{name}": value for name, value in tensors.items()},
        **{"r": 4, "lora_alpha": 6, **config},
    )


def factors(module: str, out: int, inner: int, seed: int, rank: int = 4) -> dict[str, Tensor]:
    names = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    return dict(zip(names, (some(rank, inner, seed=seed), some(out, rank, seed=seed + 1, size=0.1)), strict=True))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base, and three adapters: LoRA with a saved head and a new tensor, DoRA, and LoRA of an embedding and experts."""
    home = tmp_path_factory.mktemp("inputs")
    base = home / "base"
    base.mkdir()
    files = base_tensors()
    for name, tensors in files.items():
        save_file(tensors, base / name)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    attention = f"{LAYER}.self_attn"
    lora = {
        **factors(f"{attention}.q_proj", 64, HIDDEN, 10),
        **factors(f"{attention}.k_proj", 56, HIDDEN, 12),
        "lm_head.weight": some(VOCABULARY, HIDDEN, seed=14),
        "score.weight": some(2, HIDDEN, seed=15),
    }
    dora = {
        **factors(f"{attention}.q_proj", 64, HIDDEN, 16),
        **factors(f"{attention}.o_proj", HIDDEN, 64, 18),
        f"{attention}.q_proj.lora_magnitude_vector": some(64, seed=20).abs() + 5,
        f"{attention}.o_proj.lora_magnitude_vector": some(HIDDEN, seed=21).abs() + 5,
    }
    rest = {
        "model.embed_tokens.lora_embedding_A": some(4, VOCABULARY, seed=22),
        "model.embed_tokens.lora_embedding_B": some(HIDDEN, 4, seed=23),
        **factors(f"{LAYER}.mlp.experts", INNER, HIDDEN, 24, rank=4 * EXPERTS),
    }
    rest[f"{LAYER}.mlp.experts.lora_A.weight"] = some(4 * EXPERTS, INNER, seed=24)
    rest[f"{LAYER}.mlp.experts.lora_B.weight"] = some(HIDDEN, 4 * EXPERTS, seed=25)
    return base, [
        save_adapter(home / "lora", lora, modules_to_save=["lm_head", "score"]),
        save_adapter(home / "dora", dora, use_dora=True),
        save_adapter(home / "rest", rest, target_parameters=["mlp.experts.down_proj"]),
    ]


OPTIONS: dict[str, Any] = {"allow_new_tensors": True, "weights": [1.0, 0.5, -0.7], "expert_layout": "rank-major"}


def written(base: Path, adapters: list[Path], out: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors in the files of a merge, in the order of files and bytes, as safetensors' own reader gives them."""
    loratool.merge(base, adapters, out, device="cpu", **options)
    found = read_tensors(out)
    return {name: found[name] for path in weight_files(out) for name in in_order(path)}


def in_order(path: Path) -> list[str]:
    table = {name: entry for name, entry in header(path).items() if name != "__metadata__"}
    return sorted(table, key=lambda name: table[name]["data_offsets"])


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert tensor.shape == wanted[name].shape
        assert tensor.dtype == wanted[name].dtype
        assert same_bits(tensor.cpu(), wanted[name]), name


@pytest.mark.parametrize(("option", "value"), CHOICES)
def test_tensors_are_those_of_the_files_in_their_order(
    inputs: tuple[Path, list[Path]], tmp_path: Path, option: str, value: str
) -> None:
    options: dict[str, Any] = {**OPTIONS, option: value}
    wanted = written(*inputs, tmp_path / "out", **options)
    assert len(wanted) == 15
    assert_equal(dict(loratool.iter_merged(*inputs, **options)), wanted)
    mapping = loratool.merged(*inputs, **options)
    assert_equal(dict(mapping.items()), wanted)
    assert_equal({name: mapping[name] for name in mapping}, wanted)


@pytest.mark.parametrize(("adapted", "count"), [("lm_head", 3), ("embed_tokens", 3), ("q_proj", 2)])
def test_tied_weights_are_those_of_the_files(tmp_path: Path, adapted: str, count: int) -> None:
    """The head is in the files where an adapter makes it differ from the embedding."""
    query = f"{LAYER}.self_attn.q_proj"
    tensors = {
        "model.embed_tokens.weight": some(VOCABULARY, HIDDEN, seed=0, dtype=torch.bfloat16),
        f"{query}.weight": some(64, HIDDEN, seed=3, dtype=torch.bfloat16),
    }
    save_model(tmp_path / "base", tensors, {"model_type": "llama", "tie_word_embeddings": True})
    table = {
        "model.embed_tokens.lora_embedding_A": some(4, VOCABULARY, seed=1),
        "model.embed_tokens.lora_embedding_B": some(HIDDEN, 4, seed=2),
    }
    own = {
        "lm_head": factors("lm_head", VOCABULARY, HIDDEN, 1),
        "embed_tokens": table,
        "q_proj": factors(query, 64, HIDDEN, 1),
    }
    adapter = save_adapter(tmp_path / "adapter", own[adapted])
    wanted = written(tmp_path / "base", [adapter], tmp_path / "out")
    assert len(wanted) == count
    assert_equal(dict(loratool.iter_merged(tmp_path / "base", adapter)), wanted)


@pytest.mark.parametrize(("block", "workers"), [(40, 3), (300, 1)])
def test_blocks_chunks_and_workers_do_not_show(
    inputs: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, workers: int
) -> None:
    """In formulas too, which give other last bits in other blocks: those of the engine begin anew with each chunk."""
    monkeypatch.setattr(digests, "CHUNK", 1500)
    monkeypatch.setattr(resources, "CPU_BLOCK", block)
    monkeypatch.setattr(resources, "FORMULA_BLOCK", 130)
    wanted = written(*inputs, tmp_path / "out", **OPTIONS)
    assert_equal(dict(loratool.iter_merged(*inputs, workers=workers, **OPTIONS)), wanted)


def test_a_tensor_is_the_formula_rounded_once(inputs: tuple[Path, list[Path]]) -> None:
    base, (lora, *_) = inputs
    name = f"{LAYER}.self_attn.k_proj"
    found = loratool.merged(base, lora, allow_new_tensors=True, dtype=torch.float32)
    weight = load_file(base / FILES[0])[f"{name}.weight"].double()
    stored = load_file(lora / "adapter_model.safetensors")
    up, down = (stored[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA")
    torch.testing.assert_close(found[f"{name}.weight"], (weight + 6 / 4 * up @ down).float(), rtol=1e-7, atol=1e-9)
    assert same_bits(found["score.weight"], stored["base_model.model.score.weight"])


def test_a_tensor_belongs_to_whoever_takes_it(inputs: tuple[Path, list[Path]]) -> None:
    mapping = loratool.merged(*inputs, **OPTIONS)
    for name, tensor in mapping.items():
        before = tensor.clone()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # keeping one keeps nothing else in memory
        assert not tensor.is_inference()
        tensor.zero_()
        assert same_bits(mapping[name], before)


def test_a_mapping_computes_only_what_is_asked_for(
    inputs: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[str] = []
    fill = Filling.fill

    def noted(filling: Filling, worker: Any, start: int, stop: int) -> None:
        filled.append(filling.work.span.placed.name)
        fill(filling, worker, start, stop)

    monkeypatch.setattr(Filling, "fill", noted)
    mapping = loratool.merged(*inputs, **OPTIONS)
    assert len(mapping) == len(list(mapping)) == 15
    assert "scalar" in mapping
    assert "nothing" not in mapping
    assert mapping.get("nothing") is None
    assert filled == []
    assert mapping["lm_head.weight"].shape == (VOCABULARY, HIDDEN)
    assert set(filled) == {"lm_head.weight"}


def test_an_unknown_name_comes_with_the_closest_one(inputs: tuple[Path, list[Path]]) -> None:
    mapping = loratool.merged(*inputs, **OPTIONS)
    with pytest.raises(KeyError, match=rf"model.layers.0.self_attn.q_prj.weight; .* {LAYER}.self_attn.q_proj.weight"):
        mapping[f"{LAYER}.self_attn.q_prj.weight"]
    with pytest.raises(KeyError, match=r"no tensor model\.layers\.7"):
        mapping["model.layers.7.self_attn.q_proj.weight"]


def test_threads_may_ask_at_the_same_time(inputs: tuple[Path, list[Path]]) -> None:
    mapping = loratool.merged(*inputs, workers=2, **OPTIONS)
    wanted = dict(mapping.items())
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(mapping, pool.map(mapping.__getitem__, mapping), strict=True))
    assert_equal(found, wanted)


def test_work_is_only_a_few_blocks_ahead_of_the_consumer(
    inputs: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, (lora, _, rest) = inputs
    begun: list[int] = []
    fill = Filling.fill

    def noted(filling: Filling, worker: Any, start: int, stop: int) -> None:
        begun.append(stop - start)
        fill(filling, worker, start, stop)

    monkeypatch.setattr(Filling, "fill", noted)
    monkeypatch.setattr(resources, "CPU_BLOCK", 400)
    mapping = loratool.merged(base, [lora, rest], workers=2, **{**OPTIONS, "weights": None})
    assert mapping.ahead == 2 * 400
    with closing(mapping.every()) as tensors:
        taken = 0
        for _, tensor in tensors:
            taken += tensor.nbytes
            assert sum(begun) <= taken + mapping.ahead + 400
    assert sum(begun) == taken


def test_a_memory_limit_leaves_less_ahead_and_is_refused_where_a_tensor_does_not_fit(
    inputs: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_memory, "resident_memory", lambda: 10**6)
    with pytest.raises(loratool.UsageError, match=r"needs at least (\d+) MB") as refused:
        loratool.merged(*inputs, max_memory=2 * 10**6, **OPTIONS)
    least = int(str(refused.value).split()[-2])
    mapping = loratool.merged(*inputs, max_memory=least * 10**6, **OPTIONS)
    assert mapping.resources.workers == 1
    assert 0 <= mapping.ahead < 10**6
    assert_equal(dict(mapping.items()), dict(loratool.iter_merged(*inputs, **OPTIONS)))


def pool_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loratool-merge")]


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.is_dir() else 0


def test_closing_early_ends_the_threads_and_closes_the_files(inputs: tuple[Path, list[Path]]) -> None:
    before = open_files()
    tensors = loratool.iter_merged(*inputs, **OPTIONS)
    assert pool_threads() == []  # nothing runs before the first tensor is asked for
    next(tensors)
    assert pool_threads() != []
    tensors.close()
    assert pool_threads() == []
    assert open_files() == before


def consume(base: Path, adapters: list[Path]) -> None:
    for _ in loratool.iter_merged(base, adapters, **OPTIONS):
        raise ZeroDivisionError


def test_an_error_of_the_consumer_ends_all_work(inputs: tuple[Path, list[Path]]) -> None:
    before, precision = open_files(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ZeroDivisionError):
            consume(*inputs)
        assert pool_threads() == []
        assert open_files() == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_of_two_at_the_same_time_the_last_gives_torch_s_settings_back(inputs: tuple[Path, list[Path]]) -> None:
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        one, other = (loratool.iter_merged(*inputs, **OPTIONS) for _ in range(2))
        next(one), next(other)
        one.close()
        assert torch.get_float32_matmul_precision() == "highest"  # the other still computes
        other.close()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision(precision)


def test_progress_counts_bytes_in_the_consumer_s_thread(inputs: tuple[Path, list[Path]]) -> None:
    told: list[tuple[int, int, int]] = []

    def progress(done: int, size: int) -> None:
        told.append((done, size, threading.get_ident()))

    counted = 0
    for _, tensor in loratool.iter_merged(*inputs, progress=progress, **OPTIONS):
        counted += tensor.nbytes
        assert told[-1] == (counted, told[0][1], threading.get_ident())
    assert told[0][1] == counted


def test_only_what_adapters_change_is_given_where_that_is_asked_for(inputs: tuple[Path, list[Path]]) -> None:
    base, (lora, dora, _) = inputs
    every = dict(loratool.iter_merged(base, [lora, dora], allow_new_tensors=True))
    found = dict(loratool.iter_merged(base, [lora, dora], allow_new_tensors=True, changed_only=True))
    before = {name: tensor for file in FILES for name, tensor in load_file(base / file).items()}
    changed = [n for n in every if n not in before or not same_bits(every[n], before[n])]
    assert len(changed) == 5
    assert_equal(found, {name: every[name] for name in changed})


def small(folder: Path, weight: Tensor, up: Tensor) -> tuple[Path, Path]:
    """A base with a copied tensor and one weight, and an adapter whose A is all ones."""
    (folder / "base").mkdir()
    save_file({"z": torch.arange(5), "q.weight": weight}, folder / "base" / "model.safetensors")
    pair = {"q.lora_A.weight": torch.ones(1, weight.shape[1]), "q.lora_B.weight": up}
    return folder / "base", save_adapter(folder / "adapter", pair, r=1, lora_alpha=1)


def test_an_adapter_without_effect_is_warned_of_and_gives_the_base(tmp_path: Path) -> None:
    weight = some(6, 8, seed=0)
    base, adapter = small(tmp_path, weight, torch.zeros(6, 1))
    with pytest.warns(UserWarning, match="adapter: changes no element of the base in any of its 1 modules"):
        found = dict(loratool.iter_merged(base, adapter))
    assert_equal(found, {"z": torch.arange(5), "q.weight": weight})


def test_an_update_that_rounding_removes_is_warned_of(tmp_path: Path) -> None:
    """Next to 1, bfloat16 has steps of 2⁻⁸ below and 2⁻⁷ above: a change by 2⁻¹¹ is lost in full."""
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    weight[0] = 2.0**-9  # where it is not lost
    base, adapter = small(tmp_path, weight, torch.full((64, 1), 2.0**-11))
    with pytest.warns(UserWarning, match=r"rounding keeps 2 % of the update"):
        found = dict(loratool.iter_merged(base, adapter))
    assert torch.equal(found["q.weight"][1:], weight[1:])
    assert not torch.equal(found["q.weight"][0], weight[0])


def test_no_warning_comes_from_an_adapter_with_an_effect(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, some(6, 8, seed=0), torch.ones(6, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(dict(loratool.iter_merged(base, adapter))) == 2


def test_nan_in_an_adapter_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, some(6, 8, seed=0), torch.full((6, 1), torch.nan))
    with pytest.raises(loratool.InputError, match=r"lora_B\.weight contains NaN"):
        loratool.iter_merged(base, adapter)


def test_a_sum_that_overflows_is_an_error_where_its_tensor_is_taken(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, torch.full((6, 8), 60000.0).half(), torch.full((6, 1), 30000.0))
    tensors = loratool.iter_merged(base, adapter)
    next(tensors)
    with pytest.raises(loratool.FitError, match=r"q\.weight: merged values exceed the range of F16"):
        next(tensors)
    assert pool_threads() == []
    mapping = loratool.merged(base, adapter)
    assert torch.equal(mapping["z"], torch.arange(5))
    with pytest.raises(loratool.FitError, match="exceed the range"):
        mapping["q.weight"]


def test_a_base_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, some(6, 8, seed=0), torch.ones(6, 1))
    tensors = loratool.iter_merged(base, adapter)
    next(tensors)
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(loratool.InputError, match="changed while it was being read"):
        next(tensors)


def test_what_does_not_fit_is_told_at_the_call(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (lora, *_) = inputs
    with pytest.raises(loratool.FitError, match=r"score\.weight"):
        loratool.iter_merged(base, lora)
    with pytest.raises(loratool.UsageError, match="--device must be"):
        loratool.merged(base, lora, device="gpu", allow_new_tensors=True)
    unknown: dict[str, Any] = {"shard_size": "5GB"}
    with pytest.raises(TypeError, match="shard_size"):
        loratool.merged(base, lora, **unknown)
    with pytest.raises(loratool.InputError):
        loratool.iter_merged(tmp_path / "nothing", lora)


def test_a_default_device_of_torch_is_of_no_matter(inputs: tuple[Path, list[Path]]) -> None:
    """Models are built on the meta device within such a context."""
    wanted = dict(loratool.iter_merged(*inputs, **OPTIONS))
    with torch.device("meta"):
        found = dict(loratool.iter_merged(*inputs, device=torch.device("cpu"), **OPTIONS))
    assert_equal(found, wanted)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_on_a_gpu_are_those_of_the_files(inputs: tuple[Path, list[Path]], tmp_path: Path, dtype: str) -> None:
    base, (lora, _, rest) = inputs
    options: dict[str, Any] = {**OPTIONS, "dtype": dtype, "weights": [1.0, -0.7]}
    wanted = written(base, [lora, rest], tmp_path / "out", **options)
    found = dict(loratool.iter_merged(base, [lora, rest], device="cuda", **options))
    assert {tensor.device.type for tensor in found.values()} == {"cuda"}
    assert_equal(found, wanted)


@needs_cuda
def test_memory_of_a_gpu_that_is_used_again_is_written_after_its_last_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The consumer's stream may still read a tensor that it has let go of when that memory becomes the next one."""
    monkeypatch.setattr(in_memory, "AHEAD", 0)
    weights = {f"q{n}.weight": some(512, 512, seed=n) for n in range(40)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    pair = {"q0.lora_A.weight": torch.ones(1, 512), "q0.lora_B.weight": torch.ones(512, 1)}
    adapter = save_adapter(tmp_path / "adapter", pair, r=1, lora_alpha=1)
    kept: dict[str, Tensor] = {}
    for name, tensor in loratool.iter_merged(tmp_path / "base", adapter, device="cuda"):
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call] # the stream is late by some milliseconds
        kept[name] = tensor * 1
        del tensor
    assert all(same_bits(value.cpu(), weights[name]) for name, value in kept.items() if name != "q0.weight")
