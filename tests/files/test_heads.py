"""The quick look at a header: what it gives is what reading it with all checks gives, or it is not taken."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from paths import REAL
from safetensors.torch import save_file

from loratool.errors import InputError
from loratool.files.heads import kinds_of, read_head
from loratool.files.safefile import MOST_TENSORS, read_safefile

ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    "as the reference writes it": f'{{"a.lora_A.weight":{ENTRY}}}',
    "metadata first": f'{{"__metadata__":{{"x":"1"}},"a":{ENTRY}}}',
    "metadata last": f'{{"a":{ENTRY},"__metadata__":{{"x":"1"}}}}',
    "metadata that looks like tensors": json.dumps({"__metadata__": {"x": '"b":{"dtype":"F32","data_offsets":[0,4]}'}})[
        :-1
    ]
    + f',"a":{ENTRY}}}',
    "letters of several bytes in metadata": f'{{"__metadata__":{{"x":"é😀"}},"ü":{ENTRY}}}',
    "fields in another order": '{"a":{"shape":[1],"data_offsets":[0,4],"dtype":"F32"}}',
    "spaces and lines": f'{{ "__metadata__" : {{ "x" : "1" }} ,\n "a" : {ENTRY} }}',
    "quotation marks in a name": f'{{"a\\"b":{ENTRY}}}',
    "a tensor called as a field": f'{{"data_offsets":{ENTRY}}}',
    "no tensors": "{}",
}


def with_header(path: Path, text: str) -> Path:
    raw = text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * (4 if "dtype" in text else 0))
    return path


@pytest.mark.parametrize("name", HEADERS)
def test_names_and_metadata_are_those_of_the_checked_header(name: str, tmp_path: Path) -> None:
    path = with_header(tmp_path / "x.safetensors", HEADERS[name])
    head, file = read_head(path), read_safefile(path)
    assert list(head.tensors) == list(file.tensors)
    assert dict(head.metadata) == dict(file.metadata)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")
def test_published_files_have_the_names_that_the_checked_header_has() -> None:
    for path in sorted(REAL.glob("*/*.safetensors")):
        if "neg-" not in str(path):
            assert list(read_head(path).tensors) == list(read_safefile(path).tensors), path


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"dtype":"F32"',
        '{"a":[]}',
        '["a"]',
        '{"__metadata__":{"x":1},"a":{"dtype":"F32"}}',
        f'{{"a":{ENTRY},"a":{ENTRY}}}',
    ],
)
def test_a_header_that_is_malformed_is_refused_or_has_the_names_that_stand_in_it(text: str, tmp_path: Path) -> None:
    """Recognising a file never needs more; reading it refuses it."""
    path = with_header(tmp_path / "x.safetensors", text)
    with pytest.raises(InputError):
        read_safefile(path)
    with suppress(InputError):
        assert set(read_head(path).tensors) <= {"a"}


def test_names_that_differ_in_numbers_are_of_one_kind(tmp_path: Path) -> None:
    names = [f"layers.{number}.{end}" for number in range(12) for end in ("lora_A", "lora_B")]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    head = read_head(tmp_path / "x.safetensors")
    assert sorted(kinds_of(head)) == ["layers..lora_A", "layers..lora_B"]
    assert set(kinds_of(head).values()) <= set(names)


def test_a_million_tiny_keys_are_refused_before_any_is_looked_at(tmp_path: Path) -> None:
    entries = ",".join(
        f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(MOST_TENSORS + 1)
    )
    path = with_header(tmp_path / "x.safetensors", "{" + entries + "}")
    with pytest.raises(InputError, match="over the limit"):
        read_head(path)
