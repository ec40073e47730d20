"""What a conversion carries besides the factors: DoRA's lengths of rows, biases, and tensors saved whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapters.adapter import stored_tensors, unloaded
from loratool.adapters.formats import format_of
from loratool.adapters.formats.format import Spelling
from loratool.adapters.layers import Contents, Form, Kind
from loratool.adapters.writer import Carried, add_missing_biases, torch_dtype
from loratool.algebra.updates.additive import Add
from loratool.errors import FitError, printable
from loratool.lazy import Tensor, torch
from loratool.reworking.converting.rows import Target, gathered
from loratool.reworking.converting.wholes import stored_in_full, update_of, widens, written


def carried(
    contents: Contents,
    targets: Mapping[str, Target],
    names: Spelling,
    forms: Mapping[str, Form],
    scales: Mapping[str, float],
    beside: Mapping[str, Target],
) -> Carried:
    """Everything but the factors, under the names and by the rows of the layers that are written.

    `scales` are those that the output says of its layers, which some readers apply to biases too; `beside` is what is
    stored in full, by its target in the output.
    """
    contents.check_beside()
    found = Carried()
    for name, target in targets.items():
        if (lengths := magnitudes(contents, name, target)) is not None:
            by_column = any(m.by_column for source in target.sources if (m := contents.layers[source].magnitude))
            if by_column and not target.is_whole(contents.layers):
                text = "its lengths are those of input columns of another layer"
                raise FitError(f"{printable(name)}: {text}; convert to a dialect that has it whole")
            found.tensors[names.magnitude(name)] = lengths.reshape(
                names.lengths(forms[name], lengths.numel() if by_column else 0)
            )
        if widens(contents, target) and (called := names.widened(name)):
            found.tensors[called] = torch.tensor([forms[name].rows, forms[name].columns])
        if (bias := biases(contents, target, scales.get(name, 1.0) if names.scales_biases else 1.0)) is not None:
            found.tensors[names.bias(name)] = bias
    carry_whole(contents, names, found, beside)
    if contents.biases:
        add_missing_biases(found, names, {name: form.rows for name, form in forms.items()}, torch.float32)
    found.tensors.update(names.second_copies([contents.adapter], found.tensors))
    return found


def carry_whole(contents: Contents, names: Spelling, found: Carried, beside: Mapping[str, Target]) -> None:
    """What is stored in full, and rows of tokens."""
    adapter = contents.adapter
    every = stored_in_full(contents)
    for name, divided in beside.items():
        source, update = divided.sources[0], update_of(name, divided, every)
        called = (
            names.change(name, contents.is_norm(source))
            if isinstance(update, Add)
            else names.whole(name, format_of(adapter).was_inside(adapter, source))
        )
        found.tensors[called] = written(update)
    for target, replacement in contents.bases.items():
        found.tensors[names.whole(target, True)] = unloaded(replacement.value)
    for target, rows in contents.rows.items():
        found.tensors[names.rows(target)] = unloaded(rows.values)
        found.tokens[target] = rows.index


def magnitudes(contents: Contents, name: str, target: Target) -> Tensor | None:
    """DoRA's lengths of the rows of a layer; None where it has none. Raises `FitError` where only a part of it does."""
    own = {source: contents.layers[source].magnitude for source in target.sources}
    if not any(own.values()):
        return None
    if target.kind is Kind.PARAMETER or not all(own.values()) or any(not p.target for p in target.experts[0]):
        raise FitError(
            f"{printable(name)}: it would hold layers with and without DoRA; convert to a dialect that keeps them "
            "separate"
        )
    stored = {source: unloaded(magnitude.magnitude) for source, magnitude in own.items() if magnitude}
    loaded = {source: lengths.load(torch.device("cpu"), torch.float64) for source, lengths in stored.items()}
    dtypes = [torch_dtype(tensor.info.dtype) for lengths in stored.values() for tensor in stored_tensors(lengths)]
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    if target.is_whole(contents.layers):  # lengths of columns too
        return loaded[target.sources[0]].to(dtype)
    return gathered(target.experts[0], loaded, dtype)


def biases(contents: Contents, target: Target, scale: float) -> Tensor | None:
    """What the second factor of a layer has as a bias, for a reader who multiplies it by `scale`; None where it has none."""
    own = {
        source: bias for source in target.sources if (bias := f"{source.removesuffix('weight')}bias") in contents.biases
    }
    if not own or target.kind is Kind.PARAMETER:
        return None
    values: list[Any] = [contents.biases[bias].value for bias in own.values()]
    loaded = {source: contents.load_bias(bias) / (scale or 1.0) for source, bias in own.items()}
    return gathered(target.experts[0], loaded, torch_dtype(values[0].info.dtype))
