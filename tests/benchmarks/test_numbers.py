"""benchmarks/numbers.py writes the numbers of the pages from results of one commit, and finds those it did not write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import findings
import pages
import quantised
from running import Run

BLOCK = "<!-- numbers: {} -->\n<!-- end of numbers -->\n"
ROUNDING = "docs/rounding.md"  # a page that may have numbers of its own
FACTS = {"processor": "Abacus, 3 cores", "memory": "7.5 GiB", "GPU": "none", "file system": "ext4", "torch": "9.9"}


def run(wall: float) -> dict[str, float]:
    numbers = {"wall": wall, "work": wall / 2, "startup": 0.25, "processor": 3.0, "peak_memory": 3e8, "gpu_memory": 0}
    return {**numbers, "bytes": 5e9}


def result(**changes: Any) -> dict[str, Any]:
    """What engine.py writes, in short."""
    judged = {"value": 1.75, "target": "≥ 1.60, aim 2.00", "met": True, "aimed": False}
    finding = {"what": "rate", "measured": "1.75", "note": "turns 1.75", **judged}
    merge = {"shape": "tiny", "bytes": 5 * 10**9, "runs": {"cp -r": [run(4)], "merge cpu": [run(1), run(5), run(3)]}}
    return {
        "benchmark": "engine",
        "command": "python benchmarks/engine.py --shape tiny",
        "commit": "0123456789",
        "code": "abc",
        "machine": FACTS,
        "rows": {"merge": merge, "peft": {"skipped": "needs peft"}},
        "findings": [finding],
        **changes,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the three pages, and nothing in their blocks."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / pages.PERFORMANCE).write_text(f"# Performance\n\nFor `x = 3`.\n\n{BLOCK.format('performance')}\nEnd.\n")
    (tmp_path / pages.README).write_text(
        f"Merges.\n\n{BLOCK.format('merging')}\n{BLOCK.format('commands')}\nPython 3.10.\n"
    )
    (tmp_path / ROUNDING).write_text(f"Below 10⁻², 7 of 8.\n\n{BLOCK.format('rounding')}")
    return tmp_path


def keep(folder: Path, **results: dict[str, Any]) -> list[str]:
    paths = [folder / f"{name}.json" for name in results]
    for path, each in zip(paths, results.values(), strict=True):
        path.write_text(json.dumps(each))
    return list(map(str, paths))


def checked(root: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        pages.main(["--check"], root)
    return int(ended.value.code or 0)


def test_merges_into_quantised_bases_have_a_section_with_every_run(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As quantised.py writes it: ratios as findings, and what each contender took."""
    runs = [Run(wall, 0.5, 6.0, peak_memory=4 * 10**8, report={"startup_seconds": 1}) for wall in (9, 7, 8)]
    plain = [Run(4.0, 0.5, 5.0, peak_memory=3 * 10**8) for _ in range(3)]
    both = {"bf16": plain, "gptq, touched only": runs}
    findings = [asdict(found) for found in quantised.judge(both)]
    rows = {name: [quantised.shown(one, 10**9) for one in each] for name, each in both.items()}
    row = {"shape": "tiny", "bytes": 10**9, "runs": rows}
    one = result(benchmark="quantised", findings=findings, rows={"merge into": row})
    pages.main(keep(tmp_path_factory.mktemp("results"), one=one), root)
    page = (root / pages.PERFORMANCE).read_text()
    assert "### Quantised bases" in page
    assert "| gptq, touched only: time over it | ≤ 1.50 | 2.00 | missed |" in page
    assert "| gptq, touched only: memory above it | ≤ 60 MB | 100 MB | missed |" in page
    assert "| `merge into` | gptq, touched only | 8.00 s | 1.00 s |" in page


