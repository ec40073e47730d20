"""Names and shapes of tiny models: on disk, in memory and in the adapter, for several releases of transformers and PEFT.

`fixtures/layouts.json` is an excerpt that comes with the project; the whole table lies in `../shared/reference` and
is read where it is there. Values are random: an adapter is its names and shapes, and so is a base.

What a merge must give is worked out from the resolution that the table records (which tensors on disk a module of
the adapter means, seen by experiment) and from the formulas below, in float64.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from paths import ROOT, SHARED
from safetensors.torch import save_file
from torch import Tensor

FIXTURE = ROOT / "fixtures" / "layouts.json"
WHOLE = SHARED / "reference" / "layouts.json"
PREFIX = "base_model.model."
RANK, ALPHA = 4, 6.0
CONV1D = ("c_attn", "c_proj", "c_fc")  # of GPT-2: stored (in, out)
ON_FIRST, ON_LAST = "A on the first matrix dimension", "A on the last matrix dimension"


@dataclass(frozen=True)
class Step:
    """One module of an adapter, and what it means on disk."""

    module: str
    parameter: str  # of the module, where a parameter is adapted itself
    rule: str
    disk: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One model as one release of transformers saves it, with an adapter that PEFT saved then."""

    model: str
    release: str
    arch: str
    model_type: str
    disk: Mapping[str, tuple[int, ...]]
    memory: Mapping[str, tuple[int, ...]]
    adapter: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    steps: tuple[Step, ...]
    tied: bool | None = None

    def says_the_same(self, other: Cell) -> bool:
        return (self.disk, self.adapter, self.steps) == (other.disk, other.adapter, other.steps)

    @property
    def newest(self) -> bool:
        return self.release.startswith("5.")


def read_cells() -> dict[str, dict[str, Cell]]:
    """Model → release → cell, of the whole table where it is there, else of the excerpt.

    A release that changed nothing for a model stands for the ones before it.
    """
    found: dict[str, dict[str, Cell]] = {}
    for model, facts in read_models(WHOLE if WHOLE.is_file() else FIXTURE).items():
        releases = dict(cells_of(model, facts))
        later = releases.get("4.57")
        if later and "4.49" in releases and releases["4.49"].says_the_same(later):
            del releases["4.49"]
        found[model] = releases
    return found


def read_models(path: Path) -> dict[str, Any]:
    models: dict[str, Any] = json.loads(path.read_text())["models"]
    return models


