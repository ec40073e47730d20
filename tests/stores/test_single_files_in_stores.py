"""Merges whose output is one object of a store, with its record next to it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import faults
import pytest
from store_merges import small_parts
from store_server import BUCKET, StoreServer

import loratool
from loratool.errors import UsageError
from loratool.stores.bucket import Bucket

PLACE = "singles"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of one file, an adapter, and their merge by one process into a file of this disk."""
    home = tmp_path_factory.mktemp("single")
    faults.make_base(home / "base", 1, 96)
    faults.make_adapter(home / "adapter", 1, 96, rank=4)
    loratool.merge(base_in(home), home / "adapter", home / "merged.safetensors", sha256=True)
    return home


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)


def base_in(home: Path) -> Path:
    return next((home / "base").glob("*.safetensors"))


def base_of(store: StoreServer, models: Path, source: str) -> str:
    """The base as an operand; the server of this module has it below `team`."""
    return str(base_in(models)) if source == "local" else f"s3://{BUCKET}/team/base/{base_in(models).name}"


@pytest.mark.parametrize("source", ["local", "store"])
def test_an_output_of_one_object_has_the_bytes_of_a_file(store: StoreServer, models: Path, source: str) -> None:
    """So has its record, but for what a store copied; nothing else is left, and `verify` proves the object."""
    base, adapter = base_of(store, models, source), str(models / "adapter")
    out = f"s3://{BUCKET}/{PLACE}/{source}/merged.safetensors"
    report = loratool.merge(base, adapter, out, sha256=True)
    assert str(report).startswith(f"merged into        {out}\n")
    there = store.objects(BUCKET, f"{PLACE}/{source}")
    assert there.keys() == {"merged.safetensors", "merged.safetensors.loratool.json"}
    content = there["merged.safetensors"]
    assert content == (models / "merged.safetensors").read_bytes()
    (entry,) = json.loads(there["merged.safetensors.loratool.json"])["files"].values()
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    local = json.loads((models / "merged.safetensors.loratool.json").read_text())["files"]["merged.safetensors"]
    assert (entry == local) == ("copies" not in entry)
    assert not [key for key in store.uploads(BUCKET) if key.startswith(PLACE)]
    assert loratool.verify(out).exit_code == 0
    assert loratool.verify(out, base, adapter).exit_code == 0


def test_workers_make_one_object_and_its_neighbours_stay(store: StoreServer, models: Path) -> None:
    """What the workers share is apart from that of other outputs in the same place; so is what `--abort` removes."""
    base, adapter = base_of(store, models, "local"), str(models / "adapter")
    one, other = (f"s3://{BUCKET}/{PLACE}/parts/{name}.safetensors" for name in ("one", "other"))
    loratool.merge_part(base, adapter, one, "1/2")
    loratool.merge_part(base, adapter, other, "1/1", weights=[2])
    loratool.merge_part(base, adapter, one, "2/2")
    assert not loratool.merge_status(base, adapter, one).missing
    assert loratool.finish_merge(base, adapter, one).published
    assert loratool.merge_status(base, adapter, one).published
    found = loratool.abort_merge(other)
    assert (found.uploads, found.completed) == (("other.safetensors",), False)
    there = store.objects(BUCKET, f"{PLACE}/parts")
    assert there.keys() == {"one.safetensors", "one.safetensors.loratool.json"}
    assert there["one.safetensors"] == (models / "merged.safetensors").read_bytes()
    assert not [key for key in store.uploads(BUCKET) if key.startswith(PLACE)]


def test_an_object_is_replaced_if_its_record_lists_it(
    store: StoreServer, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --overwrite it stays, and so does one that loratool did not write; an interrupted replacement goes on."""
    base, adapter = base_of(store, models, "local"), str(models / "adapter")
    out = f"s3://{BUCKET}/{PLACE}/again/merged.safetensors"
    store.client.put_object(Bucket=BUCKET, Key=f"{PLACE}/again/merged.safetensors", Body=b"mine")
    with pytest.raises(UsageError, match="already exists"):
        loratool.merge(base, adapter, out)
    with pytest.raises(UsageError, match="does not list"):
        loratool.merge(base, adapter, out, overwrite=True)
    assert store.objects(BUCKET, f"{PLACE}/again") == {"merged.safetensors": b"mine"}
    store.client.delete_object(Bucket=BUCKET, Key=f"{PLACE}/again/merged.safetensors")
    loratool.merge(base, adapter, out, weights=[2])
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loratool.merge(base, adapter, out, overwrite=True)
    assert "merged.safetensors.loratool.json" not in store.objects(BUCKET, f"{PLACE}/again")
    loratool.merge(base, adapter, out, overwrite=True)
    there = store.objects(BUCKET, f"{PLACE}/again")
    assert there["merged.safetensors"] == (models / "merged.safetensors").read_bytes()
    assert json.loads(there["merged.safetensors.loratool.json"])["adapters"][0]["weight"] == 1
    assert len(there) == 2


def test_a_model_of_llama_cpp_is_merged_into_an_object(store: StoreServer, tmp_path: Path) -> None:
    """The bytes are those of the same merge into a file; what the adapter leaves alone is copied inside the store."""
    pytest.importorskip("gguf")
    from gguf_models import llama_weights, write_llama
    from merged_models import write_adapter

    weights = llama_weights()
    base = write_llama(tmp_path / "base.gguf", weights)
    weight = weights["model.layers.0.self_attn.q_proj.weight"]
    factors = {"model.layers.0.self_attn.q_proj.weight": (weight[:2].half(), weight[:, :2].half())}
    adapter = write_adapter(tmp_path / "adapter", factors, r=2, lora_alpha=2, target_modules=["q_proj"])
    loratool.merge(base, adapter, tmp_path / "merged.gguf")
    store.client.put_object(Bucket=BUCKET, Key=f"{PLACE}/base.gguf", Body=base.read_bytes())
    out = f"s3://{BUCKET}/{PLACE}/llama/merged.gguf"
    loratool.merge(f"s3://{BUCKET}/{PLACE}/base.gguf", adapter, out)
    assert store.objects(BUCKET, f"{PLACE}/llama")["merged.gguf"] == (tmp_path / "merged.gguf").read_bytes()
    assert any(each.kind == "copy part" for each in store.requests)
    assert loratool.verify(out).exit_code == 0
