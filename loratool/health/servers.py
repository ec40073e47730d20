"""What servers of adapters refuse, or read otherwise than it was trained, and the command that makes it what they read.

vLLM reads one α/r (or α/√r) for all modules, linear layers only, ranks up to what it was started with, and no DoRA, saved
modules or biases; SGLang fuses q, k, v and gate, up; llama.cpp's converter reads one α and nothing but A and B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import printable
from loratool.health.findings import Finding, command, quoted, some
from loratool.layouts.architectures import INPUT_EMBEDDINGS, OUTPUT_HEADS
from loratool.updates import Add, ExpertFactors, LowRank, Magnitude, Replace, ReplaceRows, Residual

if TYPE_CHECKING:
    from loratool.adapter import Adapter
    from loratool.fitting import Fit
    from loratool.updates import Update

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
VLLM_DEFAULT = 16
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by SGLang


@dataclass(frozen=True)
class Served:
    """What of an adapter matters to a server."""

    adapter: Adapter
    path: Path
    fit: Fit | None

    @property
    def config(self) -> Any:
        return self.adapter.config

    @cached_property
    def ranks(self) -> list[int]:
        """Ranks of the low-rank updates, the largest last."""
        inner = (innermost(update) for update in self.adapter.updates.values())
        return sorted({update.rank for update in inner if isinstance(update, LowRank)})

    @cached_property
    def modules(self) -> list[str]:
        """The adapted layers, each by its whole path."""
        updates = self.adapter.updates.items()
        changed = [t for t, u in updates if isinstance(innermost(u), (LowRank, ExpertFactors))]
        return [target.removesuffix(".weight") for target in changed]

    @cached_property
    def patterned(self) -> bool:
        """Whether modules differ in α/r, or in rank, so that one number does not do for all."""
        scales = {u.scale for u in map(innermost, self.adapter.updates.values()) if isinstance(u, LowRank)}
        return len(scales) > 1 or bool(self.config.get("alpha_pattern"))

    def of(self, *kinds: type[Update]) -> list[str]:
        """Targets with an update of some kinds."""
        return [t for t, u in self.adapter.updates.items() if isinstance(u, kinds)]

    def called(self, names: frozenset[str]) -> list[str]:
        """Adapted modules of some names."""
        return [module for module in self.modules if module.rpartition(".")[2] in names]

    @property
    def merge(self) -> str:
        base = quoted(Path(self.fit.base.path)) if self.fit else "BASE"
        return f"loratool merge {base} {quoted(self.path)} -o OUT"

    @property
    def plain(self) -> str:
        """The command that writes plain LoRA of one rank whose α is its rank."""
        if len(self.ranks) > 1:
            return command("resize", self.path, f"--rank {self.ranks[-1]} --uniform")
        return command("rescale", self.path, "--bake")


def innermost(update: Update) -> Update:
    inner = getattr(update, "inner", None)
    return innermost(inner) if inner is not None else update


def look_at_servers(adapter: Adapter, path: Path, fit: Fit | None) -> Iterator[Finding]:
    """What each server would do with it."""
    if str(adapter.config.get("peft_type", "LORA")) != "LORA":
        kind = printable(adapter.config.get("peft_type"))
        yield Finding(
            "note",
            "vllm-type",
            f"vLLM and llama.cpp read LoRA's two factors; {kind} has others",
            "" if adapter.unsupported else f"loratool merge BASE {quoted(path)} -o OUT",
        )
        return
    served = Served(adapter, path, fit)
    yield from vllm(served)
    yield from sglang(served)
    yield from llama_cpp(served)


def vllm(served: Served) -> Iterator[Finding]:
    config, largest = served.config, served.ranks[-1] if served.ranks else 0
    if largest > VLLM_RANKS[-1]:
        yield note(
            "vllm-rank",
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this has {largest}",
            command("resize", served.path, f"--rank {VLLM_RANKS[-1]} --uniform"),
        )
    elif largest > VLLM_DEFAULT:
        enough = next(rank for rank in VLLM_RANKS if rank >= largest)
        yield note(
            "vllm-rank",
            f"vLLM refuses rank {largest} unless it is started with --max-lora-rank {enough}; its default is "
            f"{VLLM_DEFAULT}, its choices {', '.join(map(str, VLLM_RANKS))}",
            command("resize", served.path, f"--rank {VLLM_DEFAULT} --uniform"),
        )
    if len(served.ranks) > 1 or served.patterned or config.get("rank_pattern"):
        yield note(
            "vllm-patterns",
            "vLLM reads one r and one α for all modules: rank_pattern and alpha_pattern are silently dropped, so "
            "modules get another strength",
            served.plain,
        )
    if config.get("use_rslora") is True and (experts := served.of(ExpertFactors)):
        yield note(
            "vllm-rslora",
            f"older releases of vLLM read rsLoRA as α/r on experts ({some(experts)})",
            served.plain,
        )
    if config.get("use_dora") is True:
        yield note("vllm-dora", "vLLM refuses DoRA", served.merge)
    if saved := [*served.of(Replace), *served.adapter.bases]:
        yield note("vllm-saved", f"vLLM refuses most modules that are saved whole ({some(saved)})", served.merge, saved)
    if config.get("lora_bias") is True or config.get("bias") not in (None, "none"):
        yield note("vllm-bias", "vLLM refuses lora_bias, and bias other than none", served.merge, served.of(Add))
    if served.of(ReplaceRows):
        yield note("vllm-tokens", "vLLM has no place for trained token rows", served.merge, served.of(ReplaceRows))
    if embeddings := served.called(INPUT_EMBEDDINGS | OUTPUT_HEADS):
        yield note(
            "vllm-embeddings",
            f"vLLM takes LoRA on embeddings and heads only of model classes that list them ({some(embeddings)})",
            served.merge,
            embeddings,
        )
    odd = [t for t, u in served.adapter.updates.items() if getattr(innermost(u), "kernel", ())]
    if odd := [*odd, *served.of(ExpertFactors)]:
        yield note(
            "vllm-layers",
            f"vLLM adapts linear layers; convolutions and target_parameters are none ({some(odd)})",
            served.merge,
            odd,
        )
    if moved := [t for t, u in served.adapter.updates.items() if isinstance(u, Residual)]:
        yield note(
            "servers-base-moved",
            f"servers add s · BA to the original base, from which training had taken a part ({some(moved)})",
            served.merge,
            moved,
        )


def sglang(served: Served) -> Iterator[Finding]:
    layers: dict[str, set[str]] = {}
    for module in served.modules:
        parent, _, name = module.rpartition(".")
        layers.setdefault(parent, set()).add(name)
    for together in FUSED:
        lacking = {name for found in layers.values() if found & set(together) for name in set(together) - found}
        if lacking:
            yield note(
                "sglang-fused",
                f"SGLang fuses {', '.join(together)}; older releases fail where one of them has no factors "
                f"(here {' and '.join(sorted(lacking))})",
                served.merge,
            )
    if served.patterned:
        yield note(
            "sglang-patterns",
            "older releases of SGLang read one α/r for all modules, so modules get another strength",
            served.plain,
        )


def llama_cpp(served: Served) -> Iterator[Finding]:
    config = served.config
    ignored = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if ignored:
        yield note(
            "llama.cpp-scaling",
            f"llama.cpp's converter copies lora_alpha alone and ignores {', '.join(ignored)}, so modules get another "
            "strength",
            served.plain,
        )
    refused = ["DoRA's magnitudes"] if served.of(Magnitude) else []
    refused += ["modules saved whole"] if served.of(Replace) or served.adapter.bases else []
    refused += ["lora_B.bias"] if served.of(Add) else []
    refused += ["token rows"] if served.of(ReplaceRows) else []
    if refused:
        yield note(
            "llama.cpp-tensors",
            f"llama.cpp's converter ends at any tensor that is neither A nor B: {', '.join(refused)}",
            served.merge,
        )
    heads = served.called(OUTPUT_HEADS)
    if heads and served.fit and any(served.fit.tied()):
        yield note(
            "llama.cpp-tied-head",
            f"llama.cpp's converter refuses LoRA on a head that is tied to the embedding ({some(heads)})",
            served.merge,
            heads,
        )


def note(code: str, message: str, repair: str, where: list[str] | None = None) -> Finding:
    return Finding("note", code, message, repair, tuple(map(printable, where or ())))
