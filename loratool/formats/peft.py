"""PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`.

How PEFT names, scales and applies what it saves (PEFT 0.21). Merged are LoRA on linear, Conv1D and
embedding weights with rsLoRA and patterns, and `modules_to_save`. All else is recognised by name
and reported as unsupported, and a tensor that nothing recognises is reported as unused.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, StoredTensor
from loratool.errors import InputError, LoratoolError, printable
from loratool.safefile import FLOAT_NAMES, SafeFile, open_regular, read_safefile, unreadable
from loratool.updates import LowRank, Replace

if TYPE_CHECKING:
    from loratool.updates import Update

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")
LARGEST_CONFIG = 64 << 20  # bytes
LARGEST_SCALE = 3.4e38  # float32
PATTERN_SECONDS = 10.0
PLAIN_PATTERN = re.compile(r"[\w.$-]+")  # patterns of these characters compile and match at once

PREFIX = "base_model.model."
# The adapter's name may stand inside a key of a raw state dict: `.lora_A.default.weight`.
SLOTS = (
    (re.compile(r"^(?P<module>.+)\.lora_A(\.[^.]+)?\.weight$"), "A"),
    (re.compile(r"^(?P<module>.+)\.lora_B(\.[^.]+)?\.weight$"), "B"),
    (re.compile(r"^(?P<module>.+)\.lora_embedding_A(\.[^.]+)?$"), "embedding_A"),
    (re.compile(r"^(?P<module>.+)\.lora_embedding_B(\.[^.]+)?$"), "embedding_B"),
)
WRAPPED_BIAS = re.compile(r"\.base_layer\.bias$")
EMBEDDING_BASE = re.compile(r"^(?P<module>.+)\.base_layer\.weight$")
SAVED = re.compile(r"^(?P<module>.+)\.modules_to_save(\.[^.]+)?\.(?P<parameter>[^.]+)$")
UNSUPPORTED_TENSORS = (
    (re.compile(r"\.lora_magnitude_vector(\.|$)"), "DoRA"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.bias$"), "lora_bias"),
    (re.compile(r"\.lora_diag(\.|$)"), "KaSA"),
    (re.compile(r"\.base_layer\.bias$"), "a trained bias"),
    (re.compile(r"\.base_layer\."), "a wrapped base layer, as nn.MultiheadAttention and expert parameters have"),
    (re.compile(r"trainable_tokens_delta$|\.token_adapter\."), "trainable tokens"),
    (re.compile(r"\.lora_E(\.|$)|\.ranknum(\.|$)|\.lora_[AB]$"), "AdaLoRA"),
    (re.compile(r"\.lora_velora|\.lora_monteclora"), "VeLoRA or MonteCLoRA"),
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.ia3_l"), "(IA)³"),
    (re.compile(r"(^|\.)vera_"), "VeRA"),
    (re.compile(r"\.oft_|\.boft_"), "OFT"),
    (re.compile(r"internal_xlora_classifier"), "X-LoRA"),
    (re.compile(r"^prompt_embeddings$|\.prompt_"), "a prompt method"),
    (re.compile(r"\.original_module\."), "the untrained copy of a saved module"),
)
# Settings of a LORA config that change what the tensors mean: (field, is it set?, what it is called).
UNSUPPORTED_SETTINGS = (
    ("use_dora", bool, "DoRA (use_dora)"),
    ("lora_bias", bool, "lora_bias"),
    ("alora_invocation_tokens", lambda value: value is not None, "aLoRA, which acts on some tokens only"),
    ("arrow_config", lambda value: value is not None, "Arrow, which routes tokens"),
    ("use_bdlora", bool, "BD-LoRA (use_bdlora)"),
    ("kasa_config", lambda value: value is not None, "KaSA"),
    ("velora_config", lambda value: value is not None, "VeLoRA"),
    ("monteclora_config", lambda value: value is not None, "MonteCLoRA"),
    ("use_qalora", bool, "QA-LoRA (use_qalora)"),
    ("layer_replication", bool, "layer_replication"),
    ("target_parameters", bool, "LoRA on parameters (target_parameters)"),
    ("trainable_token_indices", bool, "trainable tokens"),
)
PLAIN_INITIALISATIONS = {"gaussian", "orthogonal", "eva"}  # others move the base weights, or are variants


def recognises(path: Path) -> bool:
    """Whether `path` looks like a PEFT adapter, its format's faults included."""
    if path.suffix == ".safetensors":
        return path.is_file() or path.is_symlink()
    return any((path / name).is_symlink() or (path / name).exists() for name in (CONFIG, WEIGHTS, *PICKLED)) or bool(
        nested(path)
    )


