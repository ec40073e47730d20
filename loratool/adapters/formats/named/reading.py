"""The tensors of one file, each brought to the update it belongs to, or to what is said of those that belong to none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

from loratool.adapters.adapter import Flattened, StoredTensor, derived
from loratool.adapters.formats.found import MISSING_PARTNER, Found
from loratool.adapters.formats.named.dialects import ModuleSpelling, replaced_by, spelling_of
from loratool.adapters.formats.named.header import CONFIGS, CONTRADICTION, Header
from loratool.adapters.formats.named.numbered import layers_of
from loratool.adapters.formats.named.refused import EMBEDDINGS, refused
from loratool.adapters.formats.roles.module import Module, RoleProblem
from loratool.adapters.formats.roles.names import ALPHA, DOWN, FOREIGN, MAGNITUDES, UP, canonical, grouped
from loratool.adapters.formats.roles.reading import found_in, methods_of
from loratool.adapters.training import Training
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.formulas import part_of_rows
from loratool.algebra.updates.replacing import Replace
from loratool.errors import Problem, printable
from loratool.files.containers import taken_apart
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import SafeFile
from loratool.notes import Note
from loratool.templates import some

LYCORIS = ("hada_", "lokr_", "oft_", "on_input", "a1.", "bm.", "bias_", "w_norm", "b_norm", "diff", "lora_mid")
DENOISERS = frozenset({"unet", "prior", "transformer", "diffusion_model"})  # names of one component
WIDENED = ("img_in", "x_embedder")  # input layers of Flux, which its ControlNets feed twice the channels
MERGED_TWICE = "same-weight-twice"  # the code of a problem
MISSING = "alpha-missing"  # the code of a note, also of one that roles make
FULL = "FULL"  # what LyCORIS calls changes that are stored whole
SPLIT = Note(
    "split-qkv",
    "factors of fused layers were trained apart (split_qkv) and keep the alpha of one part, so the file's scaling of "
    "them is a third of training's, or a quarter; it is applied unchanged, as by tools that merge such files",
)


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
    spelling: ModuleSpelling
    targets: tuple[str, ...]  # the modules of the trained model
    roles: Mapping[str, StoredTensor]

    @property
    def component(self) -> str:
        """The component that a dotted target begins with; empty for a name that is flattened."""
        first = self.targets[0]
        return "" if isinstance(first, Flattened) else first.partition(".")[0]

    @property
    def path(self) -> str:
        """The first target within its component."""
        first = self.targets[0]
        return first if isinstance(first, Flattened) else first.partition(".")[2]

    def parts(self, update: Update) -> Iterator[tuple[str, Update]]:
        """The update by targets. Where there are several, each has an equal share of the rows."""
        if len(self.targets) == 1:
            yield self.targets[0], update
            return
        rows, uneven = divmod(update.shape[0], len(self.targets))
        if uneven or not isinstance(update, LowRank):
            what = f"{update.shape[0]} rows" if uneven else "tensors of another method than LoRA"
            raise RoleProblem([Problem(f"{printable(self.name)}: has {what}, for {' + '.join(self.targets)}")])
        for number, target in enumerate(self.targets):
            own = partial(part_of_rows, number, len(self.targets))
            yield target, replace(update, up=derived((rows, update.rank), own, update.up))

    @property
    def factors(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The shapes of its second and its first factor; None where one is missing, or no factor."""
        shapes = {canonical(role): tensor.shape for role, tensor in self.roles.items()}
        up, down = shapes.get(UP, ()), shapes.get(DOWN, ())
        return (up, down) if len(up) == len(down) >= 2 else None

    @cached_property
    def rank(self) -> int:
        """The rank of its factors; 0 where it has none."""
        shapes = (tensor.shape for role, tensor in self.roles.items() if canonical(role) == DOWN)
        return next((shape[0] for shape in shapes if shape), 0)


