"""What servers of adapters refuse, or read otherwise than it was trained, and the command that makes it what they read.

Such facts age. Each has in `FACTS` the release that it was seen in, and when; the message says both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import WRITTEN, format_of
from loratool.adapters.kinds import image_models, kinds_of_adapter
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.errors import printable
from loratool.grouping import by_key
from loratool.layouts.architectures import INPUT_EMBEDDINGS, OUTPUT_HEADS
from loratool.results.findings import Finding, command, quoted
from loratool.reworking.converting.servers import SERVERS, Server
from loratool.templates import some

if TYPE_CHECKING:
    from loratool.bases.adapter_fit import Fit


# What a fact about a server was seen in: the release that `convert --for` goes by too
VLLM, SGLANG = (SERVERS[word][0] for word in ("vllm", "sglang"))
CONVERTER = Server("llama.cpp's converter", "in llama-cpp-python 0.3.36", "2026-11", "gguf")
# or single files of their repositories, whose release is not recorded
VLLM_FILES, SGLANG_FILES, CONVERTER_FILES = (
    replace(server, release="main branch", seen="2026-08") for server in (VLLM, SGLANG, CONVERTER)
)

FACTS: Mapping[str, Server] = {
    "vllm-type": VLLM,
    "vllm-rank": VLLM,
    "vllm-dora": VLLM,
    "vllm-saved": VLLM,
    "vllm-initialisation": VLLM,
    "vllm-variant": VLLM,
    "vllm-experts": VLLM,
    "vllm-bias": VLLM_FILES,
    "vllm-tokens": VLLM_FILES,
    "vllm-embeddings": VLLM_FILES,
    "vllm-layers": VLLM_FILES,
    "sglang-scaling": SGLANG,
    "sglang-dora": SGLANG,
    "sglang-tokens": SGLANG,
    "sglang-fused": SGLANG_FILES,
    "llama.cpp-scaling": CONVERTER,
    "llama.cpp-tensors": CONVERTER_FILES,
    "llama.cpp-tied-head": CONVERTER_FILES,
}
VLLM_INITIALISATIONS = ("pissa", "olora", "corda", "loftq")  # refused
VLLM_VARIANTS = ("alora", "layer-replication", "bdlora", "qalora")  # refused; words of `Training.features`
VLLM_EXPERTS = (
    "gpt_oss",
    "qwen3_5",
    "qwen3_vl_moe",
    "qwen3_omni_moe",
    "interns1_pro",
)  # families whose fused experts it reads
VLLM_RANKS = (1, *VLLM.ranks)  # values of --max-lora-rank
VLLM_DEFAULT = 16
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by SGLang


@dataclass(frozen=True)
class Served:
    """What of an adapter matters to a server."""

    adapter: Adapter
    path: Path
    fit: Fit | None

    @cached_property
    def ranks(self) -> list[int]:
        """Ranks of the low-rank updates, the largest last."""
        inner = (innermost(update) for update in self.adapter.updates.values())
        return sorted({update.rank for update in inner if isinstance(update, LowRank)})

    @cached_property
    def modules(self) -> list[str]:
        """The adapted layers, each by its whole path."""
        changed = [t for t, u in self.adapter.updates.items() if isinstance(innermost(u), (LowRank, ExpertFactors))]
        return [target.removesuffix(".weight") for target in changed]

    @property
    def scaled(self) -> list[str]:
        """Fields of the config without which α/r is another number."""
        return self.spelled("rslora", "rank-pattern", "alpha-pattern")

    def spelled(self, *words: str) -> list[str]:
        """Those of some features that it has, as its config spells them."""
        return [self.adapter.training.features[word] for word in words if word in self.adapter.training.features]

    def of(self, *kinds: type[Update]) -> list[str]:
        """Targets with an update of some kinds."""
        return [t for t, u in self.adapter.updates.items() if isinstance(u, kinds)]

    def called(self, names: frozenset[str]) -> list[str]:
        """Adapted modules of some names."""
        return [module for module in self.modules if module.rpartition(".")[2] in names]

    @property
    def merge(self) -> str:
        """The command that merges it; empty where it cannot be merged."""
        if self.adapter.unsupported:
            return ""
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
    form = format_of(adapter)
    if adapter.dialects or image_models(kinds_of_adapter(adapter)):  # which none of them serves
        return
    if form is not WRITTEN:
        yield Finding(
            "note",
            "format",
            f"vLLM, SGLang and llama.cpp's converter read adapters as PEFT saves them; this one is in the {form.name} "
            "layout",
            command("rescale", path, "--bake"),
        )
        return
    if adapter.training.method != "LORA":
        yield note(
            "vllm-type",
            f"and {CONVERTER} read LoRA adapters only; this one is {printable(adapter.training.method)}",
            "" if adapter.unsupported else f"loratool merge BASE {quoted(path)} -o OUT",
        )
        return
    served = Served(adapter, path, fit)
    yield from vllm(served)
    yield from sglang(served)
    yield from llama_cpp(served)


def vllm(served: Served) -> Iterator[Finding]:
    training, largest = served.adapter.training, served.ranks[-1] if served.ranks else 0
    if largest > VLLM_RANKS[-1]:
        yield note(
            "vllm-rank",
            f"serves ranks up to {VLLM_RANKS[-1]}, but this adapter has {largest}",
            command("resize", served.path, f"--rank {VLLM_RANKS[-1]} --uniform"),
        )
    elif largest > VLLM_DEFAULT:
        enough = next(rank for rank in VLLM_RANKS if rank >= largest)
        yield note(
            "vllm-rank",
            f"refuses rank {largest} unless it is started with --max-lora-rank {enough}; its default is {VLLM_DEFAULT}, its "
            f"choices {', '.join(map(str, VLLM_RANKS))}",
            command("resize", served.path, f"--rank {VLLM_DEFAULT} --uniform"),
        )
    start = training.initialisation
    if start.lower().startswith(VLLM_INITIALISATIONS):
        field = training.features["initialisation"]
        yield note("vllm-initialisation", f"refuses {field} {printable(repr(start))}", served.merge)
    if refused := served.spelled(*VLLM_VARIANTS):
        yield note("vllm-variant", f"refuses {', '.join(refused)}", served.merge)
    if training.dora:
        yield note("vllm-dora", "refuses DoRA", served.merge)
    if saved := [*served.of(Replace), *served.adapter.bases]:
        yield note("vllm-saved", f"refuses modules saved whole ({some(saved)})", served.merge, saved)
    if training.lora_bias or training.bias != "none":
        yield note("vllm-bias", "refuses lora_bias, and bias other than none", served.merge, served.of(Add))
    yield from vllm_layers(served)


def vllm_layers(served: Served) -> Iterator[Finding]:
    """What it makes of updates of other things than linear layers."""
    if served.of(ReplaceRows):
        yield note("vllm-tokens", "does not support trained token rows", served.merge, served.of(ReplaceRows))
    if embeddings := served.called(INPUT_EMBEDDINGS | OUTPUT_HEADS):
        yield note(
            "vllm-embeddings",
            f"accepts LoRA on embeddings and heads only for model classes that list them ({some(embeddings)})",
            served.merge,
            embeddings,
        )
    if odd := [t for t, u in served.adapter.updates.items() if getattr(innermost(u), "kernel", ())]:
        yield note("vllm-layers", f"supports linear layers only, not convolutions ({some(odd)})", served.merge, odd)
    family = served.fit.checkpoint.model_type if served.fit and served.fit.checkpoint else ""
    experts = served.of(ExpertFactors)
    if experts and not family.startswith(VLLM_EXPERTS):
        yield note(
            "vllm-experts",
            f"reads target_parameters of {', '.join(VLLM_EXPERTS)} only; for other mixtures of experts it reads "
            f"lora_B as grouped by expert and silently serves something else ({some(experts)})",
            served.merge,
            experts,
        )


def sglang(served: Served) -> Iterator[Finding]:
    if served.scaled:
        weak = "; with rsLoRA the update is √r too weak" if "rslora" in served.adapter.training.features else ""
        yield note(
            "sglang-scaling",
            f"always scales by lora_alpha / r and ignores {', '.join(served.scaled)}{weak}",
            served.plain,
        )
    if served.of(Magnitude):
        yield note("sglang-dora", "refuses DoRA", served.merge)
    if (served.adapter.folder / "added_tokens.json").is_file():
        yield note("sglang-tokens", "refuses an added_tokens.json with token ids beyond the base's", served.merge)
    paths = (module.rpartition(".") for module in served.modules)
    layers = [{*names} for names in by_key((parent, name) for parent, _, name in paths).values()]
    for together in FUSED:
        if lacking := {name for found in layers if found & set(together) for name in set(together) - found}:
            yield note(
                "sglang-fused",
                f"fuses {', '.join(together)}; earlier releases fail if one of them has no factors (here "
                f"{' and '.join(sorted(lacking))})",
                served.merge,
            )


def llama_cpp(served: Served) -> Iterator[Finding]:
    if served.scaled:
        yield note(
            "llama.cpp-scaling",
            f"copies only lora_alpha and ignores {', '.join(served.scaled)}, so modules get a different strength",
            served.plain,
        )
    tensors = {
        "DoRA's magnitudes": served.of(Magnitude),
        "modules saved whole": [*served.of(Replace), *served.adapter.bases],
        "lora_B.bias": served.of(Add),
        "token rows": served.of(ReplaceRows),
    }
    if refused := [what for what, targets in tensors.items() if targets]:
        yield note(
            "llama.cpp-tensors",
            f"stops at any tensor that is neither A nor B: {', '.join(refused)}",
            served.merge,
        )
    heads = served.called(OUTPUT_HEADS)
    if heads and served.fit and any(served.fit.tied()):
        yield note(
            "llama.cpp-tied-head",
            f"refuses LoRA on a head that is tied to the embedding ({some(heads)})",
            served.merge,
            heads,
        )


def note(code: str, does: str, repair: str, where: list[str] | None = None) -> Finding:
    """What the server of a fact does, with the release and the month that it was seen in."""
    return Finding("note", code, f"{FACTS[code]} {does}", repair, tuple(map(printable, where or ())))
