"""Adapters and models in other containers than one safetensors file: read, or told what they are and how to convert."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from malformed import ADAPTER, MERGED, MODEL, WEIGHT
from oracle import needs
from safetensors.torch import load_file, save_file
from torch import Tensor
from workbench import Workbench, check_is_merged, tensors_of

import loratool

STEM = "adapter_model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4096\n"


def cut(bench: Workbench, index: bool) -> list[str]:
    """The adapter in a file for each tensor."""
    stored = load_file(bench.adapter / ADAPTER)
    (bench.adapter / ADAPTER).unlink()
    files = {name: f"{STEM}-{n:05d}-of-{len(stored):05d}.safetensors" for n, name in enumerate(stored, 1)}
    for name, file in files.items():
        save_file({name: stored[name]}, bench.adapter / file)
    if index:
        table = {"metadata": {}, "weight_map": files}
        (bench.adapter / f"{STEM}.safetensors.index.json").write_text(json.dumps(table))
    return sorted(files.values())


@pytest.mark.parametrize("index", [True, False], ids=["index", "numbers alone"])
def test_an_adapter_in_several_files_is_merged(bench: Workbench, index: bool) -> None:
    """The parts are read as one, and nothing of them counts as lying beside the adapter."""
    cut(bench, index)
    tensors, report = bench.merges()
    check_is_merged(tensors)
    assert not any(note["code"].startswith("file-") for note in report["notes"])


ALGEBRA = [["rescale", "--scale", "1"], ["rescale", "--bake"], ["resize", "--rank", "2"], ["combine"]]


@pytest.mark.parametrize("words", ALGEBRA, ids=" ".join)
def test_the_algebra_of_an_adapter_in_several_files_writes_one(bench: Workbench, words: list[str]) -> None:
    """PEFT reads one file only; its tensors merge to what the parts do."""
    cut(bench, index=True)
    outcome = bench.run(words[0], bench.adapter, *words[1:], "-o", bench.outputs / "adapter")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in (bench.outputs / "adapter").glob("*.safetensors")] == [ADAPTER]
    assert bench.run("merge", bench.base, bench.outputs / "adapter", "-o", bench.out).code == 0
    np.testing.assert_allclose(tensors_of(bench.out)[WEIGHT], MERGED, atol=1e-6)  # factors are rounded anew


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--check"], ["compare"]], ids=" ".join)
def test_looking_at_an_adapter_in_several_files(bench: Workbench, words: list[str]) -> None:
    """Every tensor of every part is counted."""
    cut(bench, index=True)
    more = [bench.adapter] if words[0] == "compare" else []
    outcome = bench.run(words[0], bench.adapter, *more, *words[1:], "--json")
    assert outcome.code == 0, outcome.err
    if words[0] == "inspect":
        stored = [t for path in bench.adapter.glob("*.safetensors") for t in load_file(path).values()]
        assert json.loads(outcome.out)["results"][0]["parameters"] == sum(tensor.numel() for tensor in stored)


def test_push_sends_every_part_and_the_index(bench: Workbench) -> None:
    """All of it is what makes the adapter."""
    parts = cut(bench, index=True)
    files = json.loads(bench.run("push", bench.adapter, "me/x", "--dry-run", "--json").out)["files"]
    assert {*parts, f"{STEM}.safetensors.index.json"} <= files.keys()


@pytest.mark.parametrize("index", [True, False], ids=["index", "numbers alone"])
def test_a_missing_part_is_named(bench: Workbench, index: bool) -> None:
    """Exit 3: an adapter that lacks a part is not merged as far as it goes."""
    parts = cut(bench, index)
    (bench.adapter / parts[0]).unlink()
    bench.refuses_to_merge(parts[0] if index else "shards [1] of the 2")


@pytest.mark.parametrize("index", [True, False], ids=["index", "numbers alone"])
def test_one_part_stands_for_all_of_them_and_that_is_told(bench: Workbench, index: bool) -> None:
    """A part named as the operand can only mean the adapter in its folder; its factor alone is never merged."""
    part = bench.adapter / cut(bench, index)[0]
    outcome = bench.run("merge", bench.base, part, "-o", bench.out)
    assert outcome.code == 0, outcome.err
    assert outcome.err == f"note: {part}: a file of the adapter in {bench.adapter}, which is read\n"
    check_is_merged(tensors_of(bench.out))


def test_weights_under_another_name_are_read_and_told(bench: Workbench) -> None:
    """The one file with factors in a folder with an adapter's config is the adapter."""
    (bench.adapter / ADAPTER).rename(bench.adapter / "my_lora.safetensors")
    save_file({"v_head.weight": torch.ones(2)}, bench.adapter / "value_head.safetensors")
    tensors, report = bench.merges("--ignore-files", "value_head.safetensors")
    check_is_merged(tensors)
    assert any("my_lora.safetensors" in note["text"] for note in report["notes"])
    (bench.adapter / "second.safetensors").write_bytes((bench.adapter / "my_lora.safetensors").read_bytes())
    bench.refuses("inspect", bench.adapter, told=["my_lora.safetensors", "second.safetensors"])


