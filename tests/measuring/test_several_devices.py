"""Several devices share the work of one command: the result is that of one device, and what fails on one stops all.

Here the devices are stand-ins, `cpu:0` and `cpu:1`, which torch takes for the CPU and which the code tells apart.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import planted, save_model, seeded
from packed_bnb import nf4
from packed_models import save_packed
from peft_files import save_peft
from workbench import snapshot

import loratool
from loratool import devices
from loratool.cli import run
from loratool.commands.merge import MergeAndPushOptions
from loratool.errors import FitError, UsageError
from loratool.measuring.session import Session
from loratool.merging import resources
from loratool.merging.merge import prepare
from loratool.merging.resources import choose_resources
from loratool.merging.row_blocks import Worker

needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="no two CUDA devices here, or LORATOOL_TEST_CUDA=1 is not set"
)
SHAPES = {
    f"model.layers.{layer}.{module}.weight": shape
    for layer in range(4)
    for module, shape in (("self_attn.q_proj", (96, 80)), ("mlp.up_proj", (400, 80)), ("mlp.down_proj", (80, 400)))
}
Command = Callable[..., Any]
COMMANDS: dict[str, Command] = {
    "resize": lambda inputs, out, **more: loratool.resize(inputs / "one", out, rank=3, **more),
    "resize by energy": lambda inputs, out, **more: loratool.resize(inputs / "one", out, energy=0.9, **more),
    "combine": lambda inputs, out, **more: loratool.combine(
        [inputs / "one", inputs / "two"], out, method="dare_ties", seed=1, **more
    ),
    "extract": lambda inputs, out, **more: loratool.extract(inputs / "base", inputs / "tuned", out, rank=4, **more),
    "merge": lambda inputs, out, **more: loratool.merge(inputs / "base", inputs / "one", out, workers=4, **more),
}
MERGE_WAYS: dict[str, Command] = {
    f"merge, {rounding}": lambda inputs, out, rounding=rounding, **more: COMMANDS["merge"](
        inputs, out, rounding=rounding, **more
    )
    for rounding in ("compensated", "stochastic")
}


def adapter(folder: Path, seed: int, rank: int = 6) -> Path:
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=seeded(seed)) * 0.1
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=seeded(seed + 1)) * 0.01
    return save_peft(folder, tensors, r=rank, lora_alpha=2 * rank, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, their base, and a model that was tuned in full."""
    folder = tmp_path_factory.mktemp("inputs")
    weights = {name: torch.randn(shape, generator=seeded(at)) for at, (name, shape) in enumerate(SHAPES.items())}
    base = {name: weight.bfloat16() for name, weight in weights.items()}
    tuned = {name: (weight + planted(weight, 3, seed=7)).bfloat16() for name, weight in weights.items()}
    save_model(folder / "base", base, files=2)
    save_model(folder / "tuned", tuned)
    adapter(folder / "one", 1)
    adapter(folder / "two", 2)
    return folder


