"""peft_type LORA (Hu et al. 2021, arXiv:2106.09685) and the variants that PEFT keeps under the same name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loratool.adapters.adapter import derived
from loratool.adapters.formats.peft import parameters, stacked, support
from loratool.adapters.formats.peft.draft import TOKENS, Draft, Module, UnsupportedError, UnusableError
from loratool.adapters.formats.peft.files import CONFIG
from loratool.adapters.formats.peft.parameters import rank_is_one
from loratool.adapters.formats.peft.scaling import Scaling
from loratool.adapters.formats.peft.training import release_of
from loratool.algebra.updates import formulas, residual
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.residual import Residual
from loratool.errors import printable
from loratool.notes import Note

SLOTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag")
ONLY_TRAINING = ("lora_velora_embed", "lora_monteclora_sampler")
PARTS = {"pissa": residual.PRINCIPAL, "olora": residual.TRIANGULAR}  # what an initialisation takes from the base
OUT_PROJ = ".base_layer.out_proj"  # of a wrapped nn.MultiheadAttention
LAST_DOUBLING = (0, 21, 2)  # the last release of PEFT that applies the update of an out_proj twice


def read_lora(draft: Draft) -> None:
    """Read every module of a LORA adapter."""
    refuse_settings(draft)
    experts = parameters.levels(draft)
    layers = [m for m in draft.modules.values() if m.name not in experts and set(m.slots) != {TOKENS}]
    scaling = Scaling(draft, [*(m.name for m in layers), *parameters.paths(draft, experts)])
    parameters.read_parameters(draft, experts, scaling)
    taken = {*stacked.read_shared(draft, scaling), *stacked.read_stacks(draft, scaling)}
    if taken:
        draft.packing = stacked.PACKING
    reader = Reader(draft, scaling)
    for module in layers:
        if module.path not in taken:
            draft.attempt(module, reader.read)
    reader.tell()


def refuse_settings(draft: Draft) -> None:
    """Note every setting that makes an adapter one that is not merged."""
    for name, row in support.OPTIONS.items():
        value = draft.config.get(name)
        if row.refused and value is not None and value is not False:
            draft.unsupported.append(f"{row.title} ({name}): {row.refused}")
    if reason := support.why_refused(draft.config.get("init_lora_weights", True)):
        draft.unsupported.append(reason)
    for name in support.CHECKED_FLAGS:
        with draft.noting():
            draft.flag(name)


@dataclass
class Reader:
    """The modules of one adapter, one after the other."""

    draft: Draft
    scaling: Scaling
    doubled: int = 0  # updates that are applied twice
    idle_biases: int = 0

    def read(self, module: Module) -> dict[str, Update]:
        """The updates of one layer's parameters."""
        embedding = "lora_embedding_A" in module or "lora_embedding_B" in module
        module.require(
            not (embedding and ("lora_A" in module or "lora_B" in module)),
            "has both linear and embedding factors",
        )
        module.agree(
            not module.path.endswith(".base_layer") or module.name == module.path,
            f"its factors belong to a parameter, but target_parameters in {CONFIG} does not list one of this module",
        )
        if embedding:
            return {"weight": self.with_magnitude(module, self.embedding(module))}
        attention = f"{module.path}{OUT_PROJ}" in self.draft.modules
        update = self.layer(module)
        found: dict[str, Update] = {"in_proj_weight" if attention else "weight": self.with_magnitude(module, update)}
        if "lora_B.bias" in module:
            found |= self.bias(module, update, attention)
        else:
            module.agree(
                self.draft.config.get("lora_bias") is not True, "lora_B.bias is missing, although lora_bias is set"
            )
        return found

    def tell(self) -> None:
        """Say what was decided for several modules alike."""
        if self.doubled:
            version = self.draft.config.get("peft_version") or "no version"
            self.draft.notes.append(
                Note(
                    "attention-doubled",
                    f"the update of {self.doubled} out_proj layers of nn.MultiheadAttention is applied twice, as PEFT "
                    f"up to 0.21.2 did when the adapter was trained ({CONFIG} names {printable(version)})",
                )
            )
        if self.idle_biases:
            self.draft.notes.append(
                Note(
                    "attention-biases-left-out",
                    f"{self.idle_biases} lora_B.bias of nn.MultiheadAttention are left out, as in PEFT",
                )
            )

    def embedding(self, module: Module) -> Update:
        """Of a (vocabulary, dimension) table: the transpose of B @ A."""
        down, up = module.tensor("lora_embedding_A"), module.tensor("lora_embedding_B")
        module.require(up.shape[1] == down.shape[0], rank_is_one(down.shape[0], up.shape[1]))
        return LowRank(up, down, self.scaling.scale(module.name, down.shape[0]), table=True).turned

    def layer(self, module: Module) -> Update:
        down, up = module.tensor("lora_A", (2, 3, 4, 5)), module.tensor("lora_B", (2, 3, 4, 5))
        if len(down.shape) != len(up.shape):
            raise UnusableError(
                f"{module.shown}: lora_A is {list(down.shape)} and lora_B {list(up.shape)}; expected two matrices or "
                "two convolution kernels"
            )
        if len(down.shape) > 2:
            return self.convolution(module, up, down)
        if isinstance(self.draft.config.get("use_bdlora"), Mapping):
            up, down = self.block_diagonal(module, up, down)
        module.require(up.shape[1] == down.shape[0], rank_is_one(down.shape[0], up.shape[1]))
        projection = module.path.endswith(OUT_PROJ)
        attention = module.name.removesuffix(".out_proj")  # whose r and α PEFT gives to its projection too
        narrowed = self.part is not None and down.shape[0] == min(down.shape[1], up.shape[0])
        scale = self.scaling.scale(attention if projection else module.name, down.shape[0], narrowed)
        if projection and doubles(self.draft.config.get("peft_version")):
            self.doubled += 1
            scale *= 2
        if self.draft.config.get("use_qalora") is True:
            from loratool.algebra.updates.products import Pooled

            return Pooled(up, down, scale, self.draft.whole("qalora_group_size", 16))
        return self.on_residual(module, LowRank(up, down, scale, turnable=True))

    def convolution(self, module: Module, up: Any, down: Any) -> Update:
        """Of a (out, in, *kernel) weight; A holds kernels, B is 1 × 1."""
        if up.shape[1] != down.shape[0] and down.shape[0] % up.shape[1] == 0:
            raise UnsupportedError(
                f"LoRA on a grouped convolution ({module.shown}, lora_B {list(up.shape)}): its update uses all input "
                "channels, which a grouped weight cannot represent; use this adapter unmerged"
            )
        module.require(up.shape[1] == down.shape[0], rank_is_one(down.shape[0], up.shape[1]))
        module.require(set(up.shape[2:]) == {1}, f"lora_B is {list(up.shape)}; expected a kernel of 1")
        rank, channels, *kernel = down.shape
        return LowRank(
            derived((up.shape[0], rank), formulas.as_matrix, up),
            derived((rank, channels * math.prod(kernel)), formulas.as_matrix, down),
            self.scaling.scale(module.name, rank),
            kernel=tuple(kernel),
        )

    def block_diagonal(self, module: Module, up: Any, down: Any) -> tuple[Any, Any]:
        """(B, A) of BD-LoRA, the one of them that is stored as blocks laid out."""
        table = self.draft.config["use_bdlora"]
        blocks = table.get("nblocks", 1)
        in_a, in_b = (
            any(isinstance(p, str) and p in module.name for p in table.get(f"target_modules_bd_{side}") or [])
            for side in "ab"
        )
        module.agree(
            type(blocks) is int and blocks >= 1 and not (in_a and in_b),
            f"use_bdlora in {CONFIG} gives no number of blocks, or says that both factors are in blocks",
        )
        for chosen, name, factor in ((in_a, "lora_A", down), (in_b, "lora_B", up)):
            module.require(
                not chosen or factor.shape[0] % blocks == 0,
                f"{name} has {factor.shape[0]} rows, which is not a multiple of {blocks} blocks",
            )
        laid_out = partial(formulas.block_diagonal, blocks)
        if in_a:
            down = derived((down.shape[0], down.shape[1] * blocks), laid_out, down)
        elif in_b:
            up = derived((up.shape[0], up.shape[1] * blocks), laid_out, up)
        return up, down

    def on_residual(self, module: Module, update: LowRank) -> Update:
        """With what was taken from the base weight before training, where something was."""
        if self.draft.config.get("kasa_config") is not None:
            diagonal = module.tensor("lora_diag", (1,))
            module.require(
                diagonal.shape[0] == update.rank, f"lora_diag has {diagonal.shape[0]} values for rank {update.rank}"
            )
            up = derived(update.up.shape, formulas.scaled_columns, update.up, diagonal)
            return Residual(replace(update, up=up, turnable=False), residual.MINOR)
        module.agree("lora_diag" not in module, f"lora_diag is present, but {CONFIG} has no kasa_config")
        return Residual(update, self.part) if self.part else update

    @property
    def part(self) -> str | None:
        """What the initialisation takes from the base; None where it takes nothing."""
        init = self.draft.config.get("init_lora_weights", True)
        return PARTS.get(init.lower()) if isinstance(init, str) else None

    def with_magnitude(self, module: Module, update: Update) -> Update:
        """The update as DoRA applies it, where it is DoRA."""
        dora = self.draft.config.get("use_dora") is True
        if "lora_magnitude_vector" not in module:
            module.agree(not dora, "lora_magnitude_vector is missing, although use_dora is set")
            return update
        module.agree(dora, f"lora_magnitude_vector is present, but use_dora is not set in {CONFIG}")
        stored = module.tensor("lora_magnitude_vector", (1, 3, 4, 5))
        count = max(stored.shape)
        by_column = "lora_embedding_A" in module
        wanted = update.shape[1] if by_column else update.shape[0]
        module.require(
            stored.shape in ((count,), (1, count, *[1] * (len(stored.shape) - 2))) and count == wanted,
            f"lora_magnitude_vector is {list(stored.shape)}; expected {wanted} values",
        )
        return Magnitude(update, derived((count,), formulas.flat, stored), by_column)

    def bias(self, module: Module, update: Update, attention: bool) -> dict[str, Update]:
        module.agree(
            self.draft.config.get("lora_bias") is True, f"lora_B.bias is present, but lora_bias is not set in {CONFIG}"
        )
        if attention:  # PEFT neither applies nor merges it
            self.idle_biases += 1
            return {}
        bias, scale = module.tensor("lora_B.bias", (1,)), self.scaling.scale(module.name, update.rank)
        module.require(
            bias.shape[0] == update.shape[0],
            f"lora_B.bias has {bias.shape[0]} values; expected {update.shape[0]}, one per row",
        )
        return {"bias": Add(bias, scale)}


def doubles(release: object) -> bool:
    """Whether the release of PEFT that saved the adapter applies the update of an out_proj twice."""
    return release_of(release) <= LAST_DOUBLING


def token_numbers(module: Module) -> object:
    """The numbers of the token rows of a module, from `trainable_token_indices`."""
    indices = module.draft.config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        own = [ids for name, ids in indices.items() if module.name == name or module.name.endswith(f".{name}")]
        return own[0] if own else None
    return indices
