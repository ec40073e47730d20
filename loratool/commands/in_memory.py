"""Merged weights as tensors in memory, for loaders of models and for engines that run: no command writes them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.lazy import Tensor
from loratool.merging import in_memory
from loratool.merging.in_memory import InMemoryOptions, MergedWeights
from loratool.options.described import made_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import InMemoryKeywords


@library_function(InMemoryOptions, "merge")
def iter_merged(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    *,
    progress: Progress | None = None,
    **keywords: Unpack[InMemoryKeywords],
) -> Generator[tuple[str, Tensor], None, None]:
    """Yield the name and the tensor of every weight of the merged model, in the order of the base; nothing is written.

    Names, dtypes, shapes and bytes are those of the files that `merge` writes. In memory are the tensor that was
    yielded, the next one, and a block ahead for each worker (3 MiB on a CPU, 16 MiB on a GPU), computed while the
    consumer uses what it has. Each tensor is the consumer's own. Close the generator, or drop it, to stop early.

    After the last tensor come warnings of adapters that change nothing, because their B is still 0 for example, and of
    updates of which rounding removes more than a tenth. Until then torch computes float32 products in full float32,
    without TF32, in the whole process.

    Args:
        base: a model folder or one `.safetensors` file, or a repository on the Hub.
        adapters: one or more adapter folders, as for `merge`.
        progress: called with (bytes done, total bytes) in the consumer's thread, before each tensor is yielded.

    Raises:
        UsageError: the arguments contradict each other.
        InputError: a file is malformed or not supported, torch lacks a dtype of the base, or, while iterating, a file
            changed.
        FitError: an adapter does not fit, or, while iterating, values overflow the dtype.
    """
    return in_memory.open_merged(base, adapters, made_of(InMemoryOptions, keywords, "iter_merged")).every(progress)


@library_function(InMemoryOptions, "merge")
def merged(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, **keywords: Unpack[InMemoryKeywords]
) -> MergedWeights:
    """Return the weights of the merged model as a mapping from names to tensors; each is computed when asked for.

    It is iterated in the order of the base. Names, dtypes, shapes and bytes are those of the files that `merge` writes.
    Nothing is kept: to ask twice is to compute twice. `items()` computes ahead as `iter_merged` does. `plan` is the
    `MergePlan`, with its notes.

    Args:
        base: as for `iter_merged`.
        adapters: as for `iter_merged`.

    Raises:
        LoratoolError: as `iter_merged` does; those that come while iterating are raised when a tensor is asked for.
    """
    return in_memory.open_merged(base, adapters, made_of(InMemoryOptions, keywords, "merged"))
