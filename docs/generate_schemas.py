"""Write docs/schemas/, the JSON Schema of what each command prints with --json, from the types of its results.

python docs/generate_schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path

from loratool.cli import COMMANDS, command
from loratool.cli.schemas import schema_of_command

FOLDER = Path(__file__).with_name("schemas")


def pages() -> dict[str, str]:
    """The text of each schema by the name of its file."""
    every = {name: schema_of_command(name, command(name)) for name in COMMANDS}
    return {f"{name}.schema.json": json.dumps(s, indent=2, ensure_ascii=False) + "\n" for name, s in every.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
