"""Quantised bases on the Hub: how they are packed is read by ranges, and no file is downloaded for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hub_client import Client
from hub_server import WRITER, HubServer
from packed_bnb import FourBit
from peft_files import save_peft
from safetensors.torch import save_file

import loratool
from loratool.files.safefile import Layout
from loratool.files.small_tensors import GAP, SMALL, TINY, SmallTensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

HIDDEN, LAYERS = 1536, 2  # so that the packed values of a weight are more than is read by ranges
PLACES = ("schema", "cost", "path", "base", "gain_forecast", "gains_forecast", "peak_memory", "against")
FILES = [f"model-{number:05d}-of-{LAYERS + 1:05d}.safetensors" for number in range(1, LAYERS + 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    (home / "base").mkdir()
    files: list[Mapping[str, NDArray[Any]]] = []
    factors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        module = f"model.layers.{layer}.self_attn.o_proj"
        files.append(FourBit((HIDDEN, HIDDEN), "nf4", 64, 256, layer).tensors(f"{module}.weight"))
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.full((2, HIDDEN), 0.01)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.full((HIDDEN, 2), 0.02)
    files.append({"lm_head.weight": np.ones((4, HIDDEN), np.float32), "model.norm.weight": np.ones(HIDDEN, np.float32)})
    for name, tensors in zip(FILES, files, strict=True):
        save_file({n: torch.from_numpy(v.copy()) for n, v in tensors.items()}, home / "base" / name)
    table = {n: name for name, tensors in zip(FILES, files, strict=True) for n in tensors}
    (home / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    packing = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": packing}
    (home / "base" / "config.json").write_text(json.dumps(config))
    save_peft(home / "adapter", factors, r=2, lora_alpha=2)
    return home


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home", WRITER)


def without_places(table: Any) -> Any:
    """What a command printed as JSON, without what depends on place and time."""
    one = table["results"][0] if "results" in table else table
    of_base = one.get("against") or {}
    return {k: v for k, v in one.items() if k not in PLACES} | {
        "against": {k: of_base[k] for k in of_base if k != "path"}
    }


COMMANDS: dict[str, tuple[list[str], Callable[[Path], Any]]] = {
    "inspect": (["inspect", "org/base"], lambda home: loratool.inspect(home / "base")),
    "estimate": (
        ["estimate", "org/base", "--rank", "2", "--target", "o_proj"],
        lambda home: loratool.estimate(home / "base", [2], "o_proj"),
    ),
    "inspect --base": (
        ["inspect", "org/adapter", "--base", "org/base"],
        lambda home: loratool.inspect(home / "adapter", base=str(home / "base")),
    ),
    "merge --dry-run": (
        ["merge", "org/base", "org/adapter", "-o", "out", "--dry-run"],
        lambda home: loratool.plan(home / "base", [home / "adapter"], home / "out"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_headers_and_small_tensors_tell_what_the_files_do(
    hub: HubServer, client: Client, models: Path, command: str
) -> None:
    words, here = COMMANDS[command]
    found = json.loads(client.works(*words, "--json").out.replace("org/adapter", "adapter"))
    ranges = [request for request in hub.asked("GET", "^/cdn/.*/model-") if request.sent]
    assert all(request.range for request in ranges)
    assert sum(request.sent for request in ranges) < 100_000
    assert without_places(found) == without_places(json.loads(json.dumps(here(models).to_dict())))


def test_a_streamed_merge_plans_by_ranges_and_brings_each_file_once(
    hub: HubServer, client: Client, models: Path, tmp_path: Path
) -> None:
    words = ["merge", "org/base", "org/adapter", "--stream", "--push-to-hub", "alice/new"]
    client.works(*words, "--dry-run")
    assert sum(request.sent for request in hub.asked("GET", "^/cdn/.*/model-")) < 100_000
    hub.log.clear()
    client.works(*words)
    for name in FILES:
        size = (models / "base" / name).stat().st_size
        assert size <= sum(request.sent for request in hub.asked("GET", f"^/cdn/.*/{name}")) < size + 30_000
    loratool.merge(models / "base", models / "adapter", tmp_path / "out", device="cpu")
    found = hub.files("alice/new")
    for path in (*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out" / "config.json"):
        assert found[path.name] == path.read_bytes()


class Counted:
    """The bytes of a file, with a list of the ranges that were asked for."""

    def __init__(self, content: bytes) -> None:
        self.content, self.asked = content, list[tuple[int, int]]()

    def read(self, start: int, count: int) -> bytes:
        self.asked.append((start, count))
        return self.content[start : start + count]


def test_small_tensors_of_one_kind_come_together() -> None:
    """Neighbours are one range; what lies between others is not read."""
    near = [(f"layers.{n}.weight_shape", "I64", (2,)) for n in range(100)]
    apart = [
        part
        for n in range(3)
        for part in ((f"layers.{n}.state", "U8", (90 + n,)), (f"layers.{n}.weight", "U8", (GAP + 1,)))
    ]
    layout = Layout.of([*near, *apart, ("odd", "U8", (TINY + 1,)), ("large", "U8", (SMALL + 1,))])
    content = layout.header + np.random.default_rng(0).bytes(layout.size - len(layout.header))
    file = Counted(content)
    small = SmallTensors(layout, file.read)

    def read(name: str, skip: int, count: int) -> bytes | None:
        start, into = layout.data_start + layout.tensors[name].start + skip, bytearray(count)
        if not small.read(start, count, memoryview(into)):
            return None
        assert bytes(into) == content[start : start + count]
        return bytes(into)

    assert all(read(name, 0, 16) for name, *_ in near)
    assert len(file.asked) == 1
    assert all(read(f"layers.{n}.state", 5, 85) for n in range(3))
    assert sorted(count for _, count in file.asked[1:]) == [90, 91, 92]
    assert read("odd", 1, TINY)
    assert read("large", 0, 10) is None
    assert read("odd", 0, TINY + 2) is None  # beyond its end
    assert len(file.asked) == 5
