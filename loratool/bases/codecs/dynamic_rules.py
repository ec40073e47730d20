"""`dynamic`, GPTQModel's rules for single modules: a pattern and what it changes, the first that matches counting.

A key is a regular expression that is matched from the start of a module's name (`re.match`). With `-:` before it, the
module is not quantised; with `+:` or nothing, its value replaces entries such as `bits` and `group_size`. GPTQModel
sorts the rules with `-:` to the front; vLLM goes through them in the order of the file, and asks with the names of the
layers that it has fused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from loratool.adapters.patterns import search_names
from loratool.bases.codecs.parts import Finder, shown
from loratool.errors import InputError

Found = TypeVar("Found")
NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")


def settings_by_module(
    modules: Collection[str], said: Mapping[str, Any], finder: Finder, read: Callable[[Mapping[str, Any]], Found]
) -> dict[str, Found]:
    """Module → what `read` makes of the entries that count for it; `ValueError` of `read` says what is unknown.

    What is wrong with single modules is noted. Raises `InputError` for entries that no module can be read with.
    """
    base = finder.base.name
    try:
        common = read(said)
        rules = rules_for(modules, said.get("dynamic") or {})
    except ValueError as error:
        raise InputError(f"{base}: its packed weights cannot be read: {error}") from None
    found: dict[str, Found] = {}
    for module in modules:
        rule, change = rules.get(module, ("", {}))
        if is_negative(rule):
            finder.note(f"{module}.qweight", f"is packed, but the rule {shown(rule)} says that it is not quantised")
            continue
        try:
            found[module] = read({**said, **change}) if change else common
        except ValueError as error:
            finder.note(module, f"the rule {shown(rule)} applies, and {error}")
    return found


def rules_for(modules: Collection[str], dynamic: object) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Module → the rule that counts for it and what the rule changes; nothing for a module without a rule.

    Raises `ValueError` for rules that cannot be read.
    """
    if not isinstance(dynamic, Mapping) or not all(isinstance(change or {}, Mapping) for change in dynamic.values()):
        raise ValueError("dynamic must be an object of objects")
    patterns = {rule: rule.removeprefix("-:").removeprefix("+:") for rule in dynamic}
    matches = search_names(patterns.values(), modules, "^(?:{})")
    in_order = sorted(dynamic, key=lambda rule: not is_negative(rule))
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for module, matching in matches.items():
        if rule := next((rule for rule in in_order if patterns[rule] in matching), ""):
            found[module] = rule, dynamic[rule] or {}
    return found


def is_negative(rule: str) -> bool:
    """Whether modules that a rule matches are not quantised."""
    return rule.startswith("-:")


def with_plain(dynamic: object, plain: Sequence[str], packed: Collection[str]) -> dict[str, Any]:
    """The rules with rules for plain modules before them. `packed` are the modules that stay packed."""
    new: dict[str, Any] = {f"-:{pattern}": {} for pattern in patterns_of(plain, packed)}
    own = dynamic if isinstance(dynamic, Mapping) else {}
    return new | {rule: change for rule, change in own.items() if rule not in new}


def patterns_of(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Patterns that match all of some names, and none of the others.

    A pattern has any number in place of a name's numbers; where such a pattern would match one of the others, it keeps
    the first number, which is the layer's; or else it is the name.
    """
    taken = [{loosened(other, kept) for other in others} for kept in (0, 1)]
    found: dict[str, None] = {}
    for name in names:
        loose = next((p for kept in (0, 1) if (p := loosened(name, kept)) not in taken[kept]), f"^{re.escape(name)}$")
        found[loose] = None
    return [*found]


def loosened(name: str, kept: int) -> str:
    """A pattern for a name that has any number in place of all numbers but the first ones."""
    numbers = NUMBER.findall(name)
    follow = [*numbers[:kept], *[r"\d+"] * len(numbers[kept:]), ""]
    pieces = (re.escape(piece) + after for piece, after in zip(NUMBER.split(name), follow, strict=True))
    return f"^{''.join(pieces)}$"
