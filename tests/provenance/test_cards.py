"""Model cards: valid for the Hub, true about the lineage, kept where they are somebody's own, and with code that runs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import click
import faults
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from paths import ROOT
from safetensors.torch import save_file

import loratool
from loratool.adapters.formats.peft import PEFT
from loratool.files.folders import CARD
from loratool.provenance.cards import MARK, Subject, card, card_of, terms_of
from loratool.provenance.invocations import command
from loratool.publishing.selecting import select
from loratool.reworking.combine_options import CombineOptions

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYERS, HIDDEN = 2, 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters, laid out as the Hub's cache lays them out."""
    home = tmp_path_factory.mktemp("cache")
    faults.make_base(place(home, "org/base"), shards=2, hidden=HIDDEN)
    for number, name in enumerate(("me/style", "me/facts")):
        faults.make_adapter(place(home, name), layers=LAYERS, hidden=HIDDEN, rank=4 + number)
        set_base(place(home, name), "org/base")
    return home


def place(home: Path, name: str) -> Path:
    return home / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def set_base(adapter: Path, base: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base, "task_type": "CAUSAL_LM"})
    )


def loaded(folder: Path) -> tuple[Mapping[str, Any], str]:
    """The front matter and the text of a card, as the Hub's client reads them, which must find them sound."""
    content = (folder / CARD).read_text(encoding="utf-8")
    found = ModelCard(content)  # raises where the front matter is none
    assert isinstance(found.data, ModelCardData)
    return entries(found), found.text


def entries(found: ModelCard) -> Mapping[str, Any]:
    """The front matter, after the way through the client's own checks and back."""
    data: dict[str, Any] = found.data.to_dict()  # type: ignore[no-untyped-call]
    again: dict[str, Any] = ModelCardData(**data).to_dict()  # type: ignore[no-untyped-call]
    assert again == data
    return data


def test_a_merged_model_s_card(models: Path, tmp_path: Path) -> None:
    loratool.merge(
        place(models, "org/base"), [place(models, "me/style")], tmp_path / "out", weights=[0.5], device="cpu"
    )
    data, text = loaded(tmp_path / "out")
    assert data == {
        "base_model": ["org/base"],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["loratool", "lora", "merge"],
    }
    assert f"`org/base@{COMMIT}`" in text
    assert f"| adapter | `me/style@{COMMIT}` | 0.5 | `4` |" in text
    assert f"$ loratool merge org/base@{COMMIT} me/style@{COMMIT} -w 0.5 --device cpu -o out" in text
    assert f"`loratool`: `{loratool.__version__}`" in text
    assert "| tensors edited | 4 |" in text


def test_a_merge_of_several_adapters_is_a_merge(models: Path, tmp_path: Path) -> None:
    adapters = [place(models, "me/style"), place(models, "me/facts")]
    loratool.merge(place(models, "org/base"), adapters, tmp_path / "out", weights=[1, -2])
    data, text = loaded(tmp_path / "out")
    assert data["base_model"] == ["org/base", "me/style", "me/facts"]
    assert data["base_model_relation"] == "merge"
    assert f"`me/facts@{COMMIT}` | -2 |" in text


@pytest.mark.parametrize("verb", ["rescale", "combine", "resize"])
def test_an_adapter_s_card(models: Path, tmp_path: Path, verb: str) -> None:
    style, facts, out = place(models, "me/style"), place(models, "me/facts"), tmp_path / "out"
    if verb == "rescale":
        loratool.rescale(style, out, scale=0.5)
    elif verb == "combine":
        loratool.combine([style, facts], out, weights=[0.7, 1.2], method="ties", density=0.3, device="cpu")
    else:
        loratool.resize(style, out, energy=0.9, device="cpu")
    data, text = loaded(out)
    assert data == {
        "base_model": ["org/base"],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["loratool", "lora", "peft"],
    }
    assert f"`me/style@{COMMIT}`" in text
    assert {
        "rescale": f"loratool rescale me/style@{COMMIT} --scale 0.5 -o out",
        "combine": f"loratool combine me/style@{COMMIT} me/facts@{COMMIT} --method ties -w 0.7 -w 1.2 --density 0.3 --device cpu",
        "resize": f"loratool resize me/style@{COMMIT} --energy 0.9 --device cpu -o out",
    }[verb] in text
    if verb != "rescale":
        assert re.search(r"\| relative error as stored \| \d", text)
        assert re.search(r"\| parameters \| \d+ \|", text)
    if verb == "combine":
        assert re.search(r"fraction of ‖ΔW‖² kept: `me/facts` \| 0\.\d+", text)
        assert "| 0.7 |" in text


