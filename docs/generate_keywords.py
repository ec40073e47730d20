"""Write loratool/commands/keywords.py, the static types of the library's keywords, from the options of the commands.

python docs/generate_keywords.py
"""

from __future__ import annotations

import re
from pathlib import Path

from loratool.commands.combine import CombineAndPushOptions
from loratool.commands.extract import ExtractAndPushOptions
from loratool.commands.merge import MergeAndPushOptions
from loratool.commands.rescale import RescaleAndPushOptions
from loratool.commands.resize import ResizeAndPushOptions
from loratool.inspecting.inspect import InspectOptions
from loratool.merging.merge import MergeOptions
from loratool.merging.planning import PlanOptions
from loratool.options.described import Options, described_by
from loratool.publishing.pushing import PushOptions
from loratool.publishing.streaming import StreamOptions
from loratool.reworking.compare import CompareOptions

PAGE = Path(__file__).parent.parent / "loratool" / "commands" / "keywords.py"
COMMANDS: dict[str, type[Options]] = {
    "MergeKeywords": MergeAndPushOptions,
    "WholePlanKeywords": MergeOptions,
    "PlanKeywords": PlanOptions,
    "StreamKeywords": StreamOptions,
    "RescaleKeywords": RescaleAndPushOptions,
    "ResizeKeywords": ResizeAndPushOptions,
    "CombineKeywords": CombineAndPushOptions,
    "ExtractKeywords": ExtractAndPushOptions,
    "CompareKeywords": CompareOptions,
    "InspectKeywords": InspectOptions,
    "PushKeywords": PushOptions,
}
HEAD = '''"""The keywords of the library's functions, for type checkers: written by docs/generate_keywords.py."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict
'''


def page() -> str:
    """The whole module."""
    return "\n\n".join([HEAD, *(body(name, options) for name, options in COMMANDS.items())])


def body(name: str, options: type[Options]) -> str:
    """The keywords of one function."""
    lines = [f"class {name}(TypedDict, total=False):", f'    """Of {re.sub("AndPush", "", options.__name__)}."""', ""]
    for field, (option, default) in described_by(options).items():
        kind = option.kind.annotation
        if option.many:
            kind = f"Sequence[{kind}] | {kind}" + (" | Mapping[str, float]" if field == "match" else "")
        lines.append(f"    {field}: {kind}{' | None' if default is None or option.many else ''}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
