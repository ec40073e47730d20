"""microsoft/loralib's layout: a state dict of `….lora_A` (rank, in) and `….lora_B` (out, rank), and maybe biases.

No file records α, so that the caller gives it, or the header of the safetensors file under `lora_alpha`. Layers are
stored as the model has them: (out, in), or (in, out) where it does. Of an embedding ΔW is the transpose of the product.
A MergedLinear has several A one below the other, and the B of those parts of its rows that are adapted; which these
are, only `enable_lora` in the header tells, and without it all of them are taken to be. A convolution with a kernel of k
has A (rank · k, in · k) and B (out · k, rank · k), whose product is read in the order of the weight's elements.
Facts: loralib 0.1.2, `layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.adapters.adapter import StoredTensor, derived
from loratool.adapters.formats.format import Config
from loratool.adapters.formats.found import Found, modules_with
from loratool.adapters.formats.known import LoralibFiles
from loratool.adapters.formats.rows import InParts, JoinedRows, Repeated
from loratool.adapters.formats.trainer import TrainerFormat
from loratool.adapters.training import Training
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.replacing import Replace
from loratool.errors import printable
from loratool.files.heads import HasNames
from loratool.files.safefile import FLOAT_NAMES
from loratool.layouts.architectures import INPUT_EMBEDDINGS
from loratool.notes import Note

A, B, BIAS = ".lora_A", ".lora_B", ".bias"
ALPHA, ENABLED = "lora_alpha", "enable_lora"  # in the header
WAY_OUT = (
    f"save the file once more with metadata={{{ENABLED!r}: 'true,false,true'}}, one word for each part, in the order of "
    "its rows"
)


@dataclass(frozen=True)
class Product(LowRank):
    """The product of a linear layer, or of a square convolution, which only the weight can tell."""

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        if len(shape) != 4 or shape[2] != shape[3] or shape[2] == 1:
            return super().fit(shape)
        kernel, (rows, columns) = shape[2], self.shape
        if (rows, columns) != (shape[0] * kernel, shape[1] * kernel):
            return None
        size = self.rank * kernel
        return LowRank(
            derived((shape[0], size), JoinedRows(kernel), self.up),
            derived((size, columns * kernel), Repeated(kernel), self.down),
            self.scale * kernel,  # α is divided by r, and B has r · k columns
            kernel=(kernel, kernel),
        )


class Loralib(LoralibFiles, TrainerFormat):
    """State dicts as loralib's `lora_state_dict` gives them, in safetensors."""

    title = "loralib"

    def claims(self, file: HasNames) -> frozenset[str]:
        modules = set(modules_with(file, (A, B)))
        own = frozenset(n for n in file.tensors if n.endswith((A, B)) or n.removesuffix(BIAS) in modules)
        return own if modules and not any(name.startswith("base_model.") for name in own) else frozenset()

    def training_of(self, config: Config) -> Training:  # noqa: ARG002 (there is none)
        return Training()

    def take(self, found: Found, config: Config) -> None:  # noqa: ARG002 (the same)
        header = found.file.layout.metadata or {}
        alpha = found.alpha(as_number(header.get(ALPHA)), f"{ALPHA} in its header")
        enabled = self.enabled_in(found, header)
        merged: list[str] = []
        for module in modules_with(found.file, (A, B)):
            if (pair := found.pair(module, A, B)) is None:
                continue
            (a, b), names = pair, (module + A, module + B)
            scale, count = alpha / b.shape[1], a.shape[0] // b.shape[1]
            if count == 1:
                found.add(f"{module}.weight", self.product(module, a, b, scale), names)
                continue
            parts = enabled if sum(enabled) == count else () if enabled else (True,) * count
            if not parts or b.shape[0] % count:
                what = f"lora_A has {count} parts, but {ENABLED} names {sum(enabled)}" if enabled else "uneven parts"
                found.refuse(module, f"{what}; lora_A is {list(a.shape)}, lora_B {list(b.shape)}")
                continue
            merged += [] if enabled else [module]
            up = derived((b.shape[0] // count * len(parts), a.shape[0]), InParts(parts), b)
            found.add(f"{module}.weight", LowRank(up, a, scale, turnable=True), names)  # type: ignore[arg-type]  # loaded later
        for name in found.file.tensors:
            if name.endswith(BIAS) and found.file.tensors[name].dtype in FLOAT_NAMES:
                found.add(name, Replace(found.stored(name)), (name,))  # type: ignore[arg-type]  # the same
        if merged:
            text = f"the file does not record which parts of {printable(merged[0])} and {len(merged) - 1} more are adapted; all are assumed to be. If the weight has more rows, {WAY_OUT}"
            found.notes.append(Note("parts-assumed", text))

    def product(self, module: str, a: StoredTensor, b: StoredTensor, scale: float) -> LowRank:
        """The update of one layer."""
        if module.rpartition(".")[2] in INPUT_EMBEDDINGS:
            return LowRank(b, a, scale, table=True).turned  # type: ignore[arg-type]  # the same
        return Product(b, a, scale, turnable=True)  # type: ignore[arg-type]  # the same

    def enabled_in(self, found: Found, header: Mapping[str, str]) -> tuple[bool, ...]:
        """Which parts of a MergedLinear are adapted; nothing where the header does not say it, or a problem was told."""
        words = [word.strip(" []'\"").lower() for word in header.get(ENABLED, "").split(",") if word.strip()]
        if set(words) - {"true", "false"} or (words and "true" not in words):
            found.refuse(ENABLED, f"is {printable(repr(header[ENABLED]))}; expected true or false for each part")
            return ()
        return tuple(word == "true" for word in words)


def as_number(text: str | None) -> float | str | None:
    """A number of a header; the text itself where it is none."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


LORALIB = Loralib()
