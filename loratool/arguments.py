"""Types of arguments that functions of all packages take."""

from __future__ import annotations

import os
from collections.abc import Callable

PathLike = str | os.PathLike[str]  # a path, or a place elsewhere by its name
Progress = Callable[[int, int], None]  # called with what is done and the total, from any thread, one call at a time
