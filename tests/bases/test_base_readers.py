"""A base's bytes have one reader: a stored weight, or who takes them as they are: a sink that carries a range over, and
the digests of a record, which count as reading nothing.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import isfunction, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_bnb import FourBit
from peft_files import save_peft
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.adapter import StoredTensor
from loratool.bases.weights import Plain
from loratool.files import safefile
from loratool.files.digests import digest_of_range
from loratool.files.shard_writer import LocalPart
from loratool.files.tensor_writer import TensorFile

CARRIES = {LocalPart.copy.__code__, TensorFile.copy.__code__}  # a range goes over as it is
CALLS = ("pread", "preadv", "read", "readv", "copy_file_range", "sendfile")
DIGESTS = {digest_of_range.__code__}  # of the bytes of a chunk, whatever these mean


@dataclass
class Trace:
    """What is read of the weight files in a folder."""

    folder: Path
    sources: dict[str, set[tuple[int, int]]] = field(default_factory=dict)  # file → ranges that a `Source` gave
    strangers: list[str] = field(default_factory=list)  # reads of tensors by others than weights and sinks
    lock: threading.Lock = field(default_factory=threading.Lock)

    def covers(self, path: Path) -> bool:
        return path.parent == self.folder and path.suffix == ".safetensors"

    def note(self, path: Path, start: int, count: int) -> None:
        """A `Source` is asked for a range."""
        if self.covers(path) and count and not in_stack(DIGESTS):
            with self.lock:
                self.sources.setdefault(path.name, set()).add((start, start + count))
                if not is_ours():
                    self.strangers.append(f"{path.name}: {start} … {start + count}")

    def system(self, descriptor: Any, call: str) -> None:
        """The system is asked for bytes; headers are read before there is any weight."""
        link = f"/proc/self/fd/{descriptor}"
        path = Path(os.readlink(link)) if os.path.islink(link) else Path()  # elsewhere only the sources are watched
        if self.covers(path) and not is_ours() and not in_stack(HEADERS | DIGESTS):
            self.strangers.append(f"{path.name}: {call}")

    def unread(self, name: str) -> int:
        """Bytes of a file's tensors that no `Source` gave."""
        path = self.folder / name
        at = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        missing = 0
        for start, stop in sorted(self.sources.get(name, ())):
            missing += max(0, start - at)
            at = max(at, stop)
        return missing + path.stat().st_size - at


HEADERS = {safefile.read_safefile.__code__}


def frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def in_stack(codes: set[Any]) -> bool:
    return any(frame.f_code in codes for frame in frames())


def is_ours() -> bool:
    """Whether this is being read for a stored weight, or carried over."""
    return any(
        frame.f_code in CARRIES
        or (frame.f_code is StoredTensor.read.__code__ and isinstance(frame.f_locals["self"], Plain))
        for frame in frames()
    )


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """What is read of the weights in `base`, from now on."""
    found = Trace(tmp_path / "base")

    class TracingSource(safefile.LocalSource):
        def read(self, start: int, count: int, into: memoryview) -> None:
            found.note(self.path, start, count)
            super().read(start, count, into)

        def copy_to(self, descriptor: int, start: int, count: int, at: int) -> None:
            found.note(self.path, start, count)
            super().copy_to(descriptor, start, count, at)

    monkeypatch.setattr(safefile, "LocalSource", TracingSource)
    for name in CALLS:
        if (real := getattr(os, name, None)) is not None:
            monkeypatch.setattr(os, name, watched(found, name, real))
    return found


def watched(trace: Trace, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(descriptor: Any, *arguments: Any, **named: Any) -> Any:
        trace.system(descriptor, name)
        return real(descriptor, *arguments, **named)

    return call


FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def weights() -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (50, 32),
        "model.layers.0.mlp.experts.down_proj": (4, 32, 24),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 48, 32),
        "model.layers.0.self_attn.qkv_proj.weight": (96, 32),
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (50, 32),
    }
    made = {name: torch.randn(*shape, generator=numbers).bfloat16() for name, shape in shapes.items()}
    made["lm_head.weight"] = made["model.embed_tokens.weight"].clone()  # tied, and there twice
    return made


