"""`Options`: the options of a command, each described once.

A command's options are a frozen dataclass whose fields `option()` makes. One description gives the Click option, the
keyword of the library, the check of its value, and the words of the command line that repeats a run. Words of a command
line and values of Python take the same way, so that both are refused in the same sentence. Click's own types know words
alone, and give no words back.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from loratool.arguments import PathLike
from loratool.errors import InputError, UsageError, escaped, printable
from loratool.files.hub_cache import origin_of
from loratool.files.hub_names import parse, slashed
from loratool.files.names import at_home
from loratool.files.untrusted import json_value, read_bounded

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SMALLEST_BARE_SIZE = 10**6  # a number of bytes below it was meant in another unit
SHORT_DTYPES = {"fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "half": "float16"}
SHORT_DTYPES |= {"bf16": "bfloat16", "float": "float32"}
Own = TypeVar("Own", bound="Options")
Function = TypeVar("Function", bound=Callable[..., Any])


class Kind:
    """What values an option takes. This one takes any text."""

    @property
    def metavar(self) -> str:
        """How help names a value."""
        return "TEXT"

    @property
    def annotation(self) -> str:
        """The type of a value in Python, as a keyword's annotation has it."""
        return "str"

    def taken(self, value: Any, flag: str) -> Any:
        """The value that a word or a Python object means; raises `UsageError`, with `flag`, for any other."""
        if not isinstance(value, str):
            raise UsageError(f"{flag} takes text (got {printable(repr(value))})")
        return value

    def word(self, value: Any) -> str:
        """The value as a word of a command line, which `taken` understands."""
        return escaped(str(value))

    def plain(self, value: Any) -> Any:
        """The value as JSON holds it, which `taken` understands too."""
        return value


def local_word(path: PathLike) -> str:
    """A path as a record names it: by its last name, for a card tells nobody's folders.

    A name that is no Unicode is escaped, for JSON cannot hold it.
    """
    name = os.path.basename(os.path.abspath(path))
    try:
        name.encode()
    except UnicodeEncodeError:
        name = escaped(name)
    return f"./{name}"


def place_word(place: PathLike) -> str:
    """An input as a record names it: with its commit if it is from the Hub, else by its last name."""
    if origin := origin_of(Path(place)):
        return str(origin)
    named = None if os.path.lexists(place) else parse(place)
    return str(named) if named else local_word(place)


@dataclass(frozen=True)
class PathKind(Kind):
    """A path."""

    metavar: str = "FILE"
    beside: bool = False  # or the name of a file in the folder of an input, as which a record has it

    annotation = "str | os.PathLike[str]"

    def taken(self, value: Any, flag: str) -> Any:
        if not isinstance(value, (str, os.PathLike)):
            raise UsageError(f"{flag} takes a path (got {printable(repr(value))})")
        return os.path.expanduser(os.fspath(value))

    def word(self, value: Any) -> str:
        return escaped(self.plain(value))

    def plain(self, value: Any) -> str:
        return str(value) if self.beside else local_word(value)


@dataclass(frozen=True)
class PlaceKind(PathKind):
    """A path or a place on the Hub, of a model unless `role` says otherwise."""

    metavar: str = "BASE"
    role: Literal["model", "any"] = "model"

    def taken(self, value: Any, flag: str) -> Any:
        """With the slashes of a name on the Hub or of an address, which a `Path` turns round on Windows."""
        return super().taken(slashed(value) if isinstance(value, os.PathLike) else value, flag)

    def plain(self, value: Any) -> str:
        return place_word(value)


@dataclass(frozen=True)
class Choice(Kind):
    """One of some words; `names` are asked for when they are needed, for a registry may grow."""

    names: Callable[[], Sequence[str]]
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def metavar(self) -> str:
        return f"[{'|'.join(self.names())}]"

    def taken(self, value: Any, flag: str) -> Any:
        word = str(value).removeprefix("torch.")
        word = self.synonyms.get(word, word)
        if word not in (names := self.names()):
            meant = f"; did you mean {near!r}?" if (near := nearest(word, names)) else ""
            raise UsageError(
                f"{flag} must be one of {', '.join(names)} (got {printable(repr(value))}){meant}",
                hint=f"{flag} {near}" if near else "",
            )
        return word


class Dtype(Choice):
    """The name of a dtype, or a dtype of torch."""

    annotation = "str | torch.dtype"


