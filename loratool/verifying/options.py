"""The options of `verify`."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.merging.options import ROUNDINGS, ChangeOptions, RunOptions
from loratool.options.described import Choice, option

AUTO, TWICE = "auto", "twice"
RESIDUAL = "residual"  # rounded before the trained update is added: W without the part that its initialisation took
STEPWISE = TWICE, RESIDUAL  # as no merge of ours does: rounded before the last sum, too


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(ChangeOptions, RunOptions):
    """What was merged, and how the tool that merged it rounds."""

    rounding: str = option(
        help="How the tool that made MERGED rounds; twice means that updates are rounded before they are added. auto "
        "recognises it.",
        default=AUTO,
        kind=Choice(lambda: (AUTO, *ROUNDINGS, TWICE)),
    )
