"""`loratool run` does the steps of a manifest, and of those only what is not up to date by digests."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from malformed import write_adapter, write_base

import loratool
from loratool import cli
from loratool.results.run import RunReport, StepReport

MANIFEST = """\
# half of a style, in a base
steps:
- rescale: {adapter: ./style, scale: 0.5, output: ./half}
- merge: {base: ./base, adapters: [./half], output: ./made}
- resize:
    adapter: ./half
    rank: 1
    output: ./small
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest whose steps have been done, from another folder."""
    home = tmp_path_factory.mktemp("manifest")
    write_base(home / "base")
    write_adapter(home / "style")
    (home / "models.yaml").write_text(MANIFEST)
    report = loratool.run(home / "models.yaml")
    assert statuses(report) == ["made"] * 3
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "home")


def statuses(report: RunReport) -> list[str]:
    return [step.status for step in report.steps]


def files(home: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its inode, which another file of the same name does not have."""
    every = (path for path in home.rglob("*") if path.is_file())
    return {path.relative_to(home).as_posix(): (path.stat().st_ino, path.read_bytes()) for path in every}


def test_the_outputs_are_those_of_the_library(finished: Path, tmp_path: Path) -> None:
    loratool.rescale(finished / "style", tmp_path / "half", scale=0.5)
    loratool.merge(finished / "base", [tmp_path / "half"], tmp_path / "made", digests="full")
    for name in ("half", "made"):
        made = {path.name: path.read_bytes() for path in (finished / name).iterdir()}
        assert made == {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}


def test_what_is_up_to_date_is_left_as_it_is(home: Path) -> None:
    before = files(home)
    report = loratool.run(home / "models.yaml")
    assert statuses(report) == ["up-to-date"] * 3
    assert files(home) == before
    roots = json.loads((home / "made" / "loratool.json").read_bytes())["files"]["model.safetensors"]["root"]
    assert report.steps[1].digests["model.safetensors"] == roots


