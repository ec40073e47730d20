"""One self-contained HTML page: the heat map, the spectra and the table of what `inspect` measured.

The template is `page.html` beside this file. Foreign names reach it as JSON that is put into the document by `textContent`
alone, and a policy in the page's head forbids it to load anything. `string.Template` would take the `${…}` of its script
for names.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.errors import UsageError, escaped, printable
from loratool.files.outputs import write_file
from loratool.results.facts import AdapterFacts, Facts
from loratool.results.text import size
from loratool.results.values import Measured

MOST_POINTS = 250_000  # singular values that a page holds; of more, every second, third … one is kept
LARGEST_HEAD = 1 << 16  # bytes in which a page's title ends
PAGE_TITLE = re.compile(rb"<title>[^<]*\xc2\xb7 loratool inspect</title>")
LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
# Modules of one layer in the order in which they are computed.
ORDER = (
    *(
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "in_proj_weight",
        "q_proj",
        "query",
        "q",
        "k_proj",
        "key",
        "k",
        "v_proj",
    ),
    *("value", "v", "o_proj", "out_proj", "o", "gate_proj", "gate_up_proj", "up_proj", "down_proj"),
)


def html_page(results: Sequence[Facts]) -> str:
    """The page as text: a section for each of the results, figures where values were measured."""
    from loratool.results.facts import AdapterFacts

    data = [adapter_data(facts) if isinstance(facts, AdapterFacts) else other_data(facts) for facts in results]
    title = ", ".join(entry["title"] for entry in data) or "nothing"
    template = files("loratool.pictures").joinpath("page.html").read_text(encoding="utf-8")
    parts = {"TITLE": html.escape(escaped(title)), "VERSION": html.escape(__version__), "DATA": embedded(data)}
    return re.sub("@@([A-Z]+)@@", lambda match: parts[match[1]], template)


def embedded(data: object) -> str:
    """JSON that no character of ends the script element it stands in, and no text of obeys or hides anything."""
    text = json.dumps(cleaned(data), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def cleaned(data: Any) -> Any:
    """Plain data whose texts are safe to show."""
    if isinstance(data, Mapping):
        return {escaped(str(key)): cleaned(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [cleaned(item) for item in data]
    return escaped(data) if isinstance(data, str) else data


def check_page(path: Path, overwrite: bool) -> None:
    """Raise `UsageError` where a page may not be written to `path`; nothing but pages made here is replaced."""
    if path.is_dir():
        raise UsageError(f"--html {printable(path)}: is a folder; expected a file")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"--html {printable(path)} already exists; pass --overwrite to replace it", hint="--overwrite")
    if path.exists() and not is_page(path):
        raise UsageError(
            f"--html {printable(path)}: was not made by loratool, so --overwrite does not replace it; choose another "
            "name"
        )
    if not path.parent.is_dir():
        raise UsageError(f"--html {printable(path)}: the folder {printable(path.parent)} does not exist")


def is_page(path: Path) -> bool:
    """Whether a file is a page made here, of this release or another."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(LARGEST_HEAD)
    return start.startswith(b"<!doctype html>") and PAGE_TITLE.search(start) is not None


def write_page(results: Sequence[Facts], path: Path, overwrite: bool = False) -> None:
    """Write the page of some results; under its final name only when all of it is there."""
    check_page(path, overwrite)
    write_file(path, html_page(results).encode(errors="backslashreplace"))


def adapter_data(facts: AdapterFacts) -> dict[str, Any]:
    """What the page shows of an adapter."""
    values = facts.values
    return {
        "title": name_of(facts.path),
        "facts": [
            ["path", facts.path],
            ["format", ", ".join(filter(None, [*facts.formats, facts.peft_type, *facts.variants]))],
            ["base", facts.base or "not named"],
            *([["task", facts.task]] if facts.task else []),
            *([["saved whole", ", ".join(facts.saved)]] if facts.saved else []),
            ["dtypes", ", ".join(f"{dtype} ×{count}" for dtype, count in facts.dtypes.items())],
            *([["parameters", facts.against.line]] if facts.against else []),
            *(["not mergeable", reason] for reason in facts.unsupported),
            *(["note", str(note)] for note in (*facts.notes, *(values.notes if values else ()))),
            *(["not measured", f"{target}: {why}"] for target, why in (values.skipped if values else {}).items()),
        ],
        "tiles": tiles(facts),
        "suggestions": [
            [
                f"{100 * s.energy:.0f} %",
                str(s.rank),
                size(s.bytes),
                part_of(s.bytes, s.bytes_now),
                size(s.bytes_by_layer),
            ]
            for s in (values.suggestions if values else ())
        ],
        "modules": module_data(values.modules) if values else [],
        "findings": [[f.level, f.code, f.message, f.repair] for f in facts.findings or ()],
        "checked": facts.findings is not None,
    }


