"""Trained weights that lie in an adapter's folder besides the adapter: named with what they hold, and never lost unsaid."""

from __future__ import annotations

import json
import os
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from malformed import BASE, MODEL, WEIGHT
from safetensors.torch import load_file, save_file
from workbench import Workbench, snapshot, tensors_of

from loratool.cli import run

OTHER = next(name for name in BASE if name != WEIGHT)  # a weight of the base that the adapter leaves alone


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def value_head(folder: Path) -> list[str]:
    save_file(
        {"v_head.summary.weight": torch.ones(1, 5), "v_head.summary.bias": torch.ones(1)},
        folder / "value_head.safetensors",
    )
    return ["value_head.safetensors", "2 tensors of 6 parameters", "v_head.summary.bias"]


def torch_pickle(folder: Path) -> list[str]:
    torch.save({"mm_projector.0.weight": torch.ones(3, 4), "x": torch.ones(2)}, folder / "non_lora_trainables.bin")
    return ["non_lora_trainables.bin", "a pickle of 2 tensors"]


def other_pickle(folder: Path) -> list[str]:
    (folder / "non_lora_state_dict.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    return ["non_lora_state_dict.bin", "a pickle"]


def bomb(folder: Path) -> list[str]:
    torch.save(Bomb(folder / "exploded"), folder / "head.pt")
    return ["head.pt", "a pickle of 0 tensors"]


def subfolder(folder: Path) -> list[str]:
    (folder / "projector").mkdir()
    save_file({"w": torch.ones(2)}, folder / "projector" / "vit.safetensors")
    return ["projector/vit.safetensors", "1 tensor of 2 parameters"]


def broken(folder: Path) -> list[str]:
    (folder / "new_embeddings.safetensors").write_bytes(b"\x00" * 4)
    return ["new_embeddings.safetensors"]


def pointer(folder: Path) -> list[str]:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n"
    (folder / "head.bin").write_text(text)
    return ["head.bin", "Git LFS pointer"]


def arrays(folder: Path) -> list[str]:
    np.savez(folder / "head.npz", a=np.ones(3))
    return ["head.npz", "bytes"]


TRAINED: dict[str, Callable[[Path], list[str]]] = {
    f.__name__: f for f in (value_head, torch_pickle, other_pickle, bomb, subfolder, broken, pointer, arrays)
}


def state(*names: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state": torch.ones(2)}, path)
        return [names[0].partition("/")[0]]

    return make


def twin(folder: Path) -> list[str]:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    return ["adapter_model.bin", "own weights"]


def renamed_twin(folder: Path) -> list[str]:
    stored = load_file(folder / "adapter_model.safetensors")
    save_file({f"x.{name}": tensor for name, tensor in stored.items()}, folder / "pytorch_lora_weights.safetensors")
    return ["pytorch_lora_weights.safetensors"]


def neighbour(folder: Path) -> list[str]:
    (folder / "other").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / "other" / name).write_bytes((folder / name).read_bytes())
    return ["other/adapter_model.safetensors"]


def model(folder: Path) -> list[str]:
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, folder / "model-00001-of-00001.safetensors")
    return ["model-00001-of-00001.safetensors"]


# Files that are named and are no reason to stop.
HARMLESS: dict[str, Callable[[Path], list[str]]] = {
    "trainer": state("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt"),
    "accelerate": state("optimizer.bin", "random_states_0.pkl", "sampler.bin"),
    "deepspeed": state("global_step10/mp_rank_00_model_states.pt", "global_step10/zero_pp_rank_0_optim_states.pt"),
    "fsdp": state("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"),
    "checkpoint": state("checkpoint-5/pytorch_model.bin"),
    "twin": twin,
    "renamed twin": renamed_twin,
    "neighbour": neighbour,
    "model": model,
}

COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", "BASE", "ADAPTER", "-o", "OUT"],
    "plan": ["merge", "BASE", "ADAPTER", "-o", "OUT", "--dry-run"],
    "rescale": ["rescale", "ADAPTER", "--scale", "2", "-o", "OUT"],
    "bake": ["rescale", "ADAPTER", "--bake", "-o", "OUT"],
    "resize": ["resize", "ADAPTER", "--rank", "1", "-o", "OUT"],
    "combine": ["combine", "ADAPTER", "ADAPTER", "-o", "OUT"],
    "inspect": ["inspect", "ADAPTER"],
    "check": ["inspect", "ADAPTER", "--check"],
    "compare": ["compare", "ADAPTER", "ADAPTER"],
    "push": ["push", "ADAPTER", "me/x", "--dry-run"],
}
REFUSING = ("merge", "plan")


def words_of(bench: Workbench, command: str) -> list[str]:
    places = {"BASE": str(bench.base), "ADAPTER": str(bench.adapter), "OUT": str(bench.out)}
    return [places.get(word, word) for word in COMMANDS[command]]


def notes_of(outcome: Any) -> str:
    """All that a report in JSON says in notes, as one text."""
    data = json.loads(outcome.out)
    found = [data, *data.get("results", [])]
    return "\n".join(note["text"] for part in found for note in part.get("notes", []))


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("command", COMMANDS)
def test_trained_weights_beside_an_adapter_are_named_with_what_they_hold(
    bench: Workbench, command: str, kind: str
) -> None:
    """A merge stops with exit 4; every other command says what became of them. Nothing is ever unpickled."""
    told = TRAINED[kind](bench.adapter)
    if command in REFUSING:
        outcome = bench.refuses(*words_of(bench, command), told=[*told, "--ignore-files"], code=4)
    else:
        outcome = bench.run(*words_of(bench, command), "--json")
        assert outcome.code == 0, outcome.err
        text = notes_of(outcome)
        assert all(part in text for part in told), text
    assert not (bench.adapter / "exploded").exists()


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("command", ["inspect", "check"])
def test_what_a_reader_sees_names_them_too(bench: Workbench, command: str, kind: str) -> None:
    """`inspect` as text, with --check and without, names each file beside the adapter with what it holds."""
    told = TRAINED[kind](bench.adapter)
    outcome = bench.run(*words_of(bench, command))
    shown = "".join((outcome.out + outcome.err).split())
    assert outcome.code == 0
    assert all("".join(part.split()) in shown for part in told), shown


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("command", ["merge", "combine", "resize", "inspect", "push"])
def test_training_states_and_twins_are_named_and_do_not_count(bench: Workbench, command: str, kind: str) -> None:
    """They are in the report, and no command stops or warns for them."""
    if kind == "model" and command in ("inspect", "push"):
        pytest.skip("a folder with a config.json is the model, and the adapter in it is not looked at")
    told = HARMLESS[kind](bench.adapter)
    outcome = bench.run(*words_of(bench, command), "--json")
    assert (outcome.code, outcome.err) == (0, "")
    text = notes_of(outcome)
    assert all(part in text for part in told), text
    if command != "push" and command != "inspect":
        assert not any(path.suffix in (".pt", ".bin", ".pth", ".pkl") for path in bench.out.rglob("*"))


@pytest.mark.parametrize("kind", TRAINED)
def test_ignored_files_are_left_out_and_the_report_says_so(bench: Workbench, kind: str) -> None:
    """With --ignore-files the merge is what it is without the file, and loratool.json records it."""
    name = TRAINED[kind](bench.adapter)[0]
    tensors, report = bench.merges("--ignore-files", name)
    assert set(tensors) == set(BASE)
    assert any(name in note["text"] and note["code"] == "file-ignored" for note in report["notes"])
    recorded = json.loads((bench.out / "loratool.json").read_text())
    assert any(name in note["text"] for note in recorded["notes"])
    assert name in recorded["command"]