def from_stdin(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """What `loratool run -` returns and prints where stdin holds a text."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code = cli.run(["run", "-"])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_manifest_comes_from_stdin_and_its_paths_start_from_the_working_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`-` is stdin, unless a file here has that name; what is wrong with it is said of stdin."""
    monkeypatch.chdir(home)
    code, printed = from_stdin(MANIFEST, monkeypatch, capsys)
    assert (code, printed.count("up to date")) == (0, 3)
    code, printed = from_stdin("steps: [{resize: {adapter: ./half}}]", monkeypatch, capsys)
    assert code == 3
    assert printed.startswith("Error: stdin: the manifest cannot be run:\n  line 1, step 1: resize: output is missing")
    assert from_stdin("", monkeypatch, capsys)[1].startswith("Error: stdin: is empty")
    (home / "-").write_text("steps: 5")
    assert "-: steps must be a list" in from_stdin(MANIFEST, monkeypatch, capsys)[1]


def test_each_step_is_told_when_it_is_done_and_has_a_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[StepReport] = []
    shutil.rmtree(home / "made")
    report = loratool.run(home / "models.yaml", progress=told.append)
    assert told == list(report.steps)
    assert cli.run(["run", str(home / "models.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"manifest  {home / 'models.yaml'}"
    assert [line.split() for line in lines[1:]] == [
        ["step", str(number), command, "→", f"{home / out},", "up", "to", "date"]
        for number, command, out in ((1, "rescale", "half"), (2, "merge", "made"), (3, "resize", "small"))
    ]
    assert str(report).splitlines()[2].endswith("made, made; reason: no output yet")


OTHERS = {
    "made_by": ("loratool combine", "its output was made by loratool combine"),
    "options": (None, "its record has no options"),
    "operands": (["./base", "./style"], "it has other inputs"),
}


@pytest.mark.parametrize("key", OTHERS)
def test_an_output_with_another_record_is_made_again(key: str, home: Path) -> None:
    record = home / "made" / "loratool.json"
    value, reason = OTHERS[key]
    record.write_text(json.dumps({**json.loads(record.read_bytes()), key: value}))
    step = loratool.run(home / "models.yaml", dry_run=True).steps[1]
    assert (step.status, step.reason) == ("to-make", reason)


def test_a_change_of_an_option_reaches_all_that_is_made_of_it(home: Path) -> None:
    manifest = home / "models.yaml"
    manifest.write_text(MANIFEST.replace("scale: 0.5", "scale: 2"))
    before = files(home)
    plan = loratool.run(manifest, dry_run=True)
    assert statuses(plan) == ["to-make", "to-see", "to-see"]
    assert plan.steps[0].reason == "changed: scale"
    assert files(home) == before
    report = loratool.run(manifest)
    assert statuses(report) == ["made"] * 3
    assert "half: adapter_config.json differs" in report.steps[1].reason
    assert statuses(loratool.run(manifest)) == ["up-to-date"] * 3


def test_only_what_depends_on_an_input_that_changed_is_done_again(home: Path) -> None:
    """One bit of the base is another; its header is the same."""
    raw = bytearray((home / "base" / "model.safetensors").read_bytes())
    raw[-2] ^= 1
    (home / "base" / "model.safetensors").write_bytes(raw)
    report = loratool.run(home / "models.yaml")
    assert statuses(report) == ["up-to-date", "made", "up-to-date"]
    assert "base: model.safetensors differs" in report.steps[1].reason


def test_a_step_that_comes_out_the_same_again_makes_nothing_else_stale(home: Path) -> None:
    shutil.rmtree(home / "half")
    assert statuses(loratool.run(home / "models.yaml", dry_run=True)) == ["to-make", "to-see", "to-see"]
    assert statuses(loratool.run(home / "models.yaml")) == ["made", "up-to-date", "up-to-date"]


def test_an_output_that_was_damaged_is_made_again(home: Path) -> None:
    before = files(home)
    (home / "small" / "adapter_model.safetensors").write_bytes(b"")
    report = loratool.run(home / "models.yaml")
    assert statuses(report) == ["up-to-date", "up-to-date", "made"]
    assert {name: content for name, (_, content) in files(home).items()} == {n: c for n, (_, c) in before.items()}


def test_after_a_step_that_fails_the_next_run_continues_with_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(home / "half")
    shutil.rmtree(home / "made")
    config = (home / "base" / "model.safetensors").read_bytes()
    (home / "base" / "model.safetensors").write_bytes(b"damaged")
    assert cli.run(["run", str(home / "models.yaml")]) == 3
    assert "step 2 (merge)" in capsys.readouterr().err
    (home / "base" / "model.safetensors").write_bytes(config)
    assert statuses(loratool.run(home / "models.yaml")) == ["up-to-date", "made", "up-to-date"]


def test_what_loratool_did_not_make_is_never_replaced(home: Path) -> None:
    shutil.rmtree(home / "small")
    shutil.copytree(home / "style", home / "small")
    (home / "models.yaml").write_text(MANIFEST.replace("scale: 0.5", "scale: 3"))
    before = files(home)
    with pytest.raises(loratool.UsageError, match="not made by loratool"):
        loratool.run(home / "models.yaml")
    assert files(home) == before


WRONG = {
    "no YAML": ("steps: [", "line 1"),
    "empty": ("", "is empty"),
    "no steps": ("models: []", "unknown keys: models"),
    "an unknown command": (
        "steps:\n- mrege: {}",
        "line 2, step 1: unknown command mrege; did you mean 'merge'? The commands are",
    ),
    "an operand with another name": (
        "steps:\n- merge: {base: ./base, adapter: [./style], output: ./x}",
        "unknown keyword 'adapter'; did you mean 'adapters'?",
    ),
    "an option of the command line": (
        "steps:\n- merge: {base: ./base, adapters: ./style, weight: 0.5, output: ./x}",
        "unknown keyword 'weight'; did you mean 'weights'?",
    ),
    "an option with another name": (
        "steps:\n- convert: {adapter: ./style, for: vllm, output: ./x}",
        "unknown keyword 'for'; did you mean 'server'?",
    ),
    "several unknown keywords": (
        "steps:\n- resize: {adaptr: ./style, rnk: 2, output: ./x}",
        "did you mean 'adapter'?, unknown keyword 'rnk'",
    ),
    "two commands": ("steps:\n- {merge: {}, rescale: {}}", "must have one command"),
    "an unknown keyword": (
        "steps:\n- rescale: {adapter: ./style, scael: 2, output: ./x}",
        "unknown keyword 'scael'; did you mean 'scale'",
    ),
    "a bad value": ("steps:\n- resize: {adapter: ./style, rank: many, output: ./x}", "--rank must be"),
    "no output": ("steps:\n- rescale: {adapter: ./style, scale: 2}", "output is missing"),
    "no operand": ("steps:\n- rescale: {scale: 2, output: ./x}", "adapter must be a path"),
    "ours": ("steps:\n- rescale: {adapter: ./style, scale: 2, output: ./x, overwrite: true}", "is decided by"),
    "a key twice": ("steps:\n- rescale: {adapter: ./style, scale: 2, scale: 3, output: ./x}", "is duplicated"),
    "code": (
        "steps:\n- rescale: {adapter: !!python/object/apply:os.system [x], output: ./x}",
        "could not determine a constructor",
    ),
    "a missing input": (
        "steps:\n- rescale: {adapter: ./nowhere, scale: 2, output: ./x}",
        "nowhere: no such file or folder",
    ),
    "one output twice": (
        "steps:\n- rescale: {adapter: ./style, scale: 2, output: ./x}\n- rescale: {adapter: ./style, scale: 3, output: ./x}",
        "step 2 has the output of step 1",
    ),
    "the wrong order": (
        "steps:\n- rescale: {adapter: ./x, scale: 2, output: ./y}\n- rescale: {adapter: ./style, scale: 3, output: ./x}",
        "step 1 needs",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_manifest_that_is_wrong_is_refused_with_line_and_step_before_anything_is_done(
    case: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, told = WRONG[case]
    before = files(finished)
    manifest = finished / "wrong.yaml"
    manifest.write_text(text)
    try:
        assert cli.run(["run", str(manifest)]) == 3
        error = capsys.readouterr().err
        assert "wrong.yaml" in error
        assert told in error
    finally:
        manifest.unlink()
    assert files(finished) == before


def test_everything_that_is_wrong_is_told_at_once(finished: Path) -> None:
    manifest = finished / "wrong.yaml"
    manifest.write_text("steps:\n- mrege: {}\n- rescale: {adapter: ./style}\n")
    try:
        with pytest.raises(loratool.InputError) as caught:
            loratool.run(manifest)
    finally:
        manifest.unlink()
    assert len(caught.value.problems) == 2


COMPRESSED = """\
steps:
- rescale: {adapter: ./style, scale: 0.5, output: ./fleet/half}
- rescale: {adapter: ./style, scale: 2, output: ./fleet/double}
- compress: {adapters: ./fleet, rank: 2, output: ./small}
- expand: {shared: ./small, name: half, output: ./back}
- merge: {base: ./base, adapters: ./style, weights: 0.1, output: ./next}
- rebase: {adapter: ./back, base: ./base, onto: ./next, force: true, output: ./moved}
"""


def test_compressed_and_rebased_adapters_are_up_to_date_or_not_like_all_others(finished: Path, tmp_path: Path) -> None:
    """A folder of adapters, the name of one in it, and models that options name are inputs of steps."""
    for name in ("base", "style"):
        shutil.copytree(finished / name, tmp_path / name)
    (tmp_path / "fleet").mkdir()
    manifest = tmp_path / "models.yaml"
    manifest.write_text(COMPRESSED)
    assert statuses(loratool.run(manifest)) == ["made"] * 6
    assert statuses(loratool.run(manifest, dry_run=True)) == ["up-to-date"] * 6
    manifest.write_text(COMPRESSED.replace("weights: 0.1", "weights: 0.2"))
    assert statuses(loratool.run(manifest, dry_run=True)) == ["up-to-date"] * 4 + ["to-make", "to-see"]
    report = loratool.run(manifest)
    assert statuses(report) == ["up-to-date"] * 4 + ["made"] * 2
    assert report.steps[5].reason.startswith("./next: ")
    manifest.write_text(COMPRESSED.replace("scale: 2", "scale: 3"))
    assert statuses(loratool.run(manifest, dry_run=True)) == [
        "up-to-date",
        "to-make",  # twice the style
        "to-see",
        "to-see",
        "to-make",  # whose weights are 0.1 again
        "to-see",
    ]


def test_a_folder_of_adapters_comes_after_the_steps_that_fill_it(finished: Path, tmp_path: Path) -> None:
    lines = COMPRESSED.splitlines()
    (tmp_path / "models.yaml").write_text("\n".join([lines[0], lines[3], *lines[1:3]]))
    shutil.copytree(finished / "style", tmp_path / "style")
    with pytest.raises(loratool.InputError) as caught:
        loratool.run(tmp_path / "models.yaml")
    assert "step 1 needs" in str(caught.value)
    assert "which step 3 makes; put it first" in str(caught.value)
