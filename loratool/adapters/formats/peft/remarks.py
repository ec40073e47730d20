"""What the config promises and the tensors do not keep: no reason to refuse, but to be said."""

from __future__ import annotations

from loratool.adapters.formats.peft import keys, packing, support
from loratool.adapters.formats.peft.draft import Draft
from loratool.errors import printable
from loratool.notes import Note

LONGEST_LIST = 8  # names that a note repeats


def remark(draft: Draft) -> None:
    """Add a note for each promise that is not kept."""
    bias = draft.config.get("bias", "none")
    if bias not in (None, "none") and not any(target.endswith(".bias") for target in draft.saved):
        draft.notes.append(
            Note(
                "bias-not-saved",
                f"the config says bias={printable(repr(bias))}, but the file contains no bias, so none is merged",
            )
        )
    unknown = (
        sorted(set(draft.config) - {*support.OPTIONS, *packing.FIELDS})
        if draft.config.get("peft_type", "LORA") == "LORA"
        else []
    )
    if unknown:
        shown = ", ".join(map(printable, unknown[:LONGEST_LIST])) + (", …" if len(unknown) > LONGEST_LIST else "")
        draft.notes.append(
            Note(
                "unknown-fields",
                f"config fields unknown to loratool, ignored as PEFT 0.21 does: {shown}",
            )
        )
    if idle := idle_targets(draft):
        more = ", …" if len(idle) > LONGEST_LIST else ""
        draft.notes.append(
            Note(
                "idle-targets",
                f"target_modules names {', '.join(map(printable, idle[:LONGEST_LIST]))}{more}, but the file has no "
                "tensor for it",
            )
        )


def idle_targets(draft: Draft) -> list[str]:
    """The entries of a list of `target_modules` that are the tail of no adapted module."""
    listed = draft.config.get("target_modules")
    if not isinstance(listed, list):
        return []
    idle = {entry for entry in listed if isinstance(entry, str)}
    for module in draft.modules.values():
        if not idle:
            break
        idle -= keys.tails(module.name)
    return [entry for entry in listed if isinstance(entry, str) and entry in idle]