@dataclass
class Reader(Found):
    """One file on its way to an adapter."""

    configs: Configs = field(kw_only=True)
    dialects: dict[str, None] = field(default_factory=dict)
    assumed: Counter[Note] = field(default_factory=Counter)  # of how many modules
    unscaled: dict[str, list[int]] = field(default_factory=dict)  # rule of a dialect → ranks of modules without alpha
    input_alpha_used: bool = False

    def read(self) -> None:
        """Take up every tensor of the file."""
        self.header = Header.of(self.file)
        groups, rest = self.grouped()
        scales = self.scales_of(groups)
        with OpenSources() as sources:
            for group in groups:
                self.dialects[dialect_of(group.spelling, group.roles, self.header)] = None
                self.take(group, scales.get(group.name), sources)
        roles = set[str]().union(*(group.roles for group in groups))
        self.methods = methods_of(roles)
        self.dora = any(canonical(role) in MAGNITUDES for role in roles)
        self.tell(groups)
        self.account_for(self.take_replacements(rest) if groups else rest)
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
            stored = {role: self.stored(name) for role, name in roles.items()}
            groups.append(Group(module, *spelled, stored))
        return self.with_layers(groups), rest

    def with_layers(self, groups: list[Group]) -> list[Group]:
        """The modules, with the layers that numbers mean; those of unknown ones are told, and left out."""
        counted: dict[str, dict[int, Group]] = {}
        for group in groups:
            if group.spelling.numbered:
                component, _, number = group.name.partition(":")
                counted.setdefault(component, {})[int(number)] = group
        lost: set[str] = set()
        for component, own in counted.items():
            shapes = [own[number].factors for number in sorted(own)]
            gaps = set(range(len(own))) - own.keys()
            if gaps:
                self.problems.append(Problem(f"{component}:{min(gaps)} is missing", MISSING_PARTNER))
            elif all(shapes):
                layers = layers_of(component, [shape for shape in shapes if shape], self.header.metadata)
                if isinstance(layers, str):
                    self.unsupported.append(layers)
                    lost.update(group.name for group in own.values())
                    continue
                self.notes.append(layers[1])
                for at, layer in enumerate(layers[0]):
                    own[at].targets = (f"{component}.{layer}",)
        return [group for group in groups if group.name not in lost]

    def scales_of(self, groups: Iterable[Group]) -> dict[str, float]:
        """The scaling of modules that a config in the header holds, by their names."""
        found: dict[str, float] = {}
        for component, config in self.header.configs(self.problems).items():
            own = {g.path: g for g in groups if g.rank and component in ("", g.component)}
            where = f"{CONFIGS} in the header" + (f", {component}" if component else "")
            ranks = {path: group.rank for path, group in own.items()}
            scales, notes, problems = self.configs.scales(self.file, config, ranks, where)
            self.notes += notes
            self.problems += problems
            found |= {own[path].name: scale for path, scale in scales.items()}
            if ranks:
                told = ", ".join(dict.fromkeys(f"{scale:g}" for scale in scales.values()))
                self.notes.append(Note("alpha-in-header", f"scaling {told} of modules ({len(ranks)}) is from {where}"))
        return found

    def take(self, group: Group, scale: float | None, sources: OpenSources) -> None:
        """The updates of one module, or what is wrong with it."""
        if ALPHA in group.roles and scale is not None:
            self.refuse(
                group.name, f"has an alpha of its own, and {CONFIGS} in the header holds one, too", CONTRADICTION
            )
        given = self.reading.input_alpha
        module = Module(
            group.name,
            group.roles,
            given,
            scale,
            dim=self.header.rank,
            constrained=group.spelling.constrained,
            widens=group.name.rpartition(".")[2] in WIDENED,
        )
        try:
            found = found_in(module, sources)
            parts = [(p, *part) for p, update in found.updates.items() for part in group.parts(update)]
        except RoleProblem as error:
            self.problems += error.problems
            return
        missing = [note for note in found.notes if note.code == MISSING]
        self.assumed.update(note for note in found.notes if note not in missing)
        if missing:
            self.unscaled.setdefault(group.spelling.rule, []).append(found.rank)
        self.input_alpha_used |= given is not None and scale is None and ALPHA not in group.roles and bool(found.rank)
        self.unsupported += found.unsupported
        for parameter, module_name, update in parts:
            of_scale = module_name.endswith(".scale")  # a parameter of its own, as older releases of ComfyUI name norms
            target = module_name if of_scale else f"{module_name}.{parameter}"
            target = Flattened(target) if isinstance(module_name, Flattened) else target
            self.add(target, update, tuple(group.roles[role].info.name for role in found.used[parameter]))

    def add(self, target: str, update: Update, names: Sequence[str]) -> None:
        if target in self.updates:
            self.refuse(names[0], f"changes the same weight as {printable(self.sources[target][0])}", MERGED_TWICE)
        self.updates[target], self.sources[target] = update, tuple(names)

    def take_replacements(self, names: list[str]) -> list[str]:
        """Take up tensors that replace the base's; those that do not are given back."""
        for name in names:
            if target := replaced_by(name):
                self.add(target, Replace(self.stored(name)), (name,))  # type: ignore[arg-type]  # loaded later
        return [name for name in names if not replaced_by(name)]

    def tell(self, groups: Iterable[Group]) -> None:
        """What was assumed, once for all modules that it was assumed of."""
        self.notes += dict.fromkeys(group.spelling.note for group in groups if group.spelling.note)
        self.notes += [
            Note(n.code, f"{count} modules: {n.text}" if count > 1 else n.text) for n, count in self.assumed.items()
        ]
        for rule, ranks in self.unscaled.items():
            text = f"modules without alpha: {len(ranks)}; their scaling is 1, {rule} (pass --input-alpha for another)"
            self.notes.append(Note(MISSING, text))
        unscaled = {rank for every in self.unscaled.values() for rank in every}
        self.notes += self.header.idle_alphas(unscaled) if unscaled else ()
        if self.reading.input_alpha is not None and not self.input_alpha_used:
            text = f"no module takes it, as all have an alpha or need none, so --input-alpha {self.reading.input_alpha:g} is ignored"
            self.notes.append(Note("input-alpha-not-used", text))
        if self.header.splits_qkv:
            self.notes.append(SPLIT)

    def account_for(self, rest: list[str]) -> None:
        """What is recognised of the other tensors, and left of them."""
        found: dict[str, list[str]] = {}
        reasons: dict[str, str] = {}
        for name, row in refused(rest, self.header.metadata):
            found.setdefault(row.name, []).append(name)
            reasons[row.name] = row.reason
        for kind, names in found.items():
            way_out = f"; {taken_apart(self.file.path, names)}" if self.updates and kind in EMBEDDINGS else ""
            self.unsupported.append(f"{reasons[kind]} ({some(names)}){way_out}")
        if not self.updates and not self.problems:
            self.dialects |= dict.fromkeys(found)
        known = {name for names in found.values() for name in names}
        self.unused = [name for name in rest if name not in known]

    def check_twice(self) -> None:
        """Find names that differ, and mean one weight: under two words for a component, or with and without dots."""
        owners: dict[str, str] = {}
        flat: dict[str, str] = {}  # names with dots, without them
        for target in sorted(self.updates, key=lambda target: isinstance(target, Flattened)):
            name = within_denoiser(target)
            owner = owners.setdefault(name, target)
            if isinstance(target, Flattened):
                owner = flat.get(name, owner)
            else:
                flat.setdefault(Flattened.of(name), target)
            if owner is not target:
                one, other = self.sources[owner][0], self.sources[target][0]
                self.refuse(
                    other, f"means the same weight as {printable(one)}, which is spelled otherwise", MERGED_TWICE
                )


def within_denoiser(target: str) -> str:
    """A target without the word for the denoiser, which has several."""
    joint = "_" if isinstance(target, Flattened) else "."
    word, found, rest = target.partition(joint)
    return rest if found and word in DENOISERS else target  # no dialect without dots has a word of two


def dialect_of(spelling: ModuleSpelling, roles: Iterable[str], header: Header) -> str:
    """What the dialect of a module is called: by the tool where the header names it, else by names and roles."""
    if spelling.plain and header.tool:
        return header.tool
    if spelling.dialect == "kohya" and not spelling.constrained:
        return "lycoris" if header.is_lycoris or any(role.startswith(LYCORIS) for role in roles) else "kohya"
    return spelling.dialect
