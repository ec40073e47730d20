"""Write docs/supported.md from the table that reading goes by, so that the two cannot disagree.

python docs/generate_supported.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.formats.peft.support import INITIALISATIONS, OPTIONS, TYPES, Row

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE = Path(__file__).with_name("supported.md")

HEAD = """\
# What is supported

*This page is written by `make docs` from the table by which adapters are read.*

An adapter that PEFT 0.21 saves is either merged into what it computes, or refused with the reason and with what can be
done instead. The last column names the test: a merge is compared with PEFT's own of the same files or, where that is
known to be wrong, with what the unmerged adapter computes.

W is a weight of the base, stored (out, in); s is the adapter's scaling. Where a base stores it (in, out), everything is
transposed. Updates that add are scaled by the weight of the adapter (`-w`); of the others the merge lies on the line
from W through the merge at weight 1.
"""

TAIL = """\
## Where PEFT is known to be wrong

| what | PEFT 0.21.2 | loratool |
|---|---|---|
| three-dimensional convolutions with a kernel (1, 1, k) | the merge ends in an error | merged as the forward computes |
| `out_proj` of `nn.MultiheadAttention` | the update counts twice, in the forward and in the merge | counts twice for adapters of those releases, and says so |
| DoRA on a row or column of zeros | NaN | stays zero |
| several patterns that match one module | saving sorts them, so that loading may take another | the file's first counts, and it is said |
| tensors that nothing recognises | passed over | refused |
| adapters in half precision | rounded twice or more | rounded once |

## How experts are packed

| in the file | how it is read |
|---|---|
| `target_parameters`, `lora_A` (experts · r, in), `lora_B` (out, r · experts) | as PEFT packs them: row e·r + k of A, column k·experts + e of B |
| the same with `"lora_B_layout": "grouped_by_expert"`, which Unsloth writes | column e·r + k of B |
| the same without the field, where the config or README.md names Unsloth | as PEFT packs them, with a warning; `--expert-layout` decides |
| `experts.gate_up_proj` and `down_proj`, or `w1`, `w3` and `w2`, with `lora_A` (experts, r, in) and `lora_B` (experts, out, r) | s · B[e] A[e]; a side of (1, …) is that of all experts |

A value that loratool does not know, of any field of the config that says how tensors are packed, is refused. What is
written is packed as PEFT packs it, without such a field; `rescale` then puts the strength into the factors, as `--bake`
does.

## Not in files

Prompt methods, X-LoRA, Arrow, aLoRA and the like add something that depends on the input; there is no weight that holds
it. Grouped convolutions are refused as well: the update sees all input channels, which a grouped weight cannot hold.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [
        HEAD,
        section("Types of adapter", "type", TYPES),
        section("Options of LoRA", "option", OPTIONS),
        section("Values of `init_lora_weights`", "value", INITIALISATIONS),
        TAIL,
    ]
    return "\n".join(parts)


def section(title: str, what: str, rows: Mapping[str, Row]) -> str:
    lines = [f"## {title}", "", f"| {what} | what it is | merged weight, or why not | test |", "|---|---|---|---|"]
    for name, row in rows.items():
        verdict = row.merged or f"**refused**: {row.refused}"
        test = f"`{row.test.partition('::')[2]}`" if row.test else ""
        lines.append(f"| `{name}` | {row.title} | {verdict} | {test} |".replace("|‖", "‖"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
