"""A merge made again and compared with the files of a finished output: what differs is told by tensor and byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import Difference, first_unequal, verify
from safetensors import safe_open
from safetensors.torch import save_file

import loratool
from loratool.adapters.formats import read_adapter
from loratool.bases.opening import open_checkpoint
from loratool.files import sink
from loratool.merging import resources
from loratool.merging.merge_options import PlanOptions
from loratool.merging.planning import plan_merge

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
EDITED = "model.layers.0.self_attn.q_proj.weight"  # in the first file
COPIED = "model.layers.1.mlp.up_proj.weight"  # in the second


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of two files, an adapter, and what the command line made of them."""
    home = tmp_path_factory.mktemp("merged")
    torch.manual_seed(0)
    layers = [f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in ("mlp.up_proj", "self_attn.q_proj")]
    tensors = {name: torch.randn(40, 30).bfloat16() for name in layers}
    (home / "base").mkdir()
    for number, file in enumerate(FILES):
        own = {name: value for name, value in tensors.items() if f".{number}." in name}
        save_file(own, home / "base" / file)
    weight_map = {name: FILES[int(".1." in name)] for name in layers}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (home / "base" / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    (home / "base" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    (home / "adapter").mkdir()
    (home / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    factors: dict[str, torch.Tensor] = {}
    for n in (0, 1):
        module = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        factors |= {f"{module}.lora_A.weight": torch.randn(2, 30), f"{module}.lora_B.weight": torch.randn(40, 2)}
    save_file(factors, home / "adapter" / "adapter_model.safetensors")
    loratool.merge(home / "base", [home / "adapter"], home / "out", device="cpu")
    return home


@pytest.fixture
def contents(merged: Path) -> dict[str, bytearray]:
    return {file: bytearray((merged / "out" / file).read_bytes()) for file in FILES}


def differences(merged: Path, folder: Path) -> tuple[Difference, ...]:
    """What `verify` says of files against a new plan of the merge."""
    model, adapter = open_checkpoint(merged / "base"), read_adapter(merged / "adapter")
    return verify(plan_merge(model, [adapter], PlanOptions()), folder, "cpu")


def written(contents: dict[str, bytearray], folder: Path) -> Path:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def place(merged: Path, file: str, tensor: str) -> tuple[int, int]:
    """The bytes of a tensor in a file, found by the bytes that safetensors reads."""
    path = merged / "out" / file
    with safe_open(path, "pt") as opened:
        raw = opened.get_tensor(tensor).view(torch.uint8).numpy().tobytes()
    content = path.read_bytes()
    assert content.count(raw) == 1
    return content.index(raw), len(raw)


def test_what_a_merge_wrote_is_what_its_plan_makes_again(merged: Path) -> None:
    assert differences(merged, merged / "out") == ()


@pytest.mark.parametrize("small", [True, False], ids=["small parts", "parts of the usual size"])
@pytest.mark.parametrize(
    ("file", "tensor"), [(FILES[0], EDITED), (FILES[1], COPIED)], ids=["an edited tensor", "a copied tensor"]
)
def test_a_flipped_bit_is_told_by_its_tensor_and_byte(
    merged: Path,
    contents: dict[str, bytearray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    tensor: str,
    small: bool,
) -> None:
    if small:
        monkeypatch.setattr(resources, "CPU_BLOCK", 100)
        monkeypatch.setattr(sink, "COPY_PIECE", 77)
    start, size = place(merged, file, tensor)
    for byte in (0, 1234, size - 1):
        contents[file][start + byte] ^= 4
    found = differences(merged, written(contents, tmp_path))
    assert found == (Difference(file, start, tensor, 0),)
    contents[file][start] ^= 4
    assert differences(merged, written(contents, tmp_path)) == (Difference(file, start + 1234, tensor, 1234),)


def test_two_tensors_that_changed_places_are_both_told(
    merged: Path, contents: dict[str, bytearray], tmp_path: Path
) -> None:
    names = [f"model.layers.1.{part}.weight" for part in ("mlp.up_proj", "self_attn.q_proj")]
    (one, size), (other, _) = (place(merged, FILES[1], name) for name in names)
    content = contents[FILES[1]]
    first, second = content[one : one + size], content[other : other + size]
    content[one : one + size], content[other : other + size] = second, first
    byte = next(n for n in range(size) if first[n] != second[n])
    wanted = {Difference(FILES[1], at + byte, name, byte) for at, name in zip((one, other), names, strict=True)}
    assert set(differences(merged, written(contents, tmp_path))) == wanted


def test_a_missing_tail_is_told_by_its_first_byte(merged: Path, contents: dict[str, bytearray], tmp_path: Path) -> None:
    content = contents[FILES[1]]
    (last,) = (t for t in ("mlp.up_proj", "self_attn.q_proj") if sum(place(merged, FILES[1], name(t))) == len(content))
    start, size = place(merged, FILES[1], name(last))
    del content[-10:]
    assert differences(merged, written(contents, tmp_path)) == (
        Difference(FILES[1], start + size - 10, name(last), size - 10),
    )


def name(part: str) -> str:
    return f"model.layers.1.{part}.weight"


def test_bytes_after_the_last_tensor_are_told(merged: Path, contents: dict[str, bytearray], tmp_path: Path) -> None:
    size = len(contents[FILES[0]])
    contents[FILES[0]] += b"x"
    assert differences(merged, written(contents, tmp_path)) == (Difference(FILES[0], size, "", size),)


def test_a_changed_header_is_told(merged: Path, contents: dict[str, bytearray], tmp_path: Path) -> None:
    contents[FILES[0]][20] ^= 1
    assert differences(merged, written(contents, tmp_path)) == (Difference(FILES[0], 20, "", 20),)


def test_of_a_missing_file_every_part_is_told(merged: Path, contents: dict[str, bytearray], tmp_path: Path) -> None:
    del contents[FILES[1]]
    found = differences(merged, written(contents, tmp_path))
    assert {each.tensor for each in found} == {"", name("mlp.up_proj"), name("self_attn.q_proj")}
    assert all((each.file, each.byte) == (FILES[1], 0) for each in found)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_first_unequal_byte_is_the_first(size: int) -> None:
    content = bytes(range(size))
    for at in range(size):
        other = bytearray(content)
        other[at] ^= 1
        other[-1] ^= 1 if at < size - 1 else 0
        assert first_unequal(memoryview(content), memoryview(other)) == at
        assert first_unequal(memoryview(content), memoryview(content[:at])) == at
