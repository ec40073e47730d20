"""Formats that are known by the names of their files, until one of their adapters is met."""

from __future__ import annotations

import pickle

from loratool.adapters import formats
from loratool.adapters.formats.known import Waiting


def test_a_format_is_the_same_before_its_module_is_imported_and_after() -> None:
    """What its files are called is the same, all else is that of the module, and copies of it work in other processes."""
    waiting = [form for form in formats.FORMATS if isinstance(form, Waiting)]
    assert {form.name for form in waiting} == {"litgpt", "loralib", "mlx", "torchtune", "megatron", "gguf"}
    for form in waiting:
        copy = pickle.loads(pickle.dumps(form))
        for name in ("name", "config_name", "config_names", "weights_name", "dialects", "file_names", "takes_model"):
            assert getattr(form, name) == getattr(copy, name) == getattr(form.format, name), (form.name, name)
        assert form.claims == form.format.claims
