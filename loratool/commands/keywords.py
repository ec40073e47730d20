"""The keywords of the library's functions, for type checkers: written by docs/generate_keywords.py."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class MergeKeywords(TypedDict, total=False):
    """Of MergeOptions."""

    weights: Sequence[float] | float | None
    dtype: str
    shard_size: int | str | None
    allow_new_tensors: bool
    also_load: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None
    ignore_files: Sequence[str] | str | None
    maps: Sequence[str] | str | None
    fan_in_fan_out: bool | None
    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None
    workers: int | None
    max_memory: int | str | None
    device: str
    overwrite: bool
    exclude: Sequence[str] | str | None
    push_to_hub: str | None
    public: bool
    allow_secret: Sequence[str] | str | None


class WholePlanKeywords(TypedDict, total=False):
    """Of MergeOptions."""

    weights: Sequence[float] | float | None
    dtype: str
    shard_size: int | str | None
    allow_new_tensors: bool
    also_load: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None
    ignore_files: Sequence[str] | str | None
    maps: Sequence[str] | str | None
    fan_in_fan_out: bool | None
    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None
    workers: int | None
    max_memory: int | str | None
    device: str
    overwrite: bool


class PlanKeywords(TypedDict, total=False):
    """Of PlanOptions."""

    weights: Sequence[float] | float | None
    dtype: str
    shard_size: int | str | None
    allow_new_tensors: bool
    also_load: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None
    ignore_files: Sequence[str] | str | None
    maps: Sequence[str] | str | None
    fan_in_fan_out: bool | None
    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None


class StreamKeywords(TypedDict, total=False):
    """Of StreamOptions."""

    weights: Sequence[float] | float | None
    dtype: str
    shard_size: int | str | None
    allow_new_tensors: bool
    also_load: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None
    ignore_files: Sequence[str] | str | None
    maps: Sequence[str] | str | None
    fan_in_fan_out: bool | None
    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None
    workers: int | None
    max_memory: int | str | None
    device: str
    overwrite: bool
    exclude: Sequence[str] | str | None
    revision: str | None
    message: str | None
    card: bool
    dry_run: bool
    public: bool
    allow_secret: Sequence[str] | str | None


class RescaleKeywords(TypedDict, total=False):
    """Of RescaleOptions."""

    scale: float | None
    alpha: float | None
    frobenius: float | None
    spectral: float | None
    each: bool
    match: Sequence[str] | str | Mapping[str, float] | None
    bake: bool
    dtype: str
    dry_run: bool
    overwrite: bool
    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None
    push_to_hub: str | None
    public: bool
    allow_secret: Sequence[str] | str | None


class ResizeKeywords(TypedDict, total=False):
    """Of ResizeOptions."""

    rank: int | None
    energy: float | None
    error: float | None
    ratio: float | None
    budget: int | str | None
    layer_weights: str | os.PathLike[str] | Mapping[str, Any] | None
    calibration: str | os.PathLike[str] | None
    uniform: bool
    dtype: str
    dry_run: bool
    overwrite: bool
    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None
    device: str
    push_to_hub: str | None
    public: bool
    allow_secret: Sequence[str] | str | None


class CombineKeywords(TypedDict, total=False):
    """Of CombineOptions."""

    method: str
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
    dtype: str
    dry_run: bool
    overwrite: bool
    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None
    device: str
    push_to_hub: str | None
    public: bool
    allow_secret: Sequence[str] | str | None


class ExtractKeywords(TypedDict, total=False):
    """Of ExtractOptions."""

    rank: int | Literal["auto"] | None
    energy: float | None
    max_rank: int
    exact: bool
    include: Sequence[str] | str | None
    exclude: Sequence[str] | str | None
    seed: int
    fan_in_fan_out: bool | None
    dtype: str
    dry_run: bool
    overwrite: bool
    device: str
    push_to_hub: str | None
    public: bool
    allow_secret: Sequence[str] | str | None


class CompareKeywords(TypedDict, total=False):
    """Of CompareOptions."""

    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None
    device: str


class InspectKeywords(TypedDict, total=False):
    """Of InspectOptions."""

    base: str | os.PathLike[str] | None
    base_config: str | os.PathLike[str] | None
    tensors: bool
    values: bool
    check: bool
    maps: Sequence[str] | str | None
    fan_in_fan_out: bool | None
    expert_layout: Sequence[str] | str | None
    adapter_name: Sequence[str] | str | None
    input_alpha: Sequence[float] | float | None
    device: str


class PushKeywords(TypedDict, total=False):
    """Of PushOptions."""

    create_pr: bool
    include: Sequence[str] | str | None
    exclude: Sequence[str] | str | None
    revision: str | None
    message: str | None
    card: bool
    dry_run: bool
    public: bool
    allow_secret: Sequence[str] | str | None
