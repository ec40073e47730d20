"""What `help` and `completion` print."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.results.base import Result


@dataclass(frozen=True, repr=False)
class HelpText(Result):
    """A topic, or a command's help."""

    topic: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, repr=False)
class CompletionScript(Result):
    """What a shell reads to complete words."""

    shell: str
    script: str

    def __str__(self) -> str:
        return self.script