def test_an_extracted_adapter_s_card(models: Path, tmp_path: Path) -> None:
    from loratool import extract

    base = place(models, "org/base")
    loratool.merge(base, [place(models, "me/style")], tmp_path / "tuned")
    extract(base, tmp_path / "tuned", tmp_path / "out", rank=4, device="cpu")
    data, text = loaded(tmp_path / "out")
    assert data["base_model"] == ["org/base"]
    assert data["base_model_relation"] == "adapter"
    assert f"| base | `org/base@{COMMIT}` |" in text
    assert "| tuned | `tuned` |" in text
    assert f"loratool extract org/base@{COMMIT} ./tuned --rank 4 --device cpu -o out" in text
    assert "relative error as stored" in text


def test_an_extracted_adapter_names_its_base_by_the_id_it_came_by(models: Path, tmp_path: Path) -> None:
    """Not by the folder's name, which in the Hub's cache is a commit."""
    base = place(models, "org/base")
    loratool.merge(base, [place(models, "me/style")], tmp_path / "tuned")
    loratool.extract(base, tmp_path / "tuned", tmp_path / "out", rank=2, device="cpu")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize("verb", ["combine", "resize", "rescale", "extract"])
def test_an_adapter_inherits_the_licence_of_what_it_is_made_of(models: Path, tmp_path: Path, verb: str) -> None:
    names = ("base", "style", "facts")
    base, style, facts = (
        shutil.copytree(place(models, f"{'org' if n == 'base' else 'me'}/{n}"), tmp_path / n) for n in names
    )
    for name in names:
        (tmp_path / name / "LICENSE").write_text("terms")
        (tmp_path / name / CARD).write_text(f"---\nlicense: apache-2.0\n---\n# {name}, {MARK}\n")
    out = tmp_path / "out"
    if verb == "combine":
        loratool.combine([style, facts], out, device="cpu")
    elif verb == "resize":
        loratool.resize(style, out, rank=2, device="cpu")
    elif verb == "rescale":
        loratool.rescale(style, out, scale=0.5)
    else:
        loratool.merge(base, [style], tmp_path / "tuned")
        loratool.extract(base, tmp_path / "tuned", out, rank=2, device="cpu")
    data, text = loaded(out)
    assert (out / "LICENSE").read_text() == "terms"
    assert data["license"] == "apache-2.0"
    assert "`apache-2.0`, as stated by the inputs" in text


