"""FP8 weights with block scales: decoded rows are the float64 formula, and a merge writes a plain model of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from oracle import nearest
from peft_files import save_peft
from safetensors.torch import load, load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import read_adapter
from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded, weight_of
from loratool.bases.opening import open_checkpoint
from loratool.bases.weights import Room, Slice
from loratool.devices import start_torch
from loratool.files.sink import Arrived, piece_of
from loratool.merging.engine import Engine
from loratool.merging.in_memory import InMemoryOptions, MergedWeights
from loratool.merging.merge_options import PlanOptions
from loratool.merging.planning import plan_merge
from loratool.merging.tasks import Job

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratool.files.digests import Digest
    from loratool.files.safefile import Layout
    from loratool.files.seen import Seen
    from loratool.files.source import Source
    from loratool.merging.plan import Plan

BLOCK = (16, 24)  # rows, columns; both leave a rest of the shapes below
NAME = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.0.mlp.down_proj.weight"  # packed as well, and no adapter's target
CPU = torch.device("cpu")


class InMemory:
    """A destination that keeps files as bytes."""

    finished: Mapping[str, object] = {}

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}

    def rounds(self, names: Sequence[str]) -> list[Sequence[str]]:
        return [names]

    def open(self, name: str, layout: Layout, stop: threading.Event) -> InMemoryFile:
        self.files[name] = bytearray(layout.header.ljust(layout.size, b"\xff"))
        return InMemoryFile(self.files[name], len(layout.header), stop)


class InMemoryFile:
    def __init__(self, content: bytearray, there: int, stop: threading.Event) -> None:
        self.content, self.arrived = content, Arrived(stop)
        self.arrived.add(there)

    def part(self, at: int, _count: int) -> InMemoryPart:
        return InMemoryPart(self, at)

    def finish(self) -> bool:
        return self.arrived.wait_for(len(self.content))

    def record(self, seen: Seen, digest: Digest) -> None:
        assert seen.device in ("", "cpu")
        assert digest.size == len(self.content)


class InMemoryPart:
    def __init__(self, file: InMemoryFile, at: int) -> None:
        self.file, self.at = file, at

    def put(self, memory: memoryview) -> None:
        piece = piece_of(memory, self.at)
        self.file.content[self.at : self.at + len(piece)] = piece
        self.at += len(piece)
        self.file.arrived.add(len(piece))

    def copy(self, source: Source, start: int, count: int, look: Callable[[memoryview], None] | None) -> None:
        piece = memoryview(self.file.content)[self.at : self.at + count]
        source.read(start, count, piece)
        if look is not None:
            look(piece)
        self.at += count
        self.file.arrived.add(count)


def values(seed: int, *shape: int) -> Tensor:
    """Eighths from −2 to 2, which e4m3 holds as they are."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed)) / 8


