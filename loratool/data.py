"""`dataclass`, as in the standard library, at a quarter of the time that it takes to make a class.

The standard library compiles up to six methods of each class. A start makes hundreds of classes, which took longer than a
small merge. Here only `__init__` is compiled, which is called often. The other methods are closures over the names of the
fields. Fields, defaults and inheritance are the standard library's work, and type checkers see its `dataclass`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, fields
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(kind=None, /, *, frozen=False, eq=True, repr=True, kw_only=False):
        """A class with fields. The options mean what they mean in the standard library; for others use that."""
        if kind is None:
            return lambda kind: dataclass(kind, frozen=frozen, eq=eq, repr=repr, kw_only=kw_only)
        own = dict(vars(kind))
        kind.__doc__ = kind.__doc__ or f"{kind.__name__}({', '.join(own.get('__annotations__', ()))})"
        dataclasses.dataclass(kind, init=False, eq=False, repr=False, kw_only=kw_only)
        methods = [constructor(kind, frozen)]
        if repr:
            methods.append(representation(kind))
        if eq:
            equal, hashed = comparison(kind)
            methods.append(equal)
            if "__hash__" not in own or (own["__hash__"] is None and "__eq__" in own):
                kind.__hash__ = named(hashed, kind) if frozen else None
        for method in methods:
            if method.__name__ not in own:
                setattr(kind, method.__name__, named(method, kind))
        for method in refusals(kind) if frozen else ():
            setattr(kind, method.__name__, named(method, kind))
        return kind


Method = Callable[..., Any]


class MadeAnew:
    """The default of a parameter that a function makes a value for."""

    def __repr__(self) -> str:
        return "<factory>"


def named(method: Method, kind: type) -> Method:
    """The method, which messages call by its class."""
    method.__qualname__ = f"{kind.__qualname__}.{method.__name__}"
    return method


def constructor(kind: Any, frozen: bool) -> Method:
    """`__init__`, with a line for each field."""
    known: dict[str, Any] = {"_made_anew": MadeAnew(), "_set": object.__setattr__}
    in_order, by_name, body = ["self"], ["*"], list[str]()
    for field in fields(kind):
        name, value, default = field.name, field.name, ""
        if field.default_factory is not MISSING:
            known[f"_make_{name}"], default = field.default_factory, "=_made_anew"
            value = f"_make_{name}() if {name} is _made_anew else {name}" if field.init else f"_make_{name}()"
        elif field.default is not MISSING:
            known[f"_default_{name}"], default = field.default, f"=_default_{name}"
        if field.init:
            (by_name if field.kw_only else in_order).append(name + default)
        if field.init or field.default_factory is not MISSING:
            body.append(f"_set(self, {name!r}, {value})" if frozen else f"self.{name} = {value}")
    if hasattr(kind, "__post_init__"):
        body.append("self.__post_init__()")
    parameters = ", ".join(in_order + by_name if len(by_name) > 1 else in_order)
    exec(f"def __init__({parameters}):\n " + "\n ".join(body or ["pass"]), known)  # noqa: S102 (of our own classes)
    made: Method = known["__init__"]
    made.__annotations__ = {**{field.name: field.type for field in fields(kind) if field.init}, "return": None}
    return made


def representation(kind: Any) -> Method:
    names = [field.name for field in fields(kind) if field.repr]

    @recursive_repr()
    def __repr__(self: Any) -> str:  # noqa: N807
        return f"{self.__class__.__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    return __repr__


def comparison(kind: Any) -> tuple[Method, Method]:
    """`__eq__` and `__hash__`, of the fields that count."""
    names = [field.name for field in fields(kind) if field.compare]
    values: Method = attrgetter(*names) if len(names) > 1 else lambda one: tuple(getattr(one, n) for n in names)

    def __eq__(self: Any, other: object) -> bool:  # noqa: N807
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: Any) -> int:  # noqa: N807
        return hash(values(self))

    return __eq__, __hash__


def refusals(kind: Any) -> tuple[Method, Method]:
    """`__setattr__` and `__delattr__` of instances that do not change; a class derived from this one may have more."""
    names = {field.name for field in fields(kind)}

    def __setattr__(self: Any, name: str, value: object) -> None:  # noqa: N807
        if type(self) is kind or name in names:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super(kind, self).__setattr__(name, value)

    def __delattr__(self: Any, name: str) -> None:  # noqa: N807
        if type(self) is kind or name in names:
            raise FrozenInstanceError(f"cannot delete field {name!r}")
        super(kind, self).__delattr__(name)

    return __setattr__, __delattr__
