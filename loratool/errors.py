"""What can go wrong, and the exit code each kind ends the command line with.

LoratoolError            1   (never raised itself: a bug is any other exception)
├── UsageError           2   the call is wrong: an unknown value, conflicting options, or an output that already exists
├── InputError           3   an input is malformed or not supported
├── FitError             4   the adapter does not fit the base, or changes nothing
├── VerificationError    5   a file differs from its record, or a result from the formula
├── StorageError         6   a disk or file-system error
└── HubError             7   the Hub is unreachable or refused the request
    └── StoreError       7   the same of an object store
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from loratool.arguments import PathLike

LONGEST_SHOWN = 200  # characters of a foreign name that a message repeats
MOST_SHOWN = 20  # problems of one input that a message lists
# Printable by Unicode's categories, and yet not to be seen: joiners, fillers, blanks, variation selectors.
INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | frozenset(
    map(chr, range(0xE0100, 0xE01F0))
)
MOST_NAMED = 3  # names that a folded problem repeats
# Patterns are text until they are needed, for compiling them takes longer than many a command.
# A problem: whose it is (an adapter, say), the dotted name that it is about, and what is said of it.
SUBJECT = r"(?s)(?P<whose>[^:\s]+: )??(?P<name>[^\s:]*\.[^\s:]*): (?P<said>.+)"
ALONE = r"(?s)(?P<whose>)(?P<name>)(?P<said>.*)"  # one that is about no name
NUMBER = r"(?<=\.)\d+(?=\.)"  # of a layer, within a name
TENSOR_ENDS = frozenset({"weight", "bias"})
FILE_ENDS = frozenset({"safetensors", "json"})
# What people may have copied into an address; a Path has one slash of two. In hf://org/name@main, @ is something else.
WITH_USER = r"\b((?:s3|https?):/{1,2}(?=[^\s/@]+@)|[a-z][a-z0-9+.-]*:/{1,2}(?=[^\s/@:]*:))[^\s/@]+@"
SIGNED = r"(?i)([?&](?:x-amz-[a-z-]+|awsaccesskeyid|signature|sig|token)=)[^&\s'\"]+"
shown_as: dict[str, str] = {}  # a folder of this disk → the place elsewhere that it stands for, as it is shown
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

BAKE = "--bake"  # the hint where no config can say how strong an update has to be
NAME_BASE = "--base BASE"  # the hint where the model tells what an adapter does not
ANOTHER_OUT = "-o"  # the hint of an error for an output that has to be somewhere else


def printable(text: object) -> str:
    """`text` as it may safely be shown: control and unprintable characters escaped, length capped.

    Tensor names, paths and config values come from files that anyone may have written.
    """
    raw = as_typed(os.fsdecode(text) if isinstance(text, (bytes, os.PathLike)) else str(text))
    raw = without_credentials(raw)
    if len(raw) > LONGEST_SHOWN:
        half = LONGEST_SHOWN // 2
        raw = f"{raw[:half]}…{raw[-half:]}"  # of a path the end tells most
    return escaped(raw)


def as_typed(text: str) -> str:
    """A path as it would be typed: places in a store by their addresses, and not by the folders that stand for them."""
    if text.startswith("s3:/") and not text.startswith("s3://"):
        text = text.replace("/", "//", 1)  # of which a Path has one
    for folder, place in shown_as.items():
        text = text.replace(folder, place)
    return text


def without_credentials(text: str) -> str:
    """`text` without the user, the password and the signature that addresses in it may have."""
    if ":/" not in text or not {"@", "="} & {*text}:
        return text
    return re.sub(SIGNED, r"\1<TOKEN>", re.sub(WITH_USER, r"\1<TOKEN>@", text))


def escaped(text: str, keep: str = "") -> str:
    """`text` without any character that a terminal, a browser or an editor obeys or hides; those in `keep` stay.

    So are control characters, marks of direction, characters of no width, half surrogates, and letters that look like
    nothing. `repr` leaves some of these as they are, and the codec `unicode_escape` no letter that is not ASCII.
    """
    if text.isprintable() and INVISIBLE.isdisjoint(text):
        return text
    return "".join(
        c
        if c in keep or (c.isprintable() and c not in INVISIBLE)
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def without_tokens(text: str) -> str:
    """`text` with everything that is, or looks like, an access token of the Hub taken out."""
    for name in TOKEN_VARIABLES:
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "<TOKEN>")
    text = re.sub(r"\bhf_(?:oauth|jwt)_[\w.-]{8,}|\bhf_[A-Za-z0-9]{8,}", "<TOKEN>", text)
    text = re.sub(r"(\w://)[^\s/@]+@", r"\1<TOKEN>@", text)
    return re.sub(r"(\w://[^\s?'\"]+\?)[^\s'\"]+", r"\1…", text)  # a signed address is a key, too


class Problem(str):
    """One thing that is wrong with an input: a sentence for people, and a constant code for programs."""

    code: str  # in kebab-case, never derived from the sentence

    def __new__(cls, text: str, code: str = "malformed") -> Problem:
        problem = super().__new__(cls, text)
        problem.code = code
        return problem


def code_of(problem: str, default: str = "malformed") -> str:
    """The code of a problem; `default` for one that is a sentence alone."""
    return getattr(problem, "code", default)


def folded(problems: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Problems, those that say the same of several modules, tensors or files as one; each with the names it is said of.

    `model.layers.0.mlp: lora_B is missing` and 223 like it become `224 modules: lora_B is missing (model.layers.0.mlp,
    … and 221 more)`. Names within a sentence may differ in the subject's own name and in the numbers of layers.
    What is told as one has one code, and keeps it.
    """
    groups: dict[tuple[str, str, str], list[re.Match[str]]] = {}
    for problem in problems:
        match = re.fullmatch(SUBJECT, problem) or re.fullmatch(ALONE, problem)
        assert match is not None
        name, said = match["name"] or "", match["said"]
        like = re.sub(NUMBER, "*", said.replace(name, "…") if name else said)
        key = (match["whose"] or "", like if name else said, code_of(problem, ""))
        groups.setdefault(key, []).append(match)
    found: list[tuple[str, tuple[str, ...]]] = []
    for (whose, _, code), matches in groups.items():
        names = [match["name"] for match in matches if match["name"]]
        if len(set(names)) > MOST_NAMED:
            listed = f"{', '.join(names[:MOST_NAMED])} and {len(names) - MOST_NAMED} more"
            many = f"{sum(map(stands_for, names))} {kind_of(names)}"
            text = f"{whose}{many}: {matches[0]['said']} ({listed})"
            found.append((Problem(text, code) if code else text, tuple(names)))
        else:
            found += [(match.string, (match["name"],) if match["name"] else ()) for match in matches]
    return found


