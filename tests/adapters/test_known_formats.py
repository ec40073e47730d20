"""Formats that are known by the names of their files, until one of their adapters is met."""

from __future__ import annotations

import pickle

from loratool.adapters import formats
from loratool.adapters.formats.known import OneFile


def test_a_format_has_the_files_by_which_it_is_known_before_its_module_is_imported() -> None:
    """What its files are called is the same in both, and a copy of either leads to the format in other processes."""
    known = [form for form in formats.FORMATS if isinstance(form, OneFile)]
    assert {form.name for form in known} == {"litgpt", "loralib", "mlx", "torchtune", "megatron", "gguf"}
    for form in known:
        for name in ("name", "config_name", "config_names", "weights_name", "dialects", "file_names"):
            assert getattr(form, name) == getattr(form.format, name), (form.name, name)
        assert form.format is form.format.format
        for copy in (form, form.format):
            assert type(pickle.loads(pickle.dumps(copy)).format) is type(form.format)
