"""An adapter in the making: what was understood, and everything that was not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loratool.adapters.adapter import FACTOR_NAMES, INTEGER_NAMES, WHOLE_NAMES, StoredTensor, is_scale
from loratool.adapters.formats.found import MISSING_PARTNER, Found
from loratool.adapters.formats.peft import keys
from loratool.adapters.formats.peft.files import AGAINST_TENSORS, CONFIG
from loratool.algebra.updates.additive import Add
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.errors import Problem, printable
from loratool.files.safefile import FLOAT_NAMES
from loratool.notes import Note
from loratool.templates import some

TOKENS = keys.TOKENS
LEFT_BEHIND = frozenset({"trainable_tokens_original"})  # beside it in a raw state dict
WHOLE = (*FLOAT_NAMES, *WHOLE_NAMES)  # what may be saved whole, a count of batches say
SHARDED = "an empty or flat tensor is a shard that ZeRO-3 or FSDP did not gather before saving"

SAVED_TWICE, UNGATHERED = "saved-twice", "ungathered"  # codes of problems


class UnusableError(Exception):
    """One thing that is wrong with an adapter; its arguments are those of the `Problem`."""


class UnsupportedError(Exception):
    """One thing that is recognised and not merged."""


@dataclass(frozen=True)
class Saved:
    """A tensor that is saved whole."""

    name: str
    wrapper: str  # what it stood in, `base_layer` say; empty for nothing


@dataclass
class Module:
    """The tensors of a method on one module of the model."""

    draft: Draft
    path: str  # with `base_layer` where PEFT wrapped a wrapper
    slots: dict[str, str] = field(default_factory=dict)  # slot → tensor

    @cached_property
    def name(self) -> str:
        """The module as the model called it, once all tensors of the file are known."""
        return self.draft.paths.plain(self.path)

    @property
    def shown(self) -> str:
        return printable(self.name)

    def __contains__(self, slot: object) -> bool:
        return slot in self.slots

    def tensor(
        self, slot: str, dimensions: Collection[int] = (2,), dtypes: Collection[str] = tuple(FACTOR_NAMES)
    ) -> Any:
        """The tensor of a slot, in any of some numbers of dimensions; raises `UnusableError` where it is none."""
        if slot not in self.slots:
            there = ", ".join(printable(tensor) for tensor in self.slots.values())
            raise UnusableError(f"{self.shown}: {slot} is missing (found only {there})", MISSING_PARTNER)
        return self.draft.stored(self.slots[slot], dimensions, dtypes)

    def shape(self, slot: str) -> tuple[int, ...]:
        """That of the tensor of a slot, whatever it is."""
        return self.draft.file.tensors[self.slots[slot]].shape

    def indices(self, slot: str, dimensions: Collection[int]) -> Any:
        return self.tensor(slot, dimensions, (*INTEGER_NAMES, *FACTOR_NAMES))

    def require(self, condition: bool, what: str, code: str = "malformed") -> None:
        if not condition:
            raise UnusableError(f"{self.shown}: {what}", code)

    def agree(self, condition: bool, what: str) -> None:
        """As `require`, of what the config says of the tensors."""
        self.require(condition, what, AGAINST_TENSORS)


@dataclass
class Draft(Found):
    """What is read of an adapter's file, under its config."""

    config: Mapping[str, Any] = field(kw_only=True)
    packing: str = ""  # how factors are packed, where not as PEFT packs them
    where: str = CONFIG  # what holds the config, for messages
    modules: dict[str, Module] = field(default_factory=dict)  # path → what a method has on it
    saved: dict[str, Saved] = field(default_factory=dict)  # target → tensor
    bases: dict[str, Replace] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)
    copies: dict[str, list[str]] = field(default_factory=dict)  # module → factors of PEFT's copies of it
    paths: keys.Paths = field(default_factory=lambda: keys.Paths(frozenset(), (), False))

    def sort(self, kind: str, slots: Collection[str], ignored: Collection[str]) -> None:
        """Put every tensor where it belongs: to its module, with those saved whole, or with those that nobody knows."""
        known = {*slots, *ignored, TOKENS, *LEFT_BEHIND}
        found = {name: keys.split(name, known) for name in self.file.tensors}
        self.paths = keys.Paths.of([key for key in found.values() if key], self.config)
        tell_spelling(self, known)
        passed_over: list[str] = []
        for name, key in found.items():
            path = ".".join(keys.path_of(name))
            if self.is_whole(path, key):
                self.keep(name, path, passed_over)
            elif key is None:
                self.unused.append(name)
            elif key.slot.removesuffix(".bias") in {*ignored, *LEFT_BEHIND}:
                passed_over.append(name)
            elif key.slot and (original := self.paths.copied(key.module)):
                self.copies.setdefault(original, []).append(name)
            elif key.slot:
                self.assign(name, key)
            elif family := keys.family_of(path):
                self.stray(name, family, kind)
            else:
                self.keep(name, path, passed_over)
        self.tell_copies()
        if passed_over:
            shown = some(passed_over, 1)
            self.notes.append(
                Note("training-only-tensors", f"left out (used only in training, or a second copy): {shown}")
            )

    def is_whole(self, path: str, key: keys.Key | None) -> bool:
        """Whether a tensor is saved whole though its module's name, or one around it, is spelled as PEFT's tensors are."""
        if key is None or not key.slot:
            return bool(keys.family_of(path)) and self.paths.is_saved(path)
        module = path.rpartition(".")[0]
        if module.endswith(self.paths.saved) and not module.endswith(key.slot.removesuffix(".bias")):
            return True
        return self.paths.biases and key.slot.endswith(".bias") and key.module not in self.paths.adapted

    def assign(self, name: str, key: keys.Key) -> None:
        """Give a factor to its module."""
        module = self.modules.setdefault(key.module, Module(self, key.module))
        if key.slot in module.slots:
            both = f"{printable(module.slots[key.slot])} and {printable(name)}"
            self.refuse(module.name, f"{both} are two spellings of the same factor", SAVED_TWICE)
        module.slots[key.slot] = name

    def tell_copies(self) -> None:
        """Refuse to merge modules of whose factors there are several copies: which one was at work, nothing says."""
        for module, names in self.copies.items():
            self.unsupported.append(
                f"LoRA on {printable(module)}, which is also saved whole: the file contains {len(names)} more factors "
                f"for it, in PEFT's own copies of the module ({', '.join(map(printable, names[:2]))}, …), and it does "
                "not record which of them the model ran with; PEFT 0.21 cannot load it either. Train again with the "
                "module in either target_modules or modules_to_save (task_type adds heads to the latter "
                "automatically)"
            )

    def stray(self, name: str, family: str, kind: str) -> None:
        """Account for a tensor that is spelled as one of a method and has no slot of this adapter's."""
        if family == kind:
            self.unused.append(name)
        else:
            self.refuse(name, f"spelled as {family}, but {CONFIG} says peft_type {kind}", AGAINST_TENSORS)

    def keep(self, name: str, path: str, passed_over: list[str]) -> None:
        """Account for a tensor that is saved whole."""
        target, wrapper = self.paths.saved_as(path)
        if wrapper == "original_module":
            passed_over.append(name)
            return
        before = self.saved.get(target)
        copies = {"modules_to_save", ""}
        if before and {before.wrapper, wrapper} == copies:
            # bias="all" and a vocabulary of another size also save what stands in the wrapper; the plain name counts
            passed_over.append(name if wrapper else before.name)
            if wrapper:
                return
        elif before:
            self.refuse(name, f"{printable(target)} is saved twice", SAVED_TWICE)
        self.saved[target] = Saved(name, wrapper)

    def stored(
        self, name: str, dimensions: Collection[int] = (), dtypes: Collection[str] = FLOAT_NAMES
    ) -> StoredTensor:
        """A tensor of the file, checked."""
        info = self.file.tensors[name]
        if info.dtype not in dtypes:
            raise UnusableError(f"{printable(name)}: stored as {info.dtype}; expected one of {', '.join(dtypes)}")
        if dimensions and (len(info.shape) not in dimensions or 0 in info.shape):
            wanted = " or ".join(str(count) for count in sorted(dimensions))
            raise UnusableError(
                f"{printable(name)}: is {list(info.shape)}; expected {wanted} dimensions ({SHARDED})", UNGATHERED
            )
        return super().stored(name)

    def add(self, target: str, update: Update, sources: Collection[str]) -> None:
        """Take up the update of a target."""
        if target in self.updates:
            self.refuse(target, f"has two updates, the second from {printable(next(iter(sources)))}")
            return
        self.updates[target] = update
        self.sources[target] = tuple(sources)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Take up what is wrong, or not merged, where a block raises it."""
        try:
            yield
        except UnusableError as error:
            self.problems.append(Problem(*error.args))
        except UnsupportedError as error:
            self.unsupported.append(str(error))

    def attempt(self, module: Module, read: Callable[[Module], Mapping[str, Update]]) -> None:
        """Add what `read` makes of a module: the updates of its parameters by name."""
        with self.noting():
            for parameter, update in read(module).items():
                target = f"{module.name}.{parameter}" if module.name else parameter
                self.add(target, update, [*module.slots.values(), *self.copies.get(module.name, ())])

    def place_tokens(self, ids: Callable[[Module], Any]) -> None:
        """Rows of an embedding that were trained as such; `ids` gives their numbers, in the order of the rows."""

        def rows(module: Module) -> dict[str, Update]:
            values, index = module.tensor(TOKENS), ids(module)
            module.agree(
                isinstance(index, list) and all(type(i) is int and i >= 0 for i in index),
                f"{CONFIG} has no list of token ids for it",
            )
            module.agree(
                len(index) == values.shape[0],
                f"{CONFIG} lists {len(index)} tokens, but {values.shape[0]} rows are stored",
            )
            module.agree(len(set(index)) == len(index), f"{CONFIG} lists a token twice")
            return {"weight": ReplaceRows(tuple(index), values)}

        for module in self.modules.values():
            if TOKENS in module:
                self.attempt(Module(self, module.path, {TOKENS: module.slots[TOKENS]}), rows)

    def place_saved(self) -> None:
        """Make replacements of what is saved whole; under an update it is the weight that this was trained on."""
        for target, saved in self.saved.items():
            with self.noting():
                self.place_whole(target, saved)

    def place_whole(self, target: str, saved: Saved) -> None:
        """Make the replacement of one tensor."""
        buffer = not target.endswith("weight")  # weights of whole numbers are packed, and mean nothing alone
        stored = self.stored(saved.name, dtypes=WHOLE if buffer else FLOAT_NAMES)
        if 0 in stored.shape:
            raise UnusableError(f"{printable(saved.name)}: is {list(stored.shape)}; {SHARDED}", UNGATHERED)
        replacement, update = Replace(stored), self.updates.get(target)  # type: ignore[arg-type]  # loaded later
        if update is None:
            self.add(target, replacement, [saved.name])
        elif saved.wrapper in keys.INNER or isinstance(update, (Add, ReplaceRows)):
            self.bases[target] = replacement
        else:
            self.refuse(target.rpartition(".")[0], "has both adapter factors and a saved replacement")

    def setting(self, name: str, default: Any, valid: Callable[[Any], bool], wanted: str) -> Any:
        """A field of the config, checked; `default` is PEFT's own for a config that is without."""
        value = self.config.get(name, default)
        if not valid(value):
            raise UnusableError(f"{self.where}: {name} is {printable(repr(value))}; expected {wanted}", AGAINST_TENSORS)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.setting(name, default, lambda value: isinstance(value, bool), "true or false"))

    def number(self, name: str, default: float) -> float:
        return float(self.setting(name, default, is_scale, "a finite number"))

    def whole(self, name: str, default: int) -> int:
        return int(self.setting(name, default, is_whole, "a whole number of at least 1"))


def is_whole(value: object) -> bool:
    return type(value) is int and 1 <= value <= 10**8


def tell_spelling(draft: Draft, slots: Collection[str]) -> None:
    """Add a note for each way in which names of the file are not spelled as PEFT saves them, and are read all the same."""
    names = list(draft.file.tensors)
    wrapped = dict.fromkeys(name for name in names if keys.wrappers_in(name))
    bare = [name for name in names if not name.startswith("base_model.") and name not in wrapped]
    doubled = [name for name in names if keys.path_of(name)[:2] == list(keys.PREFIX)]
    named = [name for name in names if keys.named_in(name, slots)]
    for code, found, what in (
        ("wrapper-in-names", wrapped, "with a training wrapper, which is dropped"),
        ("prefix-missing", bare, "without PEFT's prefix base_model.model."),
        ("prefix-doubled", doubled, "with PEFT's prefix twice"),
        ("adapter-name-in-names", named, "with the adapter's name after the factor's, which is dropped"),
    ):
        if found:
            first = printable(next(iter(found)))
            draft.notes.append(Note(code, f"{len(found)} tensor name{'s' * (len(found) != 1)} {what}, such as {first}"))