def packed_weights() -> dict[str, torch.Tensor]:
    """The same model, its matrices in the attention packed to 4 bits, and a stack of experts as well."""
    found: dict[str, torch.Tensor] = {}
    for seed, (name, value) in enumerate(weights().items()):
        if "layers" not in name or "gate_up" in name:
            found[name] = value
        else:
            packed = FourBit(tuple(value.shape), "nf4", 32, 4, seed).tensors(name)
            found |= {part: torch.from_numpy(array.copy()) for part, array in packed.items()}
    return found


def save_model(folder: Path, tensors: dict[str, torch.Tensor], quantised: bool = False) -> None:
    folder.mkdir()
    files = {name: FILES[name.startswith("model.layers")] for name in tensors}
    for file in FILES:
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "tie_word_embeddings": True}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32, "head_dim": 8}
    if quantised:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | sizes))


def save_adapter(folder: Path, *, dora: bool = False, **config: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for part in ("qkv_proj", "o_proj"):
        path = f"base_model.model.model.layers.0.self_attn.{part}"
        tensors |= {
            f"{path}.lora_A.weight": torch.randn(2, 32),
            f"{path}.lora_B.weight": torch.randn(96 if part == "qkv_proj" else 32, 2),
        }
        if dora:
            tensors[f"{path}.lora_magnitude_vector"] = torch.rand(96 if part == "qkv_proj" else 32) + 1
    save_peft(folder, tensors, **{"r": 2, "lora_alpha": 2, "use_dora": dora, **config})


def merge(home: Path, **options: Any) -> None:
    loratool.merge(home / "base", [home / "adapter"], home / "out", device="cpu", **options)


def merge_lora(home: Path) -> None:
    save_adapter(home / "adapter")
    merge(home)


def merge_dora(home: Path) -> None:
    save_adapter(home / "adapter", dora=True)
    merge(home, workers=3)


def merge_converted(home: Path) -> None:
    save_adapter(home / "adapter")
    merge(home, dtype="float32", shard_size=10_000)


def merge_embeddings(home: Path) -> None:
    """The head is compared with the embedding that it is tied to."""
    save_adapter(home / "adapter")
    path = home / "adapter" / "adapter_model.safetensors"
    factors = {"lora_embedding_A": torch.randn(2, 50), "lora_embedding_B": torch.randn(32, 2)}
    save_file({f"base_model.model.model.embed_tokens.{name}": value for name, value in factors.items()}, path)
    merge(home)


def merge_with_digests(home: Path) -> None:
    """The run that a record holds, once more."""
    save_adapter(home / "adapter")
    merge(home, digests="full", sha256=True)
    loratool.reproduce(home / "out", home / "again")


def merge_in_parts(home: Path) -> None:
    save_adapter(home / "adapter")
    job = home / "base", home / "adapter", home / "out"
    for part in ("1/2", "2/2"):
        loratool.merge_part(*job, part, device="cpu")
    loratool.merge_status(*job)
    loratool.finish_merge(*job, device="cpu")


def merge_several(home: Path) -> None:
    save_adapter(home / "adapter")
    adapters = [home / "adapter"]
    loratool.merge_many(home / "base", {home / "one": adapters, home / "two": [*adapters, *adapters]}, device="cpu")


def merge_into_memory(home: Path) -> None:
    save_adapter(home / "adapter")
    assert dict(loratool.merged(home / "base", home / "adapter", device="cpu"))
    assert dict(loratool.iter_merged(home / "base", home / "adapter", device="cpu"))


def step_of_a_manifest(home: Path) -> None:
    save_adapter(home / "adapter")
    (home / "steps.yaml").write_text("steps:\n- merge: {base: base, adapters: [adapter], output: out, device: cpu}\n")
    loratool.run(home / "steps.yaml")


def verify(home: Path) -> None:
    """Of a model that is no merge, so that each tensor is looked at twice."""
    save_adapter(home / "adapter")
    save_model(home / "tuned", tuned_weights())
    against: Any = {"base": home / "base", "adapters": [home / "adapter"], "device": "cpu"}
    loratool.verify(home / "tuned", **against)
    loratool.verify_part(home / "tuned", part="1/1", into=home / "parts", **against)
    loratool.finish_verify(home / "tuned", into=home / "parts", **against)


def extract_in_parts(home: Path) -> None:
    save_model(home / "tuned", tuned_weights())
    loratool.extract_part(
        home / "base", home / "tuned", home / "out", part="1/1", into=home / "parts", rank=2, device="cpu"
    )
    loratool.finish_extract(home / "base", home / "tuned", home / "out", into=home / "parts", rank=2, device="cpu")


def rebase_from(home: Path) -> None:
    save_adapter(home / "adapter")
    save_model(home / "tuned", tuned_weights())
    loratool.rebase(home / "adapter", home / "out", base=home / "base", onto=home / "tuned", force=True, device="cpu")


def rebase_onto(home: Path) -> None:
    save_adapter(home / "adapter")
    save_model(home / "tuned", tuned_weights())
    loratool.rebase(home / "adapter", home / "out", base=home / "tuned", onto=home / "base", force=True, device="cpu")


def merge_into_another(home: Path) -> None:
    """The adapter names `base`, which is compared with the model that it is merged into."""
    save_adapter(home / "adapter", base_model_name_or_path=str(home / "base"))
    save_model(home / "tuned", {name: value.bfloat16() for name, value in tuned_weights().items()})
    report = loratool.merge(home / "tuned", home / "adapter", home / "out", device="cpu")
    assert "base-mismatch" in {note.code for note in report.notes}


def convert(home: Path) -> None:
    """DoRA becomes LoRA, by the norms of the base."""
    save_adapter(home / "adapter", dora=True)
    loratool.convert(home / "adapter", home / "out", server="vllm", base=home / "base", rank=2)


def rework(home: Path) -> None:
    """Commands that need no values of a base; its config tells them names."""
    one, two = home / "adapter", home / "other"
    for path in (one, two):
        save_adapter(path)
    base: Any = {"base": home / "base"}
    loratool.rescale(one, home / "scaled", scale=2, **base)
    loratool.resize(one, home / "small", rank=1, **base)
    loratool.combine([one, two], home / "both", **base)
    loratool.compare([one, two], **base)
    loratool.compress([one, two], home / "fleet", rank=2, **base)
    loratool.index([one, two], home / "index", **base)


def extract(home: Path) -> None:
    changed = tuned_weights()
    save_model(home / "tuned", {name: value.to(torch.float32) for name, value in changed.items()})
    loratool.extract(home / "base", home / "tuned", home / "out", rank=2, device="cpu")


def tuned_weights() -> dict[str, torch.Tensor]:
    return {
        name: value + (1 + torch.rand(len(value), 1)) @ torch.rand(1, value.shape[-1])
        if value.dim() == 2
        else value * 2
        for name, value in weights().items()
    }


def extract_packed(home: Path) -> None:
    """BASE is packed, and so is TUNED, to other values."""
    save_model(home / "tuned", packed_weights() | {"model.norm.weight": torch.full((32,), 2.0)}, quantised=True)
    for shard in (home / "tuned").glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({n: 255 - v if n.endswith("proj.weight") else v for n, v in tensors.items()}, shard)
    loratool.extract(home / "base", home / "tuned", home / "out", rank=2, device="cpu")


def dequantise(home: Path) -> None:
    loratool.merge(home / "base", [], home / "out", dequantize=True, device="cpu")


def requantise(home: Path) -> None:
    save_adapter(home / "adapter")
    merge(home, requantize=True, accept_loss=True)


def estimate(home: Path) -> None:
    loratool.estimate(home / "base", [2], "o_proj")


def plan(home: Path) -> None:
    """The gain is forecast from some rows."""
    save_adapter(home / "adapter")
    loratool.plan(home / "base", home / "adapter", home / "out")
    loratool.plan_merge(loratool.open_checkpoint(home / "base"), [loratool.read_adapter(home / "adapter")])


def inspect_base(home: Path) -> None:
    loratool.inspect(home / "base", check=True)


def inspect_adapter(home: Path) -> None:
    save_adapter(home / "adapter")
    asked: Any = {"base": home / "base", "values": True, "device": "cpu"}
    loratool.inspect(home / "adapter", check=True, **asked)
    loratool.inspect_part(home / "adapter", part="1/1", into=home / "parts", **asked)
    loratool.finish_inspect(home / "adapter", into=home / "parts", **asked)


WHOLE = (  # these read all of a base
    *(merge_lora, merge_dora, merge_converted, merge_embeddings, merge_with_digests, merge_in_parts, merge_several),
    *(merge_into_memory, step_of_a_manifest, verify, extract, extract_in_parts, inspect_base),
)
SOME = (inspect_adapter, rebase_from, rebase_onto, merge_into_another, convert, plan)
NOTHING = (rework, estimate)  # but how values are packed


@pytest.mark.parametrize("command", [*WHOLE, *SOME, *NOTHING], ids=lambda command: command.__name__)
def test_every_byte_of_a_base_that_is_read_is_read_for_a_stored_weight(
    tmp_path: Path, trace: Trace, command: Callable[[Path], None]
) -> None:
    save_model(tmp_path / "base", weights())
    command(tmp_path)
    assert trace.strangers == []
    assert bool(trace.sources) == (command not in NOTHING)
    if command in WHOLE:
        assert {name: trace.unread(name) for name in FILES} == dict.fromkeys(FILES, 0)


WHOLE_PACKED = (merge_lora, merge_embeddings, merge_several, verify, extract, extract_packed, dequantise, requantise)
SOME_PACKED = (inspect_base, inspect_adapter, rebase_from, convert, plan, estimate)


@pytest.mark.parametrize("command", [*WHOLE_PACKED, *SOME_PACKED], ids=lambda command: command.__name__)
def test_every_byte_of_a_packed_base_that_is_read_is_read_for_a_stored_weight(
    tmp_path: Path, trace: Trace, command: Callable[[Path], None]
) -> None:
    save_model(tmp_path / "base", packed_weights(), quantised=True)
    command(tmp_path)
    assert trace.strangers == []
    assert trace.sources
    if command in WHOLE_PACKED:
        assert {name: trace.unread(name) for name in FILES} == dict.fromkeys(FILES, 0)


def test_every_function_that_takes_a_base_is_tried() -> None:
    """Apart from the one that takes the base from the Hub, and merges it as the others do."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    tried = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    functions = {name: function for name in loratool.EXPORTS if isfunction(function := getattr(loratool, name))}
    taking = {name for name, function in functions.items() if "base" in signature(function).parameters}
    assert taking - tried == {"stream"}


def test_a_reader_that_goes_past_the_weights_is_seen(tmp_path: Path, trace: Trace) -> None:
    """The trace itself: whoever opens the file and reads for himself is a stranger."""
    save_model(tmp_path / "base", weights())
    file = safefile.read_safefile(tmp_path / "base" / FILES[0])
    info = file.tensors["model.norm.weight"]
    with file.open() as source:
        source.read(file.position(info), info.nbytes, memoryview(bytearray(info.nbytes)))
    StoredTensor(file, info).finite()
    assert len(trace.strangers) >= 2
    before = len(trace.strangers)
    Plain(file, info).finite()
    assert len(trace.strangers) == before


def test_only_readers_and_copies_know_where_the_bytes_of_a_tensor_lie() -> None:
    """Everybody else would have to ask `SafeFile.position` before reading."""
    package = Path(loratool.__file__).parent
    asking = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "position"
    }
    assert asking == {
        "adapters/adapter.py",  # StoredTensor.read, which reads for stored weights as well
        "files/views.py",  # a selection asks the file that it is of
        "files/digests.py",  # a chunk that is hashed
        "files/seen_digests.py",  # a chunk of which some was read, and the rest is hashed
        "files/known_digests.py",  # a range that is recorded
        "files/tensor_writer.py",  # a range that goes into an adapter as it is
        "merging/chunks.py",  # a range that goes to a sink as it is
        "merging/whole_files.py",  # a range that is copied inside a store, recorded by its place
    }
