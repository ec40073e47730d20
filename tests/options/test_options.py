"""An option is described once: the command line, the library, the record and the static types say the same of it."""

from __future__ import annotations

import inspect
import runpy
import shlex
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import click
import pytest
import torch
from hypothesis import given, reject, settings, strategies as st
from paths import ROOT

import loratool
from loratool import cli
from loratool.adapters.formats import DIALECTS
from loratool.algebra.methods.table import METHODS
from loratool.commands import keywords
from loratool.commands.merge import MergeAndPushOptions
from loratool.errors import LoratoolError, UsageError
from loratool.inspecting.fleet.indexing import IndexOptions
from loratool.inspecting.options import InspectOptions
from loratool.lineage.recording import RecordOptions
from loratool.lineage.reproducing import ReproduceOptions
from loratool.lineage.running import ManifestOptions
from loratool.merging.dry_run import DryRunOptions
from loratool.options.described import SIZE, Choice, Flag, Number, Option, Options, Size, described_by, dtypes, made_of
from loratool.publishing.options import PushOptions
from loratool.reworking.combine_options import CombineOptions
from loratool.reworking.compare import CompareOptions
from loratool.reworking.compressing.options import CompressOptions, ExpandOptions
from loratool.reworking.converting.convert import ConvertOptions
from loratool.reworking.extracting.options import ExtractOptions
from loratool.reworking.rebasing.rebase import RebaseOptions
from loratool.reworking.rescale import RescaleOptions
from loratool.reworking.resize import ResizeOptions
from loratool.verifying.options import VerifyOptions

OPTIONS: dict[str, type[Options]] = {
    "merge": MergeAndPushOptions,
    "plan": DryRunOptions,
    "rescale": RescaleOptions,
    "resize": ResizeOptions,
    "combine": CombineOptions,
    "convert": ConvertOptions,
    "extract": ExtractOptions,
    "compare": CompareOptions,
    "compress": CompressOptions,
    "expand": ExpandOptions,
    "rebase": RebaseOptions,
    "record": RecordOptions,
    "reproduce": ReproduceOptions,
    "run": ManifestOptions,
    "index": IndexOptions,
    "inspect": InspectOptions,
    "push": PushOptions,
    "verify": VerifyOptions,
}
OF_A_TERMINAL = {"demo", "help", "completion"}  # no function of the library does the same
LISTED_BY_HAND = {"estimate"}  # a function whose few keywords are in its own signature
EVERY = [(command, name) for command, options in OPTIONS.items() for name in described_by(options)]
OPERANDS: dict[str, list[Any]] = {
    "merge": ["base", "adapter", "out"],
    "plan": ["base", "adapter", "out"],
    "combine": [["one", "two"], "out"],
    "extract": ["base", "tuned", "out"],
    "compare": [["one", "two"]],
    "index": [["one", "two"], "out"],
    "inspect": ["adapter"],
    "push": ["folder", "me/repo"],
    "verify": ["merged"],
    "compress": [["one", "two"], "out"],
    "expand": ["fleet", "name", "out"],
    "record": ["made"],
    "run": ["manifest"],
}
DUE = {"rebase": ["--from", "old", "--onto", "new"]}  # options without which there is no command