def other_data(facts: Any) -> dict[str, Any]:
    """What the page shows of a checkpoint, or of what cannot be read."""
    told = {"architecture": getattr(facts, "architecture", ""), "made by": getattr(facts, "made_by", "")}
    count = getattr(facts, "parameters", None)
    return {
        "title": name_of(facts.path),
        "facts": [["path", facts.path], *([name, value] for name, value in told.items() if value)],
        "tiles": [] if count is None else [["parameters", f"{count:,}"], ["size", size(facts.bytes)]],
        "suggestions": [],
        "modules": [],
        "findings": [[f.level, f.code, f.message, f.repair] for f in facts.findings or ()],
        "checked": facts.findings is not None,
    }


def name_of(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2] or path


def tiles(facts: AdapterFacts) -> list[list[str]]:
    """The numbers that a page begins with: name, value."""
    found = []
    if facts.ranks:
        found += [[word, several(values)] for word, values in (("rank", facts.ranks), ("α", facts.alphas))]
        found.append(["α/√r" if facts.rslora else "α/r", several(facts.scalings)])
    found += [["parameters", f"{facts.parameters:,}"], ["size", size(facts.bytes)]]
    if facts.values:
        found.append(["‖ΔW‖", f"{facts.values.norm:.4g}"])
        if facts.values.norm_base:
            found.append(["‖ΔW‖/‖W₀‖", f"{100 * facts.values.norm / facts.values.norm_base:.3g} %"])
    if facts.against:
        found.append(["trainable", f"{facts.against.percent:.4f} %"])
    return found


def several(values: Any) -> str:
    """One value, or the smallest and the largest of several."""
    if len(values) == 1:
        return str(next(iter(values)))
    ordered = sorted(values, key=float)
    return f"{ordered[0]} … {ordered[-1]}"


def part_of(part: int, whole: int) -> str:
    return f"−{100 * (1 - part / whole):.0f} %" if whole and part < whole else "unchanged"


def module_data(modules: Sequence[Measured]) -> list[dict[str, Any]]:
    """Each module's place on the heat map, its numbers and its spectrum, in the map's order."""
    step = max(1, -(-sum(len(m.singular_values) for m in modules) // MOST_POINTS))
    entries: list[dict[str, Any]] = []
    for m in modules:
        layer, name = place_of(m.target)
        ranks = m.energy_ranks or (None, None, None)
        weight = m.weight
        entries.append(
            {
                "target": m.target.removesuffix(".weight"),
                "layer": layer,
                "name": name,
                "n": [
                    *map(short, (m.rank, m.norm, m.spectral, m.stable_rank, m.entropy_rank, *ranks, m.dead, m.balance)),
                    *map(
                        short,
                        (weight.ratio, weight.amplification, weight.unchanged, weight.gain) if weight else (None,) * 4,
                    ),
                ],
                "s": [short(value, 4) for value in m.singular_values[::step]],
                "step": step,
            }
        )
    start = common([entry["name"] for entry in entries])
    for entry in entries:
        entry["name"] = entry["name"].removeprefix(start)
    return sorted(entries, key=lambda entry: (entry["layer"] is None, entry["layer"] or 0, order_of(entry["name"])))


def place_of(target: str) -> tuple[int | None, str]:
    """(layer, name) of a module: the first number of its path, and the path without it."""
    path = target.removesuffix(".weight")
    match = LAYER.search(path)
    if match is None:
        return None, path
    return int(match[0]), re.sub(r"\.+", ".", f"{path[: match.start()]}{path[match.end() :]}").strip(".")


def common(names: Sequence[str]) -> str:
    """The first parts of paths that all of them have, with the dot behind."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def order_of(name: str) -> tuple[bool, str, int, str]:
    """Where a module comes among those of its layer: attention first."""
    parent, _, last = name.rpartition(".")
    rank = ORDER.index(last) if last in ORDER else len(ORDER)
    return ("att" not in name.lower(), parent, rank, name)


def short(value: float | None, digits: int = 5) -> float | None:
    """A number with so many digits."""
    return None if value is None else float(f"{value:.{digits}g}")