@dataclass(frozen=True)
class Number(Kind):
    """A finite number; whole, and within bounds, where that is asked for."""

    whole: bool = False
    low: float | None = None  # the least
    high: float | None = None  # the largest
    above: float | None = None  # less than all
    zero: bool = True  # whether 0 is one

    @property
    def metavar(self) -> str:
        return "INTEGER" if self.whole else "FLOAT"

    @property
    def annotation(self) -> str:
        return "int" if self.whole else "float"

    def taken(self, value: Any, flag: str) -> Any:
        number = self.number(value)
        if number is None or not math.isfinite(number) or not self.has(number):
            part = (
                number / 100
                if number is not None and (self.above, self.high) == (0, 1) and 5 <= number <= 100
                else None
            )
            pointed = str(value).replace(",", ".", 1)  # 0,5 as some languages write it
            near = f"{part:g}" if part else pointed if number is None and self.number(pointed) is not None else ""
            meant = f"; did you mean {near}?" if near else ""
            raise UsageError(f"{flag} must be {self.wanted} (got {printable(value)}){meant}")
        return number

    def number(self, value: Any) -> float | None:
        """The number that a value is; None for any other object."""
        if isinstance(value, bool):
            return None
        try:
            if isinstance(value, str):
                return int(value) if self.whole else float(value)
            return operator.index(value) if self.whole else float(value)
        except (TypeError, ValueError, OverflowError):
            return None

    def has(self, number: float) -> bool:
        """Whether a number lies within the bounds."""
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.zero or number != 0)
        )

    @property
    def wanted(self) -> str:
        """The numbers that are taken, in words."""
        noun = "a whole number" if self.whole else "a finite number"
        if self.low is not None and self.high is not None:
            return (
                f"between {self.low:g} and {self.high:g}"
                if not self.whole
                else f"{noun} from {self.low:g} to {self.high:g}"
            )
        if self.above is not None and self.high is not None:
            return f"above {self.above:g} and at most {self.high:g}"
        if self.low is not None:
            return f"{noun} of at least {self.low:g}"
        if self.above is not None:
            return f"{noun} above {self.above:g}"
        return noun if self.zero else f"{noun} other than 0"

    def word(self, value: Any) -> str:
        return repr(value).removesuffix(".0")


class Flag(Kind):
    """On or off; where the default is None, either may be said."""

    annotation = "bool"

    def taken(self, value: Any, flag: str) -> Any:
        if not isinstance(value, bool):
            raise UsageError(f"{flag} must be true or false (got {printable(repr(value))})")
        return value


def nearest(word: str, names: Iterable[str]) -> str:
    """The name that a word was probably meant to be; empty where none is near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, [*names], 1)), "")


def amount(text: str) -> tuple[float, bool] | None:
    """The number that a text such as `5GB`, `512 MiB` or `4M` is, and whether it counts bytes; None for any other text.

    The Hub's client reads powers of 1000 only, and no fractions.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?)(b?)", text.strip().lower(), re.ASCII)
    return (float(match[1]) * UNITS[match[2]], bool(match[3])) if match and match[2] in UNITS else None


@dataclass(frozen=True)
class Size(Kind):
    """A number of bytes: 5GB, 512MiB, or a whole number of a million or more."""

    usual: str = "GB"  # the unit that is proposed for a number without one

    metavar = "SIZE"

    annotation = "int | str"

    def taken(self, value: Any, flag: str) -> Any:
        text = value.strip() if isinstance(value, str) else str(NUMBER_OF_BYTES.number(value))
        found = amount(text)
        if found is None:
            raise UsageError(f"{flag} {printable(repr(value))} is not a size; write it like 5GB, 512MiB or 1000000")
        size = int(found[0])
        if isinstance(value, str) and text[-1].isdigit() and 0 < size < SMALLEST_BARE_SIZE:
            raise UsageError(
                f"{flag} {text} would be {text} bytes; did you mean {text}{self.usual}?",
                hint=f"{flag} {text}{self.usual}",
            )
        if size <= 0:
            raise UsageError(f"{flag} must be larger than 0 bytes")
        return size

    def word(self, value: Any) -> str:
        return f"{value}B"


