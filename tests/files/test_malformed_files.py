"""What is wrong with a safetensors file is found before anything is written, and said in a sentence.

Rows 1 to 22 of the table of malformed inputs. The second opinion on every file is the reference parser.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from malformed import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASE,
    ENTRY,
    FACTORS,
    HIDDEN,
    MERGED,
    MODEL,
    SHARDS,
    WEIGHT,
    WEIGHT_BYTES,
    A,
    B,
    Stored,
    W,
    described,
    f32,
    frame,
    one_weight,
    pickled_trap,
    put,
    safetensors_bytes,
    write_adapter,
    write_base,
    write_sharded,
)
from workbench import (
    Workbench,
    bound_by_permissions,
    check_is_merged,
    check_refusal,
    command,
    each,
    is_clean,
    reference_takes,
    run_apart,
    snapshot,
    tensors_of,
)

Case = tuple[bytes, str]  # a malformed file, and what the message must say


HEADER = f'{{"{WEIGHT}":{ENTRY}}}'
SOUND = one_weight()


@each({f"{n} bytes": bytes([n] * n) for n in range(8)})
def test_a_file_too_short_for_a_header_is_called_a_failed_download(bench: Workbench, case: bytes) -> None:
    """Row 1."""
    bench.refuses_weights(case, "truncated" if case else "failed download")


HEADER_LENGTHS: dict[str, Case] = {
    "past the end": (frame(HEADER, b"", len(HEADER) + 1000), "1000 bytes of"),
    "one past the end": (frame(HEADER, b"", len(HEADER) + 1), "1 bytes of"),
    "largest allowed": (frame(HEADER, b"", 100_000_000), "are missing"),
    "2^32": (frame(HEADER, length=1 << 32), "4294967296 bytes, over the limit"),
    "2^63": (frame(HEADER, length=1 << 63), "over the limit"),
    "2^64-1": (frame(HEADER, length=(1 << 64) - 1), "over the limit"),
    "big-endian": (struct.pack(">Q", len(HEADER)) + HEADER.encode() + bytes(256), "over the limit"),
}


@each(HEADER_LENGTHS)
def test_a_false_header_length_is_refused_without_allocating_it(bench: Workbench, case: Case) -> None:
    """Row 2."""
    bench.refuses_weights(*case)
    put(bench.base / MODEL, case[0])
    tracemalloc.start()
    try:
        bench.refuses_to_inspect(bench.base)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_over_100_MB_is_refused_unread(bench: Workbench) -> None:
    """Row 3. The file is sparse: it takes no room, and reading it would take 100 MB of memory."""

    def sparse(path: Path) -> None:
        path.write_bytes(frame("{", b"", 100_000_001))
        os.truncate(path, 8 + 100_000_001)

    bench.refuses_weights(sparse, "100000001 bytes, over the limit of 100000000")
    put(bench.base / MODEL, sparse)
    tracemalloc.start()
    try:
        bench.refuses_to_inspect(bench.base)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


NOT_UTF_8: dict[str, Case] = {
    "Latin-1": (frame(f'{{"é":{ENTRY}}}'.encode("latin-1")), "UTF-8 (byte 2)"),
    "cut multi-byte character": (frame(HEADER.encode() + b"\xc3"), "UTF-8"),
    "surrogate in UTF-8": (frame(HEADER.replace("q_proj", "\ud800").encode(errors="surrogatepass")), "UTF-8"),
    "byte order mark": (frame(b"\xef\xbb\xbf" + HEADER.encode()), "does not begin with '{'"),
    "UTF-16": (frame(HEADER.encode("utf-16-le")), "the header is not valid"),
    "UTF-16 with a mark": (frame(HEADER.encode("utf-16")), "does not begin with '{'"),
}


@each(NOT_UTF_8)
def test_a_header_in_another_encoding_is_refused(bench: Workbench, case: Case) -> None:
    """Row 4."""
    bench.refuses_weights(*case)


NO_OBJECTS: dict[str, Case] = {
    "array": (frame("[]", b""), "does not begin with '{'"),
    "string": (frame('"header"', b""), "does not begin with '{'"),
    "null": (frame("null", b""), "does not begin with '{'"),
    "number": (frame("17", b""), "does not begin with '{'"),
    "blank": (frame("        ", b""), "does not begin with '{'"),
    "of no length": (frame("", bytes(8) + b"x"), "does not begin with '{'"),
    "cut": (frame(HEADER[:-1]), "not valid JSON"),
    "cut inside a text": (frame(HEADER[:12]), "not valid JSON"),
    "two objects": (frame(HEADER + HEADER), "not valid JSON"),
    "comment": (frame(HEADER + "//"), "not valid JSON"),
    "trailing comma": (frame(HEADER[:-1] + ",}"), "not valid JSON"),
    "NaN": (frame(HEADER[:-2] + ',"more":NaN}}'), "NaN is not valid JSON"),
    "Infinity": (frame(HEADER[:-2] + ',"more":-Infinity}}'), "-Infinity is not valid JSON"),
    "raw control character": (frame(HEADER.replace("q_proj", "q\nproj")), "not valid JSON"),
    "padded with NUL": (frame(HEADER + "\0\0\0"), "not valid JSON"),
    "half a surrogate pair": (frame(HEADER.replace("q_proj", "\\ud800")), "half a surrogate pair"),
    "number of 5000 digits": (frame(HEADER.replace("256", "9" * 5000)), "the header is not valid"),
}


@each(NO_OBJECTS)
def test_a_header_that_is_no_json_object_is_refused(bench: Workbench, case: Case) -> None:
    """Row 5."""
    bench.refuses_weights(*case)


@each({"leading blanks": frame("   " + HEADER, W.astype("<f4").tobytes())})
def test_a_header_that_does_not_begin_with_a_brace_is_refused_though_the_reference_takes_it(
    bench: Workbench, case: bytes
) -> None:
    """Row 5, and rule "leading blanks"."""
    bench.refuses_weights(case, "does not begin with '{'", reference_accepts=True)


NESTED: dict[str, Case] = {
    "100000 objects": (frame('{"a":' * 100_000), "nested too deeply"),
    "100000 arrays": (frame(f'{{"{WEIGHT}":' + "[" * 100_000), "nested too deeply"),
    "600 arrays in a field nobody reads": (
        frame(HEADER[:-2] + ',"more":' + "[" * 600 + "]" * 600 + "}}"),
        "nested too deeply",
    ),
    "126 arrays in a field nobody reads": (
        frame(HEADER[:-2] + ',"more":' + "[" * 126 + "]" * 126 + "}}"),
        "nested too deeply",
    ),
}


@each(NESTED)
def test_deep_nesting_is_refused_without_a_recursion_error(bench: Workbench, case: Case) -> None:
    """Row 6. The reference stops at 127 levels in all, and what it cannot read must not be written."""
    bench.refuses_weights(*case)


TWICE: dict[str, bytes] = {
    "plain": frame(f'{{"{WEIGHT}":{ENTRY},"{WEIGHT}":{ENTRY}}}'),
    "by an escape": frame(f'{{"{WEIGHT}":{ENTRY},"{WEIGHT.replace("q", chr(92) + "u0071")}":{ENTRY}}}'),
    "the first impossible": frame(f'{{"{WEIGHT}":{ENTRY.replace("8,8", "7,7")},"{WEIGHT}":{ENTRY}}}'),
}


@each(TWICE)
def test_a_tensor_name_that_is_there_twice_is_refused_though_the_reference_takes_the_last(
    bench: Workbench, case: bytes
) -> None:
    """Row 7."""
    bench.refuses_weights(case, f"'{WEIGHT}' is duplicated", reference_accepts=True)


METADATA: dict[str, str] = {
    "number": '{"format":1}',
    "null value": '{"format":null}',
    "list value": '{"format":["pt"]}',
    "object value": '{"format":{}}',
    "text": '"pt"',
    "list": '[["format","pt"]]',
    "number instead": "1",
    "true": "true",
}


@each(METADATA)
def test_metadata_that_does_not_map_text_to_text_is_refused(bench: Workbench, case: str) -> None:
    """Row 8."""
    bench.refuses_weights(frame(f'{{"__metadata__":{case},"{WEIGHT}":{ENTRY}}}'), "__metadata__")


@each({"whole": '"__metadata__":{},"__metadata__":{},', "a key of it": '"__metadata__":{"a":"b","a":"b"},'})
def test_metadata_that_is_there_twice_is_refused(bench: Workbench, case: str) -> None:
    """Row 8."""
    bench.refuses_weights(frame(f'{{{case}"{WEIGHT}":{ENTRY}}}'), "is duplicated", reference_accepts='"a"' in case)


DTYPES: dict[str, object] = {
    "unknown": "F31",
    "lower-case": "f32",
    "spelt by torch": "float32",
    "blank after it": "F32 ",
    "null": None,
    "number": 32,
    "list": ["F32"],
}


@each(DTYPES)
def test_an_unknown_dtype_is_refused_with_a_list_of_the_known_ones(bench: Workbench, case: object) -> None:
    """Row 9."""
    bench.refuses_weights(one_weight(dtype=case), WEIGHT, "unknown dtype", "BF16", "F8_E4M3", "U64")


@each({"two bytes for four": "F32", "four bytes for two": "F16", "half a byte for four": "F4", "eight": "F64"})
def test_a_dtype_of_another_width_than_the_bytes_is_refused(bench: Workbench, case: str) -> None:
    """Row 10."""
    size = WEIGHT_BYTES // 2 if case == "F32" else WEIGHT_BYTES
    raw = one_weight(bytes(size), dtype=case, data_offsets=[0, size])
    bench.refuses_weights(raw, WEIGHT, case, f"but data_offsets span {size}")


SHAPES: dict[str, object] = {
    "negative": [HIDDEN, -HIDDEN],
    "-1 x -2": [-1, -2],
    "float": [8.0, 8],
    "exponent": "[8e0,8]",
    "minus zero": "[-0]",
    "bool": [True, 64],
    "text": ["8", 8],
    "null": [None, 8],
    "over 64 bits": [1 << 64, 1],
    "product over 64 bits": [1 << 32, 1 << 32],
    "product wraps to the right size": [(1 << 58) + 1, 64],
    "product wraps before a zero": [1 << 40, 1 << 40, 0],
    "no list": 64,
    "no list but text": "8,8",
    "list in a list": [[8, 8]],
    "object": {},
    "null instead": None,
}


@each(SHAPES)
def test_an_impossible_shape_is_refused(bench: Workbench, case: object) -> None:
    """Row 11."""
    if isinstance(case, str) and case.startswith("["):  # spelt as only JSON can
        data = 0 if "-0" in case else WEIGHT_BYTES
        entry = f'{{"dtype":"F32","shape":{case},"data_offsets":[0,{data}]}}'
        raw = frame(f'{{"{WEIGHT}":{entry}}}', bytes(data))
    else:
        raw = one_weight(shape=case)
    bench.refuses_weights(raw, WEIGHT)


OFFSETS: dict[str, object] = {
    "negative": [-WEIGHT_BYTES, 0],
    "float": [0, 256.0],
    "bool": [False, WEIGHT_BYTES],
    "text": ["0", "256"],
    "one": [WEIGHT_BYTES],
    "three": [0, 128, WEIGHT_BYTES],
    "none": [],
    "null": None,
    "object": {"start": 0, "stop": WEIGHT_BYTES},
    "reversed": [WEIGHT_BYTES, 0],
    "over 2^63": [(1 << 63) + 1, (1 << 63) + 257],
    "over 2^64": [1 << 64, (1 << 64) + 256],
    "far past the end": [1 << 62, (1 << 62) + 256],
}


@each(OFFSETS)
def test_impossible_offsets_are_refused(bench: Workbench, case: object) -> None:
    """Row 12."""
    bench.refuses_weights(one_weight(data_offsets=case), WEIGHT)


ENTRIES: dict[str, tuple[str, bool]] = {
    "no dtype": ('{"shape":[8,8],"data_offsets":[0,256]}', False),
    "no shape": ('{"dtype":"F32","data_offsets":[0,256]}', False),
    "no offsets": ('{"dtype":"F32","shape":[8,8]}', False),
    "dtype twice": (ENTRY.replace('"dtype":"F32"', '"dtype":"F32","dtype":"F32"'), False),
    "shape twice": (ENTRY.replace('"shape":[8,8]', '"shape":[8,8],"shape":[8,8]'), False),
    "text": ('"F32"', False),
    "null": ("null", False),
    "empty": ("{}", False),
    "array of the three": ('["F32",[8,8],[0,256]]', True),
}


@each(ENTRIES)
def test_a_tensor_entry_that_is_no_object_of_three_fields_is_refused(bench: Workbench, case: tuple[str, bool]) -> None:
    """Rules "tensor entry" and "given twice"; the reference also takes an array."""
    entry, reference_accepts = case
    told = "is duplicated" if "twice" in entry or entry.count('"dtype"') > 1 or entry.count('"shape"') > 1 else WEIGHT
    bench.refuses_weights(frame(f'{{"{WEIGHT}":{entry}}}'), told, reference_accepts=reference_accepts)


TILINGS: dict[str, Case] = {
    "overlap": (described(("a", "U8", [8], 0, 8), ("b", "U8", [8], 4, 12), data=12), "b overlaps tensor a"),
    "alias": (described(("a", "U8", [8], 0, 8), ("b", "U8", [8], 0, 8), data=8), "b overlaps tensor a"),
    "nested range": (described(("a", "U8", [8], 0, 8), ("b", "U8", [2], 3, 5), data=8), "b overlaps tensor a"),
    "hole at the start": (described(("a", "U8", [8], 4, 12), data=12), "a leaves a gap after the header"),
    "hole between": (described(("a", "U8", [4], 0, 4), ("b", "U8", [4], 6, 10), data=10), "b leaves a gap after"),
    "trailing byte": (described(("a", "U8", [8], 0, 8), data=9), "1 extra bytes follow the last tensor"),
    "trailing bytes of no tensor": (frame("{}", b"x"), "1 extra bytes follow"),
    "empty tensor in the middle of another": (
        described(("a", "U8", [8], 0, 8), ("b", "U8", [0], 4, 4), data=8),
        "b overlaps",
    ),
}


@each(TILINGS)
def test_tensors_that_do_not_tile_the_file_are_refused(bench: Workbench, case: Case) -> None:
    """Row 13."""
    bench.refuses_weights(*case)


CUTS: dict[str, Case] = {
    "by one byte": (SOUND[:-1], "1 of 256 bytes of tensor data are missing"),
    "to half its data": (SOUND[:-128], "128 of 256 bytes of tensor data are missing"),
    "after its header": (SOUND[:-256], "256 of 256 bytes of tensor data are missing"),
    "inside its header": (SOUND[:40], f"{len(SOUND) - 256 - 40} bytes of"),
    "after its length": (SOUND[:8], f"{len(SOUND) - 256 - 8} bytes of"),
}


@each(CUTS)
def test_a_cut_file_is_refused_with_the_number_of_missing_bytes(bench: Workbench, case: Case) -> None:
    """Row 14."""
    bench.refuses_weights(*case)


PARTIAL_BYTES: dict[str, Case] = {
    "three F4": (one_weight(bytes(2), dtype="F4", shape=[3], data_offsets=[0, 2]), "3 values of F4"),
    "three F4 in one byte": (one_weight(bytes(1), dtype="F4", shape=[3], data_offsets=[0, 1]), "3 values of F4"),
    "one F6": (one_weight(bytes(1), dtype="F6_E2M3", shape=[1], data_offsets=[0, 1]), "1 values of F6_E2M3"),
    "F6 counted as bytes": (one_weight(bytes(64), dtype="F6_E3M2", data_offsets=[0, 64]), "takes 48 bytes"),
}


@each(PARTIAL_BYTES)
def test_values_that_do_not_fill_whole_bytes_are_refused(bench: Workbench, case: Case) -> None:
    """Row 15."""
    bench.refuses_weights(*case)


def zip_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("payload", "hello")
    return buffer.getvalue()


POLYGLOTS: dict[str, Case] = {
    "zip behind it": (SOUND + zip_archive(), f"{len(zip_archive())} extra bytes follow the last tensor"),
    "all zeros": (bytes(4096), "begins with zeros"),
    "eight zeros": (bytes(8), "begins with zeros"),
}


@each(POLYGLOTS)
def test_a_file_that_is_something_else_as_well_is_refused(bench: Workbench, case: Case) -> None:
    """Row 16."""
    bench.refuses_weights(*case)


def torch_zip(trap: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({WEIGHT: torch.zeros(2, 2)}, buffer)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"
FOREIGN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "Git LFS pointer": (lambda trap: LFS, "git lfs pull"),
    "HTML page": (lambda trap: b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
    "HTML page in lower case": (lambda trap: b"<!doctype html>\n<title>404</title>", "HTML page"),
    "HTML page without doctype": (lambda trap: b"<html><head></head></html>", "HTML page"),
    "HTML page in upper case": (lambda trap: b"<HTML><HEAD></HEAD></HTML>", "HTML page"),
    "HTML page after a blank line": (lambda trap: b"\r\n<!DOCTYPE html><html></html>", "HTML page"),
    "gzip": (lambda trap: gzip.compress(SOUND), "gzip"),
    "GGUF": (lambda trap: b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(64), "GGUF"),
    "torch zip": (torch_zip, "never unpickles"),
    **{f"pickle {n}": (lambda trap, n=n: pickled_trap(trap, n), "never unpickles") for n in (2, 3, 4, 5)},  # type: ignore[misc]
}


@each(FOREIGN)
def test_a_file_of_another_format_is_named_and_never_unpickled(
    bench: Workbench, tmp_path: Path, case: tuple[Callable[[Path], bytes], str]
) -> None:
    """Row 17."""
    make, told = case
    trap = tmp_path / "sprung"
    bench.refuses_weights(make(trap), told)
    assert not trap.exists()


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def missing(path: Path) -> None:
    del path


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "folder": (folder, "is a folder"),
    "pipe": (pipe, "is a named pipe"),
    "device": (link_to("/dev/zero"), "is a device"),
    "dangling link": (link_to("nowhere"), "does not exist"),
    "looping link": (lambda path: path.symlink_to(path.name), "leads to itself"),
    "missing": (missing, "no such file"),
}
ROLES: dict[str, str] = {
    "adapter": f"adapter/{ADAPTER}",
    "adapter config": f"adapter/{ADAPTER_CONFIG}",
    "shard": f"base/{SHARDS[1]}",
}


@pytest.mark.parametrize("role", ROLES.values(), ids=ROLES)
@each(SPECIAL)
def test_what_is_no_regular_file_is_refused_at_once(
    bench: Workbench, role: str, case: tuple[Callable[[Path], None], str]
) -> None:
    """Row 18. Opening a pipe would block for ever, and a device has no end."""
    write_sharded(bench.base)
    path = bench.inputs / role
    make, told = case
    path.unlink()
    make(path)
    if make is missing and path.name in (ADAPTER, ADAPTER_CONFIG):
        told = "is missing"
    outcome = bench.refuses_to_merge(path.name, told)
    assert outcome.seconds < 2
    if path.name != ADAPTER_CONFIG:
        bench.refuses_to_inspect(path.parent, path.name, told)


@each(SPECIAL)
def test_a_base_whose_only_weights_are_no_regular_file_is_refused_at_once(
    bench: Workbench, case: tuple[Callable[[Path], None], str]
) -> None:
    """Row 18."""
    make, told = case
    model = bench.base / MODEL
    model.unlink()
    make(model)
    for operand in (bench.base, model):
        wanted = [MODEL, told] if operand == model and make is not folder else [".safetensors"]
        outcome = bench.refuses("merge", operand, bench.adapter, "-o", bench.out, told=wanted)
        assert outcome.seconds < 2
    wanted = [MODEL] if make not in (folder, missing) else [".safetensors"]
    bench.refuses_to_merge(*wanted)


@each({name: make for name, (make, _) in SPECIAL.items()})
def test_an_operand_that_is_no_file_and_no_model_folder_is_refused_at_once(
    bench: Workbench, case: Callable[[Path], None]
) -> None:
    """Row 18, for BASE and ADAPTER themselves."""
    odd = bench.inputs / "odd"
    case(odd)
    for words in (("merge", odd, bench.adapter), ("merge", bench.base, odd)):
        assert bench.refuses(*words, "-o", bench.out, told=["odd"]).seconds < 2
    assert bench.refuses_to_inspect(odd, "odd").seconds < 2


@each({"base": f"base/{MODEL}", "adapter": f"adapter/{ADAPTER}", "adapter config": f"adapter/{ADAPTER_CONFIG}"})
def test_an_unreadable_file_is_called_unreadable_and_not_missing(bench: Workbench, case: str) -> None:
    """Row 19. The contract leaves open whether this is a bad input or a file system that said no."""
    path = bench.inputs / case
    path.chmod(0)
    before = snapshot(bench.inputs)
    merge = command("merge", bench.base, bench.adapter, "-o", bench.out)
    outcome = run_apart(bound_by_permissions(merge))
    assert outcome.code in (3, 6)
    check_refusal(outcome, [path.name, "permission denied"], outcome.code)
    assert snapshot(bench.inputs) == before
    assert list(bench.outputs.iterdir()) == []


@each({"base": "base", "adapter": "adapter"})
def test_an_unreadable_folder_is_called_unreadable_and_not_missing(bench: Workbench, case: str) -> None:
    """Row 19, for a folder that may not be entered."""
    path = bench.inputs / case
    path.chmod(0)
    outcome = run_apart(bound_by_permissions(command("merge", bench.base, bench.adapter, "-o", bench.out)))
    path.chmod(0o755)
    assert outcome.code in (3, 6)
    check_refusal(outcome, [case, "ermission denied"], outcome.code)
    assert list(bench.outputs.iterdir()) == []


def test_links_of_a_hub_cache_to_its_blobs_are_followed(bench: Workbench) -> None:
    """Row 20: models--org--name/snapshots/COMMIT/FILE → ../../blobs/HASH, as the Hub client lays it out."""
    for kind, place in (("base", bench.base), ("adapter", bench.adapter)):
        repository = bench.inputs / f"models--org--{kind}"
        commit = repository / "snapshots" / ("c0ffee" * 6)
        (repository / "blobs").mkdir(parents=True)
        commit.mkdir(parents=True)
        for number, file in enumerate(sorted(place.iterdir())):
            blob = repository / "blobs" / f"{number:064x}"
            file.rename(blob)
            (commit / file.name).symlink_to(f"../../blobs/{blob.name}")
        place.rmdir()
        place.symlink_to(commit)
    tensors, _ = bench.merges()
    check_is_merged(tensors)
    assert not any(path.is_symlink() for path in bench.out.rglob("*"))


def test_values_of_the_base_that_are_not_finite_are_kept_and_counted(bench: Workbench) -> None:
    """Row 21."""
    broken = W.copy()
    broken[0, 0], broken[3, 4], broken[7, 7] = np.nan, np.inf, -np.inf
    write_base(bench.base, {**BASE, WEIGHT: f32(broken), "model.norm.bias": f32(np.full(HIDDEN, np.nan))})
    tensors, report = bench.merges()
    assert report["nonfinite"] == {WEIGHT: 3}
    kept = ~np.isfinite(broken)
    assert np.array_equal(tensors[WEIGHT][kept], broken[kept], equal_nan=True)
    assert np.array_equal(tensors[WEIGHT][~kept], MERGED[~kept])
    assert np.isnan(tensors["model.norm.bias"]).all()
    text = bench.run("merge", bench.base, bench.adapter, "-o", bench.outputs / "again").out
    assert "3 values in 1 edited tensor" in text


NAMES: dict[str, tuple[str, ...]] = {
    "empty": ("",),
    "Unicode twins": ("caf\u00e9.weight", "cafe\u0301.weight"),
    "case twins": ("Twin.weight", "twin.weight"),
    "way up": ("../up", "/etc/passwd", "..", "a/b"),
    "NUL": ("a\0b",),
    "3000 characters": ("n" * 3000,),
    "terminal codes": ("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\u2028\u202e", "\x9b2J"),
    "line ends": ("one\r\ntwo",),
    "beyond the first plane": ("\U0001f600.weight",),
}


@each(NAMES)
def test_strange_tensor_names_are_carried_over_exactly_and_shown_escaped(
    bench: Workbench, case: tuple[str, ...]
) -> None:
    """Row 22: names are no paths, and no commands for a terminal."""
    extra = {name: f32(np.full(4, float(number))) for number, name in enumerate(case)}
    write_base(bench.base, {**BASE, **extra})
    before = snapshot(bench.inputs.parent)
    tensors, _ = bench.merges()
    check_is_merged(tensors)
    for number, name in enumerate(case):
        assert np.array_equal(tensors[name], np.full(4, float(number)))
    assert {p.name for p in bench.out.iterdir()} == {MODEL, "README.md", "config.json", "loratool.json"}
    assert set(snapshot(bench.inputs.parent)) - set(before) == {
        f"out/merged{tail}" for tail in ("", f"/{MODEL}", "/README.md", "/config.json", "/loratool.json")
    }
    for operand in (bench.base, bench.out):
        assert is_clean(bench.run("inspect", operand).out)


# PEFT takes no module name with a line end in it either
@each({name: names for name, names in NAMES.items() if name not in ("empty", "line ends")})
def test_weights_of_strange_names_are_merged_and_shown_escaped(bench: Workbench, case: tuple[str, ...]) -> None:
    """Row 22, for the weights that an adapter is for."""
    base = {f"{name}.weight": BASE[WEIGHT] for name in case}
    factors: dict[str, Stored] = {}
    for name in case:
        factors[f"base_model.model.{name}.lora_A.weight"] = FACTORS[A]
        factors[f"base_model.model.{name}.lora_B.weight"] = FACTORS[B]
    write_base(bench.base, base)
    write_adapter(bench.adapter, factors)
    tensors, _ = bench.merges()
    for name in case:
        assert np.array_equal(tensors[f"{name}.weight"], MERGED)
    for words in (
        ("inspect", bench.adapter),
        ("inspect", bench.adapter, "--json"),
        ("merge", bench.base, bench.adapter, "-o", bench.outputs / "second", "--dry-run"),
        ("merge", bench.base, bench.adapter, "-o", bench.outputs / "second"),
    ):
        outcome = bench.run(*words)
        assert outcome.code == 0
        assert is_clean(outcome.out + outcome.err)


@each(NAMES)
def test_strange_names_in_an_error_are_shown_escaped_and_cut(bench: Workbench, case: tuple[str, ...]) -> None:
    """Row 22, for the names in a message."""
    raw = frame(json.dumps({name: {"dtype": f"\x1b{name}", "shape": [name], "data_offsets": name} for name in case}))
    bench.refuses_weights(raw, "unknown dtype", "\\x1b")
    write_adapter(bench.adapter, {f"{name}.lora_A.weight": FACTORS[A] for name in case if name})
    outcome = bench.run("merge", bench.base, bench.adapter, "-o", bench.out)
    assert outcome.code in (3, 4)
    check_refusal(outcome, [], outcome.code)
    assert len(outcome.err) < 3000


ALLOWED: dict[str, bytes] = {
    "no padding": frame(HEADER, W.astype("<f4").tobytes()),
    "odd padding": frame(HEADER + " " * 13, W.astype("<f4").tobytes()),
    "padding of tabs and line ends": frame(HEADER + "\t\r\n ", W.astype("<f4").tobytes()),
    "blanks inside": frame(HEADER.replace(",", " ,\n"), W.astype("<f4").tobytes()),
    "no metadata": SOUND,
    "null for metadata": frame(f'{{"__metadata__":null,{HEADER[1:]}', W.astype("<f4").tobytes()),
    "empty metadata": frame(f'{{"__metadata__":{{}},{HEADER[1:]}', W.astype("<f4").tobytes()),
    "metadata at the end": frame(f'{HEADER[:-1]},"__metadata__":{{"a":"\\u0000"}}}}', W.astype("<f4").tobytes()),
    "a field nobody knows": one_weight(note={"nested": [1, 2.5, None]}),
    "125 arrays in a field nobody reads": one_weight(more=json.loads("[" * 125 + "]" * 125)),
    "escaped name": frame(HEADER.replace("q_proj", "\\u0071_proj"), W.astype("<f4").tobytes()),
    "empty tensor": safetensors_bytes({"empty": f32(np.zeros((0, 4))), WEIGHT: BASE[WEIGHT]}),
    "zero before a large size": safetensors_bytes({"z": Stored("F32", (0, 1 << 40), b""), WEIGHT: BASE[WEIGHT]}),
    "scalar": safetensors_bytes({WEIGHT: BASE[WEIGHT], "scalar": f32(np.array(0.5))}),
    "unaligned data": safetensors_bytes({"odd": Stored("U8", (3,), b"abc"), WEIGHT: BASE[WEIGHT]}),
    "BOOL above one": safetensors_bytes({WEIGHT: BASE[WEIGHT], "mask": Stored("BOOL", (2,), b"\x02\xff")}),
    "order of the header other than of the data": frame(
        f'{{"last":{{"dtype":"U8","shape":[4],"data_offsets":[256,260]}},{HEADER[1:]}',
        W.astype("<f4").tobytes() + b"last",
    ),
}


@each(ALLOWED)
def test_what_the_format_allows_is_merged(bench: Workbench, case: bytes) -> None:
    """Table A1: being strict must not mean being wrong."""
    (bench.base / MODEL).write_bytes(case)
    assert reference_takes(bench.base / MODEL)
    tensors, _ = bench.merges()
    assert np.array_equal(tensors[WEIGHT], MERGED)
    before = tensors_of(bench.base)
    assert set(tensors) == set(before)
    assert all(np.array_equal(tensors[name], before[name]) for name in before if name != WEIGHT)


def test_no_file_that_the_reference_refuses_is_ever_taken(bench: Workbench) -> None:
    """Table A1, by chance: a thousand spoilt headers, the reference parser judging each."""
    chance = random.Random(20240607)
    sound = safetensors_bytes(BASE, {"format": "pt"})
    length = int.from_bytes(sound[:8], "little")
    header, data = sound[8 : 8 + length], sound[8 + length :]
    spoilers = [*b'{}[]",:0123456789-+.eE \t\n\\u/truefalsn\x00\x1b\x80\xff', *range(32, 127)]
    path = bench.base / MODEL
    taken = 0
    for _ in range(1000):
        spoilt = bytearray(header)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            at = chance.randrange(len(spoilt))
            match chance.randrange(4):
                case 0:
                    spoilt[at] = chance.choice(spoilers)
                case 1:
                    spoilt.insert(at, chance.choice(spoilers))
                case 2:
                    del spoilt[at : at + chance.randrange(1, 4)]
                case _:
                    stop = min(len(spoilt), at + chance.randrange(1, 60))
                    spoilt[at:at] = spoilt[at:stop]
        path.write_bytes(frame(bytes(spoilt), data))
        outcome = bench.run("inspect", bench.base)
        assert outcome.code in (0, 3), (bytes(spoilt), outcome)
        assert is_clean(outcome.out + outcome.err)
        if outcome.code == 0:
            taken += 1
            assert reference_takes(path), bytes(spoilt)
    assert 10 < taken < 900  # the spoilers are neither toothless nor all fatal
