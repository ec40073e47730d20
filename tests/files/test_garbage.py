"""Objects that are made while no garbage is looked for count as old afterwards, and frozen ones stay frozen."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own, for the tests have frozen what was there when they began.
CODE = """
import gc
from loratool.files.process import without_collections

gc.unfreeze()  # what the interpreter's start may have frozen
with without_collections():
    assert not gc.isenabled()
    made = [[] for _ in range(10_000)]
assert gc.isenabled()
young = {id(each) for each in gc.get_objects(generation=0)}
old = {id(each) for each in gc.get_objects(generation=2)}
assert young.isdisjoint(map(id, made)) and old.issuperset(map(id, made))
gc.freeze()
frozen = gc.get_freeze_count()
with without_collections():
    pass
assert gc.get_freeze_count() >= frozen - 10
"""


def test_what_is_made_meanwhile_is_not_looked_at_again_and_what_is_frozen_stays_so() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