def nested(path: Path) -> list[Path]:
    """Direct subfolders that hold an adapter, as PEFT writes them for adapters with a name."""
    try:
        return sorted(folder for folder in path.iterdir() if (folder / CONFIG).is_file())
    except OSError:
        return []


def not_an_adapter(path: Path) -> LoratoolError:
    """The error for a path that no format recognises."""
    try:
        path.stat()
    except OSError as error:
        return unreadable(path, error)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return InputError(f"{printable(path)}: pickled weights are never loaded here; {conversion(path)}")
    return InputError(f"{printable(path)}: no adapter: neither {CONFIG} nor {WEIGHTS} is there")


def conversion(path: Path) -> str:
    """The command that turns a pickled state dict into safetensors, loading tensors only."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"d = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
        f"save_file({{k: v.clone().contiguous() for k, v in d.items()}}, {path.stem + '.safetensors'!r})"
    )
    return f'if you trust it, convert it where it lies with: python -c "{printable_code(code)}"'


def printable_code(code: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in code)


def read(path: Path) -> Adapter:
    """Read a PEFT adapter's headers and config; tensor values stay on disk.

    Raises `InputError` when the config or the file is malformed, all problems of each at once.
    """
    notes: list[str] = []
    folder, weights_path = locate(path, notes)
    file = read_safefile(weights_path)
    config_file = folder / CONFIG
    config = read_config(config_file)
    draft = Draft(file, config, notes)
    draft.read()
    if draft.problems and not draft.unsupported:  # else it is no wonder that the tensors look odd
        raise InputError(f"{printable(weights_path)}: malformed adapter:", draft.problems)
    return Adapter(
        name=printable(folder.resolve().name),
        format="peft",
        folder=folder,
        file=file,
        config=config,
        config_file=config_file,
        updates=draft.updates,
        bases=draft.bases,
        sources=draft.sources,
        unsupported=tuple(dict.fromkeys(draft.unsupported)),
        unused=tuple(draft.unused),
        notes=tuple(draft.notes),
    )


def locate(path: Path, notes: list[str]) -> tuple[Path, Path]:
    """The folder and the weights file of the adapter at `path`."""
    if path.suffix == ".safetensors":
        return path.parent, path
    folder = path
    if not any((folder / name).exists() for name in (CONFIG, WEIGHTS)):
        inside = nested(folder)
        if len(inside) > 1:
            names = ", ".join(printable(f.name) for f in inside)
            raise InputError(f"{printable(path)}: holds several adapters ({names}); name the subfolder of one")
        if inside:
            folder = inside[0]
            notes.append(f"read from the subfolder {printable(folder.name)}")
    weights = folder / WEIGHTS
    if not weights.exists() and not weights.is_symlink():
        for name in PICKLED:
            if (folder / name).exists():
                raise InputError(
                    f"{printable(folder / name)}: pickled weights are never loaded here; {conversion(folder / name)}"
                )
        raise InputError(f"{printable(folder)}: {WEIGHTS} is missing")
    return folder, weights


def read_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json` as a dict. Problems are told without repeating the file's text."""
    shown = printable(path)
    try:
        with open(open_regular(path), "rb") as stream:
            raw = stream.read(LARGEST_CONFIG + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) > LARGEST_CONFIG:
        raise InputError(f"{shown}: {len(raw)} bytes and more are no adapter config")
    if not raw.strip():
        raise InputError(f"{shown}: the file is empty")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a field is there twice")
        return found

    try:
        config = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{shown}: no JSON (line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown}: {error if isinstance(error, ValueError) else 'nested too deeply'}") from None
    if not isinstance(config, dict):
        raise InputError(f"{shown}: an object is wanted, found {type(config).__name__}")
    if not {"peft_type", "r", "lora_alpha"} & set(config):
        raise InputError(f"{shown}: no adapter config: neither peft_type nor r nor lora_alpha is in it")
    return config


