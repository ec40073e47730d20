"""A base of one file becomes one file, with a record next to it that `verify` holds it to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from diffusion_models import WIDTH, bfl_flux, under, values
from named_updates import Targets, save_targets
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters import formats
from loratool.errors import StorageError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

H = WIDTH
QKV = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
HEADER = {"modelspec.title": "narrow", "modelspec.hash_sha256": "0x12", "sshs_model_hash": "34", "format": "pt"}


@pytest.fixture(autouse=True)
def targets_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Targets()))


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A BFL file with VAE, and an adapter of one of its projections."""
    base = tmp_path / "flux.safetensors"
    tensors = values(under("model.diffusion_model.", bfl_flux()) | {"first_stage_model.decoder.conv_in.bias": (4,)})
    save_file(tensors, base, metadata=HEADER)
    save_targets(tmp_path / "adapter", {"unet_double_blocks_0_img_attn_qkv": (3 * H, H)})
    return base, tmp_path / "adapter"


def test_one_file_becomes_one_file_and_a_record(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Its header keeps what is still true: digests of the base's values are not."""
    base, adapter = inputs
    out = tmp_path / "merged.safetensors"
    before = {path.name for path in tmp_path.iterdir()}
    report = loratool.merge(base, adapter, out, weights=[0.5], device="cpu")
    assert {path.name for path in tmp_path.iterdir()} - before == {out.name, f"{out.name}.loratool.json"}
    assert report.out == out
    old, new = load_file(base), load_file(out)
    assert [name for name in old if not torch.equal(old[name], new[name])] == [QKV]
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"modelspec.title": "narrow", "format": "pt"}
    record = json.loads((tmp_path / f"{out.name}.loratool.json").read_text())
    assert list(record["files"]) == [out.name]
    assert record["adapters"][0]["weight"] == 0.5


def test_verify_holds_a_file_to_the_record_next_to_it_and_to_its_inputs(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    out = tmp_path / "merged.safetensors"
    loratool.merge(base, adapter, out, device="cpu", verify=True)
    assert loratool.verify(out).files == 1
    assert loratool.verify(out, base=base, adapters=adapter).verdict == "proven"
    raw = bytearray(out.read_bytes())
    raw[-1] ^= 1
    out.write_bytes(raw)
    spoilt = loratool.verify(out)
    assert not spoilt.passes
    assert out.name in str(spoilt)


def test_only_a_file_that_was_made_here_is_replaced(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    out = tmp_path / "merged.safetensors"
    out.write_bytes(base.read_bytes())
    for overwrite, told in ((False, "already exists"), (True, "was not made by loratool")):
        with pytest.raises(UsageError, match=told):
            loratool.merge(base, adapter, out, overwrite=overwrite, device="cpu")
    assert out.read_bytes() == base.read_bytes()
    out.unlink()
    loratool.merge(base, adapter, out, device="cpu")
    with pytest.raises(UsageError, match="already exists"):
        loratool.merge(base, adapter, out, device="cpu")
    loratool.merge(base, adapter, out, weights=[2], overwrite=True, device="cpu")
    assert loratool.verify(out).files == 1
    with pytest.raises(UsageError, match="OUT is"):
        loratool.merge(base, adapter, base, overwrite=True, device="cpu")


def test_a_folder_of_shards_wants_a_folder(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    (tmp_path / "model").mkdir()
    base.rename(tmp_path / "model" / "model.safetensors")
    with pytest.raises(UsageError, match="OUT must be a folder"):
        loratool.merge(tmp_path / "model", adapter, tmp_path / "merged.safetensors", device="cpu")


def test_an_interrupted_file_leaves_nothing_under_its_name(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    out = tmp_path / "merged.safetensors"

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loratool.merging.small_files.as_json", fails)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(StorageError):
        loratool.merge(base, adapter, out, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == before
