"""The spectra that docs/what-lora-is.md shows of published adapters are those of the files, by numpy in float64."""

from __future__ import annotations

import re
from statistics import median
from typing import Any

import numpy as np
import pytest
from paths import REAL, ROOT
from safetensors.numpy import load_file

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")

ROW = re.compile(
    r"^\| ([\w.-]+/[\w.-]+) \| [^|]+ \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", re.MULTILINE
)
FOLDERS = {  # repository and rank of a row → the folder with its file
    ("serhandenizhan/ariza-tespit-siniflandirici", 16): "bert-turkish-dupmts",
    ("dayanidhi04/emotion-classification-distilbert-lora", 8): "distilbert-emotion",
    ("Siddharth-magesh/flan-t5-base-MedicalQnA", 16): "flan-t5-base-medqa",
    ("erika0915/Speech-AI", 8): "whisper-small-enczeroB",
    ("huggingface/trl", 16): "gpt2-kto-trl",
    ("abrhaleyarefaine1997/gpt2-tigrinya-lora", 8): "gpt2-tigrinya",
    ("sanaear/tiny-LLM-Lora", 8): "distilgpt2-sanaear-fifofalse",
    ("ironhack-labs/lab-lora-tuning-peft", 4): "ih-bloom560m-r4a1",
    ("ironhack-labs/lab-lora-tuning-peft", 8): "ih-bloom560m-r8a1",
    ("ao-wei/gemma3-270m-svg-lora-partb", 4): "gemma3-270m-svg-seed42",
    ("FaithSang/anime-lora-gnerator", 4): "sd-peft-unet-anime",
}


def singular_values(down: Any, up: Any) -> Any:
    """Of B A, by way of the triangles of both."""
    left, right = np.linalg.qr(up.astype(np.float64))[1], np.linalg.qr(down.astype(np.float64).T)[1]
    return np.linalg.svd(left @ right.T, compute_uv=False)


def energy_ranks(folder: str) -> list[list[int]]:
    """For each layer that changes anything, the smallest ranks with 90, 95 and 99 % of the energy."""
    tensors = load_file(REAL / folder / "adapter_model.safetensors")
    found = []
    for name in tensors:
        if name.endswith("lora_A.weight"):
            values = singular_values(tensors[name], tensors[name.replace("lora_A", "lora_B")]) ** 2
            if values.sum():
                held = np.cumsum(values) / values.sum()
                found.append([int(np.searchsorted(held, part)) + 1 for part in (0.9, 0.95, 0.99)])
    return found


def test_every_row_of_the_table_is_what_the_files_give() -> None:
    rows = ROW.findall((ROOT / "docs" / "what-lora-is.md").read_text(encoding="utf-8"))
    assert {(repository, int(rank)) for repository, rank, *_ in rows} == FOLDERS.keys()
    for repository, rank, *shown in rows:
        ranks = energy_ranks(FOLDERS[repository, int(rank)])
        medians = [median(each[place] for each in ranks) for place in range(3)]
        assert [*medians, max(each[2] for each in ranks)] == list(map(float, shown)), repository
