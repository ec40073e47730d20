"""The keywords of the library's functions, for type checkers: written by docs/generate_keywords.py."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from loratool.lazy import torch


class BlockKeywords(TypedDict, total=False):
    """Of BlockOption."""

    block_weights: Sequence[str] | str | None


class NamingKeywords(TypedDict, total=False):
    """Of NamingOptions."""

    maps: Sequence[str] | str | None


class OrientationKeywords(TypedDict, total=False):
    """Of OrientationOption."""

    fan_in_fan_out: bool | None


class ReadingKeywords(TypedDict, total=False):
    """Of ReadingOptions."""

    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None


class ChangeKeywords(BlockKeywords, NamingKeywords, OrientationKeywords, ReadingKeywords, total=False):
    """Of ChangeOptions."""

    weights: Sequence[float] | float | None
    only: Sequence[str] | str | None
    component_weights: Sequence[str] | str | Mapping[str, float] | None
    dtype: str | torch.dtype
    gguf_type: str | None
    rounding: str
    dequantize: bool
    allow_new_tensors: bool
    also_load: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None
    ignore_files: Sequence[str] | str | None


class LayoutKeywords(TypedDict, total=False):
    """Of LayoutOption."""

    shard_size: int | str | None


class PlanKeywords(ChangeKeywords, LayoutKeywords, total=False):
    """Of PlanOptions."""

    requantize: bool
    accept_loss: bool


class ProofKeywords(TypedDict, total=False):
    """Of ProofOptions."""

    sha256: bool
    digests: str
    verify: bool


class DeviceKeywords(TypedDict, total=False):
    """Of DeviceOption."""

    device: str | torch.device


class RunKeywords(DeviceKeywords, total=False):
    """Of RunOptions."""

    workers: int | str | None
    max_memory: int | str | None


class OverwriteKeywords(TypedDict, total=False):
    """Of OverwriteOption."""

    overwrite: bool


class WholePlanKeywords(ProofKeywords, PlanKeywords, RunKeywords, OverwriteKeywords, total=False):
    """Of MergeOptions."""


class SimulationKeywords(TypedDict, total=False):
    """Of SimulationOptions."""

    simulate: Sequence[int] | int | None
    bandwidth: int | str | None
    store_bandwidth: int | str | None
    compute_rate: int | str | None
    copy_rate: int | str | None
    startup: float
    object_store: bool


class DryRunKeywords(WholePlanKeywords, SimulationKeywords, total=False):
    """Of DryRunOptions."""


class ClusterKeywords(TypedDict, total=False):
    """Of ClusterOptions."""

    num_cpus: int | None
    num_gpus: int | None


class SendKeywords(TypedDict, total=False):
    """Of SendOptions."""

    public: bool
    allow_secret: Sequence[str] | str | None


class PublishKeywords(SendKeywords, total=False):
    """Of PublishOptions."""

    push_to_hub: str | None


class PublishModelKeywords(PublishKeywords, total=False):
    """Of PublishModelOptions."""

    exclude: Sequence[str] | str | None


class MergeKeywords(WholePlanKeywords, ClusterKeywords, PublishModelKeywords, total=False):
    """Of MergeAndPushOptions."""


class CommitKeywords(SendKeywords, total=False):
    """Of CommitOptions."""

    exclude: Sequence[str] | str | None
    revision: str | None
    message: str | None
    card: bool
    dry_run: bool


class StreamKeywords(WholePlanKeywords, CommitKeywords, total=False):
    """Of StreamOptions."""


class InMemoryKeywords(ChangeKeywords, RunKeywords, total=False):
    """Of InMemoryOptions."""

    device: str | torch.device
    changed_only: bool


class WritingKeywords(OverwriteKeywords, total=False):
    """Of WritingOptions."""

    dry_run: bool


class FactorKeywords(WritingKeywords, total=False):
    """Of FactorOptions."""

    dtype: str | torch.dtype


class DialectKeywords(TypedDict, total=False):
    """Of DialectOption."""

    to: str | None


class ModelKeywords(TypedDict, total=False):
    """Of ModelOption."""

    base: str | os.PathLike[str] | None


class OutputDialectKeywords(DialectKeywords, ModelKeywords, total=False):
    """Of OutputDialect."""


class RescaleKeywords(
    BlockKeywords, FactorKeywords, OutputDialectKeywords, ReadingKeywords, PublishKeywords, total=False
):
    """Of RescaleOptions."""

    scale: float | None
    alpha: float | None
    frobenius: float | None
    spectral: float | None
    each: bool
    match: Sequence[str] | str | Mapping[str, float] | None
    bake: bool


class ResizeKeywords(
    FactorKeywords, OutputDialectKeywords, ReadingKeywords, DeviceKeywords, PublishKeywords, total=False
):
    """Of ResizeOptions."""

    rank: int | None
    energy: float | None
    error: float | None
    ratio: float | None
    cumulative: float | None
    budget: int | str | None
    layer_weights: str | os.PathLike[str] | Mapping[str, Any] | None
    calibration: str | os.PathLike[str] | None
    uniform: bool


class CombineKeywords(
    BlockKeywords, FactorKeywords, OutputDialectKeywords, ReadingKeywords, DeviceKeywords, PublishKeywords, total=False
):
    """Of CombineOptions."""

    method: str
    rule: str
    weights: Sequence[float | Mapping[str, float]] | float | Mapping[str, float] | None
    weights_file: str | os.PathLike[str] | Sequence[Any] | None
    space: str | None
    rank: int | None
    rank_policy: str
    density: float | None
    window: float
    outliers: float
    factor: float
    match_norm: str
    sign: str
    normalize: bool | None
    iso_beta: float
    row_wise: bool
    svc: bool
    seed: int
    saved: str


class CompressKeywords(FactorKeywords, ReadingKeywords, DeviceKeywords, ModelKeywords, total=False):
    """Of CompressOptions."""

    rank: int | None
    energy: float | None
    budget: int | str | None
    into: str | os.PathLike[str] | None


class ExpandKeywords(FactorKeywords, PublishKeywords, total=False):
    """Of ExpandOptions."""


class RebaseKeywords(NamingKeywords, WritingKeywords, ReadingKeywords, DeviceKeywords, PublishKeywords, total=False):
    """Of RebaseOptions."""

    base: str | os.PathLike[str] | None
    onto: str | os.PathLike[str] | None
    force: bool


class ConvertKeywords(FactorKeywords, ReadingKeywords, PublishKeywords, total=False):
    """Of ConvertOptions."""

    to: str | None
    server: str | None
    architecture: str | None
    base: str | os.PathLike[str] | None
    rank: int | None
    energy: float | None
    accept_loss: bool
    strip_metadata: bool


class ExtractKeywords(
    OrientationKeywords, FactorKeywords, DialectKeywords, DeviceKeywords, PublishKeywords, total=False
):
    """Of ExtractOptions."""

    rank: int | Literal["auto"] | None
    energy: float | None
    max_rank: int
    exact: bool
    include: Sequence[str] | str | None
    exclude: Sequence[str] | str | None
    seed: int


class CompareKeywords(ReadingKeywords, DeviceKeywords, ModelKeywords, total=False):
    """Of CompareOptions."""

    pairs: bool
    rank: int | None


class IndexKeywords(TypedDict, total=False):
    """Of IndexOptions."""

    base: str | os.PathLike[str] | None
    overwrite: bool


class InspectKeywords(NamingKeywords, OrientationKeywords, ReadingKeywords, DeviceKeywords, total=False):
    """Of InspectOptions."""

    base: str | os.PathLike[str] | None
    base_config: str | os.PathLike[str] | None
    metadata: bool
    tensors: bool
    values: bool
    check: bool
    near: str | os.PathLike[str] | None
    top: int
    where: str | None
    sort: str | None


class PushKeywords(CommitKeywords, total=False):
    """Of PushOptions."""

    create_pr: bool
    include: Sequence[str] | str | None


class VerifyKeywords(ChangeKeywords, RunKeywords, total=False):
    """Of VerifyOptions."""

    rounding: str


class RecordKeywords(TypedDict, total=False):
    """Of RecordOptions."""

    format: str


class ReproduceKeywords(OverwriteKeywords, total=False):
    """Of ReproduceOptions."""

    folders: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None


class ManifestKeywords(TypedDict, total=False):
    """Of ManifestOptions."""

    dry_run: bool