@dataclass(frozen=True)
class JsonFile(Kind):
    """A list or an object: as it is in Python, or in a JSON file."""

    type: type = dict

    metavar = "FILE.json"

    @property
    def annotation(self) -> str:
        return "str | os.PathLike[str] | " + ("Sequence[Any]" if self.type is list else "Mapping[str, Any]")

    def taken(self, value: Any, flag: str) -> Any:
        shown = f"{flag}:"
        if isinstance(value, (str, os.PathLike)):
            shown = f"{printable(value)}: {flag}"
            path = at_home(value)
            own = isinstance(value, str) and value.lstrip().startswith(("{", "[")) and not os.path.lexists(path)
            try:
                value = json_value(str(value).encode() if own else read_bounded(path))  # a record has the table itself
            except ValueError as error:
                raise InputError(f"{printable(value)}: {error}") from None
        wanted = (list, tuple) if self.type is list else Mapping
        if not isinstance(value, wanted):
            noun = "a list" if self.type is list else "an object"
            raise InputError(f"{shown} must be {noun} (got {type(value).__name__})")
        return value

    def word(self, value: Any) -> str:
        return json.dumps(value)


@dataclass(frozen=True)
class Pairs(Kind):
    """Numbers by pattern, `REGEX=FACTOR` each, or by another key; in Python also a mapping."""

    key: str = "REGEX"
    example: str = "q_proj=0.5"

    @property
    def metavar(self) -> str:
        return f"{self.key}=FACTOR"

    def taken(self, value: Any, flag: str) -> Any:
        pattern, _, number = value.rpartition("=") if isinstance(value, str) else ("", "", "")
        factor = NUMBER.number(number)
        if not pattern or factor is None or not math.isfinite(factor) or not factor:
            noun = "pattern" if self.key == "REGEX" else self.key.lower()
            raise UsageError(
                f"{flag} must be {self.metavar}, a {noun} and a finite number other than 0, such as {self.example} "
                f"(got {printable(repr(value))})"
            )
        return value


TEXT, NUMBER, FLAG, SIZE = Kind(), Number(), Flag(), Size()
NUMBER_OF_BYTES = Number(whole=True)


@dataclass(frozen=True)
class Option:
    """One option: its flags, what it means, and the values that it takes."""

    flags: tuple[str, ...]
    help: str
    kind: Kind = TEXT
    many: bool = False  # may be repeated; a sequence in Python
    commas: bool = False  # one word may hold several, separated by commas
    metavar: str = ""  # where the kind's is not the right one
    recorded: bool = True  # whether what is written depends on it
    required: bool = False
    values: Callable[[Mapping[str, Any]], Iterable[str]] | None = (
        None  # by the operands: what a shell may complete it to
    )

    @property
    def flag(self) -> str:
        """Its long name on the command line."""
        return self.flags[-1].partition("/")[0]

    def taken(self, value: Any, default: Any) -> Any:
        """The value that words or Python objects mean."""
        if not self.many:
            return value if value is None and default is None else self.kind.taken(value, self.flag)
        if value is None:
            return ()
        if isinstance(value, Mapping) and isinstance(self.kind, Pairs):
            value = [f"{name}={number!r}" for name, number in value.items()]
        one = isinstance(value, (str, os.PathLike, Mapping)) or not isinstance(value, (Sequence, Iterator, set))
        words = [value] if one else list(value)
        if self.commas:
            words = [part for word in words for part in split(word)]
        return tuple(self.kind.taken(word, self.flag) for word in words)

    def words(self, value: Any, default: Any) -> Iterator[str]:
        """The words of a command line that give it this value."""
        if value == default or value is None:
            return
        if isinstance(self.kind, Flag):
            yield self.flag if value else f"--no-{self.flag.removeprefix('--')}"
            return
        for each in value if self.many else (value,):
            yield from (self.flags[0], self.kind.word(each))

    def plain(self, value: Any) -> Any:
        """The value as JSON holds it."""
        return [*map(self.kind.plain, value)] if self.many else self.kind.plain(value)


def split(word: Any) -> list[Any]:
    """The parts of a comma list; an object of JSON is one part."""
    if not isinstance(word, str) or word.lstrip().startswith("{"):
        return [word]
    return [part.strip() for part in word.split(",")]


