"""Write loratool/commands/keywords.py, the static types of the library's keywords, from the options of the commands.

python docs/generate_keywords.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratool.commands.merge import MergeAndPushOptions
from loratool.inspecting.fleet.indexing import IndexOptions
from loratool.inspecting.options import InspectOptions
from loratool.lineage.recording import RecordOptions
from loratool.lineage.reproducing import ReproduceOptions
from loratool.lineage.running import ManifestOptions
from loratool.merging.dry_run import DryRunOptions
from loratool.merging.in_memory import InMemoryOptions
from loratool.merging.merge_options import MergeOptions, PlanOptions
from loratool.options.described import Option, Options, described_by
from loratool.publishing.options import PushOptions
from loratool.publishing.streaming import StreamOptions
from loratool.reworking.combine_options import CombineOptions
from loratool.reworking.compare import CompareOptions
from loratool.reworking.compressing.options import CompressOptions, ExpandOptions
from loratool.reworking.converting.convert import ConvertOptions
from loratool.reworking.extracting.options import ExtractOptions
from loratool.reworking.rebasing.rebase import RebaseOptions
from loratool.reworking.rescale import RescaleOptions
from loratool.reworking.resize import ResizeOptions
from loratool.verifying.options import VerifyOptions

PAGE = Path(__file__).parent.parent / "loratool" / "commands" / "keywords.py"
LONGEST = 120  # columns of a line
COMMANDS: dict[str, type[Options]] = {
    "PlanKeywords": PlanOptions,
    "WholePlanKeywords": MergeOptions,
    "DryRunKeywords": DryRunOptions,
    "MergeKeywords": MergeAndPushOptions,
    "StreamKeywords": StreamOptions,
    "InMemoryKeywords": InMemoryOptions,
    "RescaleKeywords": RescaleOptions,
    "ResizeKeywords": ResizeOptions,
    "CombineKeywords": CombineOptions,
    "CompressKeywords": CompressOptions,
    "ExpandKeywords": ExpandOptions,
    "RebaseKeywords": RebaseOptions,
    "ConvertKeywords": ConvertOptions,
    "ExtractKeywords": ExtractOptions,
    "CompareKeywords": CompareOptions,
    "IndexKeywords": IndexOptions,
    "InspectKeywords": InspectOptions,
    "PushKeywords": PushOptions,
    "VerifyKeywords": VerifyOptions,
    "RecordKeywords": RecordOptions,
    "ReproduceKeywords": ReproduceOptions,
    "ManifestKeywords": ManifestOptions,
}
HEAD = '''"""The keywords of the library's functions, for type checkers: written by docs/generate_keywords.py."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from loratool.lazy import torch
'''


def page() -> str:
    """The whole module."""
    made: dict[type[Options], str] = {}
    parts = [HEAD, *(part for name, options in COMMANDS.items() for part in bodies(name, options, made))]
    return "\n\n".join(parts)


def bodies(name: str, options: type[Options], made: dict[type[Options], str]) -> Iterator[str]:
    """The keywords of a dataclass after those of its bases, unless they are in `made`, which they are put into."""
    for base in options.__bases__:
        if base is not Options and base not in made:
            stem = base.__name__.removesuffix("s").removesuffix("Option")
            yield from bodies(f"{stem}Keywords", base, made)
    made[options] = name
    bases = [made[base] for base in options.__bases__ if base is not Options] or ["TypedDict"]
    head = f"class {name}({', '.join(bases)}, total=False):"
    if len(head) > LONGEST:
        head = f"class {name}(\n    {', '.join(bases)}, total=False\n):"
    lines = [head, f'    """Of {options.__name__}."""']
    own = vars(options).get("__annotations__", ())
    lines += ["", *(line(field, *described) for field, described in described_by(options).items() if field in own)]
    yield "\n".join(lines).rstrip() + "\n"


def line(field: str, option: Option, default: Any) -> str:
    """One keyword with its type."""
    kind = option.kind.annotation
    if option.many:
        kind = f"Sequence[{kind}] | {kind}" + (
            " | Mapping[str, float]" if field in ("match", "component_weights") else ""
        )
    return f"    {field}: {kind}{' | None' if default is None or option.many else ''}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