def cells_of(model: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    for name, found in facts["versions"].items():
        if not found.get("resolution"):
            continue  # that release did not know the model
        release = name.removeprefix("transformers-").partition(".")
        release_name = f"{release[0]}.{release[2].partition('.')[0]}"
        disk = shapes(found["disk"])
        memory = disk if found["memory"] == "same_as_disk" else shapes(found["memory"])
        steps = []
        for each in found["resolution"]:
            module, _, parameter = each["adapter_module"].partition(" [")
            steps.append(Step(module, parameter.rstrip("]"), each["rule"], tuple(each["disk"])))
        yield (
            release_name,
            Cell(
                model,
                release_name,
                facts["arch"],
                facts["model_type"],
                disk,
                memory,
                shapes(found["adapter"]),
                found["adapter_config"],
                tuple(steps),
                found.get("tie_word_embeddings"),
            ),
        )


def shapes(table: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of entries that are [shape, dtype] or a shape."""
    return {name: tuple(entry[0] if entry and isinstance(entry[0], list) else entry) for name, entry in table.items()}


# -- values ------------------------------------------------------------------------------------------


def random_tensors(table: Mapping[str, tuple[int, ...]], seed: int, spread: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * spread for name, shape in table.items()}


def write_base(folder: Path, cell: Cell, tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config: dict[str, Any] = {"architectures": [cell.arch], "model_type": cell.model_type}
    if cell.tied is not None:
        config["tie_word_embeddings"] = cell.tied
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, cell: Cell, tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        **{key: value for key, value in cell.config.items() if value is not None},
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


# -- the formulas ------------------------------------------------------------------------------------


def pair(tensors: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """(A, B) of a module in float64."""
    return tuple(tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "AB")  # type: ignore[return-value]


def linear(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · BA, which has the shape (out, in)."""
    return scale * (b @ a)


def experts(a: Tensor, b: Tensor, count: int, scale: float, side: str) -> Tensor:
    """The change of a (count, rows, columns) parameter.

    Rows of A are expert-major (expert · rank + k), columns of B rank-major (k · count + expert).
    """
    rank = a.shape[0] // count
    by_expert = a.reshape(count, rank, -1)  # (e, k, ·)
    by_rank = b.reshape(-1, rank, count)  # (·, k, e)
    if side == ON_FIRST:
        return scale * torch.einsum("eki,jke->eij", by_expert, by_rank)
    return scale * torch.einsum("ike,ekj->eij", by_rank, by_expert)


def side_of(cell: Cell) -> str:
    """Which dimension A lies on, by the release of PEFT that saved the adapter and by the class."""
    return ON_FIRST if not cell.newest or cell.model_type == "gpt_oss" else ON_LAST


def is_gate_up(parameter: str) -> bool:
    return parameter == "gate_up_proj"


def parameter_scale(cell: Cell, parameter: str) -> float:
    """α/r of an expert parameter; its patterns, where there are any, name gate_up_proj."""
    rank = next((r for key, r in (cell.config.get("rank_pattern") or {}).items() if is_gate_up(parameter)), RANK)
    alpha = next((r for key, r in (cell.config.get("alpha_pattern") or {}).items() if is_gate_up(parameter)), ALPHA)
    return float(alpha) / float(rank)


@dataclass
class Expected:
    """Tensors of a merged base in float64, and how far float32 may be from them."""

    tensors: dict[str, Tensor]
    edited: set[str] = field(default_factory=set)

    def add(self, name: str, change: Tensor, rows: slice = slice(None)) -> None:
        part = self.tensors[name][rows]
        assert part.shape == change.shape, f"{name}: the table is at odds with itself"
        self.tensors[name] = self.tensors[name].clone()
        self.tensors[name][rows] = part + change
        self.edited.add(name)


def expected(cell: Cell, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> Expected:
    """`base`, on the disk that the cell's steps speak of, with the adapter merged."""
    out = Expected({name: tensor.double() for name, tensor in base.items()})
    for step in cell.steps:
        if step.rule.startswith("full-"):
            (name,) = step.disk
            out.tensors[name] = adapter[f"{PREFIX}{step.module}"].double()
            out.edited.add(name)
            continue
        a, b = pair(adapter, step.module)
        if step.rule == "param->per-expert":
            grids = [expand(pattern) for pattern in step.disk]
            assert len(grids) == 1
            per_expert = grids[0]  # expert → the tensors that its rows are parts of
            change = experts(a, b, len(per_expert), parameter_scale(cell, step.parameter), side_of(cell))
            for names, matrix in zip(per_expert, change, strict=True):
                for name, part in zip(names, matrix.chunk(len(names)), strict=True):
                    out.add(name, part)
        elif step.rule == "gate|up->fused":
            (name,) = step.disk
            half = out.tensors[name].shape[0] // 2
            rows = slice(0, half) if step.module.endswith("gate_proj") else slice(half, None)
            out.add(name, linear(a, b, ALPHA / RANK), rows)
        else:
            assert step.rule in ("exact", "rename", "prefix", "param-exact"), step.rule
            (name,) = step.disk
            shape = out.tensors[name].shape
            if len(shape) == 3:
                out.add(name, experts(a, b, shape[0], parameter_scale(cell, step.parameter), side_of(cell)))
            else:
                change = linear(a, b, ALPHA / RANK)
                turned = cell.model_type == "gpt2" and step.module.endswith(CONV1D)
                out.add(name, change.T if turned else change)
    return out


def expand(pattern: str) -> list[list[str]]:
    """`x.{0..3}.w1|w3.weight` as one list for each expert."""
    match = re.fullmatch(r"(.+)\.\{(\d+)\.\.(\d+)\}\.([^.]+)\.weight", pattern)
    assert match, pattern
    head, first, last, leaves = match.groups()
    return [
        [f"{head}.{expert}.{leaf}.weight" for leaf in leaves.split("|")] for expert in range(int(first), int(last) + 1)
    ]


# -- from one disk to another ------------------------------------------------------------------------

# Where the newest release saves another name than the older ones: (on the older disks, on the newest one).
RESPELLED = (("vision_tower.vision_model.", "vision_tower."), ("text_model.", ""))


def newest_names(old: Cell, newest: Cell) -> dict[str, str]:
    """Tensor on the disk of an older release → the same one on the disk of the newest."""
    names: dict[str, str] = {}
    for name in old.disk:
        spellings = [name, *(name.replace(before, after) for before, after in RESPELLED if before in name)]
        if found := [spelling for spelling in spellings if spelling in newest.disk]:
            names[name] = found[0]
    return names


def carried(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in another release's shape: experts are stored (rows, columns) or (columns, rows)."""
    return tensor if tuple(tensor.shape) == shape else tensor.transpose(1, 2).contiguous()


def in_memory(newest: Cell, disk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the newest release holds in memory of the tensors of its disk.

    Known to correspond are the modules that its adapter targets, and all that has one name and one shape in both.
    """
    made = {n: disk[n] for n, shape in newest.memory.items() if n in disk and tuple(disk[n].shape) == shape}
    for step in newest.steps:
        name = memory_name(step)
        if step.rule == "param->per-expert":
            made[name] = torch.stack([torch.cat([disk[part] for part in names]) for names in expand(step.disk[0])])
        elif step.rule == "gate|up->fused":
            gate, up = disk[step.disk[0]].chunk(2)
            made[name] = (gate if step.module.endswith("gate_proj") else up).clone()
        else:
            made[name] = disk[step.disk[0]]
        assert tuple(made[name].shape) == newest.memory[name], name
    return made


def memory_name(step: Step) -> str:
    """What the newest release calls the weight of one of its own modules."""
    if step.rule.startswith("full-"):
        return step.module
    container = step.module
    while container.endswith(".base_layer"):
        container = container.removesuffix(".base_layer")
    return f"{container}.{step.parameter or 'weight'}"


def loaded_as_is(newest: Cell) -> Cell:
    """The same cell with the layout in memory as its disk."""
    rule = {"param->per-expert": "param-exact", "gate|up->fused": "exact", "rename": "exact"}
    steps = tuple(replace(s, rule=rule.get(s.rule, s.rule), disk=(memory_name(s),)) for s in newest.steps)
    return replace(newest, disk=newest.memory, steps=steps)
