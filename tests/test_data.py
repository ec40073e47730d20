"""`loratool.data.dataclass` makes what the standard library makes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from loratool import data

if TYPE_CHECKING:
    from collections.abc import Callable

    Decorator = Callable[..., Any]


def classes(dataclass: Decorator) -> dict[str, Any]:
    """The same classes, made by one decorator."""

    @dataclass(frozen=True)
    class Point:
        """A place."""

        shared: ClassVar[int] = 3
        x: int
        y: tuple[int, ...] = ()
        label: str = dataclasses.field(default="", compare=False)
        seen: list[int] = dataclasses.field(default_factory=list, repr=False, compare=False)

    @dataclass(frozen=True, kw_only=True)
    class Named(Point):
        name: str
        x: int = 7
        kept: dict[str, int] = dataclasses.field(default_factory=dict, init=False, compare=False)
        kind: str = dataclasses.field(default="named", init=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "label", f"{self.name}!")

    @dataclass
    class Counter:
        count: int = 0

    @dataclass(frozen=True)
    class OwnHash:
        value: int

        def __eq__(self, other: object) -> bool:
            return isinstance(other, OwnHash) and self.value % 10 == other.value % 10

        def __hash__(self) -> int:
            return self.value % 10

        def __repr__(self) -> str:
            return "own"

    @dataclass(frozen=True)
    class OwnEquality:
        value: int

        def __eq__(self, other: object) -> bool:
            return True

    @dataclass(frozen=True, eq=False, repr=False)
    class ByIdentity:
        value: object = None

    @dataclass(frozen=True)
    class Empty:
        pass

    return {name: kind for name, kind in locals().items() if isinstance(kind, type)}


OURS, THEIRS = classes(data.dataclass), classes(dataclasses.dataclass)
CALLS: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = (
    ("Point", (1,), {}),
    ("Point", (1, (2,), "a", [3]), {}),
    ("Point", (), {"x": 2, "label": "b"}),
    ("Point", (), {}),
    ("Point", (1, 2, 3, 4, 5), {}),
    ("Point", (1,), {"z": 1}),
    ("Named", (), {"name": "n"}),
    ("Named", (), {"name": "n", "kind": "other"}),
    ("Named", ("n",), {}),
    ("Counter", (), {}),
    ("Counter", (5,), {}),
    ("OwnHash", (12,), {}),
    ("OwnEquality", (12,), {}),
    ("ByIdentity", (), {}),
    ("Empty", (), {}),
)


def outcome(make: Callable[[], Any]) -> Any:
    """The value, or the error with its text."""
    try:
        return make()
    except (TypeError, AttributeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize(("name", "positional", "keywords"), CALLS)
def test_instances_print_hash_compare_and_refuse_as_the_standard_librarys(
    name: str, positional: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    def seen(kind: Any) -> list[Any]:
        one, other = (outcome(lambda: kind(*positional, **keywords)) for _ in range(2))
        if not isinstance(one, kind):
            return [one]
        changed = outcome(lambda: dataclasses.replace(one, **{field.name: 9 for field in dataclasses.fields(one)[:1]}))
        return [
            repr(one) if name != "ByIdentity" else "",
            vars(one) | {"value": None},
            one == other,
            one == object(),
            outcome(lambda: hash(one)) == outcome(lambda: hash(other)) if name != "Counter" else kind.__hash__,
            one == changed,
            copy.copy(one) == one,
            outcome(lambda: setattr(one, "more", 1)),
            outcome(lambda: setattr(one, "value", 1)),
            outcome(lambda: delattr(one, "x")),
            dataclasses.asdict(one),
        ]

    assert seen(OURS[name]) == seen(THEIRS[name])


@pytest.mark.parametrize("name", OURS)
def test_classes_have_the_fields_and_signatures_of_the_standard_librarys(name: str) -> None:
    def seen(kind: Any) -> list[Any]:
        every = [(f.name, f.type, f.init, f.repr, f.compare, f.kw_only, f.default) for f in dataclasses.fields(kind)]
        return [every, str(inspect.signature(kind)), kind.__match_args__, kind.__init__.__qualname__]

    assert seen(OURS[name]) == seen(THEIRS[name])


def test_a_plain_class_derived_from_a_frozen_one_may_have_more_but_not_change_its_fields() -> None:
    for kind in (OURS["Point"], THEIRS["Point"]):
        derived = type("Derived", (kind,), {})(1)
        derived.more = 2
        assert (derived.more, derived.x) == (2, 1)
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'x'"):
            derived.x = 2


def test_values_that_functions_make_are_not_shared() -> None:
    point = OURS["Point"]
    assert point(1).seen is not point(1).seen


@data.dataclass(frozen=True)
class Kept:
    """Of the module, so that pickle finds it."""

    value: int
    within: Kept | None = None


def test_instances_survive_pickling_and_one_that_holds_itself_prints() -> None:
    kept = Kept(1, Kept(2))
    assert pickle.loads(pickle.dumps(kept)) == kept
    assert repr(kept) == "Kept(value=1, within=Kept(value=2, within=None))"
    object.__setattr__(kept, "within", kept)
    assert repr(kept) == "Kept(value=1, within=...)"


def test_a_missing_docstring_is_filled_so_that_no_signature_is_computed() -> None:
    assert OURS["Empty"].__doc__ == "Empty()"
    assert OURS["Counter"].__doc__ == "Counter(count)"
