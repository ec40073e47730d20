"""The picture of a generated card: the singular values of an adapter, as an SVG file that the card refers to by its name.

The Hub serves such a file as an image where a page asks for one. It is drawn only where measuring takes seconds.
"""

from __future__ import annotations

from pathlib import Path

from loratool.errors import LoratoolError
from loratool.inspecting.inspect import inspect
from loratool.inspecting.options import InspectOptions
from loratool.results.facts import AdapterFacts, OneFacts

PICTURE = "loratool-spectrum.svg"
USAGE = b"\n## Usage\n"  # the heading of a card before which the picture belongs
SECTION = f"""
## Spectrum

![Singular values of the update by kind of module, on a logarithmic scale]({PICTURE})
""".encode()
MOST_MODULES = 5000
MOST_WORK = 1e11  # multiplications of the decompositions: rank 128 on every layer of an 8B model, some seconds


class NoPictureError(Exception):
    """There is none; its text is the reason."""


def picture_of(root: Path) -> bytes:
    """The SVG of an adapter's singular values.

    Raises:
        NoPictureError: they are not measured for its kind, or measuring would take long.
    """
    from loratool.pictures.drawing import svg_file
    from loratool.pictures.spectrum import spectrum_by_kind

    try:
        if takes_long(inspect(root, InspectOptions())):
            raise NoPictureError("the adapter is so large that measuring it would take too long")
        facts = inspect(root, InspectOptions(values=True, device="cpu"))
    except LoratoolError as error:
        raise NoPictureError(error.message) from None
    measured = facts.values.modules if isinstance(facts, AdapterFacts) and facts.values else ()
    if not any(module.norm for module in measured):
        raise NoPictureError("its updates are zero, or of a kind that is not measured")
    return svg_file(spectrum_by_kind(measured)).encode(errors="backslashreplace")


def takes_long(facts: OneFacts) -> bool:
    """Whether measuring an adapter takes more than some seconds, by its ranks and the number of its modules."""
    modules = facts.modules if isinstance(facts, AdapterFacts) else ()
    work = sum(2.0 * m.parameters * (m.rank or 0) for m in modules)  # of QR decompositions
    return work > MOST_WORK or len(modules) > MOST_MODULES


def illustrated(card: bytes) -> bytes:
    """A card with the picture, before the code that loads the adapter."""
    if PICTURE.encode() in card:
        return card
    before, usage, after = card.partition(USAGE)
    return before + SECTION + usage + after
