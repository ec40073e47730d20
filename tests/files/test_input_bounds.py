"""What stands where a file is expected and is none is refused unread; a file that is parsed has a bound, others have none."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from malformed import ADAPTER, ADAPTER_CONFIG, INDEX, frame, put, write_adapter, write_sharded
from workbench import Workbench

from loratool.files import safefile, untrusted

WHOLE = 1 << 40  # bytes of a sparse file: reading it would take minutes, holding it more memory than there is


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workbench:
    made = Workbench(tmp_path, capsys)
    write_sharded(made.base)
    shutil.copytree(made.base, made.inputs / "tuned")
    write_adapter(made.inputs / "second")
    return made


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # an address of a socket has room for 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def sparse(path: Path) -> None:
    path.write_bytes(b"{")
    os.truncate(path, WHOLE)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (pipe, "is a named pipe"),
    "socket": (bound_socket, "is a socket"),
    "device": (device, "is a device"),
    "sparse": (sparse, "over the limit of"),
}
COMMANDS: dict[str, Sequence[str]] = {
    "merge": ("merge", "base", "adapter", "-o", "OUT"),
    "merge --dry-run": ("merge", "base", "adapter", "-o", "OUT", "--dry-run"),
    "inspect": ("inspect", "base", "adapter"),
    "inspect --check": ("inspect", "--check", "base", "adapter"),
    "inspect --base": ("inspect", "adapter", "--base", "base"),
    "rescale": ("rescale", "adapter", "-o", "OUT", "--scale", "2"),
    "resize": ("resize", "adapter", "-o", "OUT", "--rank", "1"),
    "combine": ("combine", "adapter", "second", "-o", "OUT"),
    "compare": ("compare", "adapter", "second"),
    "extract": ("extract", "base", "tuned", "-o", "OUT", "--rank", "1"),
    "estimate": ("estimate", "base", "--rank", "2", "--target", "q_proj"),
    "push a model": ("push", "base", "org/name", "--dry-run"),
    "push an adapter": ("push", "adapter", "org/name", "--dry-run"),
}
ROLES = {
    "config of the base": "base/config.json",
    "index": f"base/{INDEX}",
    "tokenizer of the base": "base/tokenizer.json",
    "config of the adapter": f"adapter/{ADAPTER_CONFIG}",
    "weights of the adapter": f"adapter/{ADAPTER}",
    "tokenizer of the adapter": "adapter/tokenizer.json",
}
PARSED = ("config of the base", "index", "config of the adapter")
BLIND = ("inspect", "inspect --check", "inspect --base", "compare")  # they have no use for a tokenizer


def words_of(bench: Workbench, name: str) -> list[str]:
    folders = {folder: str(bench.inputs / folder) for folder in ("base", "adapter", "second", "tuned")}
    return [{**folders, "OUT": str(bench.out)}.get(word, word) for word in COMMANDS[name]]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_small_file_is_refused_at_once_and_never_read(bench: Workbench, name: str, role: str) -> None:
    """A pipe, a socket, a device or a sparse terabyte in place of a file: exit 3 naming it, wherever it is looked at."""
    path = bench.inputs / ROLES[role]
    if path.parts[-2] not in COMMANDS[name]:
        return  # the command does not look into this folder
    for kind, (make, told) in KINDS.items():
        if kind == "sparse" and role not in PARSED:
            continue  # a tokenizer is copied and has no bound; a header says how long a file of weights is
        if os.path.lexists(path):
            path.unlink()
        make(path)
        outcome = bench.run(*words_of(bench, name))
        assert outcome.seconds < 5, (kind, outcome)
        if role == "tokenizer of the adapter" and name in BLIND:
            assert outcome.code == 0, (kind, outcome)
            continue
        shown = " ".join((outcome.out if name == "inspect --check" else outcome.err).split())
        assert outcome.code == 3, (kind, outcome)
        assert path.name in shown, (kind, outcome)
        assert told in shown, (kind, outcome)
        assert os.listdir(bench.outputs) == []


@pytest.mark.parametrize("option", [("combine", "adapter", "second", "--weights"), ("resize", "adapter", "--budget", "1k", "--layer-weights")], ids=lambda words: words[-1])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_an_option_names_is_held_to_the_same_bounds(
    bench: Workbench, option: Sequence[str], kind: str
) -> None:
    make, told = KINDS[kind]
    make(bench.inputs / "table.json")
    words = [str(bench.inputs / w) if w in ("adapter", "second") else w for w in (*option,)]
    bench.refuses(*words, bench.inputs / "table.json", "-o", bench.out, told=["table.json", told])


def test_a_tokenizer_of_any_size_and_content_is_copied_byte_for_byte(bench: Workbench) -> None:
    """It is never parsed, so neither its size nor what is in it matters; nor does that of a template that it has."""
    content = b"[" * (untrusted.LARGEST_CONFIG + 1) + b"\xff"
    (bench.adapter / "tokenizer.json").write_bytes(content)
    (bench.adapter / "tokenizer_config.json").write_bytes(content + b'"chat_template"')
    (bench.base / "chat_template.jinja").write_text("old")
    bench.merges()
    assert (bench.out / "tokenizer.json").read_bytes() == content
    assert not (bench.out / "chat_template.jinja").exists()


def test_a_side_file_for_which_there_is_no_room_is_refused_before_anything_is_written(bench: Workbench) -> None:
    sparse(bench.base / "tokenizer.json")
    os.truncate(bench.base / "tokenizer.json", 1 << 43)
    bench.refuses("merge", bench.base, bench.adapter, "-o", bench.out, told=["free"], code=6)


# What is small enough to be read may still be too much to be parsed


LISTS = json.dumps([[]] * 1000)
TOO_MANY: dict[str, tuple[str, str]] = {
    "config of the base": ("base/config.json", f'{{"model_type": "llama", "more": {LISTS}}}'),
    "index": (f"base/{INDEX}", f'{{"weight_map": {LISTS}}}'),
    "config of the adapter": (f"adapter/{ADAPTER_CONFIG}", f'{{"r": 2, "more": {LISTS}}}'),
    "objects": (f"adapter/{ADAPTER_CONFIG}", f'{{"r": 2, "more": {LISTS.replace("[]", "{}")}}}'),
    "numbers": (f"adapter/{ADAPTER_CONFIG}", f'{{"r": 2, "more": {LISTS.replace("[]", "0")}}}'),
    "header": (f"adapter/{ADAPTER}", f'{{"more": {LISTS}}}'),
}


@pytest.mark.parametrize("case", TOO_MANY)
def test_a_file_of_too_many_values_is_refused_before_it_is_parsed(
    bench: Workbench, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of this test is a thousand; the real one keeps what is parsed below half a gigabyte."""
    name, text = TOO_MANY[case]
    put(bench.inputs / name, frame(text, b"") if case == "header" else text.encode())
    monkeypatch.setattr(untrusted, "MOST_VALUES", 1000)
    if Path(name).parts[0] == "adapter":
        bench.refuses_to_inspect(bench.adapter, Path(name).name, "values, over the limit of 1000")
    bench.refuses_to_merge(Path(name).name, "values, over the limit of 1000")
    monkeypatch.setattr(untrusted, "MOST_VALUES", 3000)
    assert "over the limit" not in bench.run("inspect", bench.inputs / Path(name).parts[0]).err


