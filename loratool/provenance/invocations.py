"""The run that made an output, as `loratool.json` holds it: for people as a command line, for programs as keywords."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from loratool.arguments import PathLike
from loratool.errors import escaped
from loratool.options.described import Options, place_word

OUT = "out"


def invocation(name: str, inputs: Sequence[PathLike], options: Options, out: bool = True) -> dict[str, Any]:
    """The entries "command", "operands" and "options" of a record: `name` on these inputs, with these options.

    `loratool reproduce` calls the library with the operands and the options; the command line says the same.
    """
    from loratool.provenance.secrets import without_secrets

    words = without_secrets(json.dumps({"operands": [*map(place_word, inputs)], "options": options.keywords()}))
    return {"command": command(name, inputs, options, out), **json.loads(words)}


def command(name: str, inputs: Sequence[PathLike], options: Options, out: bool = True) -> str:
    """The command line that repeats a run: `name` on these inputs, with these options.

    Inputs from the Hub are named with their commit, local ones by their last name: a card tells nobody's folders.
    """
    words = [
        "loratool",
        name,
        *(escaped(place_word(each)) for each in inputs),
        *options.words(),
        *(("-o", OUT) if out else ()),
    ]
    from loratool.provenance.secrets import without_secrets

    return without_secrets(shlex.join(words))
