"""How the columns of a fused lora_B are packed, where an adapter's writer packs them in another way than PEFT does.

PEFT packs the experts of a parameter rank-major (column k·E + e). Unsloth packed them by expert (column e·r + k) until
September 2026, and has since said in the config how they are packed. Both have the same shape, so that nothing but
the config, or who reads it, can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratool.adapters.formats.peft.draft import Draft
from loratool.adapters.formats.peft.files import CONFIG
from loratool.errors import LoratoolError, printable
from loratool.files.untrusted import open_regular
from loratool.notes import Note

OF_B, OF_A, DETAILS = "lora_B_layout", "lora_A_layout", "unsloth_fused_expert_lora"
FIELDS = (OF_B, OF_A, DETAILS)  # which an adapter of PEFT's own packing does without
RANK_MAJOR, GROUPED = "rank-major", "grouped-by-expert"
LAYOUTS = {"rank_major": RANK_MAJOR, "grouped_by_expert": GROUPED}  # as configs spell them
WRITER = "unsloth"
LARGEST_CARD = 1 << 16  # bytes of a README.md that are searched


def check(draft: Draft) -> None:
    """Note every field about packing whose value is unknown, or that is unknown itself: its tensors cannot be read."""
    for name, value, known in said(draft.config):
        if value is not None and value not in known:
            expected = f"expected {' or '.join(known)}" if known else "which is unknown"
            draft.unsupported.append(
                f"{CONFIG}: {name} is {printable(repr(value))}, {expected}; it determines how tensors are packed"
            )


def said(config: Mapping[str, Any]) -> Iterator[tuple[str, object, tuple[str, ...]]]:
    """(field, its value, the values that are known) for every field that says how tensors are packed."""
    by_expert = ("grouped_by_expert",)  # as PEFT packs A
    for name, value in config.items():
        if name in (OF_A, OF_B):
            yield name, value, tuple(LAYOUTS) if name == OF_B else by_expert
        elif "layout" in name.lower():
            yield name, value, ()
    details = config.get(DETAILS)
    if details is not None and not isinstance(details, Mapping):
        yield DETAILS, details, ()
        return
    yield f"{DETAILS}.{OF_A}", (details or {}).get(OF_A), by_expert
    for parameter, detail in parameters_in(config).items():
        layout = detail.get(OF_B) if isinstance(detail, Mapping) else detail
        yield f"{DETAILS}.parameters.{printable(parameter)}.{OF_B}", layout, tuple(LAYOUTS)


def parameters_in(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config says of each fused parameter, by its name."""
    details = config.get(DETAILS)
    found = details.get("parameters") if isinstance(details, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def of_parameter(config: Mapping[str, Any], parameter: str) -> str | None:
    """The layout that the config gives a parameter: its own, or the one for all."""
    detail = parameters_in(config).get(parameter)
    own = detail.get(OF_B) if isinstance(detail, Mapping) else None
    return LAYOUTS.get(str(own or config.get(OF_B)))


def expert_count(config: Mapping[str, Any], parameter: str) -> int | None:
    """How many experts the config gives a parameter; None where it does not say it."""
    detail = parameters_in(config).get(parameter)
    count = detail.get("num_experts") if isinstance(detail, Mapping) else None
    return count if type(count) is int and count > 0 else None


def is_grouped(draft: Draft, parameter: str) -> bool:
    """Whether lora_B of a parameter is packed by expert: as the caller says, else the config, else as PEFT packs it."""
    return (draft.reading.expert_layout or of_parameter(draft.config, parameter) or RANK_MAJOR) == GROUPED


def tell(draft: Draft, parameters: set[str]) -> None:
    """Say how lora_B of these parameters was read, for which it makes a difference, where PEFT's way is not certain."""
    given = draft.reading.expert_layout
    written = {parameter: of_parameter(draft.config, parameter) for parameter in parameters}
    if not parameters:
        draft.notes += draft.reading.unused_layout()
    if given and (against := sorted(p for p, layout in written.items() if layout not in (None, given))):
        draft.notes.append(
            Note(
                "expert-layout-overridden",
                f"lora_B of {', '.join(map(printable, against))} is read as {given}, as --expert-layout says; "
                f"{CONFIG} says {written[against[0]]}",
            )
        )
    elif any(is_grouped(draft, parameter) for parameter in parameters):
        who = "--expert-layout says" if given else f"{CONFIG} says"
        draft.notes.append(Note("expert-layout", f"{who} that lora_B of its fused experts is {GROUPED}"))
    elif not given and None in written.values() and (found := traces(draft)):
        draft.notes.append(
            Note(
                "expert-layout-assumed",
                f"the column order of lora_B in its fused experts is not recorded, and {', '.join(found)}: Unsloth "
                f"packed them by expert until September 2026. They are read as {RANK_MAJOR}, as PEFT packs them. If "
                f"the adapter was trained with an older Unsloth, pass --expert-layout {GROUPED}; pass --expert-layout "
                f"{RANK_MAJOR} to confirm the assumption",
            )
        )


def traces(draft: Draft) -> list[str]:
    """What speaks for Unsloth as the writer."""
    found = []
    mapping = draft.config.get("auto_mapping")
    if isinstance(mapping, Mapping) and any(WRITER in str(key).lower() for key in mapping):
        found.append(f"auto_mapping in {CONFIG} names Unsloth")
    if str(draft.config.get("base_model_name_or_path") or "").lower().startswith(f"{WRITER}/"):
        found.append("its base is one of Unsloth's")
    if WRITER in card(draft).lower():
        found.append("README.md names Unsloth")
    return found


def card(draft: Draft) -> str:
    """The beginning of the README.md beside the weights; nothing where it cannot be read."""
    try:
        with open(open_regular(draft.file.path.parent / "README.md"), "rb") as stream:
            return stream.read(LARGEST_CARD).decode("utf-8", errors="replace")
    except (OSError, LoratoolError):
        return ""
