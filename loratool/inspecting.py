"""What is in an adapter or a checkpoint, from headers and configs alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.errors import printable
from loratool.fetching import headers
from loratool.formats import peft, read_adapter
from loratool.formats.peft import support
from loratool.updates import LowRank, Replace

if TYPE_CHECKING:
    from loratool.adapter import Adapter
    from loratool.updates import Update


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter as its headers and config describe it."""

    kind: Literal["adapter"]
    path: str
    format: str
    peft_type: str
    variants: tuple[str, ...]
    base: str
    ranks: Mapping[str, int]  # rank → modules that have it
    alphas: Mapping[str, int]
    scalings: Mapping[str, int]  # α/r or α/√r → modules
    rslora: bool
    targets: tuple[tuple[str, str, int], ...]  # (module name, shape of its weight, how many)
    saved: tuple[str, ...]  # tensors that replace the base's
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    unsupported: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        from loratool.report import adapter_text

        return adapter_text(self)


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint as its headers and config describe it."""

    kind: Literal["checkpoint"]
    path: str
    architecture: str
    tensors: int
    parameters: int
    bytes: int  # of tensor data
    dtypes: Mapping[str, int]
    files: Mapping[str, int]  # weight file → bytes
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        from loratool.report import checkpoint_text

        return checkpoint_text(self)


def inspect(path: str | os.PathLike[str]) -> AdapterFacts | CheckpointFacts:
    """Describe the adapter or checkpoint at `path` without reading a tensor.

    Raises `InputError` when it is neither, or malformed.
    """
    with headers(path) as location:
        if location.is_dir() and peft.recognises(location) and not (location / "config.json").exists():
            return adapter_facts(read_adapter(location), Path(path))
        if location.is_file() and location.suffix == ".safetensors" and (location.parent / peft.CONFIG).is_file():
            return adapter_facts(read_adapter(location), Path(path))
        return checkpoint_facts(open_checkpoint(location), Path(path))


def adapter_facts(adapter: Adapter, path: Path) -> AdapterFacts:
    found = {target: low_rank_in(update) for target, update in adapter.updates.items()}
    factors = {target: update for target, update in found.items() if update is not None}
    rslora = bool(adapter.config.get("use_rslora", False))
    alphas = (u.scale * (u.rank**0.5 if rslora else u.rank) for u in factors.values())
    shapes = Counter((t.split(".")[-2] if "." in t else t, "×".join(map(str, u.shape))) for t, u in factors.items())
    unused = tuple(f"tensor {printable(name)} has no known place" for name in adapter.unused)
    return AdapterFacts(
        kind="adapter",
        path=printable(path),
        format=adapter.format,
        peft_type=printable(adapter.config.get("peft_type", "LORA")),
        variants=support.variants(adapter.config),
        base=printable(adapter.config.get("base_model_name_or_path") or ""),
        ranks=count(str(u.rank) for u in factors.values()),
        alphas=count(f"{alpha:.6g}" for alpha in alphas),
        scalings=count(f"{u.scale:.6g}" for u in factors.values()),
        rslora=rslora,
        targets=tuple((printable(name), shape, n) for (name, shape), n in shapes.items()),
        saved=tuple(printable(t) for t, u in adapter.updates.items() if isinstance(u, Replace)),
        parameters=adapter.parameters,
        bytes=adapter.file.layout.size,
        dtypes=count(t.dtype for t in adapter.file.tensors.values()),
        unsupported=(*adapter.unsupported, *unused),
        notes=adapter.notes,
    )


def low_rank_in(update: Update) -> LowRank | None:
    """The low-rank update that this is, or that others are built around."""
    inner = getattr(update, "inner", update)
    if isinstance(inner, LowRank):
        return inner
    return None if inner is update else low_rank_in(inner)


def checkpoint_facts(checkpoint: Checkpoint, path: Path) -> CheckpointFacts:
    classes = checkpoint.architectures or (checkpoint.model_type,)
    return CheckpointFacts(
        kind="checkpoint",
        path=printable(path),
        architecture=", ".join(printable(c) for c in classes if c),
        tensors=len(checkpoint.tensors),
        parameters=sum(t.elements for t in checkpoint.tensors.values()),
        bytes=sum(t.nbytes for t in checkpoint.tensors.values()),
        dtypes=count(t.dtype for t in checkpoint.tensors.values()),
        files={printable(shard.path.name): shard.layout.size for shard in checkpoint.shards},
        side_files=tuple(map(printable, checkpoint.side_files)),
        left_out=checkpoint.left_out,
        notes=checkpoint.notes,
    )


def count(values: object) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    return dict(Counter(values).most_common())  # type: ignore[call-overload]