def stands_for(name: str) -> int:
    """How many names one with ranges of layers in braces stands for: `layers.{0-5}.q` for six."""
    return math.prod(
        sum(int(last or first) - int(first) + 1 for first, last in re.findall(r"(\d+)(?:-(\d+))?", inside))
        for inside in re.findall(r"\{(\d[\d,-]*)\}", name)
    )


def kind_of(names: Iterable[str]) -> str:
    """What some names are names of."""
    ends = {name.rpartition(".")[2] for name in names}
    return "tensors" if ends <= TENSOR_ENDS else "files" if ends <= FILE_ENDS else "modules"


class LoratoolError(Exception):
    """One sentence that says what is wrong, and below it every problem of that input.

    `problems` are sentences too; each names the tensor or the field, what was found and what was
    wanted. Foreign text in either has been through `printable`.

    `hint` is the next command to type, `loratool …`; or the words that the same command needs besides, such as
    `--overwrite`. Where nothing was given, it is `next_step`, which the function or the command that failed adds, or
    what helps with most errors of this kind. `about` is the path or the place on the Hub that it was met in, as it was
    given; empty where it is of none, or of several.
    """

    code = "bug"  # for programs
    exit_code = 1
    about = ""
    next_step = ""  # by the operands of the call that failed
    usual_hint = "loratool --help"

    def __init__(self, message: str, problems: Iterable[str] = (), hint: str = "") -> None:
        self.message = message
        self.problems = tuple(problems)
        self.own_hint = as_typed(hint)
        super().__init__(message)

    @property
    def hint(self) -> str:
        """The next command to type."""
        return self.own_hint or self.next_step or self.usual_hint

    @hint.setter
    def hint(self, command: str) -> None:
        self.own_hint = command

    def __str__(self) -> str:
        every = [text for text, _ in folded(self.problems)]
        shown = every[:MOST_SHOWN]
        more = len(every) - len(shown)
        lines = [self.message, *(f"  {problem}" for problem in shown)]
        if more:
            lines.append(f"  … and {more} more")
        return escaped("\n".join(lines), keep="\n")


@contextmanager
def about(path: PathLike) -> Iterator[None]:
    """Errors within are about `path`; of several that enclose each other, the outermost is what was given."""
    try:
        yield
    except LoratoolError as error:
        error.about = os.fspath(path)
        raise


class UsageError(LoratoolError):
    """The call is wrong: an unknown value, conflicting options, or an output that already exists."""

    code = "wrong-usage"  # for programs
    exit_code = 2


class InputError(LoratoolError):
    """An input is malformed or not supported."""

    code = "unusable-input"  # for programs
    usual_hint = "loratool help operands"
    exit_code = 3


class FitError(LoratoolError):
    """The adapter does not fit the base, cannot be merged completely, or changes nothing."""

    code = "does-not-fit"  # for programs
    usual_hint = "loratool help operands"
    exit_code = 4


class VerificationError(LoratoolError):
    """A file differs from its record, or a merged model from the formula."""

    code = "not-verified"  # for programs
    usual_hint = "loratool help exit-codes"
    exit_code = 5


class StorageError(LoratoolError):
    """A disk or file-system error."""

    code = "storage"  # for programs
    usual_hint = "loratool help exit-codes"
    exit_code = 6


class HubError(LoratoolError):
    """The Hub is unreachable or refused the request."""

    code = "hub"  # for programs
    usual_hint = "loratool help hub"
    exit_code = 7


class StoreError(HubError):
    """An object store is unreachable or refused the request."""

    code = "store"  # for programs
