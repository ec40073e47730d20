"""What `loratool.json` says of inputs, and the bill of materials and the history that are made of it.

The oracles are digests that the standard library computes, the schema and the model of each standard, and what went in.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed import f32, safetensors_bytes, write_json
from numpy.random import default_rng
from oracle import sha256
from tree_digests import blake, file_entry

import loratool
from loratool import cli
from loratool.lineage import documents
from loratool.results.facts import UnreadableFacts
from loratool.results.history import Ancestor

WIDE, NARROW = 6, 4
MODULE = "model.layers.0.self_attn.q_proj"
CARD = "---\nlicense: {}\n---\n# A card\n"


def write_adapter(folder: Path, seed: int) -> Path:
    folder.mkdir()
    random = default_rng(seed)
    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": f32(random.normal(size=(2, NARROW))),
        f"base_model.model.{MODULE}.lora_B.weight": f32(random.normal(size=(WIDE, 2))),
    }
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(factors))
    write_json(
        folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    )
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter with cards; `half` of the adapter, `made` of both, and `back` with it taken out again."""
    home = tmp_path_factory.mktemp("lineage")
    (home / "base").mkdir()
    weights = {
        f"{MODULE}.weight": f32(default_rng(1).normal(size=(WIDE, NARROW))),
        "model.norm.weight": f32(np.ones(WIDE)),
    }
    (home / "base" / "model.safetensors").write_bytes(safetensors_bytes(weights))
    write_json(home / "base" / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    (home / "base" / "README.md").write_text(CARD.format("apache-2.0"))
    adapter = write_adapter(home / "adapter", 2)
    (adapter / "README.md").write_text(CARD.format("my-own"))
    loratool.rescale(adapter, home / "half", scale=0.5)
    loratool.merge(home / "base", home / "half", home / "made", digests="full", device="cpu")
    loratool.merge(home / "made", home / "half", home / "back", weights=-1, device="cpu")
    return home


def recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "loratool.json").read_bytes())
    return found


