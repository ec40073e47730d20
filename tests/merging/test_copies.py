"""Tensors whose bytes are all stored somewhere are copied: nothing is computed for them, and torch is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save_model, seeded
from peft_files import save_peft
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.cli import run
from loratool.errors import FitError

HEAD, QUERY = "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
SHAPES = {"model.embed_tokens.weight": (48, 24), QUERY: (24, 24), "model.norm.weight": (24,), HEAD: (48, 24)}


def weights(seed: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=seeded(seed + at)) for at, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", {name: tensor.bfloat16() for name, tensor in weights(0).items()}, files=2)


def saved_whole(folder: Path, tensors: dict[str, Tensor], factors: bool = False) -> Path:
    """An adapter with modules that were trained in full, and a low-rank update besides where that is asked for."""
    stored = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    if factors:
        module = f"base_model.model.{QUERY.removesuffix('.weight')}"
        stored[f"{module}.lora_A.weight"] = torch.randn(2, 24, generator=seeded(8))
        stored[f"{module}.lora_B.weight"] = torch.randn(24, 2, generator=seeded(9))
    modules = sorted({name.split(".")[-2] for name in tensors})
    return save_peft(folder, stored, r=2, lora_alpha=2, target_modules=["q_proj"], modules_to_save=modules)


def merged(out: Path) -> dict[str, Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def imported(base: Path, adapter: Path, out: Path, *options: str) -> set[str]:
    """The packages that a merge has imported when it has ended well."""
    code = (
        "import json, sys; from loratool.cli import run; code = run(sys.argv[1:]); "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules}))); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, "merge", str(base), str(adapter), "-o", str(out), "-q", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_a_merge_that_computes_nothing_imports_no_torch(base: Path, tmp_path: Path) -> None:
    new = {HEAD: weights(100)[HEAD].bfloat16(), "model.norm.weight": weights(100)["model.norm.weight"].bfloat16()}
    adapter = saved_whole(tmp_path / "adapter", new)
    assert "torch" not in imported(base, adapter, tmp_path / "out", "--sha256")
    before, after = merged(base), merged(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, new.get(name, before[name])), name
    table = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert table["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert table["adapters"][0]["modules"] == 2
    assert table["adapters"][0]["unchanged"] == 0
    assert run(["inspect", str(tmp_path / "out"), "--check", "-q"]) == 0  # every digest is right


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_saved_module_of_another_dtype_is_converted(base: Path, tmp_path: Path, dtype: str) -> None:
    new = weights(100)[HEAD].to(getattr(torch, dtype))
    adapter = saved_whole(tmp_path / "adapter", {HEAD: new})
    loratool.merge(base, [adapter], tmp_path / "out")
    assert torch.equal(merged(tmp_path / "out")[HEAD], new.bfloat16())


def test_a_copy_for_which_the_output_has_another_dtype_is_converted(base: Path, tmp_path: Path) -> None:
    new = weights(100)[HEAD].bfloat16()
    loratool.merge(base, [saved_whole(tmp_path / "adapter", {HEAD: new})], tmp_path / "out", dtype="float32")
    assert torch.equal(merged(tmp_path / "out")[HEAD], new.float())


@pytest.mark.parametrize("factors", [False, True])
def test_a_saved_module_that_is_the_bases_changes_nothing_and_is_told(
    base: Path, tmp_path: Path, factors: bool
) -> None:
    adapter = saved_whole(tmp_path / "adapter", {HEAD: merged(base)[HEAD]}, factors)
    if not factors:
        with pytest.raises(FitError, match="not written, because every weight rounds back to its old value"):
            loratool.merge(base, [adapter], tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    report = loratool.merge(base, [adapter], tmp_path / "out")
    assert report.adapters[0].modules == 2
    assert report.adapters[0].unchanged == (HEAD,)
    assert any(note.code == "modules-without-effect" for note in report.notes)


def test_one_element_that_differs_in_its_sign_alone_is_a_change(base: Path, tmp_path: Path) -> None:
    tensors = merged(base)
    tensors[HEAD][-1, -1] = 0.0
    save_model(tmp_path / "zero", tensors)
    tensors[HEAD][-1, -1] = -0.0
    report = loratool.merge(tmp_path / "zero", [saved_whole(tmp_path / "one", {HEAD: tensors[HEAD]})], tmp_path / "out")
    assert report.adapters[0].unchanged == ()
    assert merged(tmp_path / "out")[HEAD][-1, -1].signbit()


def test_outputs_made_together_have_each_their_own_saved_module(base: Path, tmp_path: Path) -> None:
    """Of one tensor of the base two outputs hold what their adapters saved, a third what it is, a fourth an update."""
    heads = [weights(seed)[HEAD].bfloat16() for seed in (100, 200)]
    adapters = [saved_whole(tmp_path / f"a{n}", {HEAD: head}) for n, head in enumerate(heads)]
    norm = weights(100)["model.norm.weight"].bfloat16()
    adapters.append(saved_whole(tmp_path / "a2", {"model.norm.weight": norm}))
    adapters.append(saved_whole(tmp_path / "a3", {"model.norm.weight": norm}, factors=True))
    loratool.merge_many(base, {tmp_path / f"o{n}": [adapter] for n, adapter in enumerate(adapters)})
    for number, adapter in enumerate(adapters):
        loratool.merge(base, [adapter], tmp_path / f"alone{number}")
        for file in (tmp_path / f"alone{number}").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / f"o{number}" / file.name).read_bytes()
        assert run(["inspect", str(tmp_path / f"o{number}"), "--check", "-q"]) == 0  # the digests too are its own
    assert [torch.equal(merged(tmp_path / f"o{n}")[HEAD], head) for n, head in enumerate(heads)] == [True, True]


def test_a_saved_module_in_memory_is_the_file_s(base: Path, tmp_path: Path) -> None:
    new = weights(100)[HEAD].bfloat16()
    tensors = dict(loratool.iter_merged(base, [saved_whole(tmp_path / "adapter", {HEAD: new})]))
    assert torch.equal(tensors[HEAD], new)
    assert torch.equal(tensors[QUERY], merged(base)[QUERY])
