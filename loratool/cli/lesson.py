"""The lesson of `loratool demo --learn`: six steps, each of which runs commands as they are shown."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from loratool import lesson as work
from loratool.cli import cli
from loratool.demo import LAYERS
from loratool.errors import VerificationError
from loratool.results.base import Cost
from loratool.results.lesson import Latency, Lesson, Nearness, Played, Step, latency_text, nearness_text

Words = tuple[str, ...]

TRAINED = """\
LoRA leaves a weight W₀ (d × k) as it is and trains two small matrices: B (d × r),
which starts at zero, and A (r × k). The layer computes W₀x + s·BAx with s = α/r.
Only A and B have gradients and optimizer states. How many parameters that is, for
Llama-2-7B from a table of known models and for the base in this folder:"""
TRAINED_AFTER = """\
To train every weight, AdamW needs 12 bytes for each parameter: 2 for the weight, 2
for its gradient and 8 for two moments. For 7 billion parameters that is the 84 GB
that is often quoted. The model has 6.74 billion: 80.86 GB. With LoRA,
almost all that is left is the frozen base."""
BY_HAND = """\
{folder}/matrix is a model with a single weight of 6 × 4, and {folder}/matrix-adapter
is LoRA of rank 2 for it. Multiply B and A by hand, then by s, and add W₀:"""
SPECTRUM = """\
{folder}/adapter has rank 16. It has just been trained: each layer had to learn a
change of its weight with four singular values, 0.8, 0.6, 0.3 and 0.1. The rank
that it needs can be measured. The columns 90 %, 95 % and 99 % show the rank that
holds that much of the energy, the sum of the squared singular values of ΔW:"""
SPECTRUM_AFTER = """\
Three directions hold 99 % of the energy: 0.8² + 0.6² + 0.3² is 99.1 % of the sum.
The remaining rank was not used. The error is √(1 − 0.991) = 9.5 % of ‖ΔW‖."""
ALPHA = """\
ΔW = s·BA, so α is a strength: half the α means half the change. The strength of a
trained adapter can be changed with another α, or with -w when it is merged. Both
result in the same model, as verify proves:"""
MERGE = """\
W₀ + ΔW has the shape of W₀. After merging there is one matrix again:"""
MERGE_AFTER = """\
One pass through the {layers} adapted layers on this machine: the median and the middle
half of {rounds} rounds, and the median of the ratios to the base in the same round.

{timings}

The merged model computes what the base does, with other numbers, so for it a ratio
other than 1.00 is noise. Unmerged, each layer has two more products."""
UNMERGE = """\
A merge is undone by merging again with the weight -1. But the merged weights were
rounded to bfloat16, and now they are rounded once more:"""
UNMERGE_AFTER = """\
The edited weights of {folder}/unmerged and of the base:

{nearness}

What rounding removed does not come back. Weights that are further off were small
next to ΔW. Keep the base, and merge from it again."""


@dataclass(frozen=True)
class Scene:
    """One step before it has been played."""

    title: str
    before: str
    commands: Sequence[Words]
    after: str | Callable[[], str] = ""


def play(home: Path, overwrite: bool, show: Callable[[Step], None]) -> Lesson:
    """Prepare the folder, play all steps, and give each to `show` as soon as it is done.

    Raises:
        UsageError: `home` exists and may not be replaced.
        VerificationError: a command of the lesson did not do what the lesson says.
    """
    started = time.monotonic()
    work.prepare(home, overwrite)
    latency: dict[str, Latency] = {}
    near: list[Nearness] = []

    def after_merge() -> str:
        latency.update(work.time_layers(home))
        layers = len(work.TARGETS) * LAYERS
        return MERGE_AFTER.format(layers=layers, rounds=work.TIMINGS, timings=latency_text(latency))

    def after_unmerge() -> str:
        near.append(work.nearness(home))
        return UNMERGE_AFTER.format(folder=home, nearness=nearness_text(near[0]))

    scenes = [*first_scenes(home), *last_scenes(home, after_merge, after_unmerge)]
    steps = []
    for number, scene in enumerate(scenes, 1):
        played = tuple(map(run, scene.commands))
        after = scene.after if isinstance(scene.after, str) else scene.after()
        steps.append(Step(number, scene.title, scene.before, played, after))
        show(steps[-1])
    return Lesson(home, tuple(steps), latency, near[0], cost=Cost.since(started))


def first_scenes(home: Path) -> list[Scene]:
    """What is trained, ΔW by hand, and the rank."""
    sizes = ("--target", "q_proj,v_proj")
    return [
        Scene(
            "what is trained",
            TRAINED,
            [
                ("estimate", "--preset", "llama-2-7b", "--rank", "8", *sizes),
                ("estimate", f"{home}/base", "--rank", "16", *sizes),
            ],
            TRAINED_AFTER,
        ),
        Scene(
            "ΔW by hand",
            f"{BY_HAND.format(folder=home)}\n\n{work.by_hand(home)}",
            [("merge", f"{home}/matrix", f"{home}/matrix-adapter", "-o", f"{home}/matrix-merged")],
            lambda: f"The file has W₀ + ΔW, as by hand:\n\n{work.merged_matrix(home)}",
        ),
        Scene(
            "the rank, from the spectrum",
            SPECTRUM.format(folder=home),
            [
                ("inspect", f"{home}/adapter", "--values"),
                ("resize", f"{home}/adapter", "-o", f"{home}/small", "--energy", "0.99"),
            ],
            SPECTRUM_AFTER,
        ),
    ]


def last_scenes(home: Path, after_merge: Callable[[], str], after_unmerge: Callable[[], str]) -> list[Scene]:
    """α, the merge, and taking it back."""
    base, adapter = f"{home}/base", f"{home}/adapter"
    return [
        Scene(
            "α is a strength",
            ALPHA,
            [
                ("rescale", adapter, "-o", f"{home}/half", "--scale", "0.5"),
                ("merge", base, adapter, "-w", "0.5", "-o", f"{home}/merged-half"),
                ("verify", f"{home}/merged-half", "--base", base, "--adapter", f"{home}/half"),
            ],
        ),
        Scene("merging", MERGE, [("merge", base, adapter, "-o", f"{home}/merged")], after_merge),
        Scene(
            "unmerging, and how close it comes",
            UNMERGE,
            [("merge", f"{home}/merged", adapter, "-w", "-1", "-o", f"{home}/unmerged")],
            after_unmerge,
        ),
    ]


def run(words: Words) -> Played:
    """Run a command in this process, as a terminal would."""
    command, output = shlex.join(["loratool", *words]), StringIO()
    with redirect_stdout(output):
        code = cli.main(args=list(words), prog_name="loratool", standalone_mode=False)
    if isinstance(code, int) and code:
        raise VerificationError(f"{command}: ended with code {code}")
    return Played(command, output.getvalue().rstrip("\n"))
