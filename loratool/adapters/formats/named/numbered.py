"""Layers that a file numbers: cloneofsimo's lora_diffusion saves factors in the order in which its code meets the layers.

The header has the classes of modules that were looked into, and the known walks through a model with them are compared
with the shapes of all factors. One walk that fits gives every number its layer; otherwise nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loratool.errors import printable
from loratool.files.untrusted import json_value
from loratool.layouts.diffusion.walks import ATTENTION, CLIP, GEGLU, ORDERS, UNET_CLASSES, Layer, Size, UnetWalk, clip
from loratool.notes import Note

Shape = tuple[int, ...]
# What the tool looks into where it is not told otherwise, for files without an entry in their header.
DEFAULTS = {"unet": ATTENTION | {GEGLU}, "text_encoder": frozenset({CLIP})}
TOOL = "cloneofsimo/lora (lora_diffusion)"
UNKNOWN = "nothing in the file says which layers they belong to; write them into a model with its lora_add, then extract them: loratool extract BASE MODEL -o LORA"


def layers_of(
    component: str, shapes: Sequence[tuple[Shape, Shape]], header: Mapping[str, str]
) -> tuple[list[str], Note] | str:
    """The layers that the numbers of a component mean, with a note on how that is known; or why it is not.

    Args:
        component: `unet` or `text_encoder`.
        shapes: of (up, down) by number.
        header: the metadata of the file.
    """
    classes = classes_in(header[component]) if component in header else DEFAULTS.get(component, frozenset())
    ways = dict(walks_of(component, classes, len(shapes)))
    found: dict[tuple[str, ...], str] = {}
    for name, layers in ways.items():
        if agree(layers, shapes):
            found.setdefault(tuple(layer.name for layer in layers), name)
    if len(found) == 1:
        ((names, way),) = found.items()
        return [*names], Note(
            "numbered-layers",
            f"{component}: {len(names)} layers are numbered in the order in which {way} makes them",
        )
    shown = f"{len(shapes)} layers of {printable(component)} in {', '.join(map(printable, sorted(classes))) or 'modules of unknown classes'}"
    why = "fit several ways through the model" if found else "fit no known way through Stable Diffusion 1 or 2"
    return f"LoRA of {TOOL}, whose {shown} {why}: {UNKNOWN}"


def classes_in(text: str) -> frozenset[str]:
    """The classes of modules that an entry of the header lists; none where it lists none."""
    try:
        found = json_value(text.encode("utf-8", "surrogatepass"))
    except ValueError:
        return frozenset()
    return frozenset(found) if isinstance(found, list) and all(isinstance(each, str) for each in found) else frozenset()


def walks_of(component: str, classes: frozenset[str], count: int) -> Iterator[tuple[str, list[Layer]]]:
    """The ways through a model that meet so many layers, each with what it is called."""
    if component == "text_encoder" and classes == {CLIP} and count % 4 == 0:
        yield "transformers", [*clip(count // 4)]
    if component != "unet" or not classes <= UNET_CLASSES:
        return
    for name, order in ORDERS.items():
        for convolutions in (False, True):
            layers = [*UnetWalk(classes, order, convolutions).layers()]
            if len(layers) == count:
                yield name, layers


def agree(layers: Sequence[Layer], shapes: Sequence[tuple[Shape, Shape]]) -> bool:
    """Whether factors have the shapes of these layers, with one width for each name."""
    widths: dict[str, int] = {}
    return all(
        down[2:] == layer.kernel and fits(widths, layer.rows, up[0]) and fits(widths, layer.columns, down[1])
        for layer, (up, down) in zip(layers, shapes, strict=True)
    )


def fits(widths: dict[str, int], size: Size, length: int) -> bool:
    """Whether a length is that of a size, whose width is remembered."""
    name, factor = size
    if not factor:
        return True
    return length % factor == 0 and widths.setdefault(name, length // factor) == length // factor
