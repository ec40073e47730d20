"""Runs llama.cpp's own converters of models and adapters, without vocabularies: `python … LLAMA_CPP JOBS` with a JSON list.

A job is [model folder, output], or [model folder, output, adapter folder].
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main(home: str, jobs: list[list[str]]) -> None:
    sys.path[:0] = [home, f"{home}/gguf-py"]
    import conversion
    import gguf
    import torch

    for model, out, *adapter in jobs:
        if adapter:
            sys.argv = ["convert_lora_to_gguf.py", "--base", model, "--outfile", out, "--outtype", "f32", *adapter]
            runpy.run_path(f"{home}/convert_lora_to_gguf.py", run_name="__main__")
            continue
        hparams = conversion.ModelBase.load_hparams(Path(model), False)
        kind = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))

        class Bare(kind):  # type: ignore[misc, valid-type]
            model_arch = kind.model_arch

            def set_vocab(self) -> None:
                pass

        with torch.inference_mode():
            made: Any = Bare(Path(model), gguf.LlamaFileType.ALL_F32, Path(out))
            made.write()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
