"""Commands here that have the name of a module of Python give way to it when anything imports that name."""

from __future__ import annotations

import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def give_way(name: str) -> None:
    """Have `import name` mean Python's own module."""
    own = spec_from_file_location(name, Path(sysconfig.get_path("stdlib"), f"{name}.py"))
    assert own is not None
    assert own.loader is not None
    sys.modules[name] = module_from_spec(own)
    own.loader.exec_module(sys.modules[name])