def function(command: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(loratool, command)
    return found


def operands(command: str) -> list[Any]:
    return OPERANDS.get(command, ["adapter", "out"])


def words(command: str, *more: str) -> list[str]:
    """A command line with operands that are not there: a wrong option is found first."""
    flat = [word for each in operands(command) for word in (each if isinstance(each, list) else [each])]
    if "out" in flat:
        flat[flat.index("out") : flat.index("out") + 1] = ["-o", "out"]
    return [command, *flat, *DUE.get(command, []), *more]


def wrong_value(option: Option) -> str:
    """A word that no option of this kind takes."""
    return {Number: "many", Size: "five", Choice: "nothing"}[type(option.kind)]


WRONG = [
    (command, name)
    for command, name in EVERY
    if type(described_by(OPTIONS[command])[name][0].kind) in (Number, Size, Choice)
]


@pytest.mark.parametrize(("command", "name"), EVERY)
def test_each_option_is_a_flag_of_the_command_and_a_keyword_of_the_function(command: str, name: str) -> None:
    """Click's parameter and the function's keyword bear the field's name; the keyword's default is the field's."""
    described, default = described_by(OPTIONS[command])[name]
    (parameter,) = [p for p in cli.command(command).params if p.name == name]
    assert isinstance(parameter, click.Option)
    assert set(parameter.opts) | set(parameter.secondary_opts) == {
        f for flag in described.flags for f in flag.split("/")
    }
    assert described.help.rstrip(".") in str(parameter.help)
    keyword = inspect.signature(function(command)).parameters[name]
    assert keyword.kind is keyword.KEYWORD_ONLY
    assert keyword.default == default
    assert f"{name}: {described.help}" in str(function(command).__doc__)


def test_every_command_is_here() -> None:
    assert {*OPTIONS, *LISTED_BY_HAND, *OF_A_TERMINAL} == {*cli.COMMANDS}
    assert OF_A_TERMINAL.isdisjoint(loratool.EXPORTS)


def test_the_commands_have_no_options_that_the_library_has_not() -> None:
    """Apart from those that belong to a terminal, and from the ways of a merge that are functions of their own."""
    alone = {  # plan(), stream(), merge_many(), merge_part(), finish_merge(), merge_status()
        "merge": {"named_base", "dry_run", "stream", "card", "out", "also", "part", "finish", "status", "abort"},
        "verify": {"part", "finish", "into"},  # verify_part(), finish_verify()
        "extract": {"part", "finish", "into"},
        "inspect": {"part", "finish", "into", "from_file", "as_csv", "as_lines"},  # lists of paths, FleetFacts
    }
    for command in (*OPTIONS, *LISTED_BY_HAND):
        mine = {p.name for p in cli.command(command).params if isinstance(p, click.Option)}
        mine -= {"as_json", "quiet", "verbose"} | alone.get(command, set())
        if "html" in mine:
            mine -= {"html", "svg", "overwrite"}  # write_page(), write_svgs()
        assert mine <= set(inspect.signature(function(command)).parameters), command


@pytest.mark.parametrize(("command", "name"), WRONG)
def test_a_wrong_value_is_refused_in_the_same_words_by_the_command_and_the_function(
    command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both say which option, what it takes and what it got, before an input is looked at."""
    described, _ = described_by(OPTIONS[command])[name]
    value = wrong_value(described)
    assert cli.run(words(command, described.flags[-1], value)) == 2
    by_hand = capsys.readouterr().err
    with pytest.raises(UsageError) as caught:
        function(command)(*operands(command), **{name: value})
    assert by_hand == f"Error: {caught.value}\nhint: loratool {command} --help\n"
    assert described.flag in by_hand
    assert value in by_hand


def test_a_keyword_that_no_function_has_is_a_type_error_that_proposes_the_nearest() -> None:
    with pytest.raises(
        TypeError, match=r"merge\(\) got an unexpected keyword argument 'weigths'; did you mean 'weights'"
    ):
        loratool.merge("base", "adapter", "out", weigths=[1])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean 'folders'"):
        loratool.reproduce("made", "out", from_=["inputs"])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("400MB", 4 * 10**8),
        ("5GiB", 5 * 2**30),
        ("5gib", 5 * 2**30),
        ("1.5kB", 1500),
        ("3000B", 3000),
        ("2 TB", 2 * 10**12),
        ("1000000", 10**6),
        (1000, 1000),
        (10**12, 10**12),
    ],
)
def test_a_size_is_a_number_with_a_unit_or_an_int_of_python(text: str | int, size: int) -> None:
    assert SIZE.taken(text, "--size") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-5GB", "5 dozen", "0", "0GB", "1e9", "5GBB", "٣GB", True, 1.5, None, "9" * 400]
)
def test_anything_else_is_no_size(text: object) -> None:
    with pytest.raises(UsageError):
        SIZE.taken(text, "--size")


def test_a_bare_number_that_is_too_small_for_bytes_is_asked_about() -> None:
    """`--max-memory 5` of somebody who means 5 GB is no limit of five bytes."""
    with pytest.raises(UsageError, match=r"--max-memory 5 would be 5 bytes; did you mean 5MB\?"):
        Size("MB").taken("5", "--max-memory")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("fp32", "float32"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("float16", "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float32, "float32"),
        ("torch.float16", "float16"),
    ],
)
def test_a_dtype_may_be_spelled_as_users_do(value: object, name: str) -> None:
    assert dtypes("float32", "bfloat16", "float16").taken(value, "--dtype") == name


def test_a_near_word_is_proposed() -> None:
    with pytest.raises(UsageError, match=r"must be one of .* \(got 'linaer'\); did you mean 'linear'\?"):
        CombineOptions(method="linaer")


@pytest.mark.parametrize("given", ["0.5,-1", ["0.5", "-1"], [0.5, -1], (0.5, -1.0), iter([0.5, -1]), ["0.5,-1"]])
def test_weights_are_a_comma_list_or_one_each(given: Any) -> None:
    assert MergeAndPushOptions(weights=given).weights == (0.5, -1.0)


def test_weights_on_the_command_line_are_a_comma_list_or_one_each() -> None:
    for line in (["-w", "0.5,-1"], ["-w", "0.5", "-w", "-1"], ["--weight=0.5", "--weight", "-1"]):
        assert parsed("merge", ["base", "one", "two", "-o", "out", *line]).weights == (0.5, -1.0)


def parsed(command: str, line: list[str]) -> Any:
    """The options that the command line makes of words, as the command gets them."""
    options = OPTIONS[command]
    parent = click.Context(cli.cli, info_name="loratool", **cli.cli.context_settings)
    context = cli.command(command).make_context(command, line, parent=parent)
    known = described_by(options)
    return options(**{n: v for n, v in context.params.items() if n in known and v not in (None, ())})


def values_of(option: Option, default: Any) -> st.SearchStrategy[Any]:
    """Any value that an option takes, as Python has it."""
    kind = option.kind
    text = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
    if isinstance(kind, Flag):
        found: st.SearchStrategy[Any] = st.booleans()
    elif isinstance(kind, Choice):
        found = st.sampled_from(list(kind.names()))
    elif isinstance(kind, Size):
        found = st.integers(1, 10**13)
    elif isinstance(kind, Number):
        low = kind.low if kind.low is not None else kind.above if kind.above is not None else -1000
        bounds = (low, kind.high if kind.high is not None else 1000)
        found = (
            st.integers(int(bounds[0]), int(bounds[1]))
            if kind.whole
            else st.floats(*bounds, exclude_min=kind.above is not None)
        ).filter(kind.has)
    else:
        found = text
    found = st.lists(found, max_size=3) if option.many else found
    return found if default is not None or option.many else st.none() | found


SIMPLE = (Flag, Choice, Size, Number)  # kinds whose words name no file and no pattern


@pytest.mark.parametrize("command", ["merge", "resize", "combine", "rescale", "extract"])
def test_the_recorded_words_give_the_same_options_again(command: str) -> None:
    """Random options, written as a command line and read back by Click, are the same options: floats to the last bit."""
    options = OPTIONS[command]
    known = {n: (o, d) for n, (o, d) in described_by(options).items() if o.recorded and isinstance(o.kind, SIMPLE)}

    @settings(max_examples=60, deadline=None)
    @given(st.fixed_dictionaries({}, optional={name: values_of(*pair) for name, pair in known.items()}))
    def holds(chosen: Mapping[str, Any]) -> None:
        try:
            made = made_of(options, chosen, command)
        except UsageError:  # some options have no effect without others, or with them
            reject()
        line = shlex.split(shlex.join(made.words()))
        flat = [word for each in operands(command) for word in (each if isinstance(each, list) else [each])]
        again = parsed(command, [*(w for w in flat if w != "out"), *line, "-o", "out"])
        assert again == made

    holds()


def test_choices_come_from_the_registry_of_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that is added to the table is one that the command and the library take."""
    with pytest.raises(LoratoolError):
        CombineOptions(method="brand_new")
    monkeypatch.setitem(METHODS, "brand_new", METHODS["linear"])
    assert CombineOptions(method="brand_new").method == "brand_new"


def test_choices_come_from_the_registry_of_dialects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a dialect can be asked for, one of a format that is registered is taken."""
    for options in (ConvertOptions, ExtractOptions, CombineOptions, ResizeOptions):
        with pytest.raises(LoratoolError):
            made_of(options, {"to": "brand_new"}, "command")
    monkeypatch.setitem(DIALECTS, "brand_new", DIALECTS["mlx"])
    for options in (ConvertOptions, ExtractOptions, CombineOptions, ResizeOptions):
        more = {"rank": 1} if options is ResizeOptions else {}
        assert vars(made_of(options, {"to": "brand_new", **more}, "command"))["to"] == "brand_new"


def test_the_static_types_are_those_that_the_script_writes() -> None:
    written = (ROOT / "loratool" / "commands" / "keywords.py").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "generate_keywords.py"))["page"]() == written


@pytest.mark.parametrize(("command", "name"), EVERY)
def test_every_option_has_a_static_type(command: str, name: str) -> None:
    of = OPTIONS[command].__name__.removesuffix("Options").removesuffix("AndPush")
    assert name in get_type_hints(getattr(keywords, f"{of}Keywords"), vars(keywords))
