"""How adapters of image and video models are written: the names of tensors, where the scale is, and the header.

diffusers reads no α from tensors, and ComfyUI none from a header: what is written for either holds the scale in its
factors, and both read it alike. All others have α as a tensor of each module.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.format import Format, Parts, Shape, Spelling, told_losses
from loratool.adapters.formats.named.card import common
from loratool.adapters.formats.named.dialects import NORMS, ORIGINAL_NORMS
from loratool.adapters.formats.roles.names import RESHAPE, of_factors
from loratool.adapters.layers import Form, Kind
from loratool.algebra.lowrank.products import Product
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.replacing import Replace
from loratool.errors import FitError, printable
from loratool.files.model_files import RECORD_KEY
from loratool.files.tensor_writer import OF_DATA
from loratool.lazy import Tensor
from loratool.notes import Note


@dataclass(frozen=True)
class Dialect:
    """One way to name tensors."""

    name: str
    down: str  # behind the name of a module
    up: str
    magnitude: str
    alpha: bool  # whether it has α as a tensor
    flat: bool  # whether names of modules have no dots
    network: str = ""  # what kohya's tools call the kind of network
    standard: bool = False  # whether magnitudes have a dimension for the weight's columns
    biases: bool = True  # whether factors may have a bias
    changes: bool = False  # whether a weight or bias may be changed in full
    values: re.Pattern[str] | None = None  # the weights that may be replaced in full


KOHYA = (".lora_down.weight", ".lora_up.weight", ".dora_scale", True, True)
DIALECTS: Mapping[str, Dialect] = {
    row.name: row
    for row in (
        Dialect(
            "diffusers",
            ".lora_A.weight",
            ".lora_B.weight",
            ".lora_magnitude_vector",
            False,
            False,
            values=re.compile(rf"(?:{NORMS}|{ORIGINAL_NORMS})"),
        ),
        Dialect("kohya", *KOHYA, network="networks.lora", standard=True, biases=False),
        Dialect(
            "comfy",
            ".lora_down.weight",
            ".lora_up.weight",
            ".dora_scale",
            True,
            False,
            standard=True,
            changes=True,
            values=re.compile(r"(?!.*\.bias$).*"),
        ),
        Dialect("lycoris", *KOHYA, network="lycoris.kohya", standard=True, changes=True),
    )
}
# What kohya's tools call the module that trains an architecture, where it is one of its own.
NETWORKS = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3", "lumina2": "networks.lora_lumina"}
# What they call the model.
MODELS = {
    "sd15": "sd_v1",
    "sd2": "sd_v2",
    "sdxl": "sdxl_base_v1-0",
    "flux": "flux1",
    "lumina2": "lumina2",
}
# Entries of a header that are true of one file alone; what they say is computed anew, or left out.
OF_ONE_FILE = frozenset(
    {
        *(
            "format",
            "sshs_model_hash",
            "sshs_legacy_hash",
            "modelspec.hash_sha256",
            "lora_adapter_metadata",
            RECORD_KEY,
        ),
        *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
    }
)
OWN_WORDS = ("te_", "te1_", "te2_", "te3_", "unet_", "prior_")  # of components, which `lora_` comes before


class NamedNames(Spelling):
    """Names and layouts of an adapter that is written in one of these dialects."""

    def __init__(self, form: Format, kinds: Mapping[str, Kind], dialect: str) -> None:
        self.form, self.kinds, self.dialect = form, kinds, DIALECTS[dialect or next(iter(DIALECTS))]
        self.reader, self.flattens = self.dialect.name, self.dialect.flat
        self.scales_biases = self.dialect.name == "diffusers"
        if odd := [t for t, kind in kinds.items() if kind not in (Kind.LINEAR, Kind.CONVOLUTION)]:
            raise FitError(f"{dialect} cannot store LoRA of embeddings or experts:", map(printable, odd))

    def module(self, target: str) -> str:
        """What the tensors of a module begin with."""
        module = target.rpartition(".")[0]
        if self.dialect.flat:
            return f"lora_{module}" if module.startswith(OWN_WORDS) else f"lycoris_{module}"
        if self.dialect.name == "comfy" and not module.startswith("diffusion_model."):
            component, _, path = module.partition(".")
            return f"text_encoders.{component}.transformer.{path}"
        return module

    def factors(self, target: str) -> tuple[str, str]:
        return self.module(target) + self.dialect.down, self.module(target) + self.dialect.up

    def shapes(self, form: Form) -> tuple[Shape, Shape]:
        if form.kind is Kind.CONVOLUTION:
            channels = form.columns // math.prod(form.kernel)
            return (form.rank, channels, *form.kernel), (form.rows, form.rank, *(1 for _ in form.kernel))
        return (form.rank, form.columns), (form.rows, form.rank)

    def stored(self, form: Form, found: Product) -> tuple[Tensor, Tensor]:
        of_a, of_b = self.shapes(replace(form, rank=found.rank))
        return found.down.reshape(of_a).contiguous(), found.up.reshape(of_b).contiguous()

    def keeps(self, form: Form) -> bool:  # noqa: ARG002 (all it can store)
        return True

    def magnitude(self, target: str) -> str:
        return self.module(target) + self.dialect.magnitude

    def lengths(self, form: Form, columns: int = 0) -> Shape:
        ones = (1 for _ in form.kernel)
        if columns and not self.dialect.standard:
            return super().lengths(form, columns)
        if columns:
            return (1, columns, *ones)
        if self.dialect.standard:
            return (form.rows, 1, *ones)
        return (1, form.rows, *ones) if form.kernel else (form.rows,)

    def bias(self, target: str) -> str:
        return self.module(target) + (".lora_B.bias" if self.dialect.name == "diffusers" else ".diff_b")

    def change(self, target: str, norm: bool = False) -> str:
        """LyCORIS has roles of their own for norms; ComfyUI reads both.

        Files with kohya's names have such changes too, which kohya's own tools do not read.
        """
        if self.dialect.name == "diffusers":
            return super().change(target, norm)
        of_norm = norm and self.dialect.name == "lycoris"
        weight, bias = ("w_norm", "b_norm") if of_norm else ("diff", "diff_b")
        return f"{self.module(target)}.{bias if target.endswith('.bias') else weight}"

    def whole(self, target: str, inside: bool) -> str:
        """ComfyUI's role, or the weight's own name for the norms that diffusers' Flux replaces."""
        if inside or not self.dialect.values:
            return super().whole(target, inside)
        return target if self.dialect.name == "diffusers" else f"{self.module(target)}.set_weight"

    def widened(self, target: str) -> str:
        return f"{self.module(target)}.{RESHAPE}" if self.dialect.name == "comfy" else ""

    def of_one_rank(self) -> list[tuple[str, ...]]:
        return []

    def scales(self, wanted: Mapping[str, float]) -> dict[str, float]:
        """α/r for each module, as a number that is not negative; or 1 for all."""
        return {target: abs(scale) if self.dialect.alpha else 1.0 for target, scale in wanted.items()}

    def strengths(self, parts: Parts) -> dict[str, float]:
        """α of every module."""
        if not self.dialect.alpha:
            return {}
        alphas = {target: rank * parts.scales.get(target, 1.0) for target, rank in parts.ranks.items()}
        return {f"{self.module(target)}.alpha": alpha for target, alpha in alphas.items()}

    def header(self, sources: Sequence[Adapter], parts: Parts) -> dict[str, str]:
        """What the headers of all sources agree on, as far as it is still true, and what kohya's tools want to know.

        What only one of them says, such as its trigger phrase, would be taken for a fact of the whole.
        """
        kept = self.agreed(sources)
        if not self.dialect.network:
            return kept
        alphas = [rank * parts.scales.get(target, 1.0) for target, rank in parts.ranks.items()]
        network = NETWORKS.get(parts.architecture, self.dialect.network)
        told = {
            "ss_network_module": self.dialect.network if self.dialect.name == "lycoris" else network,
            "ss_network_dim": only(parts.ranks.values()),
            "ss_network_alpha": only(alphas),
            "sshs_model_hash": OF_DATA,
        }
        if model := MODELS.get(parts.architecture):
            told |= {"ss_base_model_version": kept.get("ss_base_model_version", model)}
            told |= {"ss_v2": str(parts.architecture == "sd2")}
        return {**kept, **told}

    def describe(self, sources: Sequence[Adapter], parts: Parts) -> dict[str, Any]:  # noqa: ARG002 (it has no config)
        """What the headers of all sources say, for the card."""
        return self.agreed(sources)

    def agreed(self, sources: Sequence[Adapter]) -> dict[str, str]:
        """What the headers of all sources say alike, and may be true of another file."""
        own = [source.config if source.format == self.form.name else {} for source in sources]
        return {key: value for key, value in common(own).items() if key not in OF_ONE_FILE}


