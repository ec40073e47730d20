"""`MergedWeights`: merged tensors in memory, in the order of the base. Nothing is written.

Whoever takes the tensors drives the work. Asked for the next one, its thread hands the blocks of rows of that tensor,
and a few of those after it, to a pool of workers. So a slow consumer stops the workers, and one that leaves ends them.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import deque
from collections.abc import Generator, ItemsView, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count, groupby, pairwise

from loratool.arguments import PathLike, Progress, several
from loratool.bases.binding.telling import nearest
from loratool.devices import exact_arithmetic, find_devices, load_linear_algebra, resident_memory
from loratool.errors import InputError, printable
from loratool.files.open_sources import OpenSources
from loratool.files.pipelines import identities, itself
from loratool.files.safefile import FLOAT_NAMES, TensorInfo
from loratool.lazy import Tensor, torch
from loratool.merging.chunks import chunks_of
from loratool.merging.describing import described
from loratool.merging.edited_spans import EditedSpan
from loratool.merging.effects import effect_notes, effects_of
from loratool.merging.gain import gain_notes, gains_of
from loratool.merging.inputs import opened_inputs, planned
from loratool.merging.merge_options import MergeOptions, PlanOptions
from loratool.merging.options import ChangeOptions, RunOptions
from loratool.merging.output_layout import Span
from loratool.merging.plan import Plan
from loratool.merging.resources import (
    Resources,
    choose_resources,
    rows_of_block,
    sums_products,
)
from loratool.merging.row_blocks import Worker
from loratool.merging.shared_updates import SharedUpdates
from loratool.merging.tasks import compare_replaced
from loratool.merging.totals import Totals
from loratool.options.described import FLAG, described_by, option
from loratool.options.shared import DeviceKind
from loratool.results.plan import MergePlan
from loratool.shown import Shown
from loratool.templates import Numbers, template_of

AHEAD = 1  # blocks for each worker that are computed before their tensor is asked for
# Every dtype of a file that torch has too, if its release does.
DTYPES: Mapping[str, str] = {
    **FLOAT_NAMES,
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


WAYS_OF_GGUF = (
    "; pass dequantize=True for all tensors as plain ones (with gguf_type='f32' in float32), or changed_only=True for "
    "those that change"
)


@dataclass(frozen=True, kw_only=True)
class InMemoryOptions(ChangeOptions, RunOptions):
    """Of a merge into memory."""

    device: str = option(
        help="Device that the tensors are on, and on which they are computed.",
        default="cpu",
        kind=DeviceKind(several=False),
    )
    changed_only: bool = option(
        help="Yield only the tensors that the adapters change, replace or add.", default=False, kind=FLAG
    )


class Own(threading.local):
    """What a thread of a pool has for itself."""

    worker: Worker | None = None


@dataclass
class Filling:
    """A tensor on its way: blocks of its rows are put into it by several threads."""

    work: EditedSpan
    sources: OpenSources  # of all tensors of an output file
    last: bool  # of them
    device: torch.device
    blocks: deque[Future[None]] = field(default_factory=deque)  # those that were begun

    @cached_property
    def tensor(self) -> Tensor:
        """Memory for all of it."""
        placed = self.work.span.placed
        return torch.empty(placed.shape, dtype=getattr(torch, torch_name(placed)), device=self.device)

    def begin(self) -> None:
        """Take the memory, in the consumer's thread: what its stream still does with that memory comes first."""
        self.ready = torch.cuda.current_stream(self.device).record_event() if self.tensor.is_cuda else None

    def fill(self, worker: Worker, start: int, stop: int) -> None:
        """Bring bytes `start` … `stop` of it, which are whole rows where it is computed."""
        if self.ready is not None and worker.stream is not None:
            worker.stream.wait_event(self.ready)
        span = self.work.span
        if span.carried is not None:
            piece = self.tensor.view(-1).view(torch.uint8)[start:stop]
            worker.carry(span.carried, start, self.sources, piece)
        else:
            row = span.placed.nbytes // span.rows
            rows = self.tensor.view(span.rows, span.width)[start // row : stop // row]
            worker.fill(self.work, start // row, self.sources, rows)

    def complete(self) -> None:
        """Wait for all of it. Raises what went wrong in any of its blocks."""
        while self.blocks:
            self.blocks.popleft().result()
        self.sources.check_unchanged()
        if self.last:
            self.sources.close()

    def released(self) -> Tensor:
        """The tensor, which is not kept here."""
        found: Tensor = self.__dict__.pop("tensor")
        return found


@dataclass(eq=False, repr=False)
class MergedWeights(Shown, Mapping[str, Tensor]):
    """The tensors of a merged model by their names in its files, in the order of the base; each is computed when asked for.

    A tensor has the dtype and the shape that it has in the files that `merge` writes, and the same bytes. Several
    threads may ask at the same time. `items` computes a few blocks ahead of whoever takes them.
    """

    working: Plan  # what is merged
    options: InMemoryOptions
    resources: Resources = field(init=False, repr=False)
    ahead: int = field(init=False, repr=False)  # bytes that are computed before their tensor is asked for
    shared: SharedUpdates = field(default_factory=SharedUpdates, repr=False)

    def __post_init__(self) -> None:
        """Raises `InputError` and `UsageError`."""
        lacking = {span.placed.dtype for span in self.spans.values() if not hasattr(torch, torch_name(span.placed))}
        if lacking:
            way = WAYS_OF_GGUF if self.working.base.is_gguf else ""
            raise InputError(
                f"{printable(self.working.base.name)}: torch has no dtype for {', '.join(sorted(lacking))}{way}"
            )
        options, sizes = self.options, [0, *(span.placed.nbytes for span in self.spans.values()), 0]
        devices, used, limit = devices_of(options.device), resident_memory(), options.max_memory
        if not all(map(sums_products, self.working.spans)):
            load_linear_algebra(devices)
        if devices[0] == "cpu":
            used += max(one + other for one, other in pairwise(sizes))  # the tensor that a consumer has, and the next
        chosen = choose_resources(self.working.spans, devices, options.threads, limit, used)
        self.resources, self.ahead = chosen, AHEAD * chosen.workers * chosen.block
        if limit is not None and not chosen.on_gpu:
            self.ahead = min(self.ahead, limit - used - chosen.memory(self.working.spans))

    @cached_property
    def plan(self) -> MergePlan:
        """What a merge into files would do, with all that was guessed for it."""
        return described(self.working, MergeOptions())

    @cached_property
    def spans(self) -> dict[str, Span]:
        """Every tensor's way from the files, by its name."""
        own = identities(self.working.base.shards)
        changed_only = self.options.changed_only
        return {
            span.placed.name: span
            for span in self.working.spans
            if not changed_only or span.edits or any(id(itself(t.file)) not in own for t in span.weight.tensors)
        }

    @cached_property
    def files(self) -> dict[str, str]:
        """The file that `merge` would write each tensor to."""
        return {span.placed.name: shard.name for shard in self.working.shards for span in shard.spans}

    def __getitem__(self, name: str) -> Tensor:
        """The merged tensor. Raises `KeyError` with the nearest name for any that is not there, and else as `items`."""
        if name not in self.spans:
            raise KeyError(f"no tensor {printable(name)}{nearest_of(name, self.spans)}")
        ((_, tensor),) = self.stream([self.spans[name]], Totals())
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.spans

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    def items(self) -> ItemsView[str, Tensor]:
        """Names and tensors, in the order of the base."""
        return Items(self)

    def every(self, progress: Progress | None = None) -> Generator[tuple[str, Tensor], None, None]:
        """Names and tensors, in the order of the base; after the last one, warnings of what is probably not meant."""
        totals = Totals()
        yield from self.stream(self.spans.values(), totals, progress)
        seen = totals.of(self.spans.values())
        notes = [n for n in (*self.working.notes, *effect_notes(effects_of(self.working, seen))) if n.is_warning]
        for note in (*notes, *gain_notes(self.working, gains_of(self.working, seen))):
            warnings.warn(str(note), stacklevel=2)

    def stream(
        self, spans: Iterable[Span], totals: Totals, progress: Progress | None = None
    ) -> Generator[tuple[str, Tensor], None, None]:
        """Some tensors with their names; `totals` collects norms and effects."""
        wanted = list(spans)
        size = sum(span.placed.nbytes for span in wanted)
        own, numbers, started = Own(), count(), deque[Filling]()

        def fill(filling: Filling, start: int, stop: int) -> None:
            own.worker = own.worker or Worker.of(wanted, self.resources, next(numbers))
            filling.fill(own.worker, start, stop)

        with ExitStack() as stack:
            stack.enter_context(exact_arithmetic())
            todo = self.blocks(wanted, totals, started, stack.enter_context(ExitStack()))
            pool = ThreadPoolExecutor(self.resources.workers, "loratool-merge")
            stack.callback(pool.shutdown, cancel_futures=True)  # before the files are closed
            handed = end = 0  # bytes
            for span in wanted:
                end += span.placed.nbytes
                while (not started or handed < end + self.ahead) and (block := next(todo, None)):
                    filling, start, stop = block
                    if stop > start:
                        filling.blocks.append(pool.submit(fill, filling, start, stop))
                    handed += stop - start
                filling = started.popleft()
                filling.complete()
                if progress is not None:
                    progress(end, size)
                yield span.placed.name, filling.released()

    def blocks(
        self, spans: Sequence[Span], totals: Totals, started: deque[Filling], files: ExitStack
    ) -> Iterator[tuple[Filling, int, int]]:
        """All blocks of some tensors; before its first block each tensor is put into `started`, with an empty one."""
        device = torch.device(self.resources.devices[0])
        for _, group in groupby(spans, lambda span: self.files[span.placed.name]):
            sources, mine = OpenSources(), list(group)
            files.callback(sources.close)
            for span in mine:
                filling = Filling(EditedSpan(span, totals, self.shared), sources, span is mine[-1], device)
                filling.begin()
                if span.carried is not None and span.edits:
                    compare_replaced(span, totals)
                started.append(filling)
                yield filling, 0, 0
                yield from ((filling, *cut) for cut in cuts_of(span, self.resources.block))


class Items(ItemsView[str, Tensor]):
    """Names and tensors; those to come are computed while one is used."""

    _mapping: MergedWeights

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._mapping.every()


def cuts_of(span: Span, block: int) -> Iterator[tuple[int, int]]:
    """Where blocks of a tensor begin and end, in bytes. Those that are computed have the rows that the engine gives them."""
    for chunk in (each for each in chunks_of(span) if each.size):
        if span.carried is not None:
            yield from ((at, min(at + block, chunk.stop)) for at in range(chunk.start, chunk.stop, block))
            continue
        row, step = span.placed.nbytes // span.rows, rows_of_block(span, block)
        for first, rows in chain.from_iterable(chunk.blocks(step, step)):
            yield first * row, (first + rows) * row


def devices_of(device: str) -> tuple[str, ...]:
    """The devices that a word means: of the GPUs of this machine only the current one, which torch means by "cuda"."""
    if device in ("auto", "cuda") and torch.cuda.is_available() and torch.cuda.device_count():
        return find_devices(f"cuda:{torch.cuda.current_device()}")
    return find_devices(device)


def torch_name(info: TensorInfo) -> str:
    """What torch calls the dtype of a tensor."""
    return DTYPES.get(info.dtype, info.dtype)


def nearest_of(name: str, known: Iterable[str]) -> str:
    """The name most like one that is not known, as the end of a sentence."""
    templates: dict[str, dict[Numbers, str]] = {}
    for each in known:
        template, numbers = template_of(each)
        templates.setdefault(template, {})[numbers] = each
    template, numbers = template_of(name)
    there = nearest(template, sorted(templates))
    if there is None:
        return ""
    members = templates[there]
    return f"; the closest name is {printable(members.get(numbers) or next(iter(members.values())))}"


def open_merged(base: PathLike, adapters: Sequence[PathLike] | PathLike, options: InMemoryOptions) -> MergedWeights:
    """The merged weights of a base and adapters, planned and not yet computed."""
    model, read, _ = opened_inputs(base, several(adapters), options)
    how = {name: getattr(options, name) for name in described_by(ChangeOptions)}
    plan = planned(model, read, PlanOptions(**how))
    for adapter in plan.adapters:
        adapter.check_values()
    doubts = plan.check_packed(plan.spans)
    return MergedWeights(dataclasses.replace(plan, notes=(*plan.notes, *doubts)), options)