def test_a_pattern_ignores_several_and_one_that_matches_nothing_is_refused(bench: Workbench) -> None:
    """Names may be patterns; a name of no file is a slip that would hide another file's loss."""
    value_head(bench.adapter)
    torch_pickle(bench.adapter)
    bench.refuses_to_merge("value_head.safetensors", "non_lora_trainables.bin", code=4)
    bench.refuses_to_merge("non_lora", code=4, options=["--ignore-files", "value*"])
    bench.refuses_to_merge("nothing.bin", "value_head", code=2, options=["--ignore-files", "nothing.bin"])
    bench.merges("--ignore-files", "value*", "--ignore-files", "*.bin")


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("where", ["name", "path", "elsewhere"])
def test_files_whose_tensors_are_the_bases_are_merged_with_also_load(
    bench: Workbench, tmp_path: Path, prefix: str, where: str
) -> None:
    """The file's tensors replace the base's bit for bit, the adapter is merged as ever, and both are recorded."""
    base = load_file(bench.base / MODEL)
    trained = torch.randn(base[OTHER].shape).to(base[OTHER].dtype)
    place = tmp_path if where == "elsewhere" else bench.adapter
    save_file({f"{prefix}{OTHER}": trained}, place / "trained.safetensors")
    if where != "elsewhere":
        bench.refuses_to_merge("--also-load trained.safetensors", code=4)
    file = "trained.safetensors" if where == "name" else str(place / "trained.safetensors")
    tensors, report = bench.merges("--also-load", file)
    wanted = trained.double().numpy()
    assert np.array_equal(tensors[OTHER], wanted)
    assert not np.array_equal(tensors[WEIGHT], base[WEIGHT].double().numpy())
    recorded = (bench.out / "loratool.json").read_text()
    assert "trained.safetensors" in recorded
    assert "prefix-missing" not in {note["code"] for note in report["notes"]}
    assert str(tmp_path) not in recorded
    if where != "elsewhere":
        assert any(note["code"] == "file-merged" for note in report["notes"])


def test_a_file_that_the_base_has_no_place_for_needs_to_be_allowed_as_new(bench: Workbench) -> None:
    """A value head is refused with the reason, and added where new tensors are allowed."""
    value_head(bench.adapter)
    bench.refuses_to_merge("v_head.summary", code=4, options=["--also-load", "value_head.safetensors"])
    tensors, _ = bench.merges("--also-load", "value_head.safetensors", "--allow-new-tensors")
    assert np.array_equal(tensors["v_head.summary.weight"], np.ones((1, 5)))


@pytest.mark.parametrize("kind", ["torch_pickle", "missing", "factors"])
def test_what_cannot_be_loaded_along_is_refused(bench: Workbench, kind: str) -> None:
    """A pickle with the command that converts it, a name of no file, and a second adapter that is called a file."""
    if kind == "torch_pickle":
        torch_pickle(bench.adapter)
        bench.refuses_to_merge("never loads", "python -c", code=3, options=["--also-load", "non_lora_trainables.bin"])
    elif kind == "missing":
        bench.refuses_to_merge("nothing.safetensors", code=2, options=["--also-load", "nothing.safetensors"])
    else:
        (bench.adapter / "second.safetensors").write_bytes((bench.adapter / "adapter_model.safetensors").read_bytes())
        bench.refuses_to_merge("ADAPTER", code=3, options=["--also-load", "second.safetensors"])