def spoil_adapter(bench: Workbench) -> Path:
    (bench.adapter / ADAPTER).unlink()
    return bench.adapter / f"{STEM}.bin"


def spoil_base(bench: Workbench) -> Path:
    (bench.base / MODEL).unlink()
    return bench.base / "pytorch_model.bin"


@pytest.mark.parametrize("spoil", [spoil_adapter, spoil_base], ids=["adapter", "base"])
@pytest.mark.parametrize("operand", ["folder", "file"])
def test_a_pointer_of_git_lfs_is_told_and_no_conversion_is_proposed(
    bench: Workbench, spoil: Callable[[Workbench], Path], operand: str
) -> None:
    """The file was never fetched, so there is nothing to convert."""
    path = spoil(bench)
    path.write_text(POINTER)
    place = path if operand == "file" else path.parent
    words = ("merge", bench.base, place) if spoil is spoil_adapter else ("merge", place, bench.adapter)
    told = bench.refuses(*words, "-o", bench.out, told=["git lfs pull", path.name]).err
    assert "python -c" not in told


def follow(told: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the one line that a message gives, in a folder; in this process, which has torch in it already."""
    line = next(line for line in told.splitlines() if "python -c" in line)
    words = shlex.split(line[line.index("python -c") :])[:3]
    assert words[:2] == ["python", "-c"]
    monkeypatch.chdir(folder)
    exec(compile(words[2], "the line", "exec"), {})


def flat(tensors: dict[str, Tensor]) -> object:
    return tensors


def nested(tensors: dict[str, Tensor]) -> object:
    return {"step": 3, "model": tensors}


@pytest.mark.parametrize("shape", [flat, nested])
@pytest.mark.parametrize("end", ["bin", "pt"])
def test_the_line_that_converts_a_pickled_adapter_works(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, end: str, shape: Callable[[dict[str, Tensor]], object]
) -> None:
    """Run where the file lies, it leaves what merges to the right model."""
    stored = load_file(bench.adapter / ADAPTER)
    path = spoil_adapter(bench).with_suffix(f".{end}")
    torch.save(shape(stored), path)
    follow(bench.refuses_to_merge("never loads").err, bench.adapter, monkeypatch)
    check_is_merged(bench.merges()[0])


@pytest.mark.parametrize("operand", ["file", "folder"])
def test_the_line_that_converts_arrays_of_numpy_works(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, operand: str
) -> None:
    """An .npz is what older releases of MLX wrote; the line leaves safetensors with the same arrays."""
    folder = bench.inputs / "mlx"
    folder.mkdir()
    arrays: dict[str, Any] = {"layers.0.q.lora_a": np.ones((3, 2), np.float32), "layers.0.q.lora_b": np.ones((2, 3))}
    np.savez(folder / "adapters.npz", **arrays)
    place = folder / "adapters.npz" if operand == "file" else folder
    bench.refuses("index", place, "-o", bench.out, told=["adapters.npz", "numpy"])
    told = bench.refuses("merge", bench.base, place, "-o", bench.out, told=["adapters.npz", "numpy"]).err
    follow(told, folder, monkeypatch)
    found = load_file(folder / "adapters.safetensors")
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


@pytest.mark.parametrize("operand", ["file", "folder"])
def test_the_line_that_converts_litgpts_pickle_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operand: str
) -> None:
    """`lit_model.pth.lora` holds a state dict under "model"; what the line leaves is read with the settings beside it."""
    tensors = {
        "transformer.h.0.attn.proj.lora_A": torch.ones(2, 4),
        "transformer.h.0.attn.proj.lora_B": torch.ones(4, 2),
    }
    torch.save({"model": tensors}, tmp_path / "lit_model.pth.lora")
    (tmp_path / "hyperparameters.yaml").write_text("lora_r: 2\nlora_alpha: 4\n")
    with pytest.raises(loratool.InputError, match="never loads pickled") as told:
        loratool.read_adapter(tmp_path / "lit_model.pth.lora" if operand == "file" else tmp_path)
    follow(str(told.value), tmp_path, monkeypatch)
    found = loratool.inspect(tmp_path)
    assert isinstance(found, loratool.AdapterFacts)
    assert (found.format, found.scalings) == ("litgpt", {"2": 1})


@pytest.mark.parametrize("operand", ["file", "folder"])
def test_the_lines_that_unpack_and_convert_a_nemo_archive_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operand: str
) -> None:
    """The archive is a tar with a pickled state dict and the settings, which are read once they are unpacked."""
    name = "model.decoder.layers.0.self_attention.adapter_layer.lora_dense_attention_adapter"
    tensors = {f"{name}.linear_in.weight": torch.ones(2, 4), f"{name}.linear_out.weight": torch.ones(4, 2)}
    torch.save(tensors, tmp_path / "model_weights.ckpt")
    (tmp_path / "model_config.yaml").write_text("peft:\n  lora_tuning:\n    adapter_dim: 2\n    alpha: 4\n")
    folder = tmp_path / "here"
    folder.mkdir()
    with tarfile.open(folder / "my lora.nemo", "w") as archive:
        for part in ("model_weights.ckpt", "model_config.yaml"):
            archive.add(tmp_path / part, part)
    with pytest.raises(loratool.InputError, match="NeMo archive") as told:
        loratool.read_adapter(folder / "my lora.nemo" if operand == "file" else folder)
    line = re.search(r"with: (mkdir .*?)\. Then", str(told.value))
    assert line is not None
    subprocess.run(line[1], shell=True, cwd=folder, check=True)
    with pytest.raises(loratool.InputError, match="never loads pickled"):
        loratool.read_adapter(folder / "my lora")
    follow(str(told.value), folder / "my lora", monkeypatch)
    found = loratool.inspect(folder / "my lora")
    assert isinstance(found, loratool.AdapterFacts)
    assert (found.format, found.scalings) == ("megatron", {"2": 1})


def save_distributed(folder: Path, tensors: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as distributed

    module: Any = distributed
    module.save({"model": tensors}, storage_writer=module.FileSystemWriter(folder))


@pytest.mark.parametrize(("name", "role"), [("pytorch_model_fsdp_0", "adapter"), ("dcp", "base"), ("dcp", "adapter")])
def test_the_command_that_gathers_a_distributed_checkpoint_works(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, name: str, role: str
) -> None:
    """FSDP folders are gathered by accelerate, other ones by torch; what comes out holds the tensors."""
    stored = load_file(bench.adapter / ADAPTER if role == "adapter" else bench.base / MODEL)
    path = spoil_adapter(bench) if role == "adapter" else spoil_base(bench)
    save_distributed(path.parent / name, stored)
    told = bench.refuses_to_merge(name, "gather it with").err
    line = told[told.index("gather it with: ") + 16 :].splitlines()[0].partition(". Then copy ")[0]
    words = shlex.split(line)
    words[-1] = str(bench.outputs / words[-1])
    if words[0] == "accelerate":
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_module("accelerate.commands.accelerate_cli", run_name="__main__")
    else:
        assert words[:2] == ["python", "-m"]
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")
    if name == "dcp":
        gathered = torch.load(words[-1], weights_only=True)["model"]
    else:
        gathered = load_file(Path(words[-1]) / "model.safetensors")
    assert gathered.keys() == stored.keys()
    assert all(torch.equal(gathered[key], tensor) for key, tensor in stored.items())
    if name != "dcp":
        bench.refuses("merge", bench.base, words[-1], "-o", bench.out, told=["adapter_config.json is missing"])
        assert ". Then copy adapter_config.json into OUT" in told
        shutil.copy(bench.adapter / "adapter_config.json", words[-1])
        assert bench.run("merge", bench.base, words[-1], "-o", bench.out).code == 0
        check_is_merged(tensors_of(bench.out))


@pytest.mark.parametrize("script", [True, False], ids=["with its script", "without"])
def test_a_checkpoint_of_deepspeed_is_told_with_the_command_that_gathers_it(bench: Workbench, script: bool) -> None:
    """deepspeed does not run here, so the command is not followed: it is the one that its own script documents."""
    spoil_adapter(bench)
    (bench.adapter / "global_step7").mkdir()
    (bench.adapter / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    if script:
        (bench.adapter / "zero_to_fp32.py").write_text("")
    wanted = "zero_to_fp32.py" if script else "deepspeed.utils.zero_to_fp32"
    bench.refuses_to_merge("DeepSpeed", wanted, "--safe_serialization", "Then copy adapter_config.json into OUT")
    bench.refuses_to_inspect(bench.adapter, "DeepSpeed", wanted)


def test_the_line_that_converts_a_pickled_model_works(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers loads the model in its folder and saves it as safetensors, with the same tensors."""
    needs("torch", "2.6", "is one whose pickles transformers does not load")
    from tiny_models import FAMILIES, build_base

    model = build_base(bench.inputs / "llama", FAMILIES["tied llama"])
    stored = load_file(model / MODEL)
    (model / MODEL).unlink()
    torch.save(stored, model / "pytorch_model.bin")
    told = bench.refuses("merge", model, bench.adapter, "-o", bench.out, told=["never loads"]).err
    follow(told, model, monkeypatch)
    found = load_file(model / "converted" / MODEL)
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_an_archive_is_refused_with_the_command_that_unpacks_it(bench: Workbench) -> None:
    """What the command leaves is the adapter; a zip is told with its own command."""
    zipped = shutil.make_archive(str(bench.inputs / "z"), "zip", bench.adapter)
    bench.refuses("merge", bench.base, zipped, "-o", bench.out, told=[f"unzip {zipped} -d {zipped[:-4]}"])
    bench.refuses("merge", zipped, bench.adapter, "-o", bench.out, told=[f"unzip {zipped} -d"])
    bench.refuses("inspect", zipped, told=[f"unzip {zipped} -d"])
    packed = shutil.make_archive(str(bench.inputs / "my lora"), "gztar", bench.adapter)
    told = bench.refuses("merge", bench.base, packed, "-o", bench.out, told=["an archive; unpack it with: "]).err
    line = told[told.index("unpack it with: ") + 16 :].partition("; then pass the folder")[0]
    subprocess.run(line, shell=True, cwd=bench.inputs, check=True)
    assert bench.run("merge", bench.base, bench.inputs / "my lora", "-o", bench.out).code == 0
    check_is_merged(tensors_of(bench.out))


def test_states_of_a_training_run_are_not_converted(tmp_path: Path) -> None:
    """No command is proposed that would make safetensors of an optimizer's state."""
    for name in ("optimizer.pt", "training_args.bin", "random_states_0.pkl"):
        torch.save({}, tmp_path / name)
    with pytest.raises(loratool.InputError, match="only files of a training run") as told:
        loratool.inspect(tmp_path)
    assert "python -c" not in str(told.value)