def only(values: Iterable[float]) -> str:
    """The one number that all are, else the word that kohya's tools have for several."""
    found = Counter(values)
    return f"{next(iter(found)):g}" if len(found) == 1 else "Dynamic"


def losses(adapter: Adapter, dialect: str) -> tuple[Note, ...]:
    """What of an adapter a dialect cannot hold."""
    return told_losses(
        adapter, "not-in-dialect", f"{dialect} cannot store", partial(unspeakable, adapter, DIALECTS[dialect])
    )


def unspeakable(adapter: Adapter, dialect: Dialect, target: str, update: Update) -> str:
    """What of an update a dialect cannot hold, in words; empty where it holds all of it."""
    inner = update.inner if isinstance(update, Magnitude) else update
    match inner:
        case LowRank(table=False):
            by_column = isinstance(update, Magnitude) and update.by_column
            return "DoRA of input columns" if by_column and not dialect.standard else ""
        case LowRank():
            return "LoRA of embeddings"
        case Add() if of_factors(target, adapter.sources):
            return "" if dialect.biases else "changes of biases"
        case Add():
            return "" if dialect.changes else "changes stored in full"
        case Replace() if target not in adapter.bases and dialect.values and dialect.values.fullmatch(target):
            return ""
        case Replace():
            return "tensors saved whole"
    return {
        "ExpertFactors": "LoRA of fused experts",
        "ReplaceRows": "token rows",
    }.get(type(inner).__name__, "updates other than a product of two factors")
