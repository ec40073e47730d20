"""Programs load what a merge wrote as it is, and compute what the base computes with the adapter.

As docs/after-the-merge.md shows it. What is not installed is skipped; `make acceptance` installs what can be.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from paths import ROOT
from torch import Tensor

import loratool
from loratool.demo import demo

CONVERTERS = Path(sys.prefix) / "llama.cpp"
VLLM = ROOT / ".venv-vllm"  # an environment of its own, for it pins another torch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, an adapter that PEFT trained, and the merge of both by loratool and by PEFT."""
    folder = tmp_path_factory.mktemp("tiny")
    runpy.run_path(str(ROOT / "fixtures" / "make_tiny.py"))["make_tiny"](folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    base.save_pretrained(folder / "half")
    tuned = peft.PeftModel.from_pretrained(base.float(), folder / "adapter")
    tuned.merge_and_unload().save_pretrained(folder / "by-peft")
    loratool.merge(folder / "half", folder / "adapter", folder / "merged", device="cpu")
    return folder


TOKENS = [1, 5, 9, 13, 17, 21]


def logits(folder: Path) -> Tensor:
    """By transformers, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm())


def test_mlx_loads_the_folder_and_computes_what_peft_does(tiny: Path) -> None:
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(tiny / "merged")
    found = torch.tensor(model(mx.array([TOKENS])).astype(mx.float32).tolist())[0]
    wanted, base = logits(tiny / "by-peft"), logits(tiny / "half")
    assert distance(found, wanted) < 0.05 * distance(base, wanted)


def test_llama_cpp_converts_the_folder_to_the_weights_that_peft_merged(tiny: Path) -> None:
    """The converter finds every tensor of the folder under the name it expects; values differ by bfloat16's rounding."""
    pytest.importorskip("gguf")
    if not (CONVERTERS / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converters are not installed")
    from gguf_models import read_back

    jobs = [[str(tiny / name), str(tiny / f"{name}.gguf")] for name in ("merged", "by-peft", "half")]
    script = ROOT / "tests" / "helpers" / "llama_cpp_convert.py"
    subprocess.run([sys.executable, str(script), str(CONVERTERS), json.dumps(jobs)], check=True, capture_output=True)
    found, wanted, base = (read_back(tiny / f"{name}.gguf") for name in ("merged", "by-peft", "half"))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2**-8, atol=1e-6, err_msg=name)
    assert any(not np.array_equal(found[name], base[name]) for name in base)


def greedy(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The most likely tokens after each prompt, by transformers in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    return [model.generate(torch.tensor([each]), **asked)[0, len(each) :].tolist() for each in prompts]


@pytest.mark.skipif(
    not (VLLM / "ready").exists(), reason="vLLM is not installed in .venv-vllm; `make acceptance` does that"
)
def test_vllm_serves_the_folder_and_writes_what_base_and_adapter_do(tmp_path: Path) -> None:
    """On a CPU: the tokens are those of transformers, and those that vLLM itself writes with base and adapter."""
    demo(tmp_path / "demo")
    prompts, count = [TOKENS, [3, 1, 4, 1, 5]], 16
    calm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}

    def written(model: Path, adapter: Path | None = None) -> list[list[int]]:
        job = {"model": str(model), "adapter": adapter and str(adapter), "prompts": prompts, "count": count}
        script = str(ROOT / "tests" / "helpers" / "vllm_tokens.py")
        ran = subprocess.run(
            [VLLM / "bin" / "python", script, json.dumps(job)],
            env=os.environ | calm,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        tokens: list[list[int]] = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("[[")))
        return tokens

    merged = written(tmp_path / "demo" / "merged")
    assert merged == greedy(tmp_path / "demo" / "merged", prompts, count)
    assert merged == written(tmp_path / "demo" / "base", tmp_path / "demo" / "adapter")
    assert merged != greedy(tmp_path / "demo" / "base", prompts, count)


def test_diffusers_loads_a_merged_pipeline_and_computes_what_the_base_does_with_the_adapter(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 32)}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(**sizes, **blocks).eval()
    diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler()).save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(unet, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    weights = peft.get_peft_model_state_dict(tuned)
    state = {f"unet.{key.removeprefix('base_model.model.')}": value for key, value in weights.items()}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "style.safetensors")
    x, step = torch.randn(1, 3, 8, 8), torch.tensor([5])
    with torch.no_grad():
        wanted = tuned(x, step).sample
        with tuned.disable_adapter():
            base = tuned(x, step).sample
    loratool.merge(
        tmp_path / "base", tmp_path / "style.safetensors", tmp_path / "merged", input_alpha=[2], device="cpu"
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = pipeline.unet.eval()(x, step).sample
    assert distance(found, wanted) < 1e-3 * distance(base, wanted)
