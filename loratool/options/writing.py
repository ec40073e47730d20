"""Options of commands that write an output, and of whatever sends files to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratool.errors import UsageError
from loratool.options.described import FLAG, Options, option


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
