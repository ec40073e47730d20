"""GLoRA changes a bias by W @ C: by what the weight of the same layer is, wherever that lies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
from hub_client import Client
from hub_server import WRITER, HubServer
from oracle import read_tensors
from peft_zoo import Pair, make_zoo, train
from safetensors.torch import load_file, save_file

import loratool


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A base whose biases are in another file than its weights, and an adapter of two layers."""
    pair = train(tmp_path_factory.mktemp("glora"), make_zoo(), peft.GloraConfig(target_modules=["linear", "head"], r=3))
    tensors = load_file(pair.base / "model.safetensors")
    names = {name: f"model-0000{1 + name.endswith('bias')}-of-00002.safetensors" for name in tensors}
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, pair.base / file, {"format": "pt"})
    (pair.base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": names}
    (pair.base / "model.safetensors.index.json").write_text(json.dumps(index))
    return pair


@pytest.fixture
def hub(pair: Pair) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/base", pair.base)
        yield server


def test_the_weight_may_be_in_another_file(pair: Pair, tmp_path: Path) -> None:
    """The merged biases are those of PEFT."""
    found = pair.merge(tmp_path / "out")
    for name, wanted in pair.merged.items():
        assert float((found[name] - wanted).abs().max()) <= 1e-5, name


def test_a_streaming_merge_fetches_that_file_too(pair: Pair, hub: HubServer, tmp_path: Path) -> None:
    """The output is, byte for byte, that of a merge on the disk, though its files are made one by one."""
    (tmp_path / "work").mkdir()
    client = Client(hub, tmp_path / "home", WRITER)
    client.works("merge", "org/base", pair.adapter, "--stream", "--push-to-hub", "alice/out", cwd=tmp_path / "work")
    loratool.merge(pair.base, [pair.adapter], tmp_path / "local")
    streamed = hub.files("alice/out")
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert streamed[path.name] == path.read_bytes()


def test_a_bias_whose_weight_is_of_another_size_is_refused(pair: Pair, tmp_path: Path) -> None:
    """Nothing is guessed: the message names the bias and says that nothing that fits is beside it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = load_file(pair.adapter / "adapter_model.safetensors")
    start = "base_model.model.head."
    odd = {name: tensor for name, tensor in tensors.items() if "glora_A" not in name and "glora_B" not in name}
    odd[f"{start}glora_C.Xd"] = odd[f"{start}glora_C.Xd"].repeat(2, 1)
    save_file(odd, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_bytes((pair.adapter / "adapter_config.json").read_bytes())
    with pytest.raises(loratool.FitError, match=r"head\.bias: depends on the weight of the same layer"):
        loratool.merge(pair.base, [adapter], tmp_path / "out")
    assert set(read_tensors(pair.base)) == set(pair.before)
