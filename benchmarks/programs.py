"""What benchmarks run next to loratool itself, each as a process of its own.

python benchmarks/programs.py peft-merge BASE ADAPTER OUT [DEVICE]
python benchmarks/programs.py peft-merge-packed BASE ADAPTER OUT
python benchmarks/programs.py peft-combine CONFIG.json OUT RANK full|reduced ADAPTER...
python benchmarks/programs.py altered [--float32] [--block BYTES] [--numpy] merge BASE ADAPTER -o OUT ...
python benchmarks/programs.py in-parts DEVICE,DEVICE... merge BASE ADAPTER -o OUT ...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from loratool.merging.exact_rows import ExactSum, Scratch
    from loratool.merging.numpy_sums import Added, Tiles
    from loratool.merging.totals import BlockSeen


def peft_merge(base: str, adapter: str, out: str, device: str = "cpu") -> None:
    """PEFT as its documentation merges: load, `merge_and_unload`, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device})
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def peft_merge_packed(base: str, adapter: str, out: str) -> None:
    """The same into a base that bitsandbytes has packed, whose weights PEFT packs anew.

    transformers 5.23 cannot save a model that it has loaded so (`Bnb4bitDeserialize` has no reverse), so the tensors are
    written as they are.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": "cpu"})
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    tied = {"lm_head.weight"} if merged.config.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in merged.state_dict().items() if name not in tied}
    Path(out).mkdir()
    save_file(tensors, Path(out) / "model.safetensors")


def peft_combine(config: str, out: str, rank: str, kind: str, *adapters: str) -> None:
    """PEFT as its documentation combines: load adapters into a model, `add_weighted_adapter`, save.

    Prints the seconds of the call as JSON. PEFT's own default is `full`: all singular vectors, most of which it drops.
    """
    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**json.loads(Path(config).read_text()))).to(torch.bfloat16)
    # an adapter called "0" would take layer 0 out of what PEFT saves
    names = [f"part{number}" for number in range(len(adapters))]
    wrapped = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, path in zip(names[1:], adapters[1:], strict=True):
        wrapped.load_adapter(path, adapter_name=name)
    started = time.perf_counter()
    wrapped.add_weighted_adapter(
        names,
        [1.0] * len(names),
        "combined",
        combination_type="svd",
        svd_rank=int(rank),
        svd_full_matrices=kind == "full",
    )
    seconds = time.perf_counter() - started
    wrapped.save_pretrained(out, selected_adapters=["combined"])
    print(json.dumps({"seconds": seconds}))


def altered(*words: str) -> None:
    """Loratool's command line, with its engine computing in plain float32, with blocks of another size, or by numpy.

    `--numpy` has it compute what it can, on any number of cores.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from loratool.cli import main
    from loratool.merging import exact_rows, numpy_sums, resources

    parser = argparse.ArgumentParser()
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--block", type=int)
    parser.add_argument("--numpy", action="store_true")
    options, command = parser.parse_known_args(words)
    if options.float32:
        exact_rows.ExactSum.merge = merge_in_float32  # type: ignore[method-assign]
        exact_rows.SMALL = 0  # weights that are computed in float64
        numpy_sums.Tiles.sum = sum_in_float32  # type: ignore[method-assign]
    if options.block:
        resources.CPU_BLOCK = resources.LARGE_BLOCK = options.block
        resources.CUDA_BLOCK = resources.PACKED_CUDA_BLOCK = options.block
    if options.numpy:
        resources.FEW_WORKERS = 1 << 10
    sys.argv = ["loratool", *command]
    main()


def in_parts(devices: str, *command: str) -> None:
    """A merge by one process for each device, all at the same time, and `--finish` after them.

    Prints a report whose seconds are those of the worker that took longest, each without its start-up, and whose profile
    has the threads of all of them.
    """
    names = devices.split(",")
    words = [sys.executable, "-m", "loratool", *command, "--json", "-q"]
    shares = [[*words, "--device", name, "--part", f"{number}/{len(names)}"] for number, name in enumerate(names, 1)]
    reports = [json.loads(said) for said in at_once(shares)]
    (last,) = (json.loads(said)["cost"] for said in at_once([[*words, "--finish"]]))
    workers = [each["cost"] for each in reports]
    seconds = max(each["seconds"] - each["startup_seconds"] for each in workers)
    memory = sum(each["peak_memory"] for each in workers)
    cost = {"seconds": seconds, "startup_seconds": 0.0, "finish_seconds": last["seconds"], "peak_memory": memory}
    threads = {
        f"process {number}, {name}": stages
        for number, each in enumerate(reports, 1)
        for name, stages in each["profile"]["threads"].items()
    }
    count = sum(each["workers"] for each in reports)
    print(json.dumps({"cost": cost, "workers": count, "profile": {"threads": threads}}))


def at_once(commands: Sequence[Sequence[str]]) -> list[str]:
    """What some processes print that run at the same time; none is left when one fails."""
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for words in commands]
    try:
        said = [each.communicate()[0] for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()
    if any(each.returncode for each in running):
        raise SystemExit("one of several processes failed")
    return said


def merge_in_float32(
    self: ExactSum,
    before: Tensor,
    first: int,
    after: Tensor,
    scratch: Scratch,
    tile: int,
    substitute: Callable[[Tensor, int], None] | None = None,
    measure: bool = False,
) -> BlockSeen:
    """What `ExactSum.merge` would do without exactness: the same measures, one product in float32, one rounding."""
    import torch

    from loratool.files.stopwatch import lap
    from loratool.merging.exact_rows import largest_of
    from loratool.merging.totals import BlockSeen

    seen = BlockSeen()
    for at in range(0, before.shape[0], tile):
        stored, rounded = before[at : at + tile], after[at : at + tile]
        room = scratch.of(stored.shape[0], self.width, self.work, self.target)
        weight, change = room.weight, room.change
        weight.copy_(stored)
        lap("cast")
        seen.weight += float(torch.linalg.vector_norm(weight)) ** 2
        if substitute is not None:
            substitute(weight, first + at)
        size = largest_of(weight if substitute else stored)
        stacks = [each for each in self.stacks if each.place.meets(first + at, first + at + stored.shape[0])]
        seen.largest = max(seen.largest, size + sum(each.reach for each in stacks))
        lap("measure")
        for stack in stacks:
            if measure:
                change.zero_()
                stack.add_to(change, first + at)
                seen.change += float(torch.linalg.vector_norm(change)) ** 2
                weight.add_(change)
            else:
                stack.add_to(weight, first + at)
        lap("product")
        rounded.copy_(weight)
        lap("round")
    return seen


def sum_in_float32(
    self: Tiles,
    added: Added,
    weight: NDArray[Any],
    first: int,
    largest: float,  # noqa: ARG001
    after: NDArray[Any],
) -> NDArray[Any]:
    """What `Tiles.sum` would do without exactness: no element is left undecided."""
    import numpy

    from loratool.merging.numpy_sums import alone, multiply

    sums = self.sums[: len(weight)]
    multiply(added.up[first : first + len(weight)], added.cut[:, :-1], sums, alone())
    numpy.add(sums, weight, out=sums)
    after[...] = self.result.nearest(sums)
    return numpy.empty(0, numpy.int64)


def main(words: Sequence[str]) -> None:
    programs: dict[str, Callable[..., None]] = {
        "peft-merge": peft_merge,
        "peft-merge-packed": peft_merge_packed,
        "peft-combine": peft_combine,
        "altered": altered,
        "in-parts": in_parts,
    }
    if not words or words[0] not in programs:
        sys.exit(__doc__)
    programs[words[0]](*words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
