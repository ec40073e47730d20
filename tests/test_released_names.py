"""What the documentation of 0.1.0 names in Python and on the command line is still there: scripts go on working."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module

import pytest

import loratool
from loratool import cli

# As README.md and docs/ had it; what is here stays as it is, whatever becomes of the pages.
NAMES = """
    AdapterFacts Adapter Checkpoint CheckpointFacts CombineReport CompareReport ExtractReport FitError HubError InputError
    LoratoolError MergePlan MergeReport Note PushReport RescaleReport ResizeReport StorageError StreamReport UsageError
    VerificationError combine compare estimate extract html_page inspect merge open_checkpoint plan plan_merge push
    read_adapter rescale resize stream
"""
TORCH_NAMES = ("LoRALinear", "apply_lora", "load_adapter", "save_adapter")  # of loratool.nn
# Function → how many arguments are given by place, and those given by name.
CALLS: Mapping[str, tuple[int, str]] = {
    "combine": (2, "method space weights density dry_run"),
    "compare": (1, ""),
    "estimate": (3, ""),
    "extract": (3, "rank dry_run"),
    "html_page": (1, ""),
    "inspect": (1, "base values check device"),
    "merge": (3, "weights device dtype shard_size workers max_memory overwrite maps allow_new_tensors input_alpha also_load "
                 "ignore_files progress"),
    "open_checkpoint": (1, ""),
    "plan": (3, ""),
    "plan_merge": (2, "weights"),
    "push": (2, "public dry_run"),
    "read_adapter": (1, ""),
    "rescale": (2, "scale bake dry_run"),
    "resize": (2, "energy dry_run"),
    "stream": (3, "weights"),
}  # fmt: skip
# Class of loratool, or module and class → attributes that examples read.
ATTRIBUTES: Mapping[str, str] = {
    "Adapter": "updates",
    "AdapterFacts": "against findings kind ranks scalings values to_dict",
    "Checkpoint": "tensors",
    "CheckpointFacts": "dtypes kind to_dict",
    "CombineReport": "totals to_dict",
    "CompareReport": "totals to_dict",
    "ExtractReport": "totals to_dict",
    "LoratoolError": "exit_code",
    "MergePlan": "bytes_read bytes_written copied edited spans to_dict",
    "MergeReport": "digests edited notes relative_norms to_dict",
    "Note": "code text",
    "PushReport": "files left_out to_dict",
    "RescaleReport": "modules to_dict",
    "ResizeReport": "modules totals to_dict",
    "StreamReport": "to_dict",
    "algebra.updates.additive.LowRank": "rank scale shape",
    "bases.edits.Edit": "rule target",
    "nn.LoRALinear": "merge unmerge",
    "results.plan.PlannedEdit": "rule target",
    "results.plan.PlannedTensor": "edits placed source",
    "results.plan.SourceFile": "path",
    "results.combine.CombinedTotals": "energy_kept error",
    "results.estimate.Estimate": "full per_rank ranks",
    "results.findings.Finding": "code level message repair",
    "results.values.Measured": "energy_ranks norm target weight",
}
# Command → its options, besides -h, -q, -v and --json.
OPTIONS: Mapping[str, str] = {
    "combine": "adapter-name allow-secret density device dry-run dtype expert-layout input-alpha iso-beta lambda match-norm "
    "method no-normalize normalize output overwrite public push-to-hub rank rank-policy row-wise saved seed sign space svc "
    "weight weights window",
    "compare": "adapter-name device expert-layout input-alpha",
    "demo": "overwrite",
    "estimate": "dtype rank target",
    "extract": "allow-secret device dry-run dtype energy exact exclude fan-in-fan-out include max-rank no-fan-in-fan-out "
    "output overwrite public push-to-hub rank seed",
    "inspect": "adapter-name base base-config check device expert-layout fan-in-fan-out html input-alpha map "
    "no-fan-in-fan-out overwrite tensors values",
    "merge": "adapter-name allow-new-tensors allow-secret also-load base card device dry-run dtype exclude expert-layout "
    "fan-in-fan-out ignore-files input-alpha map max-memory no-fan-in-fan-out output overwrite public push-to-hub "
    "shard-size stream weight workers",
    "push": "allow-secret card create-pr dry-run exclude include message public revision",
    "rescale": "adapter-name allow-secret alpha bake dry-run dtype each expert-layout frobenius input-alpha match output "
    "overwrite public push-to-hub scale spectral",
    "resize": "adapter-name allow-secret budget calibration device dry-run dtype energy error expert-layout input-alpha "
    "layer-weights output overwrite public push-to-hub rank ratio uniform",
}


def test_every_name_is_there() -> None:
    assert [name for name in NAMES.split() if not hasattr(loratool, name)] == []
    module = import_module("loratool.nn")
    assert [name for name in TORCH_NAMES if not hasattr(module, name)] == []


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_one_that_the_function_takes(name: str) -> None:
    places, keywords = CALLS[name]
    inspect.signature(getattr(loratool, name)).bind(*range(places), **dict.fromkeys(keywords.split()))


def attributes(kind: type) -> Sequence[str]:
    """What an object of a class has, as far as the class tells."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    noted = [name for each in kind.__mro__ for name in vars(each).get("__annotations__", ())]
    return [*dir(kind), *noted, *(field.name for field in fields)]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_that_examples_read_is_there(name: str) -> None:
    module, _, own = name.rpartition(".")
    kind = getattr(import_module(f"loratool.{module}") if module else loratool, own)
    assert set(ATTRIBUTES[name].split()) <= set(attributes(kind))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_taken(name: str) -> None:
    options = [option for each in cli.command(name).params for option in (*each.opts, *each.secondary_opts)]
    common = {"-q", "--quiet", "-v", "--verbose", "--json"}
    assert {f"--{option}" for option in OPTIONS[name].split()} | common <= set(options)
