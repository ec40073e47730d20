"""The pages whose tables come from results, and the search for numbers that stand outside of them."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from reasons import reasons
from sections import performance
from tables import (
    Result,
    aspects,
    commands_table,
    machine_of,
    memory_table,
    merging_table,
    people_table,
    rounding_table,
)

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
PERFORMANCE, README = "docs/performance.md", "README.md"
GUARDED = (PERFORMANCE, README)  # pages in which no other number may stand; in all others, no time and no rate
BLOCK = re.compile(r"(?P<begin><!-- numbers: (?P<name>\w+) -->\n).*?(?P<end><!-- end of numbers -->)", re.DOTALL)
BLOCKS: dict[str, Callable[[Sequence[Result]], str]] = {
    "performance": performance,
    "merging": merging_table,
    "memory": memory_table,
    "commands": commands_table,
    "people": people_table,
    "rounding": rounding_table,
    "reasons": reasons,
    "fleets": partial(aspects, benchmark="people", heads={"processor": "CPU time", "peak memory": "peak memory"}),
    "compressed": partial(
        aspects,
        benchmark="people",
        heads={
            "error of compress": "error of `compress`",
            "error of resize of each": "error of `resize --budget` of each",
        },
    ),
    "qlora": partial(aspects, benchmark="qlora", heads={way: way for way in ("gain", "weights", "outputs")}),
    "inference": partial(
        aspects,
        benchmark="inference",
        heads={
            "merged / plain": "merged / plain",
            "unmerged / plain": "unmerged / plain",
            "plain again / plain": "plain / plain (noise)",
        },
    ),
}
WITHOUT = re.compile(  # what is not measured: code, links' targets, names (bf16, 16-bit, Llama-3.2-1B), requirements
    r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|\b[A-Za-z][\w.-]*\d[\w.-]*|Python \d+\.\d+|Apache \d\.\d|\b\d+-bit\b",
    re.DOTALL,
)
NUMBER = re.compile(r"\d")
TIME = re.compile(r"\d ?(?:s|ms|µs|seconds?|minutes?|hours?|[kMG]B/s)\b")  # also a rate


class UnnamedCodeError(Exception):
    """Results of code that is no commit, or not the one that they name."""


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Results, in the order of their names.

    Raises `UnnamedCodeError` where the code that was measured is no commit, or results of one commit are of different code.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]
    codes: dict[str, str] = {}
    for path, each in zip(sorted(paths), results, strict=True):
        if codes.setdefault(each["commit"], each["code"]) != each["code"]:
            raise UnnamedCodeError(f"{path.name}: other code than that of another result of commit {each['commit']}")
    for name in dict.fromkeys(each["commit"] for each in results):
        if not re.fullmatch(r"[0-9a-f]{7,40}", name):
            raise UnnamedCodeError(f"the code that was measured is not a commit ({name}): commit it and measure again")
    return results


def pages_of(root: Path) -> list[Path]:
    return [root / README, *sorted((root / "docs").rglob("*.md"))]


def written(page: str, results: Sequence[Result]) -> str:
    """A page with its blocks as they are to be."""

    def filled(found: re.Match[str]) -> str:
        text = BLOCKS[found["name"]](results)
        return f"{found['begin']}\n{text}\n\n{found['end']}" if text else f"{found['begin']}{found['end']}"

    return BLOCK.sub(filled, page)


def stray_numbers(page: str, kind: re.Pattern[str] = NUMBER) -> list[str]:
    """Lines with numbers of a kind that stand outside of blocks and are not in code or names."""
    rest = WITHOUT.sub("", BLOCK.sub("", page))
    return [line.strip() for line in rest.splitlines() if kind.search(line)]


def problems(root: Path) -> Iterator[str]:
    """What is not as the kept results say."""
    results = read_results([*(root / RESULTS).glob("*.json")])
    for path in pages_of(root):
        page, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        if written(page, results) != page:
            yield f"{name}: its tables are not those of {RESULTS}; run python benchmarks/numbers.py"
        for line in stray_numbers(page, NUMBER if name in GUARDED else TIME):
            yield f"{name}: a number that benchmarks/numbers.py did not write: {line}"


def keep(paths: Sequence[Path], kept: Path) -> None:
    """Copy results to the kept ones. Older ones of the same machine, and those of the same command, go.

    Raises `UnnamedCodeError` before anything is changed.
    """
    new = read_results(paths)
    kept.mkdir(parents=True, exist_ok=True)
    for path in {*kept.glob("*.json")} - {path.resolve() for path in paths}:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = [each for each in new if machine_of(each) == machine_of(old)]
        again = any(each["command"] == old["command"] for each in same)
        if same and (again or old["code"] not in {each["code"] for each in same}):
            print(f"{path.name}: removed; it is of {old['commit']}")
            path.unlink()
    for path in paths:
        if path.resolve().parent != kept.resolve():
            shutil.copyfile(path, kept / path.name)


def main(arguments: Sequence[str] | None = None, root: Path = REPOSITORY) -> None:
    parser = argparse.ArgumentParser(prog="numbers.py", description="Write the numbers of the pages, or check them.")
    parser.add_argument(
        "results", nargs="*", type=Path, help="results to keep in place of older ones of their machines"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail where a page is not as it should be"
    )
    options = parser.parse_args(arguments)
    try:
        if options.check:
            found = [*problems(root)]
            print("\n".join(found) or "every number is one of benchmarks/results")
            sys.exit(bool(found))
        if options.results:
            keep(options.results, root / RESULTS)
        results = read_results([*(root / RESULTS).glob("*.json")])
    except UnnamedCodeError as error:
        sys.exit(str(error))
    for path in pages_of(root):
        page = path.read_text(encoding="utf-8")
        if (fresh := written(page, results)) != page:
            path.write_text(fresh, encoding="utf-8")
