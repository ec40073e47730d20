"""Files of dialects made to mislead: each is refused with the name of what is wrong, and nothing is written.

What GGUF headers say falsely is in tests/files/test_gguf_headers.py, and broken modules of image models are in
tests/adapters/test_dialects_refused.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_bytes import number, whole_file, words
from safetensors.torch import save_file

from loratool.cli import run
from loratool.files import safefile

MODULE, WEIGHT = "lora_unet_mid_block_attn_to_q", "unet.mid_block.attn.to_q.weight"
DOWN, UP = f"{MODULE}.lora_down.weight", f"{MODULE}.lora_up.weight"


def factors(size: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {DOWN: torch.full((2, 4), size, dtype=dtype), UP: torch.full((6, 2), size, dtype=dtype)}


def alpha_of_text(folder: Path) -> Path:
    """α as a row of bytes: a text that a tool put where a number belongs."""
    save_file(
        factors() | {f"{MODULE}.alpha": torch.tensor(list(b"sixteen"), dtype=torch.uint8)}, folder / "lora.safetensors"
    )
    return folder / "lora.safetensors"


def overflow(folder: Path) -> Path:
    """Finite factors in half precision whose product is not."""
    save_file(factors(60000.0, torch.float16), folder / "lora.safetensors")
    return folder / "lora.safetensors"


def infinite(folder: Path) -> Path:
    save_file(factors() | {UP: torch.full((6, 2), 1e6).half()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def two_modules(folder: Path) -> Path:
    """Two modules of a file that are one name without dots."""
    one, other = "lora_unet_mid_block_attn_to_q", "unet.mid_block.attn.to_q"
    tensors = {
        f"{m}.{end}": each
        for m in (one, other)
        for end, each in zip(("lora_down.weight", "lora_up.weight"), factors().values(), strict=True)
    }
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def long_names(folder: Path) -> Path:
    name = "lora_unet_" + "a" * 10_000
    save_file({f"{name}.lora_down.weight": torch.ones(2, 4)}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def tiny_keys(folder: Path) -> Path:
    """As many tensors as one more than may be."""
    header = {f"{MODULE}_{n}.alpha": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(1001)}
    raw = json.dumps(header).encode()
    (folder / "lora.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(1001))
    return folder / "lora.safetensors"


def circle(folder: Path) -> Path:
    """A link that leads to itself by way of another."""
    (folder / "lora.safetensors").symlink_to(folder / "other.safetensors")
    (folder / "other.safetensors").symlink_to(folder / "lora.safetensors")
    return folder / "lora.safetensors"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "alpha is a text": (alpha_of_text, f"{MODULE}.alpha is [7]; expected one number"),
    "product overflows": (overflow, ": merged values exceed the range of F16; pass --dtype"),
    "infinite factor": (infinite, "not finite"),
    "two modules are one": (two_modules, "means the same weight as"),
    "names of 10 kB": (long_names, "lora_up.weight is missing"),
    "too many keys": (tiny_keys, "1001 tensors, over the limit of 1000"),
    "a circle of links": (circle, "lora.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_misleads_is_refused_in_a_few_lines(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, told = BAD[case]
    monkeypatch.setattr(safefile, "MOST_TENSORS", 1000)  # so that a file of one more is small
    save_file({WEIGHT: torch.ones(6, 4).half()}, tmp_path / "base.safetensors")
    adapter = make(tmp_path)
    assert run(["merge", str(tmp_path / "base.safetensors"), str(adapter), "-o", str(tmp_path / "out")]) == (
        4 if make is overflow else 3
    )
    said = capsys.readouterr().err
    assert told in " ".join(said.split()), said
    assert len(said) < 3000
    assert not (tmp_path / "out").exists()


def test_parts_of_a_gguf_model_that_are_links_to_the_first_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each says that it is the first, and all have the same tensors."""
    entries = (words("general.architecture", "llama"), number("split.count", 2), number("split.no", 0))
    first = tmp_path / "model-00001-of-00002.gguf"
    first.write_bytes(whole_file(entries, {"output.weight": np.ones((2, 4), np.float32)}))
    (tmp_path / "model-00002-of-00002.gguf").symlink_to(first)
    assert run(["inspect", str(first)]) == 3
    said = capsys.readouterr().err
    assert "do not belong together" in said
    assert "split.no" in said


def test_an_index_that_names_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    name = "model.safetensors.index.json"
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {WEIGHT: name}}))
    (folder / "config.json").write_text("{}")
    assert run(["inspect", str(folder)]) == 3
    assert name in capsys.readouterr().err


def test_an_alpha_that_no_float32_holds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """α may be as large as float32 has numbers; twice as large a one cannot be stored."""
    save_file(factors() | {f"{MODULE}.alpha": torch.tensor(3e38)}, tmp_path / "lora.safetensors")
    words = ["rescale", str(tmp_path / "lora.safetensors"), "-o", str(tmp_path / "out.safetensors"), "--scale"]
    assert run([*words, "2"]) == 2
    assert "alpha would overflow float32" in capsys.readouterr().err
    assert run([*words, "0.5"]) == 0


def test_a_name_of_numbered_blocks_alone_is_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lora_unet_" + "down_blocks_0_" * 2
    save_file({f"{name}.{n.rpartition(f'{MODULE}.')[2]}": t for n, t in factors().items()}, tmp_path / "a.safetensors")
    assert run(["inspect", str(tmp_path / "a.safetensors")]) == 0
    assert "unet_down_blocks_0_down_blocks_0_: 6×4 ×1" in capsys.readouterr().out
