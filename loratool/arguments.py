"""Types of arguments that functions of all packages take."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

PathLike = str | os.PathLike[str]  # a path, or a place elsewhere by its name
Progress = Callable[[int, int], None]  # called with what is done and the total, from any thread, one call at a time


def several(operands: Sequence[PathLike] | PathLike) -> Sequence[PathLike]:
    """One path or several, as several."""
    return [operands] if isinstance(operands, (str, os.PathLike)) else operands