def blocks_of(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The scale of each value, by its row and column: the definition."""
    rows, columns = (torch.arange(size) // each for size, each in zip(shape, BLOCK, strict=True))
    return scales[rows[:, None], columns[None, :]]


def save_base(folder: Path, scales: Mapping[str, Tensor], packed: Mapping[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    plain = {"model.norm.weight": values(9, 70).bfloat16(), "model.embed_tokens.weight": values(8, 20, 70).bfloat16()}
    first = {**plain, NAME: packed[NAME].to(torch.float8_e4m3fn), OTHER: packed[OTHER].to(torch.float8_e4m3fn)}
    second = {name + "_scale_inv": value.float() for name, value in scales.items()}  # in another file than the values
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    packing = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    table = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**table, "quantization_config": packing, **config}))
    return folder


PACKED = {NAME: values(0, 40, 70), OTHER: values(1, 70, 40)}
POWERS = {  # so that every product is exact in bfloat16
    NAME: 2.0 ** torch.randint(-3, 3, (3, 3), generator=torch.Generator().manual_seed(2)),
    OTHER: 2.0 ** torch.randint(-3, 3, (5, 2), generator=torch.Generator().manual_seed(3)),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", POWERS, PACKED)


@pytest.fixture
def any_scales(tmp_path: Path) -> tuple[Path, Tensor]:
    """A base whose scales are any float32, and what its weight is in float64."""
    numbers = torch.Generator().manual_seed(4)
    scales = {name: torch.rand(value.shape, generator=numbers) + 0.01 for name, value in POWERS.items()}
    exact = PACKED[NAME].double() * blocks_of(scales[NAME].double(), (40, 70))
    return save_base(tmp_path / "base", scales, PACKED), exact


@pytest.mark.parametrize(("first", "count"), [(0, 40), (0, 1), (15, 2), (16, 16), (17, 20), (39, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_the_values_times_the_scale_of_their_block(
    any_scales: tuple[Path, Tensor], first: int, count: int, dtype: torch.dtype
) -> None:
    path, exact = any_scales
    weight = weight_of(decoded(open_checkpoint(path)), NAME)
    wanted = exact[first : first + count]
    wanted = wanted.float().to(dtype)  # what the format decodes to is a float32, whatever it is computed in
    assert torch.equal(weight.rows(first, count, CPU, dtype, Room()), wanted)
    assert torch.equal(weight.matrix(70).rows(first, count, CPU, dtype, Room()), wanted)
    room = Room(host=torch.empty(40 * 70, dtype=torch.uint8))
    assert torch.equal(weight.rows(first, count, CPU, dtype, room), wanted)
    room.sources.close()
    part = Slice(weight, first, count, slice(3, 60, 2))
    assert torch.equal(part.rows(0, count, CPU, dtype, Room()), wanted[:, 3:60:2])
    assert part.shape == tuple(wanted[:, 3:60:2].shape)


def test_a_matrix_in_blocks_is_seen_in_no_other_shape(base: Path) -> None:
    with pytest.raises(ValueError, match="lines of 70"):
        weight_of(decoded(open_checkpoint(base)), NAME).matrix(35)


def save_adapter(folder: Path) -> tuple[Path, Tensor]:
    """An adapter, and its change of the weight in float64."""
    down, up = values(5, 2, 70), values(6, 40, 2)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_peft(folder, {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, r=2, lora_alpha=2)
    return folder, up.double() @ down.double()


def made(base: Path, adapter: Path, options: PlanOptions) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of a merge into the decoded base, and the tensors that it gives."""
    plan = plan_merge(open_checkpoint(base), [read_adapter(adapter)], options)
    destination = InMemory()
    Engine([Job(plan, destination)], start_torch("cpu"), 2, None, None).run()  # type: ignore[arg-type]
    return plan, {name: value for content in destination.files.values() for name, value in load(bytes(content)).items()}


def test_packed_weights_are_merged_into_memory(base: Path, tmp_path: Path) -> None:
    adapter, change = save_adapter(tmp_path / "adapter")
    plan = plan_merge(open_checkpoint(base), [read_adapter(adapter)], PlanOptions(dequantize=True))
    found = MergedWeights(plan, InMemoryOptions())
    assert list(found) == [span.placed.name for span in plan.spans]
    weight = PACKED[NAME].double() * blocks_of(POWERS[NAME].double(), (40, 70))
    assert torch.equal(found[NAME], nearest(weight + change, torch.bfloat16))
    other = PACKED[OTHER].double() * blocks_of(POWERS[OTHER].double(), (70, 40))
    assert torch.equal(dict(found.items())[OTHER], nearest(other, torch.bfloat16))


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_all_of_a_packed_base_becomes_plain_on_request(base: Path, tmp_path: Path, dtype: str) -> None:
    adapter, change = save_adapter(tmp_path / "adapter")
    plan, found = made(base, adapter, PlanOptions(dtype=dtype, dequantize=True))
    kept = torch.bfloat16 if dtype == "keep" else torch.float32
    weights = {
        name: PACKED[name].double() * blocks_of(POWERS[name].double(), tuple(PACKED[name].shape)) for name in POWERS
    }
    assert found.keys() == {NAME, OTHER, "model.norm.weight", "model.embed_tokens.weight"}
    assert torch.equal(found[NAME], nearest(weights[NAME] + change, kept))
    assert torch.equal(found[OTHER], nearest(weights[OTHER], kept))
    assert torch.equal(found["model.norm.weight"], values(9, 70).to(kept))
    config = next(json.loads(file.content or b"") for file in plan.side_files if file.name == "config.json")
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert [shard.name for shard in plan.shards] == ["model.safetensors"]  # the scales had a file to themselves
    assert not any(file.name.endswith("index.json") for file in plan.side_files)


def test_a_base_alone_is_dequantised(base: Path, tmp_path: Path) -> None:
    report = loratool.merge(base, [], tmp_path / "out", device="cpu", dequantize=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in POWERS:
        weight = PACKED[name].double() * blocks_of(POWERS[name].double(), tuple(PACKED[name].shape))
        assert torch.equal(found[name], nearest(weight, torch.bfloat16))
    assert not report.adapters
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_scales_that_do_not_fit_are_all_told(tmp_path: Path) -> None:
    wrong = {NAME: torch.ones(2, 3), OTHER: torch.ones(5, 3)}
    path = save_base(tmp_path / "base", wrong, PACKED)
    with pytest.raises(loratool.InputError) as caught:
        decoded(open_checkpoint(path))
    for told in (f"{NAME}_scale_inv: must be F32 [3, 3] for [40, 70], but it is F32 [2, 3]", f"{OTHER}_scale_inv"):
        assert told in str(caught.value)


@pytest.mark.parametrize("packing", [None, {"quant_method": "gptq", "weight_block_size": [16, 24]}, "fp8"])
def test_another_packing_is_left_alone(tmp_path: Path, packing: object) -> None:
    path = save_base(tmp_path / "base", POWERS, PACKED, quantization_config=packing)
    checkpoint = open_checkpoint(path)
    found = decoded(checkpoint)
    assert found is checkpoint or (isinstance(found, Decoded) and not found.weights)
