"""How GGML packs tensors, and how GGUF spells values: data, no logic. Facts from ggml.h and gguf.h of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Packing(NamedTuple):
    """A type of tensors: values come in blocks, which lie along the last dimension."""

    code: int  # in a file
    values: int  # in a block
    nbytes: int  # of a block


# By the names of llama.cpp; those that safetensors has too are spelled alike.
TYPES: Mapping[str, Packing] = {
    "F32": Packing(0, 1, 4),
    "F16": Packing(1, 1, 2),
    "Q4_0": Packing(2, 32, 18),
    "Q4_1": Packing(3, 32, 20),
    "Q5_0": Packing(6, 32, 22),
    "Q5_1": Packing(7, 32, 24),
    "Q8_0": Packing(8, 32, 34),
    "Q8_1": Packing(9, 32, 40),
    "Q2_K": Packing(10, 256, 84),
    "Q3_K": Packing(11, 256, 110),
    "Q4_K": Packing(12, 256, 144),
    "Q5_K": Packing(13, 256, 176),
    "Q6_K": Packing(14, 256, 210),
    "Q8_K": Packing(15, 256, 292),
    "IQ2_XXS": Packing(16, 256, 66),
    "IQ2_XS": Packing(17, 256, 74),
    "IQ3_XXS": Packing(18, 256, 98),
    "IQ1_S": Packing(19, 256, 50),
    "IQ4_NL": Packing(20, 32, 18),
    "IQ3_S": Packing(21, 256, 110),
    "IQ2_S": Packing(22, 256, 82),
    "IQ4_XS": Packing(23, 256, 136),
    "I8": Packing(24, 1, 1),
    "I16": Packing(25, 1, 2),
    "I32": Packing(26, 1, 4),
    "I64": Packing(27, 1, 8),
    "F64": Packing(28, 1, 8),
    "IQ1_M": Packing(29, 256, 56),
    "BF16": Packing(30, 1, 2),
    "TQ1_0": Packing(34, 256, 54),
    "TQ2_0": Packing(35, 256, 66),
    "MXFP4": Packing(39, 32, 17),
    "NVFP4": Packing(40, 64, 36),
    "Q1_0": Packing(41, 128, 18),
}
BY_CODE: Mapping[int, str] = {packing.code: name for name, packing in TYPES.items()}

# The types that are decoded, and those of them that are written too.
DECODED = frozenset(
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()  # noqa: SIM905  (as they are told)
)
ENCODED = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))

# Code of a value in the metadata → what `struct` calls it.
NUMBERS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
