"""An error as `--json` prints it."""

from __future__ import annotations

from typing import TypedDict

from loratool.errors import LoratoolError, code_of, escaped


class ErrorProblem(TypedDict):
    """One thing that is wrong with an input."""

    code: str
    text: str


class ErrorData(TypedDict):
    """What went wrong. Codes are constants; docs/codes.md has all of them."""

    code: str
    exit_code: int
    message: str
    problems: list[ErrorProblem]
    hint: str  # the next command to type; empty where there is none


class ErrorTable(TypedDict):
    """What any command prints with `--json` in the place of its result."""

    error: ErrorData


def error_data(error: LoratoolError, hint: str) -> ErrorData:
    """An error as data; `hint` is the whole command to type next."""
    return {
        "code": error.code,
        "exit_code": error.exit_code,
        "message": error.message,
        "problems": [{"code": code_of(problem, error.code), "text": str(problem)} for problem in error.problems],
        "hint": escaped(hint),
    }