def option(*flags: str, default: Any = None, help: str, **more: Any) -> Any:
    """A field of `Options`. Its flag is the field's name where none is given."""
    return dataclasses.field(default=default, metadata={"option": Option(flags, help, **more)})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a command; made with words or with Python's values, it holds what they mean."""

    def __post_init__(self) -> None:
        for name, (described, default) in described_by(type(self)).items():
            object.__setattr__(self, name, described.taken(getattr(self, name), default))

    def is_given(self, name: str) -> bool:
        """Whether an option has another value than it has by default."""
        return bool(getattr(self, name) != described_by(type(self))[name][1])

    def given(self, kind: type[Options] | None = None) -> list[str]:
        """The flags of all that have another value than they have by default, or of those of one kind."""
        return [each.flag for name, (each, _) in described_by(kind or type(self)).items() if self.is_given(name)]

    def check_needed(self, name: str, *others: str) -> None:
        """Raise `UsageError` where an option is given that has no effect without one of some others."""
        if self.is_given(name) and not any(map(self.is_given, others)):
            every = described_by(type(self))
            raise UsageError(f"{every[name][0].flag} needs {' or '.join(every[each][0].flag for each in others)}")

    def words(self) -> list[str]:
        """The words of a command line that say what is not so by default, and decides what is written."""
        every = described_by(type(self)).items()
        return [w for name, (o, default) in every if o.recorded for w in o.words(getattr(self, name), default)]

    def keywords(self) -> dict[str, Any]:
        """What `words` says, as keywords of the library and as JSON holds them."""
        every = described_by(type(self)).items()
        given = ((name, o, getattr(self, name)) for name, (o, _) in every if o.recorded and self.is_given(name))
        return {name: o.plain(value) for name, o, value in given if value is not None}


def described_by(options: type[Options]) -> dict[str, tuple[Option, Any]]:
    """Field → its option and its default, in the order of help: a class before its bases, these as they are named."""
    return described_once(options)  # type: ignore[arg-type]  # mypy takes the hash of an instance for that of its class


@cache
def described_once(options: Any) -> dict[str, tuple[Option, Any]]:
    fields = {field.name: field for field in dataclasses.fields(options)}
    found: dict[str, tuple[Option, Any]] = {}
    for name in (
        name for owner in options.__mro__ for name in vars(owner).get("__annotations__", ()) if name in fields
    ):
        described: Option = fields[name].metadata["option"]
        flags = described.flags or (f"--{name.replace('_', '-')}",)
        values = described.values or words_of(described.kind)
        found.setdefault(name, (dataclasses.replace(described, flags=flags, values=values), fields[name].default))
    return found


def words_of(kind: Kind) -> Callable[[Mapping[str, Any]], Iterable[str]] | None:
    """The words of a choice, for completion; they depend on no operand."""
    return (lambda _operands: kind.names()) if isinstance(kind, Choice) else None


def keyword_near(word: str, options: type[Options], others: Iterable[str] = ()) -> str:
    """The keyword, or one of `others`, that a word was probably meant to be: by its option's name, else by spelling."""
    known = described_by(options)
    by_flag = {flag.lstrip("-").replace("-", "_"): name for name, (each, _) in known.items() for flag in each.flags}
    return by_flag.get(word.rstrip("_")) or nearest(word, [*others, *known])


def made_of(options: type[Own], keywords: Mapping[str, Any], caller: str) -> Own:
    """The options that keywords mean; an unknown keyword is a `TypeError`, as of any function."""
    known = described_by(options)
    for name in keywords:
        if name not in known:
            meant = f"; did you mean {near!r}?" if (near := keyword_near(name, options)) else ""
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{meant}")
    return options(**keywords)


def keyword_options(options: type[Options]) -> Callable[[Function], Function]:
    """For a library function that takes a command's options as keywords: puts them into its signature and docstring."""

    def told(function: Function) -> Function:
        own = inspect.signature(function)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        lines = []
        for name, (described, default) in described_by(options).items():
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
            lines.append(f"        {name}: {described.help}")
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        text = inspect.cleandoc(function.__doc__ or "")
        every = "\n".join(line[4:] for line in lines)
        function.__doc__ = text.replace("\n\nRaises:", f"\n\nOptions:\n{every}\n\nRaises:")
        return function

    return told


def dtypes(*names: str) -> Choice:
    """A choice of dtypes, which may be spelled as users do, or be torch's own."""
    return Dtype(lambda: names, SHORT_DTYPES)