def test_commas_and_brackets_inside_of_texts_are_no_values(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long chat template in a config does not make it too large."""
    text = '[{,"' * 1000 + "\\"
    write_adapter(bench.adapter, chat_template=text, **{text: "x"})
    monkeypatch.setattr(untrusted, "MOST_VALUES", 1000)
    assert bench.run("inspect", bench.adapter).code == 0


@pytest.mark.parametrize("text", ['{"a": "' + '\\"' * 500_000, '{"a": "' + "\\" * 1_000_001, '{"a' + ',"' * 500_001])
def test_texts_without_an_end_are_counted_in_one_pass(
    text: str, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that began anew at each quote would take hours."""
    (bench.adapter / ADAPTER_CONFIG).write_text(text + "," * 50)
    monkeypatch.setattr(untrusted, "MOST_VALUES", 10)
    outcome = bench.run("inspect", bench.adapter)
    assert outcome.code == 3, outcome


def test_a_header_of_too_many_tensors_is_refused_before_it_is_parsed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safefile, "MOST_TENSORS", 1)
    bench.refuses_to_merge("describes 2 tensors, over the limit of 1")
    bench.refuses_to_inspect(bench.adapter, "describes 2 tensors, over the limit of 1")


NUMBERS = {"as a whole": "9" * 309, "negative": "-" + "9" * 309, "behind a point": "0." + "1" * 5000}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("role", PARSED)
def test_a_number_of_hundreds_of_digits_is_refused_in_our_words(bench: Workbench, role: str, number: str) -> None:
    """float64 does not hold it, and of thousands Python's own words advise to change a setting of the interpreter."""
    path = bench.inputs / ROLES[role]
    path.write_text(path.read_text().replace("{", f'{{"n": {NUMBERS[number]}, ', 1))
    bench.refuses_to_merge(path.name, "a number of more than 308 digits")


@pytest.mark.parametrize("depth", [126, 127, 200, 5000])
@pytest.mark.parametrize("role", PARSED)
def test_levels_beyond_those_of_the_format_are_refused(bench: Workbench, role: str, depth: int) -> None:
    """126 arrays in an object are what the safetensors parser takes in a header; what is read is written, too."""
    path = bench.inputs / ROLES[role]
    path.write_text(path.read_text().replace("{", f'{{"deep": {"[" * depth}{"]" * depth}, ', 1))
    if depth == 126:
        bench.merges()
    else:
        bench.refuses_to_merge(path.name, "nested too deeply")
