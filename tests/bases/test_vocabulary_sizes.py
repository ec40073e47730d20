"""Vocabularies of another size than the base's: merged where the adapter holds the rows, else refused with the way out.

The way out is followed: the model that was trained is saved without its adapter, as the message says, and is the base
of a second merge. The oracle of both is the output of the model under the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import PREFIX, picture, read_tensors
from tiny_models import FAMILIES, VOCABULARY, Family, adapt, bert_config, build_base, load, output_of
from torch import Tensor

from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WAY_OUT = "model.unload().save_pretrained("
SIZES = {"smaller": VOCABULARY - 10, "larger": VOCABULARY + 4}


def roberta_config() -> Any:
    return transformers.RobertaConfig(
        **{**bert_config().to_dict(), "model_type": "roberta", "max_position_embeddings": 40}
    )


# name → (the family, its embedding, its head)
MODELS: dict[str, tuple[Family, str, str]] = {
    "llama": (FAMILIES["llama"], "model.embed_tokens", "lm_head"),
    "tied llama": (FAMILIES["tied llama"], "model.embed_tokens", "lm_head"),
    "bert": (Family(bert_config, "BertForMaskedLM", {}), "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "roberta": (
        Family(roberta_config, "RobertaForMaskedLM", {}),
        "roberta.embeddings.word_embeddings",
        "lm_head.decoder",
    ),
}
LAYER = {"llama": "q_proj", "tied llama": "q_proj", "bert": "query", "roberta": "query"}
Settings = Callable[[str, str, str], dict[str, Any]]
# form → the settings of PEFT, of the names of a layer, the embedding and the head; and whether embeddings are saved
FORMS: dict[str, tuple[Settings, Any]] = {
    "by itself": (lambda layer, _embedding, _head: {"target_modules": [layer]}, "auto"),
    "modules_to_save": (
        lambda layer, embedding, head: {"target_modules": [layer], "modules_to_save": [embedding, head]},
        "auto",
    ),
    "both with factors": (lambda layer, embedding, head: {"target_modules": [layer, embedding, head]}, "auto"),
    "the embedding with factors": (lambda layer, embedding, _head: {"target_modules": [layer, embedding]}, "auto"),
    "the head with factors": (lambda layer, _embedding, head: {"target_modules": [layer, head]}, "auto"),
    "factors alone": (lambda layer, embedding, _head: {"target_modules": [layer, embedding]}, False),
    "token rows alone": (
        lambda layer, embedding, _head: {
            "target_modules": [layer],
            "trainable_token_indices": {embedding.rpartition(".")[2]: [3, VOCABULARY + 1]},
        },
        False,
    ),
}
ENCODERS = ("bert", "roberta")
# Rows of tokens of a smaller vocabulary are rows of the larger one too: nothing tells that it was cut. Roberta differs
# from BERT in the names of its head alone.
CELLS = [
    (name, form, size)
    for name in MODELS
    for form in FORMS
    for size in SIZES
    if (form, size) != ("token rows alone", "smaller") and (name != "roberta" or form in list(FORMS)[:2])
]
# these hold every row where the head has no bias of its own
MERGED = {("llama", "by itself"), ("llama", "modules_to_save"), ("llama", "both with factors")}
MERGED |= {
    (name, form) for name in ("tied llama") for form in ("by itself", "both with factors", "the embedding with factors")
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = build_base(tmp_path_factory.mktemp("sizes") / "base", MODELS[name][0])
        return made[name]

    return of


def tokens(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.cat([torch.randint(0, size, (2, 6), generator=generator), torch.tensor([[size - 1], [3]])], 1)


def says_the_same(family: Family, merged: Path, said: Tensor, size: int) -> None:
    """Loaded with nothing missing, the merged model gives the output of the model under the adapter."""
    found = output_of(load(family, merged), {"input_ids": tokens(size)})
    assert found.shape == said.shape
    assert float((found - said).abs().max()) <= 1e-5 * float(said.abs().max())
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == size


@pytest.mark.parametrize(("name", "form", "size"), CELLS)
def test_a_vocabulary_of_another_size_is_merged_or_the_way_out_works(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, form: str, size: str
) -> None:
    """Tied or not, saved whole or not: exit 0 and the right model, or exit 4 and a message that is followed to it."""
    family, embedding, head = MODELS[name]
    settings, saving = FORMS[form]
    count = SIZES[size]
    model = load(family, bases(name))
    torch.manual_seed(9)
    model.resize_token_embeddings(count, mean_resizing=False)
    wrapped = adapt(model, **settings(LAYER[name], embedding, head))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=saving)
    said = output_of(wrapped, {"input_ids": tokens(count)})
    if form == "token rows alone" and name in ENCODERS:
        head_module = model.get_output_embeddings()
        said = said + head_module.original_module.bias  # PEFT 0.21 leaves it out of a head that is tied to such rows
    before = picture(tmp_path)
    command = ["merge", str(bases(name)), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]
    code = run(command)
    message = capsys.readouterr().err
    if (name, form) in MERGED:
        assert code == 0, message
    if code == 0:
        says_the_same(family, tmp_path / "out", said, count)
        return
    assert code == 4
    assert str(count if form != "token rows alone" else VOCABULARY + 2) in message
    assert str(VOCABULARY) in message
    assert WAY_OUT in message, message
    assert picture(tmp_path) == before
    wrapped.unload().save_pretrained(tmp_path / "resized")
    assert run(["merge", str(tmp_path / "resized"), *command[2:]]) == 0, capsys.readouterr().err
    says_the_same(family, tmp_path / "out", said, count)


def test_a_vocabulary_that_was_cut_is_told(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report says which tensors took the place of larger ones, and what config.json says of it."""
    family = MODELS["tied llama"][0]
    model = load(family, bases("tied llama"))
    model.resize_token_embeddings(SIZES["smaller"])
    adapt(model, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    assert f"{PREFIX}model.embed_tokens.weight" in read_tensors(tmp_path / "adapter")
    assert (
        run(["merge", str(bases("tied llama")), str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--json"]) == 0
    )
    notes = {note["code"]: note["text"] for note in json.loads(capsys.readouterr().out)["notes"]}
    assert f"[{SIZES['smaller']}, 32]" in notes["tensor-replaced"]
    assert "vocab_size" in notes["config-edit"]
