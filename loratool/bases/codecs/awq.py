"""AWQ in the layout `gemm`, as AutoAWQ and GPTQModel store it: `qweight`, `qzeros` and `scales` for each module.

    W[o, i] = scales[i // group_size, o] · (q[o, i] − z[i // group_size, o])

`qweight` is (inputs, outputs / 8) of int32 and `qzeros` (groups, outputs / 8): the four bits at 4n of word c, the lowest
first, are those of output 8c + ORDER[n]. Zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loratool.bases.codecs import numpy_values
from loratool.bases.codecs.bit_fields import packed, unpacked
from loratool.bases.codecs.dynamic_rules import settings_by_module, with_plain
from loratool.bases.codecs.gptq import SCALES, WAY_OUT, packed_modules, said_by, words_of
from loratool.bases.codecs.grouped import Grouped, rows_of
from loratool.bases.codecs.parts import Finder, Unfit, is_count, shown
from loratool.bases.codecs.plain_modules import (
    complete,
    expert_layers,
    in_memory,
    modules_of,
    note_unlisted,
    plain_matrices,
    skipped_by,
    texts_in,
)
from loratool.bases.packed import Codec, Packed, Packing, plain_dtype
from loratool.bases.packing_settings import Setting, Settings
from loratool.files.checkpoint import Checkpoint
from loratool.lazy import NDArray, Tensor, numpy, torch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs whose bits are in a word, from the lowest bits on
PLACES = [ORDER.index(output) for output in range(8)]
SKIPPED = "modules_to_not_convert"


@dataclass(frozen=True, kw_only=True)
class AwqWeight(Grouped):
    """A matrix (outputs, inputs) whose integers lie along rows of words, eight outputs in a word."""

    def integers(self, words: Tensor, first: int, count: int) -> Tensor:
        start, stop = first // 8, -(-(first + count) // 8)  # words
        some = rows_of(words[:, start:stop]).view(torch.uint8)  # in the cache, where turning it costs least
        # byte 2h + l of a word has the outputs 4l + h and 4l + 2 + h
        turned = some.T.contiguous().view(stop - start, 2, 2, self.line).transpose(1, 2)  # (words, l, h, inputs)
        found = torch.empty(stop - start, 2, 2, 2, self.line, dtype=torch.uint8, device=words.device)
        torch.bitwise_and(turned, 15, out=found[:, :, 0])
        torch.bitwise_right_shift(turned, 4, out=found[:, :, 1])
        return found.view(-1, self.line)[first - 8 * start :][:count]

    def integers_by_numpy(self, words: NDArray[Any], first: int, count: int) -> NDArray[Any]:
        start, stop = first // 8, -(-(first + count) // 8)  # words
        some = numpy.ascontiguousarray(words[:, start:stop]).view(numpy.uint8)
        turned = numpy.ascontiguousarray(some.T).reshape(stop - start, 2, 2, self.line).transpose(0, 2, 1, 3)
        found = numpy.empty((stop - start, 2, 2, 2, self.line), numpy.uint8)
        numpy.bitwise_and(turned, 15, out=found[:, :, 0])
        numpy.right_shift(turned, 4, out=found[:, :, 1])
        return found.reshape(-1, self.line)[first - 8 * start :][:count]

    def zeros_by_numpy(self, words: NDArray[Any]) -> NDArray[Any]:
        fields = numpy_values.nibbles(words.view(numpy.uint8)).reshape(len(words), -1, 8)
        return fields[:, :, PLACES].reshape(len(words), -1)

    @property
    def together(self) -> int:
        return 8

    def words(self, integers: Tensor) -> Tensor:
        found = torch.zeros(len(integers) // 8, self.line, dtype=torch.int32, device=integers.device)
        for place, output in enumerate(ORDER):
            found |= integers[output::8].int() << 4 * place
        return found

    def zero_points(self, words: Tensor) -> Tensor:
        fields = unpacked(words.view(torch.uint8), 4).view(len(words), -1, 8)
        return fields[:, :, PLACES].flatten(1)

    def stored_zeros(self, zeros: Tensor) -> Tensor:
        return packed(zeros.view(len(zeros), -1, 8)[:, :, list(ORDER)].flatten(1), 4)


class Awq(Codec):
    """AWQ in its layout gemm."""

    name, title = "awq", "AWQ"
    kinds = (("4 bits, version gemm", AwqWeight),)

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        # the files of AutoAWQ and llm-awq name no method
        said = said_by(settings, ("awq",), {"w_bit", "q_group_size"} <= settings.values.keys())
        if said is None or not (modules := packed_modules(base)):
            return None
        finder = Finder(base)
        found: dict[str, Packed] = {}
        for module, group in settings_by_module(modules, said, finder, group_of).items():
            with suppress(Unfit):
                found[f"{module}.weight"] = weight_of(finder, module, group)
        if entries := said.get(SKIPPED):  # without a list, loaders go by what is in the files
            note_unlisted(finder, found, lambda modules: skipped_by(entries, modules, base), SKIPPED)
        return complete(finder, found, self.title, WAY_OUT)

    def left_plain(
        self, setting: Setting, packing: Packing, plain: Collection[str], base: Checkpoint
    ) -> Mapping[str, Any]:
        """`modules_to_not_convert` with the modules that are plain, and the rules of GPTQModel where it has written any.

        transformers takes an entry for a regular expression from the start of a name, or for the end of it
        (`should_convert_module`); vLLM (`is_layer_skipped`) and AutoAWQ look for it anywhere in a name: so names are
        whole. Where there is no list, vLLM goes by the dtypes in the files; where there is one, it must be complete.
        """
        gone = frozenset(plain)  # with the names that they have in memory
        edited, kept = modules_of(plain), modules_of([name for name in packing.weights if name not in gone])
        listed = texts_in(setting.values.get(SKIPPED))
        if not listed:
            listed = plain_matrices(base, packing)
            listed += in_memory(listed, base)
        skipped = [*listed, *edited, *expert_layers(edited, kept)]
        values = {**setting.values, SKIPPED: [*dict.fromkeys(skipped)]}
        if "dynamic" in values or "meta" in values:
            values["dynamic"] = with_plain(values.get("dynamic"), edited, [*kept, *in_memory(kept, base)])
        return values


def group_of(said: Mapping[str, Any]) -> int:
    """The inputs in a group, -1 for all of them. `ValueError` says what is unknown."""
    bits, group = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size", -1))
    layouts = [
        str(said[key]).lower() for key in ("version", "format", "checkpoint_format") if said.get(key) is not None
    ]
    if said.get("backend") == "llm-awq":
        layouts.append("llm-awq")
    if unknown := [layout for layout in layouts if layout != "gemm"]:
        raise ValueError(f"the layout (version) must be gemm, but it is {shown(unknown[0])}")
    if type(bits) is not int or bits != 4:
        raise ValueError(f"bits must be 4, but it is {shown(bits)}")
    if group != -1 and not is_count(group):
        raise ValueError(f"group_size must be -1 or a number of inputs, but it is {shown(group)}")
    return int(group)


def weight_of(finder: Finder, module: str, size: int) -> AwqWeight:
    """The weight of a module. Raises `Unfit` where anything of it is wrong."""
    values = words_of(finder, module)
    inputs, words = values.shape if values else (0, 0)
    group = inputs if size == -1 else size
    groups = -(-inputs // max(group, 1))
    why = f"for {[8 * words, inputs]} in {f'groups of {group}' if groups > 1 else 'one group'}"
    tensors = finder.every(
        finder.part(f"{module}.qweight", ["I32"], None, why),
        finder.part(f"{module}.qzeros", ["I32"], [groups, words] if values else None, why),
        finder.part(f"{module}.scales", SCALES, [groups, 8 * words] if values else None, why),
    )
    return AwqWeight(
        shape=(8 * words, inputs),
        line=inputs,
        dtype=plain_dtype(finder.base),
        tensors=tensors,
        scheme=f"AWQ, 4 bits, {'one group' if size == -1 else f'groups of {group}'}",
        bits=4,
        group=group,
    )
