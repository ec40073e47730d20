"""The types of the config's fields, as PEFT defines them: checked once, so that nothing else has to ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loratool.adapters.formats.peft.files import AGAINST_TENSORS, CONFIG
from loratool.errors import Problem, printable


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def is_text_or_list(value: object) -> bool:
    return is_text(value) or is_list_of_texts(value)


def is_number_or_list(value: object) -> bool:
    return all(type(each) is int for each in (value if isinstance(value, list) else [value]))


# Fields that more than one place reads; null is allowed for each. What one method alone reads, it checks itself.
TYPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "bias": (is_text, "text"),
    "exclude_modules": (is_text_or_list, "text or a list of texts"),
    "feedforward_modules": (is_text_or_list, "text or a list of texts"),
    "layers_pattern": (is_text_or_list, "text or a list of texts"),
    "layers_to_transform": (is_number_or_list, "a whole number or a list of them"),
    "modules_to_save": (is_text_or_list, "a list of texts"),
    "target_modules": (is_text_or_list, "text or a list of texts"),
    "target_parameters": (is_text_or_list, "a list of texts"),
}


def wrong_fields(config: Mapping[str, Any]) -> dict[str, Problem]:
    """Each field that holds a value of another type, with a sentence that says so."""
    return {
        name: Problem(f"{CONFIG}: {name} is {printable(repr(config[name]))}; expected {wanted}", AGAINST_TENSORS)
        for name, (fits, wanted) in TYPES.items()
        if config.get(name) is not None and not fits(config[name])
    }
