"""Adapters of one file as objects of a store: their record is in the header, and they appear in one step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import numbers
from diffusion_models import clip, ldm_unet, under, values
from safetensors.torch import load, load_file, save_file
from store_server import BUCKET, Asked, StoreServer, tree

import loratool
from loratool import cli
from loratool.errors import UsageError
from loratool.publishing import storing

PLACE = "files"
LDM = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Stable Diffusion 1.5, the same with another weight, and two adapters of it."""
    home = tmp_path_factory.mktemp("files")
    unet = under("model.diffusion_model.", ldm_unet((1, 1, 1, 0), matrix_ends=False, added=False))
    tensors = values(unet | under("cond_stage_model.transformer.", clip()))
    save_file(tensors, home / "sd.safetensors")
    rows, columns = tensors[LDM].shape
    save_file({**tensors, LDM: tensors[LDM] + numbers(rows, 1) @ numbers(1, columns)}, home / "tuned.safetensors")
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for seed, name in enumerate("ab"):
        factors = {"lora_down.weight": numbers(4, columns, seed=seed), "lora_up.weight": numbers(rows, 4, seed=seed)}
        tensors = {f"{module}.{end}": factor for end, factor in factors.items()} | {
            f"{module}.alpha": torch.tensor(4.0)
        }
        save_file(tensors, home / f"{name}.safetensors")
    return home


