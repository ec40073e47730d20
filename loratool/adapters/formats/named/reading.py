"""The tensors of one file, each brought to the update it belongs to, or to what is said of those that belong to none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from loratool.adapters.adapter import Flattened, StoredTensor
from loratool.adapters.formats.named.dialects import Spelling, spelling_of
from loratool.adapters.formats.named.header import CONFIGS, CONTRADICTION, Header
from loratool.adapters.formats.named.refused import refused
from loratool.adapters.formats.roles import Module, RoleProblem, found_in, grouped
from loratool.adapters.formats.roles.names import ALPHA, DOWN, FOREIGN, canonical
from loratool.adapters.reading import Reading
from loratool.adapters.training import Training
from loratool.algebra.updates.base import Update
from loratool.errors import Problem, printable
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import SafeFile
from loratool.notes import Note
from loratool.results.repairs import some

LYCORIS = ("hada_", "lokr_", "oft_", "on_input", "a1.", "bm.", "bias_", "w_norm", "b_norm", "diff", "lora_mid")
DENOISERS = frozenset({"unet", "prior", "transformer", "diffusion_model"})  # names of one component
MERGED_TWICE = "same-weight-twice"  # the code of a problem


class Configs(Protocol):
    """The format of the configs that diffusers writes into headers."""

    @property
    def config_name(self) -> str:
        """What such a config is called where it is a file."""

    def scales(
        self, file: SafeFile, config: Mapping[str, Any], ranks: Mapping[str, int], where: str
    ) -> tuple[Mapping[str, float], list[Note], list[Problem]]:
        """The scaling of each module, by the ranks that their tensors have; `where` the config is, for messages."""

    def training_of(self, config: Mapping[str, Any]) -> Training:
        """What a config says of the training."""


@dataclass
class Group:
    """The tensors of one module."""

    name: str  # in words of the file
    spelling: Spelling
    target: str  # the module of the trained model
    roles: Mapping[str, StoredTensor]

    @property
    def component(self) -> str:
        """The component that a dotted target begins with; empty for a name that is flattened."""
        return "" if isinstance(self.target, Flattened) else self.target.partition(".")[0]

    @property
    def path(self) -> str:
        """The target within its component."""
        return self.target if isinstance(self.target, Flattened) else self.target.partition(".")[2]

    @cached_property
    def rank(self) -> int:
        """The rank of its factors; 0 where it has none."""
        shapes = (tensor.shape for role, tensor in self.roles.items() if canonical(role) == DOWN)
        return next((shape[0] for shape in shapes if shape), 0)


@dataclass
class Reader:
    """One file on its way to an adapter."""

    file: SafeFile
    reading: Reading
    configs: Configs
    updates: dict[str, Update] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dialects: dict[str, None] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    told: Counter[Note] = field(default_factory=Counter)  # what was assumed of how many modules
    unscaled: Counter[str] = field(default_factory=Counter)  # rule of a dialect → modules without alpha

    def read(self) -> None:
        """Take up every tensor of the file."""
        self.header = Header.of(self.file)
        groups, rest = self.grouped()
        scales = self.scales_of(groups)
        with OpenSources() as sources:
            for group in groups:
                self.dialects[self.dialect_of(group)] = None
                self.take(group, scales.get(group.name), sources)
        self.tell()
        self.refuse(rest)
        self.check_twice()

    def grouped(self) -> tuple[list[Group], list[str]]:
        """The tensors by module, and those of no module of any dialect."""
        found = grouped(self.file.tensors)
        groups: list[Group] = []
        rest = list(found.rest)
        for module, roles in found.modules.items():
            spelled = spelling_of(module)
            if spelled is None or not FOREIGN.keys().isdisjoint(roles):
                rest += roles.values()
                continue
            stored = {role: StoredTensor(self.file, self.file.tensors[name]) for role, name in roles.items()}
            groups.append(Group(module, *spelled, stored))
        return groups, rest

    def scales_of(self, groups: Iterable[Group]) -> dict[str, float]:
        """The scaling of modules that a config in the header holds, by their names."""
        if not self.header.has_configs:
            return {}
        found: dict[str, float] = {}
        configs = self.header.configs(self.problems)
        for component, config in configs.items():
            own = {g.path: g for g in groups if g.rank and component in ("", g.component)}
            where = f"{CONFIGS} in the header" + (f", {component}" if component else "")
            ranks = {path: group.rank for path, group in own.items()}
            scales, notes, problems = self.configs.scales(self.file, config, ranks, where)
            self.notes += notes
            self.problems += problems
            found |= {own[path].name: scale for path, scale in scales.items()}
            if ranks:
                told = ", ".join(dict.fromkeys(f"{scale:g}" for scale in scales.values()))
                self.notes.append(
                    Note("alpha-in-header", f"the scaling of {len(ranks)} modules ({told}) is from {where}")
                )
        return found

    def dialect_of(self, group: Group) -> str:
        """What the dialect of a module is called: by the tool where the header names it, else by names and roles."""
        if group.spelling.plain and self.header.tool:
            return self.header.tool
        if group.spelling.dialect == "kohya":
            return "lycoris" if self.header.is_lycoris or any(r.startswith(LYCORIS) for r in group.roles) else "kohya"
        return group.spelling.dialect

    def take(self, group: Group, scale: float | None, sources: OpenSources) -> None:
        """The updates of one module, or what is wrong with it."""
        if ALPHA in group.roles and scale is not None:
            text = f"{printable(group.name)}: has an alpha of its own, and {CONFIGS} in the header holds one, too"
            self.problems.append(Problem(text, CONTRADICTION))
        try:
            found = found_in(self.module(group, scale), sources)
        except RoleProblem as error:
            self.problems += error.problems
            return
        missing = [note for note in found.notes if note.code == "alpha-missing"]
        self.told.update(note for note in found.notes if note not in missing)
        self.unscaled.update([group.spelling.rule] * bool(missing))
        self.unsupported += found.unsupported
        for parameter, update in found.updates.items():
            target = f"{group.target}.{parameter}"
            target = Flattened(target) if isinstance(group.target, Flattened) else target
            names = tuple(group.roles[role].info.name for role in found.used[parameter])
            if target in self.updates:
                text = f"{printable(group.name)}: changes the same weight as {printable(self.sources[target][0])}"
                self.problems.append(Problem(text, MERGED_TWICE))
            self.updates[target], self.sources[target] = update, names

    def module(self, group: Group, scale: float | None) -> Module:
        """A module with all that the header and its name say of it; only kohya's OFT has a prefix of its own."""
        limited = group.name.startswith("oft_")
        return Module(
            group.name, group.roles, self.reading.input_alpha, scale, dim=self.header.rank, constrained=limited
        )

    def tell(self) -> None:
        """What was assumed, once for all modules that it was assumed of."""
        self.notes += [
            Note(n.code, f"{count} modules: {n.text}" if count > 1 else n.text) for n, count in self.told.items()
        ]
        for rule, count in self.unscaled.items():
            text = f"{count} modules have no alpha; their scaling is 1, {rule} (pass --input-alpha to set another)"
            self.notes.append(Note("alpha-missing", text))

    def refuse(self, rest: list[str]) -> None:
        """What is recognised of the other tensors, and left of them."""
        found: dict[str, list[str]] = {}
        reasons: dict[str, str] = {}
        for name, row in refused(rest):
            found.setdefault(row.name, []).append(name)
            reasons[row.name] = row.reason
        for kind, names in found.items():
            self.unsupported.append(f"{reasons[kind]} ({some(names)})")
        if not self.updates and not self.problems:
            self.dialects |= dict.fromkeys(found)
        known = {name for names in found.values() for name in names}
        self.unused = [name for name in rest if name not in known]

    def check_twice(self) -> None:
        """Find names that differ, and flatten to one weight."""
        owners: dict[str, str] = {}
        for target in self.updates:
            key = common(target)
            if (owner := owners.setdefault(key, target)) is not target:
                one, other = self.sources[owner][0], self.sources[target][0]
                text = f"{printable(other)}: means the same weight as {printable(one)}, which another dialect names"
                self.problems.append(Problem(text, MERGED_TWICE))


def common(target: str) -> str:
    """What all ways to write a target have in common: it is flattened, its component one of several synonyms."""
    flattened = str(Flattened.of(target))
    for word in DENOISERS:
        if flattened.startswith(f"{word}_"):
            return flattened[len(word) + 1 :]
    return flattened