def test_the_way_from_a_pickle_to_a_merge_works(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that the message gives is run where the file lies; its result is merged as the message says."""
    base = load_file(bench.base / MODEL)
    trained = torch.randn(base[OTHER].shape).to(base[OTHER].dtype)
    torch.save({OTHER: trained}, bench.adapter / "non_lora_trainables.bin")
    told = bench.refuses_to_merge("python -c", "--also-load non_lora_trainables.safetensors", code=4).err
    line = next(line for line in told.splitlines() if "python -c" in line)
    monkeypatch.chdir(bench.adapter)
    exec(shlex.split(line[line.index("python -c") :])[2], {"__name__": "__main__"})
    (bench.adapter / "non_lora_trainables.bin").unlink()
    tensors, _ = bench.merges("--also-load", "non_lora_trainables.safetensors")
    assert np.array_equal(tensors[OTHER], trained.double().numpy())


@pytest.mark.parametrize("command", ["rescale", "bake", "resize", "combine"])
@pytest.mark.parametrize("kind", ["value_head", "torch_pickle", "subfolder"])
def test_algebra_carries_trained_weights_over_byte_for_byte(bench: Workbench, command: str, kind: str) -> None:
    """They belong to what was trained, so they come along with the adapter that is made of it."""
    name = TRAINED[kind](bench.adapter)[0]
    assert bench.run(*words_of(bench, command)).code == 0
    assert (bench.out / name).read_bytes() == (bench.adapter / name).read_bytes()


def test_a_combination_of_adapters_with_other_heads_warns_that_they_are_lost(bench: Workbench) -> None:
    """No head of two is the head of both: neither is taken, and stderr says so."""
    value_head(bench.adapter)
    second = bench.inputs / "second"
    second.mkdir()
    for path in bench.adapter.iterdir():
        (second / path.name).write_bytes(path.read_bytes())
    save_file({"v_head.summary.weight": torch.zeros(1, 5)}, second / "value_head.safetensors")
    outcome = bench.run("combine", bench.adapter, second, "-o", bench.out)
    assert outcome.code == 0
    assert outcome.err.count("warning:") == 2
    assert "value_head.safetensors" in outcome.err
    assert not (bench.out / "value_head.safetensors").exists()


def test_push_sends_safetensors_and_leaves_pickles_here_with_a_warning(bench: Workbench) -> None:
    """What is sent and what is not are both in the report."""
    value_head(bench.adapter)
    torch_pickle(bench.adapter)
    outcome = bench.run(*words_of(bench, "push"), "--json")
    report = json.loads(outcome.out)
    assert "value_head.safetensors" in report["files"]
    assert "non_lora_trainables.bin" not in report["files"]
    assert any("non_lora_trainables.bin" in line for line in report["left_out"])
    assert "warning: non_lora_trainables.bin" in outcome.err
    outcome = bench.run(*words_of(bench, "push"), "--include", "*.bin", "--json")
    assert "non_lora_trainables.bin" in json.loads(outcome.out)["files"]


def test_extract_says_what_it_does_not_compare(bench: Workbench) -> None:
    """Weights beside the tuned model are named, those that are the base's byte for byte are not."""
    tuned = bench.inputs / "tuned"
    tuned.mkdir()
    stored = load_file(bench.base / MODEL)
    stored[WEIGHT] = stored[WEIGHT] + torch.randn(stored[WEIGHT].shape[0], 1) @ torch.randn(1, stored[WEIGHT].shape[1])
    save_file(stored, tuned / MODEL)
    value_head(tuned)
    subfolder(tuned)
    subfolder(bench.base)
    outcome = bench.run("extract", bench.base, tuned, "-o", bench.out, "--rank", "1")
    assert outcome.code == 0, outcome.err
    assert "value_head.safetensors" in outcome.err
    assert "vit.safetensors" not in outcome.err


def test_a_refused_merge_touches_nothing(bench: Workbench) -> None:
    """Inputs and outputs are as they were, links and times among them."""
    value_head(bench.adapter)
    before = snapshot(bench.inputs)
    bench.refuses_to_merge("value_head.safetensors", code=4)
    assert snapshot(bench.inputs) == before
    assert tensors_of(bench.base)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a base and an adapter of sentence-transformers with pooling and a dense layer, and its answer."""
    library: Any = pytest.importorskip("sentence_transformers")
    models: Any = pytest.importorskip("sentence_transformers.models")
    import transformers
    from peft import LoraConfig
    from tiny_models import bert_config

    folder = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    transformers.BertModel(bert_config()).save_pretrained(folder / "base")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / "base")
    parts = [models.Transformer(str(folder / "base")), models.Pooling(32), models.Dense(32, 8)]
    model = library.SentenceTransformer(modules=parts, device="cpu")
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query", "value"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(folder / "adapter"))
    return folder, model.encode(["a b c", "j i"])


@pytest.mark.parametrize("command", ["merge", "resize"])
def test_the_modules_of_sentence_transformers_come_along(
    sentences: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """sentence-transformers itself loads what comes out, and encodes as the model with its adapter did."""
    from sentence_transformers import SentenceTransformer

    folder, wanted = sentences
    inputs = [folder / "base", folder / "adapter"] if command == "merge" else [folder / "adapter", "--rank", "2"]
    assert run([command, *map(str, inputs), "-o", str(tmp_path / "out"), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("2_Dense/model.safetensors" in note["text"] and note["code"] == "file-carried-over" for note in notes)
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a b c", "j i"])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