@pytest.mark.parametrize(
    "words",
    [
        "convert a.safetensors --to comfy",
        "resize a.safetensors --rank 2",
        "rescale a.safetensors --scale 2",
        "combine a.safetensors b.safetensors",
        "extract sd.safetensors tuned.safetensors --rank 1 --to kohya",
    ],
)
def test_an_object_has_the_bytes_of_the_file(
    store: StoreServer, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """It is the only one, it is read as the file is, and `--overwrite` replaces what was made here."""
    monkeypatch.chdir(here)
    local, name = tmp_path / "out.safetensors", words.split()[0]
    out = f"s3://{BUCKET}/{PLACE}/{name}/out.safetensors"
    for place in (str(local), out):
        assert cli.run([*words.split(), "-q", "-o", place]) == 0
    there = store.objects(BUCKET, f"{PLACE}/{name}")
    assert there == {"out.safetensors": local.read_bytes()}
    assert cli.run([*words.split(), "-q", "-o", out]) == 2
    assert cli.run([*words.split(), "-q", "-o", out, "--overwrite"]) == 0
    assert store.objects(BUCKET, f"{PLACE}/{name}") == there
    assert str(loratool.inspect(out)).replace(out, str(local)) == str(loratool.inspect(local))


def test_an_adapter_extracted_by_many_workers_may_be_an_object(store: StoreServer, here: Path, tmp_path: Path) -> None:
    """That of one process; nothing is in the store until it is put together."""
    models, out = (here / "sd.safetensors", here / "tuned.safetensors"), f"s3://{BUCKET}/{PLACE}/parts/out.safetensors"
    for part in ("1/2", "2/2"):
        loratool.extract_part(*models, out, part=part, into=tmp_path / "into", rank=1, to="kohya")
    assert not store.objects(BUCKET, f"{PLACE}/parts")
    report = loratool.finish_extract(*models, out, into=tmp_path / "into", rank=1, to="kohya")
    assert str(report).startswith(f"extracted into  {out}\n")
    loratool.extract(*models, tmp_path / "out.safetensors", rank=1, to="kohya")
    found, wanted = (
        load(store.objects(BUCKET, f"{PLACE}/parts")["out.safetensors"]),
        load_file(tmp_path / "out.safetensors"),
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_large_file_appears_when_all_of_it_has_arrived(
    store: StoreServer, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends on the way leaves what was there; the next one sends all of it and leaves no upload."""
    monkeypatch.setattr(storing, "PIECE", 1 << 10)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1 << 10)
    out, local = f"s3://{BUCKET}/{PLACE}/large/out.safetensors", tmp_path / "out.safetensors"
    loratool.rescale(here / "a.safetensors", out, scale=2)
    before = store.objects(BUCKET, f"{PLACE}/large")
    assert before.keys() == {"out.safetensors"}
    with monkeypatch.context() as patch:
        for name in ("complete", "abort"):  # as if it were killed there
            patch.setattr(f"loratool.stores.uploads.{name}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loratool.rescale(here / "b.safetensors", out, scale=2, overwrite=True)
    after = store.objects(BUCKET, f"{PLACE}/large")
    assert after.keys() == {"out.safetensors", ".loratool/out.safetensors/begin.json"}
    assert after["out.safetensors"] == before["out.safetensors"]
    assert store.uploads(BUCKET) == [f"{PLACE}/large/out.safetensors"]
    loratool.rescale(here / "b.safetensors", out, scale=2)  # what it replaces was settled by the first run
    loratool.rescale(here / "b.safetensors", local, scale=2)
    assert store.objects(BUCKET, f"{PLACE}/large") == {"out.safetensors": local.read_bytes()}
    assert not store.uploads(BUCKET)


def test_what_was_not_made_here_stays(store: StoreServer, here: Path) -> None:
    """So does what is written by something else between the first look and the end."""
    key = f"{PLACE}/others/out.safetensors"
    out, theirs = f"s3://{BUCKET}/{key}", (here / "b.safetensors").read_bytes()
    store.client.put_object(Bucket=BUCKET, Key=key, Body=theirs)
    with pytest.raises(UsageError, match="does not list"):
        loratool.rescale(here / "a.safetensors", out, scale=2, overwrite=True)
    store.client.delete_object(Bucket=BUCKET, Key=key)

    def first(asked: Asked) -> None:
        if asked.method == "PUT" and asked.key == key:
            store.fault = lambda _: None
            store.client.put_object(Bucket=BUCKET, Key=key, Body=theirs)

    store.fault = first
    with pytest.raises(UsageError, match="in the meantime"):
        loratool.rescale(here / "a.safetensors", out, scale=2)
    assert store.objects(BUCKET, f"{PLACE}/others") == {"out.safetensors": theirs}


def test_a_model_and_an_adapter_of_ours_replace_each_other_as_files_do(
    store: StoreServer, here: Path, tmp_path: Path
) -> None:
    """`--overwrite` asks who made what is there, and not what it is; what nobody of ours made stays."""
    key = f"{PLACE}/either/out.safetensors"
    for out in (f"s3://{BUCKET}/{key}", tmp_path / "out.safetensors"):
        loratool.rescale(here / "a.safetensors", out, scale=2)
        loratool.merge(here / "sd.safetensors", here / "a.safetensors", out, overwrite=True)
        loratool.rescale(here / "b.safetensors", out, scale=2, overwrite=True)
    there, local = store.objects(BUCKET, f"{PLACE}/either"), tree(tmp_path)
    assert there == local
    assert there.keys() == {"out.safetensors"}
    store.client.put_object(Bucket=BUCKET, Key=key, Body=(here / "b.safetensors").read_bytes())
    for each in (f"s3://{BUCKET}/{key}", here / "b.safetensors"):
        with pytest.raises(UsageError, match="--overwrite does not replace it"):
            loratool.merge(here / "sd.safetensors", here / "a.safetensors", each, overwrite=True)


def test_formats_with_a_config_need_a_prefix(
    store: StoreServer, here: Path, models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The message names the address, and not the folder on this disk in which the output is built."""
    out = f"s3://{BUCKET}/{PLACE}/peft.safetensors"
    assert cli.run(["resize", str(models / "adapter"), "--rank", "2", "-o", out]) == 2
    assert (
        f"{out}: OUT must be a folder, such as s3://{BUCKET}/{PLACE}/peft; only adapters of" in capfd.readouterr().err
    )
    assert cli.run(["resize", str(here / "a.safetensors"), "--rank", "2", "-o", f"s3://{BUCKET}/top.gguf"]) == 2
    assert f"s3://{BUCKET}/top.gguf: OUT must be a folder, such as s3://{BUCKET}/top\n" in capfd.readouterr().err
    assert not store.objects(BUCKET, PLACE).keys() & {"peft.safetensors"}


def test_an_adapter_of_llama_cpp_is_an_object_too(store: StoreServer, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    shutil.copytree(models / "base", tmp_path / "base")
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out.gguf", f"s3://{BUCKET}/{PLACE}/gguf/out.gguf"
    for place in out:
        loratool.convert(models / "adapter", place, to="gguf", base=tmp_path / "base")
    assert store.objects(BUCKET, f"{PLACE}/gguf") == {"out.gguf": out[0].read_bytes()}