def test_the_record_has_digests_licences_and_options_of_every_input(home: Path) -> None:
    table = recorded(home / "made")
    files = {path.name: path.read_bytes() for path in (home / "base").iterdir() if path.name != "README.md"}
    assert table["base"]["files"] == {name: file_entry(name, content) for name, content in files.items()}
    assert table["base"]["license"] == "apache-2.0"
    (half,) = table["adapters"]
    assert half["sha256"] == {
        name: sha256(home / "half" / name) for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    assert half["license"] == "my-own"  # which the card of an adapter takes over from that of its input
    assert half["made"]["adapter"]["sha256"]["adapter_config.json"] == sha256(home / "adapter" / "adapter_config.json")
    assert (table["operands"], table["options"]) == (["./base", "./half"], {"device": "cpu", "digests": "full"})
    assert table["gain"] == 1.0  # float32 keeps all of the update


def test_without_full_digests_a_local_base_is_recorded_by_its_headers_and_one_of_ours_by_its_own_record(
    home: Path, tmp_path: Path
) -> None:
    loratool.merge(home / "base", home / "half", tmp_path / "out", device="cpu")
    entry = recorded(tmp_path / "out")["base"]["files"]["model.safetensors"]
    raw = (home / "base" / "model.safetensors").read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    assert entry == {"size": len(raw), "function": "blake3", "header": blake(header).hex()}
    known = recorded(home / "back")["base"]["files"]
    assert known["model.safetensors"] == recorded(home / "made")["files"]["model.safetensors"]


def test_an_input_that_was_changed_since_has_no_history(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "half", tmp_path / "half")
    config = json.loads((tmp_path / "half" / "adapter_config.json").read_bytes())
    write_json(tmp_path / "half" / "adapter_config.json", {**config, "lora_alpha": 8})
    loratool.rescale(tmp_path / "half", tmp_path / "out", scale=2)
    assert "made" not in recorded(tmp_path / "out")["adapter"]
    assert "made" in recorded(home / "made")["adapters"][0]


def history_of(path: Path) -> Ancestor | None:
    facts = loratool.inspect(path)
    assert not isinstance(facts, UnreadableFacts)
    return facts.history


def shape(node: Ancestor | None) -> tuple[str, str, list[Any]]:
    assert node is not None
    return node.name, node.made_by, [shape(each) for each in node.inputs]


def test_inspect_shows_the_ancestry_through_all_generations(home: Path) -> None:
    half: tuple[str, str, list[Any]] = ("half", "rescale", [("adapter", "", [])])
    made = ("made", "merge", [("base", "", []), half])
    assert shape(history_of(home / "back")) == ("back", "merge", [made, half])
    told = str(loratool.inspect(home / "back"))
    tree = """\
history
  back, made by merge
  ├─ base: made (apache-2.0), made by merge
  │  ├─ base: base (apache-2.0)
  │  └─ adapter × 1: half (my-own), made by rescale
  │     └─ adapter: adapter (my-own)
  └─ adapter × -1: half (my-own), made by rescale
     └─ adapter: adapter (my-own)"""
    assert tree in told
    assert shape(history_of(home / "half")) == half
    assert history_of(home / "adapter") is None


def test_a_file_that_stands_alone_has_its_history_in_its_header(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {
        f"{module}.lora_down.weight": f32(np.ones((2, NARROW))),
        f"{module}.lora_up.weight": f32(np.ones((WIDE, 2))),
        f"{module}.alpha": f32(np.array(2.0)),
    }
    (tmp_path / "one.safetensors").write_bytes(safetensors_bytes(factors))
    loratool.rescale(tmp_path / "one.safetensors", tmp_path / "two.safetensors", scale=2)
    loratool.rescale(tmp_path / "two.safetensors", tmp_path / "three.safetensors", scale=2)
    found = history_of(tmp_path / "three.safetensors")
    one: tuple[str, str, list[Any]] = ("one", "", [])
    assert found is not None
    assert shape(found) == ("three.safetensors", "rescale", [("two", "rescale", [one])])
    assert found.inputs[0].digests == {"two.safetensors": sha256(tmp_path / "two.safetensors")}


def test_a_record_that_anybody_may_have_written_is_shown_escaped_and_never_raises(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "half", tmp_path / "half")
    table = recorded(tmp_path / "half")
    nested: dict[str, Any] = {"made_by": "loratool merge", "adapter": {"name": "deep"}}
    for _ in range(30):
        nested = {"made_by": "loratool \x1b[31m", "adapter": {"name": "\u202eevil", "weight": "1", "made": nested}}
    tables: list[Any] = [
        nested,
        [],
        {"made": {"made_by": 7, "adapters": {"name": "x"}}},
        {"files": {"../x": {"root": 3}, "y": 4}},
    ]
    for base in tables:
        write_json(tmp_path / "half" / "loratool.json", {**table, "base": base, "tuned": {"name": "t", "made": base}})
        told = str(loratool.inspect(tmp_path / "half"))
        assert "\x1b" not in told
        assert "\u202e" not in told
        assert "history" in told


def test_a_bill_has_the_sha256_of_every_file_and_all_generations(home: Path) -> None:
    bill = loratool.record(home / "back").document
    assert {f["name"]: f["sha256"] for f in bill["files"]} == {p.name: sha256(p) for p in (home / "back").iterdir()}
    assert [part["name"] for part in bill["inputs"]] == ["made", "half"]
    assert [part["name"] for part in bill["inputs"][0]["inputs"]] == ["base", "half"]
    root = file_entry("model.safetensors", (home / "base" / "model.safetensors").read_bytes())["root"]
    assert root in [file["root"] for file in bill["inputs"][0]["inputs"][0]["files"]]


def test_no_bill_is_made_of_files_that_are_not_what_was_written(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "made", tmp_path / "made")
    whole = bytearray((tmp_path / "made" / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (tmp_path / "made" / "model.safetensors").write_bytes(whole)
    assert cli.run(["record", str(tmp_path / "made")]) == 5
    assert "model.safetensors: differs" in capsys.readouterr().err
    assert cli.run(["record", str(home / "base")]) == 3
    assert "has no loratool.json" in capsys.readouterr().err


def test_a_card_that_was_removed_is_not_in_the_bill(home: Path, tmp_path: Path) -> None:
    """It decides nothing that is computed, so it is no reason to refuse."""
    made = shutil.copytree(home / "made", tmp_path / "made")
    (made / "README.md").unlink()
    bill = loratool.record(made).document
    assert {f["name"] for f in bill["files"]} == {p.name for p in made.iterdir()}


def test_a_bill_in_cyclonedx_fulfils_the_schema_of_the_standard(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema is the one that the standard's library carries, in its strict form."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    found = loratool.record(home / "back", format="cyclonedx")
    assert validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(str(found)) is None
    assert found.document["metadata"]["timestamp"].startswith("2023-11-14T22:13:20")
    output, parts = found.document["metadata"]["component"], found.document["components"]
    assert {output["type"], *(part["type"] for part in parts)} == {"machine-learning-model"}
    assert {f["name"]: f["hashes"][0]["content"] for f in output["components"]} == {
        p.name: sha256(p) for p in (home / "back").iterdir()
    }
    licences = {part["name"]: part["licenses"] for part in parts}
    assert licences["base"] == [{"license": {"id": "Apache-2.0"}}]
    assert licences["half"] == [{"license": {"name": "my-own"}}]
    assert output["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["value"] == "1"
    assert str(loratool.record(home / "back", format="cyclonedx")) == str(found)


def test_a_bill_in_spdx_is_read_by_the_model_of_the_standard_with_the_ai_profile(home: Path) -> None:
    """The bindings are made of the standard's own SHACL; they refuse unknown properties, values and missing ones."""
    model = pytest.importorskip("spdx_python_model")
    pytest.importorskip("cyclonedx")
    found = loratool.record(home / "back", format="spdx")
    spdx, objects = model.load_data(json.loads(str(found)))
    (document,) = objects.foreach_type(spdx.SpdxDocument)
    assert spdx.ProfileIdentifierType.ai in document.profileConformance
    (root,) = document.rootElement
    assert isinstance(root, spdx.ai_AIPackage)
    related = {
        (r.from_.name, r.relationshipType.rpartition("/")[2], each.name)
        for r in objects.foreach_type(spdx.Relationship)
        for each in r.to
    }
    assert {
        ("back", "descendantOf", "made"),
        ("made", "descendantOf", "base"),
        ("half", "descendantOf", "adapter"),
    } <= related
    (weights,) = (
        each
        for r in objects.foreach_type(spdx.Relationship)
        if r.from_ is root
        for each in r.to
        if each.name == "model.safetensors"
    )
    assert weights.verifiedUsing[0].hashValue == sha256(home / "back" / "model.safetensors")
    expressions = {
        x.simplelicensing_licenseExpression for x in objects.foreach_type(spdx.simplelicensing_LicenseExpression)
    }
    assert expressions == {"Apache-2.0"}


def test_a_bill_in_spdx_fulfils_the_json_schema_of_the_standard(home: Path) -> None:
    """The schema of SPDX 3.0.1, which the package lib4sbom carries; nothing of that package is run."""
    pytest.importorskip("spdx_python_model")
    jsonschema = pytest.importorskip("jsonschema")
    try:
        place = distribution("lib4sbom").locate_file("lib4sbom/schemas/spdx/3.0-schema.json")
    except PackageNotFoundError:
        pytest.skip("lib4sbom, which has the schema, is not installed")
    schema = json.loads(Path(str(place)).read_bytes())
    assert schema["properties"]["@context"]["const"] == "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
    validator = jsonschema.Draft202012Validator(schema)
    found = json.loads(str(loratool.record(home / "back", format="spdx")))
    assert [each.message for each in validator.iter_errors(found)] == []
    package = next(each for each in found["@graph"] if each["type"] == "ai_AIPackage")
    assert not validator.is_valid({**found, "@graph": [{**package, "ai_typeOfModels": ["model"]}]})


@pytest.mark.parametrize("name", ["spdx", "cyclonedx"])
def test_a_format_whose_library_is_missing_names_the_extra(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_module: str) -> None:
        raise ModuleNotFoundError("No module named 'cyclonedx'", name="cyclonedx")

    monkeypatch.setattr(documents, "import_module", missing)
    with pytest.raises(loratool.UsageError) as caught:
        loratool.record(home / "back", format=name)
    assert caught.value.hint == 'pip install "loratool[bom]"'