@dataclass
class Draft:
    """An adapter in the making: what was understood, and everything that was not."""

    file: SafeFile
    config: Mapping[str, Any]
    notes: list[str]
    updates: dict[str, Update] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    bases: dict[str, Replace] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def read(self) -> None:
        kind = self.config.get("peft_type", "LORA")
        if kind != "LORA":
            self.unsupported.append(f"peft_type {printable(kind)}")
            return
        for setting, is_set, name in UNSUPPORTED_SETTINGS:
            if is_set(self.config.get(setting)):
                self.unsupported.append(name)
        if any(WRAPPED_BIAS.search(name) for name in self.file.tensors):
            self.unsupported.append(f"trained biases (bias={printable(repr(self.config.get('bias')))})")
        init = self.config.get("init_lora_weights", True)
        if not isinstance(init, bool) and not (isinstance(init, str) and init in PLAIN_INITIALISATIONS):
            self.unsupported.append(f"init_lora_weights {printable(repr(init))}, for which the base weights were moved")
        modules = self.sort_tensors()
        scales = self.scales(modules)
        for module, slots in modules.items():
            self.add_lora(module, slots, scales.get(module, 0.0))
        if not self.updates and not self.problems and not self.unsupported and not self.unused:
            self.problems.append("there is no adapter tensor in it")

    def sort_tensors(self) -> dict[str, dict[str, str]]:
        """Module → slot → tensor, for the LoRA tensors; all others go where they belong at once."""
        modules: dict[str, dict[str, str]] = {}
        for name in self.file.tensors:
            key = name.removeprefix(PREFIX)
            for pattern, slot in SLOTS:
                if (match := pattern.match(key)) and ".base_layer" not in key:
                    slots = modules.setdefault(match["module"], {})
                    if slot in slots:
                        self.problems.append(
                            f"{printable(match['module'])}: {printable(slots[slot])} and {printable(name)} are two "
                            "spellings of the same factor"
                        )
                    slots[slot] = name
                    break
            else:
                self.sort_other(name, key)
        return modules

    def sort_other(self, name: str, key: str) -> None:
        if (match := EMBEDDING_BASE.match(key)) and self.is_embedding(name):  # PEFT saves it whole beside its factors
            if (stored := self.stored(name)) is not None:
                self.bases[f"{match['module']}.weight"] = Replace(stored)  # type: ignore[arg-type]  # loaded later
            return
        for pattern, feature in UNSUPPORTED_TENSORS:
            if pattern.search(key):
                self.unsupported.append(f"{feature} (tensor {printable(name)})")
                return
        if match := SAVED.match(key):
            key = f"{match['module']}.{match['parameter']}"
        elif "lora_" in key:
            self.unused.append(name)
            return
        elif key.endswith(".bias") and self.config.get("bias", "none") != "none" and not self.is_saved_module(key):
            self.unsupported.append(f"trained biases (bias={printable(repr(self.config['bias']))})")
            return
        if key in self.updates:
            self.problems.append(f"{printable(name)}: {printable(key)} is saved twice")
        if (stored := self.stored(name)) is not None:
            self.updates[key] = Replace(stored)  # type: ignore[arg-type]  # loaded later
            self.sources[key] = (name,)

    def is_embedding(self, name: str) -> bool:
        module = name.removesuffix(".base_layer.weight")
        return any(tensor.startswith(f"{module}.lora_embedding_A") for tensor in self.file.tensors)

    def is_saved_module(self, key: str) -> bool:
        saved = self.config.get("modules_to_save") or []
        module = key.rpartition(".")[0]
        return any(isinstance(entry, str) and module.endswith(entry) for entry in saved)

    def stored(self, name: str) -> StoredTensor | None:
        info = self.file.tensors[name]
        if info.dtype not in FLOAT_NAMES:
            self.problems.append(
                f"{printable(name)}: stored as {info.dtype}; wanted is one of {', '.join(FLOAT_NAMES)}"
            )
            return None
        return StoredTensor(self.file, info)

    def add_lora(self, module: str, slots: Mapping[str, str], scale: float) -> None:
        shown = printable(module)
        embedding = "embedding_A" in slots or "embedding_B" in slots
        names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if set(slots) - set(names):
            self.problems.append(f"{shown}: has factors of a linear layer and of an embedding")
            return
        if missing := [f"lora_{slot}" for slot in names if slot not in slots]:
            there = ", ".join(printable(tensor) for tensor in slots.values())
            self.problems.append(f"{shown}: {missing[0]} is missing, only {there} is there")
            return
        down, up = (self.stored(slots[slot]) for slot in names)
        if down is None or up is None:
            return
        if len(down.shape) in (3, 4, 5) and len(down.shape) == len(up.shape):
            self.unsupported.append(f"LoRA on a convolution ({shown}, lora_A {list(down.shape)})")
            return
        if len(down.shape) != 2 or len(up.shape) != 2 or 0 in down.shape + up.shape:
            self.problems.append(
                f"{shown}: lora_A is {list(down.shape)} and lora_B {list(up.shape)}; two matrices are wanted "
                "(an empty or flat one is a shard that ZeRO-3 or FSDP did not gather before saving)"
            )
            return
        if up.shape[1] != down.shape[0]:
            self.problems.append(
                f"{shown}: lora_A has {down.shape[0]} rows and lora_B {up.shape[1]} columns; the rank is one"
            )
            return
        update = LowRank(up, down, scale, turnable=not embedding)  # type: ignore[arg-type]  # loaded later
        target = f"{module}.weight"
        if target in self.updates:
            self.problems.append(f"{shown}: has LoRA factors and a saved replacement")
            return
        self.updates[target] = update.turned if embedding else update
        self.sources[target] = tuple(slots[slot] for slot in names)

    def scales(self, modules: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
        """Module → α/r (rsLoRA: α/√r, Kalajdzievski 2023, arXiv:2312.03732), r being the rank of its tensors."""
        rank, alpha = self.config.get("r", None), self.config.get("lora_alpha", 8)
        if "lora_alpha" not in self.config:
            self.notes.append("the config has no lora_alpha; PEFT's default of 8 is used")
        if "r" in self.config and not is_rank(rank):
            self.problems.append(f"{CONFIG}: r is {printable(repr(rank))}; a whole number from 1 on is wanted")
            return {}
        if not is_alpha(alpha):
            self.problems.append(f"{CONFIG}: lora_alpha is {printable(repr(alpha))}; a finite number is wanted")
            return {}
        rslora = self.config.get("use_rslora", False)
        if not isinstance(rslora, bool):
            self.problems.append(f"{CONFIG}: use_rslora is {printable(repr(rslora))}; true or false is wanted")
            return {}
        rank_pattern = self.pattern("rank_pattern", is_rank)
        alpha_pattern = self.pattern("alpha_pattern", is_alpha)
        if self.problems:
            return {}
        try:
            found = match_patterns([*rank_pattern, *alpha_pattern], modules)
        except ValueError as error:
            self.problems.append(f"{CONFIG}: {error}")
            return {}
        result: dict[str, float] = {}
        for module, slots in modules.items():
            stored = self.stored_rank(slots)
            ranks = [rank_pattern[p] for p in rank_pattern if p in found[module]] or ([rank] if rank else [])
            alphas = [alpha_pattern[p] for p in alpha_pattern if p in found[module]] or [alpha]
            if stored and ranks and stored not in ranks and not self.unsupported:
                self.problems.append(
                    f"{printable(module)}: {CONFIG} says r = {ranks[0]}, the tensors have rank {stored}"
                )
            if len(set(alphas)) > 1:
                self.notes.append(
                    f"{printable(module)}: several alpha patterns match ({', '.join(map(str, alphas))}); {alphas[0]} is "
                    "used as PEFT does when it loads the adapter, training may have used another, since saving sorts them"
                )
            result[module] = alphas[0] / (math.sqrt(stored) if rslora else stored) if stored else 0.0
        return result

    def stored_rank(self, slots: Mapping[str, str]) -> int:
        for slot in ("A", "embedding_A"):
            if slot in slots and (shape := self.file.tensors[slots[slot]].shape):
                return shape[0]
        return 0

    def pattern(self, name: str, valid: Any) -> dict[str, Any]:
        """`rank_pattern` or `alpha_pattern`, checked."""
        table = self.config.get(name) or {}
        if not isinstance(table, dict):
            self.problems.append(f"{CONFIG}: {name} is no object")
            return {}
        for pattern, value in table.items():
            if not valid(value):
                self.problems.append(
                    f"{CONFIG}: {name}: {printable(repr(pattern))} has the value {printable(repr(value))}"
                )
        return table


def is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= 10**8


def is_alpha(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_SCALE


def match_patterns(patterns: Iterable[str], modules: Iterable[str]) -> dict[str, set[str]]:
    """Module → the patterns that PEFT would find to match it: the whole path, or a whole dotted tail of it.

    A pattern may take for ever to compile or to match, so all but plain ones are tried in a process
    of their own that ends with the time limit. `ValueError` names those that took too long, or are none.
    """
    wanted, names = list(dict.fromkeys(patterns)), list(modules)
    risky = [p for p in wanted if not PLAIN_PATTERN.fullmatch(p)]
    found: dict[str, set[str]] = {name: set() for name in names}
    for pattern in wanted:
        if pattern not in risky:
            expression = re.compile(rf"(?:.*\.)?(?:{pattern})$")
            for name in names:
                if expression.match(name):
                    found[name].add(pattern)
    if risky and names:
        for name, matching in zip(names, match_apart(risky, names), strict=True):
            found[name].update(matching)
    for name in set(names) & set(wanted):  # PEFT's last resort: the path itself as a key
        if not found[name]:
            found[name].add(name)
    return found


MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
expressions, invalid = [], []
for p in patterns:
    try:
        re.compile(p)
        expressions.append((p, re.compile(rf"(.*\\.)?({p})$")))
    except (re.error, RecursionError, OverflowError):
        invalid.append(p)
json.dump([invalid, [[p for p, e in expressions if e.match(n)] for n in names]], sys.stdout)
"""


def match_apart(patterns: list[str], names: list[str]) -> list[list[str]]:
    """For each name the patterns that match it, tried in a child process under a time limit."""
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCHER],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"a pattern takes too long to match, one of {few(patterns)}; write it without nested repeats"
        ) from None
    except subprocess.CalledProcessError:
        raise ValueError("a pattern cannot be matched") from None
    result: list[list[str]]
    invalid, result = json.loads(answer.stdout)
    if invalid:
        raise ValueError(f"no regular expression in rank_pattern or alpha_pattern: {few(invalid)}")
    return result


def few(patterns: list[str]) -> str:
    """The first patterns, for a message."""
    return ", ".join(printable(repr(p)) for p in patterns[:3]) + (", …" if len(patterns) > 3 else "")
