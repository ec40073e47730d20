"""What servers make of adapters, for `--for`: the dialect that each reads, and what has to be baked into the factors.

Rules age. Each row has the release it was seen in and when; `docs/servers.md` is made of this table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.adapters.model_settings import model_types
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.errors import UsageError, printable

WORDS: Mapping[type[Update], str] = {
    Magnitude: "DoRA",
    Replace: "modules saved whole",
    ReplaceRows: "token rows",
    Add: "biases",
}
CONVOLUTIONS = "LoRA of convolutions"


@dataclass(frozen=True)
class Server:
    """What one release of a server, and later ones as far as is known, take."""

    name: str
    release: str
    seen: str  # year and month
    dialect: str  # that it reads, a word of `--to`
    uniform: bool = False  # whether all layers must have one rank
    plain: bool = False  # whether α must be the rank, so that the scale is in the factors
    ranks: tuple[int, ...] = ()  # that can be asked of it; any where there are none
    refuses: tuple[type[Update], ...] = ()
    convolutions: bool = True  # whether it takes LoRA of them
    images: bool = False  # whether it is known to serve image models
    apart: bool = False  # whether it reads LoRA on experts one by one
    fused: frozenset[str] = frozenset()  # model types whose experts it reads in one parameter all the same
    why: str = ""  # what it makes of adapters that are written otherwise

    def __str__(self) -> str:
        return f"{self.name} {self.release} ({self.seen})"

    def rank(self, largest: int) -> int:
        """The rank of its that holds the largest one. Raises `UsageError` where there is none."""
        if self.ranks and largest > self.ranks[-1]:
            raise UsageError(f"{self} takes ranks up to {self.ranks[-1]}, and this adapter has {largest}; pass --rank")
        return self.raised(largest)

    def raised(self, rank: int) -> int:
        """The smallest rank of its that holds this one; the same where any can be asked for, or none is as large."""
        return next((each for each in self.ranks if each >= rank), rank)

    def splits(self, config: Mapping[str, Any]) -> bool:
        """Whether experts of a model with this config, or of an unknown one, have to be apart for it."""
        return self.apart and not self.fused & model_types(config)

    def refused(self, update: Update) -> str:
        """What of an update it refuses, in words; empty for nothing."""
        if not self.convolutions and isinstance(update, LowRank) and update.kernel:
            return CONVOLUTIONS
        return next((WORDS[kind] for kind in self.refuses if isinstance(update, kind)), "")


NOT_LORA = (Magnitude, Replace, ReplaceRows, Add)
# By the word of `--for`; of several rows the newest first.
SERVERS: Mapping[str, tuple[Server, ...]] = {
    "vllm": (
        Server(
            "vLLM",
            "0.32.0",
            "2026-11",
            "peft",
            uniform=True,
            plain=True,
            ranks=(8, 16, 32, 64, 128, 256, 320, 512),
            refuses=NOT_LORA,
            apart=True,
            # classes with `is_3d_moe_weight`
            fused=frozenset(
                {"gpt_oss", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}
                | {"qwen3_omni_moe", "qwen3_omni_moe_thinker", "interns1_pro"}
            ),
            convolutions=False,
            why="older releases ignore rank and alpha patterns; it refuses DoRA, saved modules and biases, and "
            "accepts LoRA on embeddings and output heads for models whose class lists them",
        ),
    ),
    "sglang": (
        Server(
            "SGLang",
            "0.5.23",
            "2026-11",
            "peft",
            uniform=True,
            plain=True,
            refuses=NOT_LORA,
            apart=True,
            convolutions=False,
            why="it always scales by lora_alpha / r and ignores rsLoRA and patterns",
        ),
    ),
    "llama.cpp": (
        Server(
            "llama.cpp",
            "with gguf-py 0.19",
            "2026-11",
            "gguf",
            refuses=NOT_LORA,
            why="one alpha for all modules; its converter ignores rsLoRA and patterns",
        ),
    ),
    "mlx": (Server("mlx-lm", "of 2026-08", "2026-11", "mlx", refuses=(Replace, ReplaceRows, Add)),),
    "comfyui": (
        Server(
            "ComfyUI",
            "of 2026-01",
            "2026-11",
            "comfy",
            refuses=(Magnitude, ReplaceRows),
            images=True,
            why="it reads alpha from tensors only, and divides by the norm of W where DoRA divides by that of W + ΔW",
        ),
    ),
    "diffusers": (
        Server(
            "diffusers",
            "0.42.1",
            "2026-11",
            "diffusers",
            refuses=(ReplaceRows,),
            images=True,
            why="without alpha in the file every module has the scale 1; of new values it accepts only those of "
            "Flux's norms",
        ),
        Server(
            "diffusers",
            "0.32.0",
            "2026-08",
            "diffusers",
            uniform=True,
            refuses=(ReplaceRows,),
            images=True,
            why="before 0.42 adapters of several ranks get one wrong alpha for all modules",
        ),
    ),
}


def server_for(word: str) -> Server:
    """The row of `NAME` or `NAME@RELEASE`. Raises `UsageError` for a server or a release that is not known."""
    name, at, release = word.partition("@")
    if name not in SERVERS:
        raise UsageError(f"--for must be one of {', '.join(SERVERS)} (got {printable(repr(name))})")
    rows = SERVERS[name]
    if not at:
        return rows[0]
    if not re.fullmatch(r"\d+(\.\d+){0,3}", release):
        raise UsageError(f"--for {printable(word)}: a release is written like {name}@{rows[0].release}")
    asked = numbers(release)
    for row in rows:
        if not row.release[0].isdigit() or asked >= numbers(row.release):
            return row
    raise UsageError(f"--for {printable(word)}: what releases before {rows[-1].release} take is not known")


def numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release))
