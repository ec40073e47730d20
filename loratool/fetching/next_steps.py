"""The next command to type after an error, from the command that failed and its operands."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from loratool.errors import (
    FitError,
    HubError,
    InputError,
    LoratoolError,
    StorageError,
    UsageError,
    VerificationError,
)
from loratool.fetching.operands import Operand, is_list, kind_of, proposals
from loratool.files.system import shell_line

REPEATED = ("--from",)  # options of which one more value is meant; of any other the value that was typed will not do
FOR_PROGRAMS = ("--json", "-q", "--quiet")  # words that a command to be typed by a person does without


def typed(*words: str) -> str:
    """`loratool WORDS` as it is typed into the shell of this system."""
    return shell_line(["loratool", *(word for word in words if word not in FOR_PROGRAMS)])


def in_full(hint: str, arguments: Sequence[str]) -> str:
    """The hint of an error; the whole command where it is only words that were missing from it."""
    flag, space, _ = hint.partition(" ")
    if space and hint.startswith("-") and flag not in REPEATED:
        arguments = without_option(arguments, {flag, "--output"} if flag == "-o" else {flag})
    return f"{typed(*arguments)} {hint}" if hint.startswith("-") else hint


def without_option(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """The words of a command without an option and its value."""
    at = next((at for at, word in enumerate(arguments) if word.partition("=")[0] in flags), len(arguments))
    return [*arguments[:at], *arguments[at + (1 if "=" in "".join(arguments[at : at + 1]) else 2) :]]


def alone(arguments: Sequence[str], out: str, adapters: Sequence[str], first: Sequence[str]) -> list[str]:
    """The words of a merge of several outputs for one of them alone.

    Args:
        arguments: as they were typed, `--also` among them.
        out: the output.
        adapters: its own.
        first: those of the output that `-o` names, whose place the own ones take.

    Returns:
        The words; `arguments` where the adapters of `-o` are not found in them.
    """
    words = without_option(arguments, {"-o", "--output"})
    while len(fewer := without_option(words, {"--also"})) < len(words):
        words = fewer
    places = [at for at, word in enumerate(words) if any(same_path(word, each) for each in first)]
    if not places:
        return [*arguments]
    rest = [word for at, word in enumerate(words) if at not in places]
    return [*rest[: places[0]], *adapters, *rest[places[0] :], "-o", out]


def next_step(error: LoratoolError, arguments: Sequence[str], operands: Sequence[Operand] = ()) -> str:
    """The command to type after an error: its own hint in full, a proposal for an operand, or what shows more."""
    if error.own_hint:
        return in_full(error.own_hint, arguments)
    if isinstance(error, (InputError, HubError)):
        lists = [operand.word for operand in operands if is_list(operand.word)]
        if lists and arguments[0] == "inspect":
            return typed(*(word for word in arguments if word not in lists), "--from-file", lists[0])
        for operand in operands:
            if is_concerned(operand, error) and (proposed := again_with(operand, arguments)):
                return proposed
    return usual_step(error, arguments, operands)


def is_concerned(operand: Operand, error: LoratoolError) -> bool:
    """Whether an error is about an operand; one that is about nothing may be about what is not here."""
    return same_path(error.about, operand.word) if error.about else not os.path.lexists(operand.word)


def again_with(operand: Operand, arguments: Sequence[str]) -> str:
    """The same command with what may have been meant by an operand; empty where nothing is near."""
    found = proposals(operand)
    at = next((at for at, word in enumerate(arguments) if same_path(word, operand.word)), None)
    if not found or at is None:
        return ""
    return typed(*arguments[:at], found[0], *arguments[at + 1 :])


def same_path(one: str, other: str) -> bool:
    return one == other or os.path.abspath(os.path.expanduser(one)) == os.path.abspath(os.path.expanduser(other))


def usual_step(error: LoratoolError, arguments: Sequence[str], operands: Sequence[Operand]) -> str:
    """What shows more about an error of this kind."""
    command = arguments[0] if arguments else ""
    models = [operand.word for operand in operands if operand.role == "model"]
    adapters = [operand.word for operand in operands if operand.role == "adapter"]
    if isinstance(error, FitError):
        concerned = [word for word in adapters if error.about and same_path(word, error.about)]
        about = (concerned + adapters + models + [operand.word for operand in operands])[:1]
        together = models and adapters and not error.about  # else it is of another model altogether
        return typed("inspect", *about, *(["--base", models[-1]] if together else ()))
    if isinstance(error, InputError):
        about = [each.word for each in operands if is_concerned(each, error) and each.kind]
        if about and command != "inspect" and not any(each.is_wrong for each in operands):
            return typed("inspect", about[0], "--check")
        if adapters and not error.about and all(kind_of(adapter) == "adapter" for adapter in adapters):
            return f"loratool {command} --help"  # they can be read: an option is missing or wrong
        return "loratool help operands"
    if isinstance(error, VerificationError):
        return "" if command == "verify" else "loratool help exit-codes"
    if isinstance(error, HubError):
        from loratool.fetching.client import is_offline  # here, as the client is needed by few commands

        if is_offline():
            return "loratool help hub"
    if isinstance(error, (StorageError, HubError)):  # once what is in the way is gone
        return typed(*arguments)
    if isinstance(error, UsageError):
        return f"loratool {command} --help"
    return f"{typed(*arguments)} -v"
