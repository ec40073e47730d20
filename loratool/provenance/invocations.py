"""The run that made an output, as `loratool.json` holds it: for people as a command line, for programs as keywords."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from loratool.arguments import PathLike
from loratool.options.described import Options, place_word
from loratool.provenance.cards import command


def invocation(name: str, inputs: Sequence[PathLike], options: Options, out: bool = True) -> dict[str, Any]:
    """The entries "command", "operands" and "options" of a record: `name` on these inputs, with these options.

    `loratool reproduce` calls the library with the operands and the options; the command line says the same.
    """
    from loratool.provenance.secrets import without_secrets

    words = without_secrets(json.dumps({"operands": [*map(place_word, inputs)], "options": options.keywords()}))
    return {"command": command(name, inputs, options, out), **json.loads(words)}
