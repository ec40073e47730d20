"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratool.devices import check_device
from loratool.errors import UsageError
from loratool.options.described import FLAG, Kind, Options, PathKind, option


@dataclass(frozen=True, kw_only=True)
class OverwriteOption(Options):
    """Of a command that makes a folder."""

    overwrite: bool = option(
        help="Replace OUT if it contains nothing but model or adapter files.",
        default=False,
        kind=FLAG,
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class WritingOptions(OverwriteOption):
    """Of a command that makes an adapter."""

    dry_run: bool = option(help="Compute and report, but write nothing.", default=False, kind=FLAG, recorded=False)


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


@dataclass(frozen=True, kw_only=True)
class SendOptions(Options):
    """Of whatever sends files to the Hub."""

    public: bool = option(help="Make a newly created repository public.", default=False, kind=FLAG, recorded=False)
    allow_secret: tuple[str, ...] = option(
        help="Upload FILE (or files matching a pattern) even if it seems to contain a secret; may be repeated.",
        default=(),
        many=True,
        metavar="FILE",
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class PublishOptions(SendOptions):
    """Of a command that writes an output."""

    push_to_hub: str | None = option(
        help="Also upload the output, as `loratool push` does.", metavar="REPO", recorded=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is None and (idle := [flag for flag, given in self.for_push().items() if given]):
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise UsageError(f"{flags} need{'s' * (len(idle) == 1)} --push-to-hub REPO", hint="--push-to-hub REPO")

    def for_push(self) -> dict[str, Any]:
        """The options that are those of `push`."""
        return {"public": self.public, "allow_secret": self.allow_secret}

    @property
    def destination(self) -> str | None:
        """The repository that the output goes to; none where there is no output, or it stays here."""
        dry = isinstance(self, WritingOptions) and self.dry_run
        return None if dry else self.push_to_hub
