"""The commands that make something, as records and manifests name them: their functions, operands and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.options.described import Options, PathKind, PlaceKind, described_by


@dataclass(frozen=True)
class Maker:
    """A command that makes an output of inputs. A last operand with a star takes all inputs that are left."""

    function: Callable[..., Any]  # of the library; its arguments are the operands, `out` and options as keywords
    operands: tuple[str, ...]
    options: type[Options]
    words: frozenset[str] = frozenset()  # operands that are names, not inputs
    listed: Callable[[Sequence[Any]], Sequence[Any]] = list  # the inputs as a record has them, of those that were given

    def arguments(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The inputs as arguments of the function."""
        found: dict[str, Any] = {}
        for number, name in enumerate(self.operands):
            if name.endswith("*"):
                found[name[:-1]] = [*inputs[number:]]
            elif number < len(inputs):
                found[name] = inputs[number]
        return found

    @property
    def recorded(self) -> frozenset[str]:
        """The options on which the output depends, by keyword."""
        return frozenset(name for name, (described, _) in described_by(self.options).items() if described.recorded)

    def is_word(self, number: int) -> bool:
        """Whether an operand, counted from 0, is a name and not an input."""
        return number < len(self.operands) and self.operands[number] in self.words

    def places(self, operands: Sequence[Any]) -> list[Any]:
        """Those operands that are inputs."""
        return [each for number, each in enumerate(operands) if not self.is_word(number)]

    @property
    def models(self) -> frozenset[str]:
        """The options that name models."""
        return frozenset(n for n, (o, _) in described_by(self.options).items() if isinstance(o.kind, PlaceKind))

    @property
    def paths(self) -> frozenset[str]:
        """The options that name files or models which do not lie in an input's folder."""
        every = described_by(self.options).items()
        return frozenset(n for n, (o, _) in every if isinstance(o.kind, PathKind) and not o.kind.beside)


Makers = Mapping[str, Maker]
