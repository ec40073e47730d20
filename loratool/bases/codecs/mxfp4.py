"""MXFP4 experts, as gpt-oss stores them: e2m1 values in blocks of 32 that share a power of two.

`X_blocks` is (experts, rows, blocks, 16) of bytes, two values a byte, the low nibble first; `X_scales` is (experts, rows,
blocks) of bytes. The values, (experts, rows, 32 · blocks), are the **transpose** of the plain weight X of each expert:

    X[e, 32 b + j, r] = e2m1(nibble j of blocks[e, r, b]) · 2^(scales[e, r, b] − 127)

Every product is exact in float32. A row of X is a column of the file, so the packed values of one expert are held until
all of its rows were read: rows · columns / 2 bytes and the scales, for each expert that is being worked on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loratool.bases.codecs.byte_values import by_columns, by_rows, e8m0
from loratool.bases.codecs.new_scales import stored_powers
from loratool.bases.codecs.numbers import FP4
from loratool.bases.codecs.parameters import WithParameters
from loratool.bases.codecs.parts import Finder, Unfit, in_blocks, told
from loratool.bases.codecs.plain_modules import (
    complete,
    modules_of,
    note_unlisted,
    skipped_by,
    stacks_left,
    with_entries,
)
from loratool.bases.codecs.scaled import wrong
from loratool.bases.packed import Codec, Packed, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import Room
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import Tensor, torch

BLOCK = 32
LIST = "modules_to_not_convert"
WAY_OUT = "download the model again, or pass the unquantised model as BASE"


class Expert:
    """The packed values of one expert, turned: there until all of its lines were asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.parts: tuple[Tensor, Tensor] | None = None
        self.left = 0

    def take(self, lines: int, of: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Its values and scales, of which some of its lines are going to be decoded."""
        with self.lock:
            if self.parts is None:
                self.parts, self.left = make(), of
            taken = self.parts
            self.left -= lines
            if self.left <= 0:
                self.parts = None
            return taken


@dataclass(frozen=True, kw_only=True)
class TurnedExperts(WithParameters):
    """A stack of experts, (experts, columns on disk, rows on disk). `tensors`: blocks, scales."""

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        lines = self.tensors[1].info.shape[2] * BLOCK  # of an expert
        found = []
        for expert in range(first // lines, (first + count - 1) // lines + 1):
            start, stop = max(first - expert * lines, 0), min(first + count - expert * lines, lines)
            held = room.held.of(("expert", expert, device), Expert)
            values, scales = held.take(stop - start, lines, lambda expert=expert: self.turned(expert, device, room))  # type: ignore[misc]
            some = scales[start // BLOCK : (stop - 1) // BLOCK + 1]
            found.append(self.scaled(values[start:stop], some, start))
        return found[0] if len(found) == 1 else torch.cat(found)

    def turned(self, expert: int, device: torch.device, room: Room) -> tuple[Tensor, Tensor]:
        """An expert as its plain weight lies: values (columns, ⌈rows/2⌉), two rows a byte; scales (columns/32, rows)."""
        parts = []
        for tensor in self.tensors:
            size = tensor.info.nbytes // tensor.info.shape[0]
            parts.append(Room(room.sources).read(tensor, expert * size, size, device).view(self.line, -1))
        return by_rows(parts[0]).T.contiguous(), parts[1].T.contiguous()

    def scaled(self, values: Tensor, scales: Tensor, start: int) -> Tensor:
        """Lines from `start` on, out of their bytes and the bytes of their blocks' scales."""
        decoded = FP4.floats(values)
        decoded = decoded if decoded.shape[1] == self.line else decoded[:, : self.line].contiguous()
        powers = e8m0(scales)
        for lines, blocks in in_blocks(decoded.view(-1), start * self.line, BLOCK * self.line):
            lines.view(len(lines), -1, self.line).mul_(powers[blocks, None])
        return decoded

    @property
    def together(self) -> int:
        return BLOCK

    def measure(self, values: Tensor) -> Tensor:
        """The largest magnitude of each block, (blocks, line)."""
        return values.abs().view(-1, BLOCK, self.line).amax(1)

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        experts, rows, groups = self.tensors[1].info.shape
        powers = stored_powers(measured.cpu(), FP4).view(experts, groups, rows)
        return {**own, self.tensors[1].info.name: powers.mT.contiguous()}

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """Lines as they are decoded, two values of a line a byte."""
        scales = self.scales_of(parameters, first, len(values), values.device)
        units = values.view(-1, BLOCK, self.line) / e8m0(scales)[:, None]
        return FP4.bytes(FP4.clamped(units.view(-1, self.line))).flatten()

    def decode_packed(self, packed: Tensor, first: int, count: int, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.scaled(packed.view(count, -1), self.scales_of(parameters, first, count, packed.device), 0)

    def scales_of(self, parameters: Mapping[str, Tensor], first: int, count: int, device: torch.device) -> Tensor:
        """The bytes of the scales of whole blocks of lines, (blocks, line)."""
        turned = parameters[self.tensors[1].info.name].mT.reshape(-1, self.line)
        return turned[first // BLOCK : -(-(first + count) // BLOCK)].to(device)

    def laid_out(self, packed: Tensor) -> Tensor:
        experts = packed.view(self.tensors[1].info.shape[0], -1, -(-self.line // 2))
        return torch.cat([by_columns(expert.T.contiguous())[: self.line].flatten() for expert in experts])

    def check(self, room: Room) -> str:
        return wrong(self.tensors[1], room)


class Mxfp4(Codec):
    """The experts of gpt-oss."""

    name, title = "mxfp4", "MXFP4"
    kinds = (("experts of gpt-oss", TurnedExperts),)

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        if settings.method != self.name:
            return None
        finder = Finder(base)
        found: dict[str, Packed] = {}
        for name in finder.stems("_blocks"):
            with suppress(Unfit):
                found[name] = weight_of(finder, name)
        for name in finder.stems("_scales"):
            if f"{name}_blocks" not in base.tensors:
                finder.note(f"{name}_blocks", f"is missing, but {printable(name)}_scales exists")
        for name, info in base.tensors.items():
            if info.dtype in FLOAT_NAMES and name in found:
                finder.note_both(name, f"{name}_blocks")
        note_unlisted(finder, found, lambda names: skipped_by(settings.values.get(LIST), names, base), LIST)
        return complete(finder, found, self.title, WAY_OUT)

    def left_plain(
        self,
        setting: Setting,
        packing: Packing,
        plain: Collection[str],
        base: Checkpoint,  # noqa: ARG002 (packing says all of it)
    ) -> Mapping[str, Any]:
        """All experts of a layer are one module (`should_convert_module`); without a list, the head is left out too."""
        names = [*modules_of(plain), *stacks_left(packing, plain)]
        if setting.values.get(LIST) is None:
            names.insert(0, "lm_head")
        return {**setting.values, LIST: with_entries(setting.values.get(LIST), names)}


def weight_of(finder: Finder, name: str) -> TurnedExperts:
    """The stack of experts that is named so. Raises `Unfit` where something is wrong."""
    blocks = finder.need(f"{name}_blocks", ["U8"])
    shape = blocks.info.shape
    if len(shape) != 4 or shape[3] != BLOCK // 2 or 0 in shape:
        raise finder.unfit(
            blocks.info.name, f"must be [experts, rows, blocks, {BLOCK // 2}], but it is {told(blocks.info)}"
        )
    scales = finder.need(f"{name}_scales", ["U8", "F8_E8M0"], shape[:3], f"for {list(shape)}")
    experts, rows, groups, _ = shape
    return TurnedExperts(
        shape=(experts, groups * BLOCK, rows),
        line=rows,
        dtype=plain_dtype(finder.base),
        tensors=(blocks, scales),
        scheme=f"MXFP4, groups of {BLOCK}",
    )