def test_what_many_adapters_cost_is_a_table_of_its_own_next_to_what_was_promised(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As people.py writes it: findings without a target stand in the machine's section only."""
    page = root / pages.PERFORMANCE
    page.write_text(f"# Performance\n\n{BLOCK.format('people')}\n{BLOCK.format('performance')}")
    found = [
        findings.at_most("a table of many", 2.5, 3.0, findings.seconds),
        findings.Finding("a sketch", "9 ms", 0.009),
    ]
    people = result(benchmark="people", rows={}, findings=[asdict(each) for each in found])
    pages.main(keep(tmp_path_factory.mktemp("results"), engine=result(), people=people), root)
    table, _, sections = page.read_text().partition("<!-- numbers: performance -->")
    assert "| Abacus, 3 cores | a table of many | ≤ 3.00 s | 2.50 s | met |" in table
    assert "a sketch" not in table
    assert "### Many adapters, and pages" in sections
    assert "| a sketch |  | 9 ms |  |" in sections
    assert checked(root) == 0


def test_pages_show_machine_commit_command_and_every_number(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What a result holds stands in the blocks, medians included; text around them stays; the check then passes."""
    pages.main(keep(tmp_path_factory.mktemp("results"), one=result()), root)
    page = (root / pages.PERFORMANCE).read_text()
    assert page.startswith("# Performance\n\nFor `x = 3`.\n\n<!-- numbers: performance -->\n\n")
    assert page.endswith("\n\n<!-- end of numbers -->\n\nEnd.\n")
    for text in (
        "commit `0123456789`",
        "## Abacus, 3 cores",
        "7.5 GiB of memory, file system ext4, torch 9.9",
        "```console\n$ python benchmarks/engine.py --shape tiny\n```",
        "| rate | ≥ 1.60, aim 2.00 | 1.75 (turns 1.75) | met |",
        "| `merge` | merge cpu | 3.00 s | 0.25 s | 3.33 GB/s | 3.00 s | 300 MB |",
        "Not measured on this machine: `peft`: needs peft.",
    ):
        assert text in page
    expected = "| Abacus, 3 cores | tiny, 5.00 GB | 4.0 s | 3.0 s on cpu, of which 0.2 s start-up |  | 300 MB |"
    assert expected in (root / pages.README).read_text()
    assert checked(root) == 0


@pytest.mark.parametrize(
    ("value", "least", "most"), [(1.0, "missed", "aim met"), (1.5, "met", "met"), (2.5, "aim met", "missed")]
)
def test_a_number_is_judged_by_target_and_aim(value: float, least: str, most: str) -> None:
    """With target 1.4 and aim 2, or for what is to be small with target 2 and aim 1.2."""
    up = findings.at_least("x", value, 1.4, findings.ratio, 2.0)
    down = findings.at_most("x", value, 2.0, findings.ratio, 1.2)
    assert (findings.verdict(up.met, up.aimed), findings.verdict(down.met, down.aimed)) == (least, most)
    assert (up.target, down.target) == ("≥ 1.40, aim 2.00", "≤ 2.00, aim 1.20")


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"commit": "aaaaaaaaaa", "code": "abd"}, ["new.json"]),
        ({}, ["new.json"]),
        ({"command": "python benchmarks/engine.py --rows batch"}, ["new.json", "old.json"]),
        ({"commit": "aaaaaaaaaa", "code": "abd", "machine": {**FACTS, "GPU": "Far"}}, ["new.json", "old.json"]),
    ],
    ids=["another commit", "the same command", "another command", "another machine"],
)
def test_new_results_take_the_place_of_what_they_measure_again(
    root: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], left: list[str]
) -> None:
    """Of their machine, results of another commit and of the same command go; all others stay, on the pages too."""
    pages.main(keep(tmp_path_factory.mktemp("old"), old=result(**changes)), root)
    pages.main(keep(tmp_path_factory.mktemp("new"), new=result()), root)
    assert sorted(path.name for path in (root / pages.RESULTS).iterdir()) == left
    sections = (root / pages.PERFORMANCE).read_text().count("```console")
    assert sections == len(left)
    assert checked(root) == 0


def test_what_was_measured_in_several_ways_is_a_row_under_its_command(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The ways are columns, whatever their order in the result; one that is missing leaves its cell empty."""
    (root / "docs/fleets.md").write_text(BLOCK.format("fleets"))
    measured = {
        "a table": "3 s",
        "a table: peak memory": "30 MB",
        "a table: processor": "2 s",
        "an index: processor": "1 s",
    }
    found = [asdict(findings.Finding(what, shown, 0.0)) for what, shown in measured.items()]
    people = result(benchmark="people", command="python benchmarks/people.py", rows={}, findings=found)
    pages.main(keep(tmp_path_factory.mktemp("results"), people=people), root)
    assert (root / "docs/fleets.md").read_text().splitlines()[2:-2] == [
        "`python benchmarks/people.py` on Abacus, 3 cores:",
        "",
        "|  | CPU time | peak memory |",
        "|---|---|---|",
        "| a table | 2 s | 30 MB |",
        "| an index | 1 s |  |",
    ]


def test_a_range_is_that_of_all_machines(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """README's line about quantised bases covers every kept result, and not only the last one."""
    (root / pages.README).write_text(BLOCK.format("reasons"))
    far = {"machine": {**FACTS, "GPU": "Far"}}
    each = {
        name: result(
            benchmark="quantised",
            findings=[asdict(findings.at_most("nf4, touched only: time over it", value, 1.3, findings.ratio))],
            **more,
        )
        for name, value, more in (("one", 1.34, {}), ("two", 0.91, far))
    }
    pages.main(keep(tmp_path_factory.mktemp("results"), **each), root)
    assert "Merging into nf4 takes 0.91 to 1.34 times as long" in (root / pages.README).read_text()


def test_each_table_names_its_commit(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Results that are kept together may be of several commits and of several machines."""
    other = result(commit="aaaaaaaaaa", code="abd", command="python benchmarks/engine.py --rows other")
    far = result(commit="bbbbbbbbbb", code="abe", machine={**result()["machine"], "GPU": "Far"})
    pages.main(keep(tmp_path_factory.mktemp("results"), one=result(), two=other, three=far), root)
    page = (root / pages.PERFORMANCE).read_text()
    assert [re.findall(r"at commit `(\w+)`", part) for part in page.split("\n## ")[1:]] == [
        ["0123456789", "aaaaaaaaaa"],
        ["bbbbbbbbbb"],
    ]
    assert checked(root) == 0


def test_results_of_one_commit_are_of_one_code(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tree that was taken for another commit is found by the digest of its source, and nothing is written."""
    other = result(code="abd", command="python benchmarks/engine.py --rows other")
    with pytest.raises(SystemExit, match="other code than that of another result of commit 0123456789"):
        pages.main(keep(tmp_path_factory.mktemp("results"), one=result(), two=other), root)
    assert not (root / pages.RESULTS).exists()


def test_older_results_of_a_machine_go(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One of a commit that none of the new ones has, whatever its command; those of other machines stay."""
    far = result(machine={**result()["machine"], "GPU": "Far"})
    old = result(command="python benchmarks/engine.py --rows other")
    pages.main(keep(tmp_path_factory.mktemp("results"), far=far, old=old), root)
    pages.main(keep(tmp_path_factory.mktemp("results"), new=result(commit="aaaaaaaaaa", code="abd")), root)
    assert sorted(path.stem for path in (root / pages.RESULTS).iterdir()) == ["far", "new"]


@pytest.mark.parametrize("commit", ["unknown", "0123456789+"])
def test_code_that_is_no_commit_is_refused(root: Path, tmp_path_factory: pytest.TempPathFactory, commit: str) -> None:
    """A tree with changes of its own cannot be named on a page."""
    with pytest.raises(SystemExit, match="commit it and measure again"):
        pages.main(keep(tmp_path_factory.mktemp("results"), one=result(commit=commit)), root)


@pytest.mark.parametrize(
    ("page", "text", "line"),
    [
        (pages.PERFORMANCE, "It takes 3 s.", "It takes 3 s."),
        (pages.README, "About 350 MB.", "About 350 MB."),
        (pages.README, "| 12.8 s |", "| 12.8 s |"),
        (pages.README, "Llama-3.2-1B in bf16 with Python 3.12 on an H100, see [this](docs/v2.md), `-w 0.7`.", None),
        (ROUNDING, "7 of 8, in blocks of 3 MiB, with `--wait 3s`.", None),
        (ROUNDING, "It took 52 s.", "It took 52 s."),
        (ROUNDING, "It reads 1.5 GB/s.", "It reads 1.5 GB/s."),
    ],
)
def test_numbers_that_were_not_written_are_found(
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    page: str,
    text: str,
    line: str | None,
) -> None:
    """A number in the text of a guarded page fails the check, and a time or a rate on any page; names, code, links and
    requirements are no numbers.
    """
    pages.main(keep(tmp_path_factory.mktemp("results"), one=result()), root)
    path = root / page
    path.write_text(path.read_text() + f"\n{text}\n")
    assert checked(root) == (line is not None)
    assert (
        line is None or f"{page}: a number that benchmarks/numbers.py did not write: {line}" in capsys.readouterr().out
    )


def test_a_number_that_was_changed_by_hand_is_found(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What stands in a block must be what the kept results say."""
    pages.main(keep(tmp_path_factory.mktemp("results"), one=result()), root)
    path = root / pages.PERFORMANCE
    path.write_text(path.read_text().replace("1.75", "2.75"))
    assert checked(root) == 1


def test_the_pages_of_this_repository_hold_no_other_numbers() -> None:
    """The command itself, as it is run."""
    command = [sys.executable, str(ROOT / "benchmarks/numbers.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "every number is one of benchmarks/results")


def test_a_command_is_shown_without_folders_of_the_machine() -> None:
    """Neither where the result went nor where models were made; an older commit keeps its name."""
    words = "a/engine.py --rows merge --folder /mnt/x --json /tmp/r.json --over /mnt/old/0.2.0 --json=/tmp/s.json"
    assert findings.command(words.split()) == "python benchmarks/engine.py --rows merge --folder DIR --over 0.2.0"
    shown = "python benchmarks/engine.py --folder /dev/shm"
    assert findings.command(["engine.py", "--folder", "/dev/shm"]) == shown
