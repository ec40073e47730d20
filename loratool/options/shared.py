"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratool.errors import UsageError, printable
from loratool.options.described import FLAG, Kind, Options, PathKind, option


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """Of a command whose result has a page, and which writes an output."""

    html: str | None = option(
        help="Also write an HTML page with figures and tables.", kind=PathKind("FILE"), recorded=False
    )
    svg: str | None = option(
        help="Also write the figures of that page as SVG files into a folder.", kind=PathKind("DIR"), recorded=False
    )


@dataclass(frozen=True, kw_only=True)
class PageOptions(PictureOptions):
    """Of a command whose result has a page, and which writes nothing else."""

    overwrite: bool = option(
        help="Replace FILE, and figures in DIR, if loratool made them.", default=False, kind=FLAG, recorded=False
    )


def other_count(weights: Sequence[object], adapters: int, way_out: str) -> UsageError:
    """The error for another number of weights than of adapters; `0,5` is two weights, as lists have commas."""
    halved = len(weights) == 2 * adapters and all(isinstance(w, float) and w.is_integer() for w in weights)
    point = "; decimals are written with a point, such as 0.5" * halved
    counts = ((len(weights), "weight"), (adapters, "adapter"))
    given, wanted = (f"{count} {noun}{'s' * (count != 1)}" for count, noun in counts)
    return UsageError(f"got {given} for {wanted}; {way_out}{point}")


def check_device(device: str, several: bool = True) -> None:
    """Raise `UsageError` where `device` names none, or more than one without `several`."""
    numbered = device.split(",")
    every = all(name.startswith("cuda:") and name[5:].isdigit() for name in numbered)
    if device not in ("auto", "cpu", "cuda") and not (every and (several or len(numbered) == 1)):
        more = ", or several such as cuda:0,cuda:1" if several else ""
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N{more} (got {printable(repr(device))})")
    if twice := [name for name in numbered if numbered.count(name) > 1]:
        raise UsageError(f"--device names {twice[0]} more than once")


@dataclass(frozen=True)
class DeviceKind(Kind):
    """The name of a device, of all GPUs or of several, or a device of torch."""

    several: bool = True

    @property
    def metavar(self) -> str:
        return "auto|cpu|cuda|cuda:N[,cuda:N...]" if self.several else "auto|cpu|cuda|cuda:N"

    annotation = "str | torch.device"

    def taken(self, value: Any, flag: str) -> Any:  # noqa: ARG002 (the sentence names it)
        check_device(word := str(value), self.several)
        return word


@dataclass(frozen=True, kw_only=True)
class DeviceOption(Options):
    """Of a command that computes."""

    device: str = option(
        help="Device to compute on; cuda means all GPUs, cuda:0,cuda:1 two of them, and GPUs share the work.",
        default="auto",
        kind=DeviceKind(),
    )


@dataclass(frozen=True, kw_only=True)
class BlockOption(Options):
    """Of a command that scales updates by block."""

    block_weights: tuple[str, ...] = option(
        help="Multiply updates by block: a preset such as OUTALL, a list of numbers, or BLOCK=FACTOR such as IN04=0.5, "
        "OUT03-OUT05=0 or S=0.8.",
        default=(),
        many=True,
        commas=True,
        metavar="BLOCKS",
    )


@dataclass(frozen=True, kw_only=True)
class NamingOptions(Options):
    """Of a command that looks for the weights of an adapter in a base."""

    maps: tuple[str, ...] = option(
        "--map",
        help="Rename the adapters' weights before looking them up in BASE, as re.sub(REGEX, TEMPLATE, name) does; may "
        "be repeated.",
        default=(),
        many=True,
        metavar="REGEX=TEMPLATE",
    )


@dataclass(frozen=True, kw_only=True)
class OrientationOption(Options):
    """Of a command for which it matters how a square weight is stored."""

    fan_in_fan_out: bool | None = option(
        "--fan-in-fan-out/--no-fan-in-fan-out",
        help="Whether square weights that may be Conv1D are stored (in, out) [default: decided by the model class].",
        kind=FLAG,
    )
