"""The commands that make something, as records and manifests name them: their functions, operands and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.options.described import Options, PathKind, described_by


@dataclass(frozen=True)
class Maker:
    """A command that makes an output of inputs. A last operand with a star takes all inputs that are left."""

    function: Callable[..., Any]  # of the library; its arguments are the operands, `out` and options as keywords
    operands: tuple[str, ...]
    options: type[Options]

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

    @property
    def paths(self) -> frozenset[str]:
        """The options that name files which do not lie in an input's folder."""
        every = described_by(self.options).items()
        return frozenset(n for n, (o, _) in every if isinstance(o.kind, PathKind) and not o.kind.beside)


Makers = Mapping[str, Maker]
