"""The types of the config's fields, as PEFT defines them: checked once, so that nothing else has to ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapters.formats.peft.files import AGAINST_TENSORS, CONFIG
from loratool.errors import Problem, printable

# Fields that more than one place reads, each with its type, and whether it may be a list of it; null is allowed for each.
# What one method alone reads, it checks itself.
TYPES: Mapping[str, tuple[type, bool, str]] = {
    "bias": (str, False, "text"),
    "exclude_modules": (str, True, "text or a list of texts"),
    "feedforward_modules": (str, True, "text or a list of texts"),
    "layers_pattern": (str, True, "text or a list of texts"),
    "layers_to_transform": (int, True, "a whole number or a list of them"),
    "modules_to_save": (str, True, "a list of texts"),
    "target_modules": (str, True, "text or a list of texts"),
    "target_parameters": (str, True, "a list of texts"),
}


def wrong_fields(config: Mapping[str, Any]) -> dict[str, Problem]:
    """Each field that holds a value of another type, with a sentence that says so."""
    return {
        name: Problem(f"{CONFIG}: {name} is {printable(repr(value))}; expected {wanted}", AGAINST_TENSORS)
        for name, (kind, listed, wanted) in TYPES.items()
        if (value := config.get(name)) is not None
        and any(type(each) is not kind for each in (value if listed and isinstance(value, list) else [value]))
    }
