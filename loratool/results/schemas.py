"""JSON Schemas of what commands print with `--json`, made of the types of their results.

A dataclass is an object with all of its fields, described by its docstring and the comments behind its fields. Packages
that do the same want models of their own in the place of dataclasses, and know no comments.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import pkgutil
import re
import sys
import tokenize
import types
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict

from loratool import results
from loratool.notes import Note
from loratool.results.base import SCHEMA, Result
from loratool.results.failure import ErrorTable
from loratool.results.push import PushReport

DRAFT = "https://json-schema.org/draft/2020-12/schema"
SIMPLE: Mapping[Any, dict[str, Any]] = {
    str: {"type": "string"},
    Path: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
    Any: {},
    object: {},
}


def schema_of(command: str, kinds: Sequence[Any]) -> dict[str, Any]:
    """The schema of what `loratool COMMAND --json` prints, which is of one of these types, or an error."""
    definitions: dict[str, Any] = {}
    tops = [top_level(kind, definitions) for kind in (*kinds, ErrorTable)]
    return {
        "$schema": DRAFT,
        "title": f"loratool {command} --json",
        "anyOf": tops,
        "$defs": dict(sorted(definitions.items())),
    }


def top_level(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """An object that is printed: with the number of the schema, and what was said of operands."""
    found = object_of(kind, definitions)
    number = {"const": SCHEMA, "description": "Fields may be added without another number."}
    said = {
        "description": "How operands were read that were typed as something else.",
        **kind_of(list[Note], definitions),
    }
    found["properties"] = {"schema": number, **found["properties"], "operands": said}
    return {**found, "required": ["schema", *found["required"]]}


def object_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """A dataclass or a typed dictionary: all of its fields are there, and no others."""
    comments = {name: text for owner in reversed(kind.__mro__) for name, text in comments_in(owner).items()}
    properties = {}
    for name, field in fields_of(kind).items():
        about = {"description": comments[name]} if name in comments else {}
        properties[name] = {**about, **kind_of(field, definitions)}
    about = {"description": sentence} if (sentence := first_sentence(kind)) else {}
    return {
        **about,
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def first_sentence(kind: Any) -> str:
    text = " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())
    return "" if text.startswith(f"{kind.__name__}(") else text


def fields_of(kind: Any) -> dict[str, Any]:
    """Field → its type, in the order in which they are printed; what a class prints besides is its `Besides`."""
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None
    hints: dict[str, Any] = {}
    for owner in reversed(kind.__mro__):
        for name, said in vars(owner).get("__annotations__", {}).items():
            hints[name] = evaluated(said, owner)
    found = {name: hints[name] for name in names or hints}
    besides = getattr(kind, "Besides", None)
    return {**found, **(fields_of(besides) if besides else {})}


def evaluated(said: Any, owner: Any) -> Any:
    """The type that an annotation is the text of."""
    text = getattr(said, "__forward_arg__", said)
    if not isinstance(text, str):
        return said
    return eval(text, {**known(), **vars(sys.modules[owner.__module__])})  # noqa: S307 (our own source)


@cache
def known() -> dict[str, Any]:
    """Every name in the modules of results: some are imported there for type checkers alone."""
    modules = [import_module(f"{results.__name__}.{each.name}") for each in pkgutil.iter_modules(results.__path__)]
    return {name: value for module in modules for name, value in vars(module).items() if not name.startswith("__")}


def kind_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value of some type; objects are put into `definitions`."""
    kind = PushReport if kind is Result else kind  # of a push; the module of results in general knows none of them
    if kind in SIMPLE:
        return dict(SIMPLE[kind])
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": [*inner]}
    if origin in (Union, types.UnionType):
        return any_of([kind_of(each, definitions) for each in inner])
    if origin is tuple and inner[-1] is not Ellipsis:
        return {
            "type": "array",
            "prefixItems": [kind_of(each, definitions) for each in inner],
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": kind_of(inner[1], definitions)}
    if isinstance(origin, type) and issubclass(origin, Collection):
        return {"type": "array", "items": kind_of(inner[0], definitions)}
    if not (dataclasses.is_dataclass(kind) or is_typeddict(kind)):
        raise TypeError(f"{kind!r} has no JSON Schema")
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # which ends a circle
        definitions[name] = object_of(kind, definitions)
    return {"$ref": f"#/$defs/{name}"}


def any_of(kinds: list[dict[str, Any]]) -> dict[str, Any]:
    """One of several; types that are nothing but a word are put together."""
    plain = [each["type"] for each in kinds if each.keys() == {"type"}]
    rest = [each for each in kinds if each.keys() != {"type"}]
    if not rest:
        return {"type": plain}
    return {"anyOf": [*rest, *({"type": each} for each in plain)]}


@cache
def comments_in(kind: Any) -> dict[str, str]:
    """Field → the comment behind it, as a sentence."""
    if kind.__module__ in ("builtins", "typing"):
        return {}
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # installed without sources
        return {}
    found: dict[str, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := re.match(r"\s+(\w+): ", token.line)):
            text = token.string.lstrip("# ").strip()
            found[match[1]] = f"{text[:1].upper()}{text[1:]}."
    return found