class StandIns:
    """Devices that are the CPU, and what each of them has worked on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.names = tuple(f"cpu:{n}" for n in range(count))
        self.all_at_work = threading.Barrier(count)
        self.lock = threading.Lock()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []  # device and work
        self.failing: Callable[[str], None] = lambda _: None  # called on a device when all have begun
        monkeypatch.setattr(devices, "find_devices", lambda _: self.names)
        monkeypatch.setattr(resources, "means_cpu", lambda _: False)  # nor are they any for which numpy would do
        monkeypatch.setattr(resources, "CPU_BLOCK", 80 * 80)  # a few blocks in each weight
        spread, merged_rows = Session.spread, Worker.merged_rows

        def spread_noted(session: Session, work: Callable[[Any], Any], items: Any) -> Any:
            def noted(item: Any) -> Any:
                self.note(str(session.device), (getattr(work, "__qualname__", ""), item))
                return work(item)

            return spread(session, noted, items)

        def rows_noted(worker: Worker, work: Any, first: int, rows: int, *more: Any) -> memoryview:
            self.note(str(worker.device), (work.span.placed.name, first, rows))
            return merged_rows(worker, work, first, rows, *more)

        monkeypatch.setattr(Session, "spread", spread_noted)
        monkeypatch.setattr(Worker, "merged_rows", rows_noted)

    def note(self, device: str, work: tuple[Any, ...]) -> None:
        """Account for a piece of work; no device does its second before each has its first."""
        with self.lock:
            begins = all(device != other for other, _ in self.seen)
            self.seen.append((device, work))
        if begins:
            self.all_at_work.wait(60)
            self.failing(device)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", [*COMMANDS, *MERGE_WAYS])
def test_any_number_of_devices_gives_the_bytes_of_one(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, found = {**COMMANDS, **MERGE_WAYS}[name], []
    for count in (1, 3):
        with monkeypatch.context() as patches:
            stand_ins = StandIns(patches, count)
            report = command(inputs, tmp_path / str(count))
        assert report.cost.device == ", ".join(stand_ins.names)
        assert {device for device, _ in stand_ins.seen} == {*stand_ins.names}
        work = [what for _, what in stand_ins.seen]
        assert len(work) == len({*map(repr, work)}), "something was computed twice"
        found.append((content(tmp_path / str(count)), sorted(map(repr, work))))
    assert found[0] == found[1]


def test_compare_finds_the_same_with_any_number_of_devices(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for count in (1, 3):
        with monkeypatch.context() as patches:
            stand_ins = StandIns(patches, count)
            report = loratool.compare([inputs / "one", inputs / "two"]).to_dict()
        assert sorted(work[-1] for _, work in stand_ins.seen) == sorted(SHAPES)
        found.append({key: value for key, value in report.items() if key != "cost"})
    assert found[0] == found[1]


def test_inspect_measures_the_same_with_any_number_of_devices(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for count in (1, 3):
        with monkeypatch.context() as patches:
            stand_ins = StandIns(patches, count)
            facts = loratool.inspect(inputs / "one", base=inputs / "base", values=True).to_dict()
        assert {device for device, _ in stand_ins.seen} == {*stand_ins.names}
        assert facts["values"].pop("cost")["device"] == ", ".join(stand_ins.names)
        found.append(facts["values"])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_failure_on_one_device_stops_all_and_leaves_nothing(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = StandIns(monkeypatch, 2)

    def fail(device: str) -> None:
        if device == "cpu:1":
            raise FitError("a weight that cannot be")

    stand_ins.failing = fail
    threads = threading.active_count()
    with pytest.raises(FitError, match="a weight that cannot be"):
        COMMANDS[name](inputs, tmp_path / "out")
    assert snapshot(tmp_path) == {}
    assert len(stand_ins.seen) < len(SHAPES), "work went on"
    assert threading.active_count() == threads


@pytest.mark.parametrize("name", COMMANDS)
def test_after_an_interrupt_nothing_is_left_or_the_merge_continues(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        stand_ins = StandIns(patches, 2)
        stand_ins.failing = lambda device: os.kill(os.getpid(), signal.SIGINT) if device == "cpu:1" else None
        with pytest.raises(KeyboardInterrupt):
            COMMANDS[name](inputs, tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= ({"out.partial"} if name == "merge" else set())  # where a file was complete by then
    COMMANDS[name](inputs, tmp_path / "out", device="cpu")
    COMMANDS[name](inputs, tmp_path / "other", device="cpu")
    assert content(tmp_path / "out") == content(tmp_path / "other")


@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:0", "cuda:1")], ids=len)
def test_a_memory_limit_holds_for_any_number_of_devices(devices: Sequence[str], inputs: Path, tmp_path: Path) -> None:
    options = MergeAndPushOptions()
    spans = prepare(inputs / "base", inputs / "one", tmp_path / "out", options)[0].spans
    unlimited = choose_resources(spans, tuple(devices), 32, None, 0)
    most = unlimited.memory(spans)
    chosen = choose_resources(spans, tuple(devices), 32, most - 1, 0)
    assert chosen.devices == devices
    assert chosen.memory(spans) < most
    with pytest.raises(UsageError, match="--max-memory"):
        choose_resources(spans, tuple(devices), 32, 10**6, 0)


@pytest.mark.parametrize(
    ("free", "block"), [(2**34, resources.PACKED_CUDA_BLOCK), (2**33, resources.CUDA_BLOCK)], ids=str
)
def test_packed_weights_take_larger_blocks_on_a_gpu_that_has_the_memory(
    free: int, block: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    packed = nf4({name: torch.randn(shape) for name, shape in SHAPES.items()})
    save_packed(tmp_path / "packed", packed.tensors, packed.config)
    spans = prepare(tmp_path / "packed", inputs / "one", tmp_path / "out", MergeAndPushOptions())[0].spans
    monkeypatch.setattr(resources, "free_memory", lambda _: free)
    assert choose_resources(spans, ("cuda:0", "cuda:1"), 16, None, 0).block == block
    plain = prepare(inputs / "base", inputs / "one", tmp_path / "out", MergeAndPushOptions())[0].spans
    assert choose_resources(plain, ("cuda:0", "cuda:1"), 16, None, 0).block == resources.CUDA_BLOCK


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("cuda:0,cuda:0", "--device names cuda:0 more than once"),
        ("cpu,cuda:0", "--device must be auto, cpu, cuda or cuda:N, or several such as cuda:0,cuda:1"),
        ("cuda:0,", "--device must be auto, cpu, cuda or cuda:N, or several such as cuda:0,cuda:1"),
        ("cuda,cuda:1", "--device must be auto, cpu, cuda or cuda:N, or several such as cuda:0,cuda:1"),
    ],
)
def test_a_list_that_means_no_devices_is_refused(
    word: str, told: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["resize", str(inputs / "one"), "-o", str(tmp_path / "out"), "--rank", "2", "--device", word])
    assert code == 2
    assert told in capsys.readouterr().err


def test_tensors_in_memory_are_on_one_device(inputs: Path) -> None:
    with pytest.raises(UsageError, match=r"--device must be auto, cpu, cuda or cuda:N \(got"):
        next(iter(loratool.iter_merged(inputs / "base", inputs / "one", device="cuda:0,cuda:1")))


def test_memory_of_a_gpu_that_runs_out_is_told(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins = StandIns(monkeypatch, 2)

    def fail(device: str) -> None:
        if device == "cpu:1":
            raise torch.cuda.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 1 has a total capacity of 1.00 MiB. And so on."
            )

    stand_ins.failing = fail
    assert run(["resize", str(inputs / "one"), "-o", str(tmp_path / "out"), "--rank", "2"]) == 6
    told = capsys.readouterr().err
    assert told.startswith("Error: CUDA out of memory. Tried to allocate 2.00 MiB. GPU 1 has")
    assert snapshot(tmp_path) == {}


@needs_two_gpus
@pytest.mark.parametrize("name", [*COMMANDS, *MERGE_WAYS])
def test_two_gpus_give_the_bytes_of_one(name: str, inputs: Path, tmp_path: Path) -> None:
    command = {**COMMANDS, **MERGE_WAYS}[name]
    for number, words in enumerate(("cuda:0", "cuda:1", "cuda:0,cuda:1", "cuda:1,cuda:0")):
        report = command(inputs, tmp_path / str(number), device=words)
        assert report.cost.device == words.replace(",", ", ")
    one, *others = (content(tmp_path / str(number)) for number in range(4))
    weights = [file for file in one if file.endswith(".safetensors")]
    assert weights
    for other in others:
        assert {file: other[file] for file in weights} == {file: one[file] for file in weights}


@needs_two_gpus
def test_two_gpus_compare_as_one_does(inputs: Path) -> None:
    one, two = (loratool.compare([inputs / "one", inputs / "two"], device=d) for d in ("cuda:0", "cuda:0,cuda:1"))
    assert one.modules == two.modules
    assert one.totals == two.totals


@needs_two_gpus
def test_all_gpus_are_meant_by_cuda(inputs: Path, tmp_path: Path) -> None:
    report = loratool.resize(inputs / "one", tmp_path / "out", rank=2, device="cuda")
    assert report.cost.device == ", ".join(f"cuda:{n}" for n in range(torch.cuda.device_count()))