def test_licence_and_task_are_inherited_and_a_quarrel_is_told(models: Path, tmp_path: Path) -> None:
    inputs = []
    for name, licence in (
        ("base", "license: other\nlicense_name: own-terms\nlicense_link: LICENSE"),
        ("adapter", "license: mit"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / CARD).write_text(f"---\n{licence}\npipeline_tag: text-generation\ntags:\n- x\n---\n# {name}\n")
        inputs.append(folder)
    one, both = terms_of(inputs[0]), terms_of(*inputs)
    assert one.fields == {
        "license": "other",
        "license_name": "own-terms",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
    }
    assert both.disputed == ("own-terms", "mit")
    text = card({"made_by": "loratool merge"}, {}, both).decode()
    assert "license:" not in text
    assert "different licences (`own-terms`, `mit`)" in text
    assert 'license_name: "own-terms"' in card({"made_by": "loratool merge"}, {}, one).decode()


def test_a_card_that_somebody_wrote_is_kept_and_one_of_ours_is_made_anew(models: Path, tmp_path: Path) -> None:
    style = tmp_path / "style"
    shutil.copytree(place(models, "me/style"), style)
    (style / CARD).write_text("# my own\n")
    loratool.rescale(style, tmp_path / "half", scale=0.5)
    assert (tmp_path / "half" / CARD).read_text() == "# my own\n"
    assert MARK.encode() in card_of(tmp_path / "half", "me/half")

    (style / CARD).write_text(
        "---\nbase_model: /srv/mine/base\n---\n# Model Card for Model ID\n[More Information Needed]\n"
    )
    loratool.rescale(style, tmp_path / "double", scale=2)
    assert "A rescaled copy of `style`." in (tmp_path / "double" / CARD).read_text()

    loratool.resize(place(models, "me/style"), tmp_path / "small", rank=2)
    loratool.rescale(tmp_path / "small", tmp_path / "weak", scale=0.5)
    assert "A rescaled copy of `small`." in (tmp_path / "weak" / CARD).read_text()


@pytest.mark.parametrize(
    "hostile",
    [
        "x\n---\nlicense: evil",
        "org/name\nlicense: evil",
        '"quoted": {yes',
        "`code` | <script>alert(1)</script>",
        "\x1b[31mred",
        "💥 ünïcode \u2028 line",
        "a" * 100_000,
        "![x](http://x)",
    ],
)
def test_foreign_text_stays_text(hostile: str) -> None:
    provenance = {
        "made_by": "loratool merge",
        "command": f"loratool merge {hostile}",
        "base": {"name": hostile, "hub": hostile},
        "adapters": [
            {"name": hostile, "hub": hostile, "weight": hostile, "rank": hostile, "sha256": {hostile: hostile}}
        ],
        "versions": {hostile: hostile},
        "method": hostile,
        "measured": {"energy_kept": {hostile: 0.5}},
        "tensors": {"all": 3},
    }
    config = {
        "base_model_name_or_path": hostile,
        "architectures": [hostile],
        "task_type": hostile,
        "rank_pattern": {hostile: 3},
    }
    text = card(provenance, config, terms_of(), hostile).decode()
    data = entries(ModelCard(text))
    assert "license" not in data
    assert data["library_name"] == "transformers"
    assert "\x1b" not in text
    assert text.count("\n---\n") == 1  # the end of the front matter


def test_the_snippets_load_what_they_stand_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader runs them, in the folder of the card."""
    import runpy

    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    made = runpy.run_path(str(ROOT / "fixtures" / "make_tiny.py"))
    made["make_tiny"](tmp_path)
    set_base(tmp_path / "adapter", str(tmp_path / "base"))
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", device="cpu")
    loratool.rescale(tmp_path / "adapter", tmp_path / "same", scale=1.0)
    logits = []
    for name in ("merged", "same"):
        text = (tmp_path / name / CARD).read_text()
        code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(code) == 1
        monkeypatch.chdir(tmp_path / name)
        namespace: dict[str, Any] = {}
        exec(code[0].replace('"BASE"', repr(str(tmp_path / "base"))), namespace)
        with torch.no_grad():
            logits.append(namespace["model"].eval()(made["TOKENS"]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def about(config: dict[str, Any]) -> Subject | dict[str, Any]:
    """What a card is about: an adapter, where it is the config of one, else a model."""
    return PEFT.subject(config) if "peft_type" in config else config


def test_the_snippet_takes_the_class_that_is_known() -> None:
    """Or tells none: code that cannot run is worse."""

    def code(provenance: dict[str, Any], **config: object) -> str:
        return "".join(
            re.findall(r"```python\n(.*?)```", card(provenance, about(config), terms_of()).decode(), re.DOTALL)
        )

    merged = {"made_by": "loratool merge"}
    assert code(merged) == ""
    own = code(merged, architectures=["OwnModel"], auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.OwnModel"})
    assert "import AutoModelForCausalLM\n" in own
    assert "from_pretrained(place, trust_remote_code=True)" in own
    noted = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    assert "base = LlamaForCausalLM.from_pretrained" in code({}, peft_type="LORA", task_type=None, auto_mapping=noted)
    hostile = noted | {"base_model_class": "x; import os"}
    assert "base = AutoModel.from_pretrained" in code({}, peft_type="LORA", auto_mapping=hostile)


def test_other_methods_than_lora_are_not_called_so() -> None:
    text = card({}, about({"peft_type": "IA3", "task_type": "CAUSAL_LM"}), terms_of()).decode()
    assert 'lora"' not in text
    assert "# PEFT adapter" in text


def test_the_command_of_a_card_is_one_that_the_command_line_takes(models: Path) -> None:
    import shlex

    from loratool import cli

    options = CombineOptions(
        method="ties",
        weights=(1, {"mlp": 0.5, "default": 1}),
        space="core",
        rank=8,
        factor=0.7,
        match_norm="mean",
        normalize=False,
        svc=True,
        overwrite=True,
    )
    words = command("combine", [place(models, "me/style"), Path("/srv/mine/my adapter")], options)
    assert words == (
        f"loratool combine me/style@{COMMIT} './my adapter' --method ties -w 1 -w '{{\"mlp\": 0.5, \"default\": 1.0}}' "
        "--space core --rank 8 --lambda 0.7 --match-norm mean --no-normalize --svc -o out"
    )
    assert "/srv/mine" not in words
    plain = shlex.split(words.replace("""-w '{"mlp": 0.5, "default": 1.0}'""", "-w 1"))
    parent = click.Context(cli.cli, info_name="loratool", **cli.cli.context_settings)
    assert cli.command("combine").make_context("combine", plain[2:], parent=parent).params["factor"] == "0.7"


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SDXL = {"ss_base_model_version": "sdxl_base_v1-0"}
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"


def image_adapter(folder: Path, header: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True)
    factors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(1.0)}
    tensors = {f"{KOHYA}.{role}": value for role, value in factors.items()}
    save_file(tensors, folder / "style.safetensors", dict(header))
    return folder


@pytest.mark.parametrize(
    ("header", "base", "tag"),
    [
        (SDXL | {"ss_sd_model_name": "sd_xl_base_1.0.safetensors"}, SDXL_BASE, "stable-diffusion-xl"),
        (SDXL | {"ss_sd_model_name": "someone/mix"}, "someone/mix", "stable-diffusion-xl"),
        (SDXL | {"ss_sd_model_name": "mix.safetensors"}, None, "stable-diffusion-xl"),
        (SDXL, None, "stable-diffusion-xl"),  # or Pony, or another finetune
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, None, "stable-diffusion-xl"),
        ({"ss_base_model_version": "flux1"}, None, "flux"),
        ({"ss_base_model_version": "sd_v1"}, None, "stable-diffusion"),
        ({"ss_base_model_version": "sd_1.5"}, None, "stable-diffusion"),
        ({"ss_base_model_version": "sd_1.5", "software": '{"name": "ai-toolkit"}'}, None, None),  # of Flux as well
        ({"ss_network_module": "networks.lora_flux"}, None, "flux"),
        ({}, None, None),
    ],
)
def test_the_card_of_an_image_adapter_is_what_the_hub_expects(
    tmp_path: Path, header: dict[str, str], base: str | None, tag: str | None
) -> None:
    """With a prompt and a base where the header holds them, and where they are sure."""
    folder = image_adapter(tmp_path / "style", header | {"modelspec.trigger_phrase": 'a "sks" dog: #1'})
    sent = select_card(folder)
    data = entries(ModelCard(sent))
    own = ["text-to-image", "diffusers", "lora", "template:sd-lora", *([tag] if tag else [])]
    wanted = {
        "library_name": "diffusers",
        "tags": ["loratool", *own],
        "instance_prompt": 'a "sks" dog: #1',
        "widget": [{"text": 'a "sks" dog: #1'}],
    }
    assert data == wanted | ({"base_model": [base], "base_model_relation": "adapter"} if base else {})


class Pipeline:
    """What the code of a card takes for diffusers' pipelines; it keeps what it was asked for."""

    asked: ClassVar[list[object]] = []

    @classmethod
    def from_pretrained(cls, base: str, **options: object) -> Pipeline:
        cls.asked = [base, options]
        return cls()

    def load_lora_weights(self, place: str) -> None:
        self.asked.append(place)

    def to(self, device: str) -> None:
        self.asked.append(device)

    def __call__(self, prompt: str) -> Any:
        self.asked.append(prompt)
        return SimpleNamespace(images=[Image()], frames=["a video"])


class Image:
    def save(self, name: str) -> None:
        Pipeline.asked.append(name)


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of these names, for code that imports them."""
    write = lambda video, name: Pipeline.asked.append((video, name))  # noqa: E731
    utils = SimpleNamespace(export_to_video=write)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(DiffusionPipeline=Pipeline, utils=utils))
    monkeypatch.setitem(sys.modules, "diffusers.utils", utils)


@pytest.mark.usefixtures("diffusers")
@pytest.mark.parametrize(
    ("header", "base", "dtype"),
    [
        (SDXL | {"ss_sd_model_name": "sd_xl_base_1.0.safetensors"}, SDXL_BASE, torch.float16),
        ({"ss_base_model_version": "flux1", "ss_sd_model_name": "some/flux"}, "some/flux", torch.bfloat16),
        ({"ss_base_model_version": "wan2.1"}, "BASE", torch.bfloat16),
    ],
)
def test_the_card_of_an_image_adapter_has_code_that_runs_its_pipeline(
    tmp_path: Path, header: dict[str, str], base: str, dtype: torch.dtype
) -> None:
    """Read by the Hub's parser, and executed: the base in the dtype of its family, the adapter from its repository, and
    the words that call up what was trained, whatever characters they have.
    """
    prompt = 'a "sks" dog\\'
    card = ModelCard(select_card(image_adapter(tmp_path / "style", header | {"modelspec.trigger_phrase": prompt})))
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    made = [("a video", "video.mp4")] if header["ss_base_model_version"] == "wan2.1" else ["image.png"]
    assert Pipeline.asked == [base, {"torch_dtype": dtype}, "me/style", "cuda", prompt, *made]


def test_no_code_is_told_for_what_diffusers_does_not_load(tmp_path: Path) -> None:
    """LoHa, on the way to the Hub and as an output."""
    sides = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    (tmp_path / "loha").mkdir()
    save_file({f"{KOHYA}.{side}": torch.ones(4, 4) for side in sides}, tmp_path / "loha" / "style.safetensors", SDXL)
    assert "## Usage" not in select_card(tmp_path / "loha")
    loratool.rescale(tmp_path / "loha", tmp_path / "out", scale=0.5)
    assert "## Usage" not in (tmp_path / "out" / "README.md").read_text()
    loratool.convert(tmp_path / "loha", tmp_path / "lora", to="diffusers", rank=2)
    assert "pipeline.load_lora_weights(place)" in (tmp_path / "lora" / "README.md").read_text()


def test_what_no_header_holds_is_in_no_card(tmp_path: Path) -> None:
    for number, header in enumerate(({"ss_base_model_version": "wan2.1"}, {"ss_network_module": "networks.lora_wan"})):
        data = entries(ModelCard(select_card(image_adapter(tmp_path / f"{number}", header))))
        assert data == {
            "library_name": "diffusers",
            "tags": ["loratool", "text-to-video", "diffusers", "lora", "template:sd-lora", "wan"],
        }


def select_card(folder: Path) -> str:
    """The card that a push makes."""
    made = {upload.name: upload.content for upload in select(folder, (), (), False, "me/style").uploads}
    return (made[CARD] or b"").decode()


@pytest.mark.parametrize("verb", ["rescale", "rescale --bake", "resize", "combine", "convert"])
def test_commands_keep_the_prompt_of_an_image_adapter_in_the_card(tmp_path: Path, verb: str) -> None:
    trained_on = SDXL | {"ss_sd_model_name": "sd_xl_base_1.0.safetensors"}
    header = trained_on | {"modelspec.trigger_phrase": "sks dog"}
    style, out = image_adapter(tmp_path / "style", header), tmp_path / "out"
    match verb:
        case "resize":
            loratool.resize(style, out, rank=1, device="cpu")
        case "combine":
            loratool.combine([style, image_adapter(tmp_path / "other", trained_on)], out, device="cpu")
        case "convert":
            loratool.convert(style, out, to="diffusers", accept_loss=True)
        case _:
            loratool.rescale(style, out, scale=0.5, bake="bake" in verb)
    data, _ = loaded(out)
    assert data["base_model"] == [SDXL_BASE]
    assert data["library_name"] == "diffusers"
    assert data.get("instance_prompt") == (None if verb == "combine" else "sks dog")  # one of them has none
