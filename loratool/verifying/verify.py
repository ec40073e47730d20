"""`verify()`: a merged model against its record, or against what its base and adapters give."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from loratool.arguments import PathLike, Progress
from loratool.errors import UsageError
from loratool.files.process import without_collections
from loratool.results.verify import Verification
from loratool.verifying.options import VerifyOptions


def verify(
    merged: PathLike,
    base: PathLike | None,
    adapters: Sequence[PathLike] | PathLike,
    options: VerifyOptions,
    progress: Progress | None = None,
) -> Verification:
    """Prove `merged`; `loratool.commands.verify` says all of it."""
    if by_record(base, adapters, options):
        from loratool.verifying.records import verify_record

        return verify_record(merged, progress=progress)
    with without_collections():
        from loratool.verifying.verifier import verifier_of  # most of the library, which a record needs nothing of

    started = time.monotonic()
    return verifier_of(merged, base, adapters, options, progress).run(started)


def by_record(base: PathLike | None, adapters: Sequence[PathLike] | PathLike, options: VerifyOptions) -> bool:
    """Whether a model is held to its record alone. Raises `UsageError` where the arguments contradict each other."""
    named = isinstance(adapters, (str, os.PathLike)) or len(adapters) > 0
    if not named and base is None:
        if given := options.given(VerifyOptions):  # what was merged, or what the proof may use
            raise UsageError(f"{', '.join(given)}: needs --adapter, and --base where the adapter does not name it")
        return True
    if not named and not options.dequantize:
        raise UsageError("--base needs --adapter, once for each adapter that was merged, or --dequantize")
    return False
