"""Nobody but PEFT's format knows what PEFT calls the fields of its configs, or how the format is built inside."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import peft.tuners  # noqa: F401  # its subclasses exist once they are imported
from paths import PACKAGE
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

FORMAT = "adapters/formats/peft/"
REGISTRY = "adapters/formats/__init__.py"  # the one file that may import the format, by its one name

# Ordinary words that are fields of PEFT's configs too: the word, what it means where it stands, and where that is.
WORDS = {
    "r": (
        "the mode of torch.linalg.qr that gives R alone, the rank of `LoRALinear`, a field of torchtune's own config, or what "
        "people type for an option",
        (
            "nn.py",
            "algebra/",
            "cli/unknown_options.py",
            "reworking/extracting/differences.py",
            "adapters/formats/torchtune.py",
        ),
    ),
    "lora_alpha": (
        "a setting of the trainers' own",
        tuple(f"adapters/formats/{name}.py" for name in ("torchtune", "litgpt", "loralib")),
    ),
    "base_model_name_or_path": ("a field of torchtune's own config", ("adapters/formats/torchtune.py",)),
    "bias": (
        "the parameter of a module",
        (
            *(
                "bases/decoders.py",
                "bases/binding/aliases.py",
                "bases/trained_view.py",
                "errors.py",
                "merging/draft.py",
                "inspecting/inspect.py",
            ),
            *(
                "reworking/aligned_layers.py",
                "reworking/renaming.py",
                *(f"reworking/converting/{name}.py" for name in ("carrying", "naming", "proof", "wholes")),
                "reworking/extracting/pairing.py",
                "adapters/writer.py",
            ),
            *("reworking/resize.py", "reworking/sketches.py", "results/facts.py", "adapters/formats/roles/"),
        ),
    ),
    "alpha": (
        "an option of rescale, what people type for one, a line of inspect, a column of its table, a setting of other trainers, "
        "or a tensor of other tools' files",
        (
            *("reworking/rescale.py", "results/facts.py", "results/fleet.py", "inspecting/fleet/conditions.py"),
            *("pictures/fleet.py", "cli/unknown_options.py"),
            *("adapters/formats/mlx.py", "adapters/formats/megatron.py", "adapters/formats/roles/"),
        ),
    ),
    "scaling": (
        "a line of inspect and of rescale, another word for a column, what people type for an option",
        ("results/facts.py", "results/rescale.py", "inspecting/fleet/conditions.py", "cli/unknown_options.py"),
    ),
    "fan_in_fan_out": ("an option of merge and inspect", ("inspecting/options.py",)),
    "rank_pattern": ("a line of inspect, and a field of its facts", ("results/facts.py",)),
    "alpha_pattern": ("a line of inspect, and a field of its facts", ("results/facts.py",)),
    "adapters": (
        "operands of commands, what a record or an index lists, and lines of compress and index",
        (
            *(
                "cli/",
                "commands/library.py",
                "merging/",
                "provenance/",
                "inspecting/inspect.py",
                "inspecting/neighbours.py",
            ),
            *("reworking/combine.py", "reworking/compressing/", "results/compress.py", "results/index.py"),
            "pictures/",
        ),
    ),
    "use_dora": ("a field of mlx-lm's own early configs", ("adapters/formats/mlx.py",)),
    "revision": ("part of a place on the Hub", ("files/hub_names.py",)),
    "group_size": ("an entry of the config of a quantised base", ("bases/codecs/",)),
    "block_size": ("the same, of torchao", ("bases/codecs/torchao.py",)),
    "exclude_modules": ("the same, of ModelOpt", ("bases/codecs/modelopt.py",)),
    "hidden_size": ("a field of a model's config", ("bases/", "layouts/gguf.py", "demo.py")),
    "num_layers": (
        "a field of a model's config, and one of mlx-lm's and of NeMo's own",
        ("bases/same_base.py", "adapters/formats/mlx.py", "adapters/formats/megatron.py"),
    ),
    "num_attention_heads": (
        "a field of a model's config",
        ("bases/", "layouts/fusions.py", "layouts/gguf.py", "demo.py"),
    ),
}


def subclasses(kind: type) -> set[type]:
    below: set[type] = set(kind.__subclasses__())
    return below.union(*map(subclasses, below))


CONFIGS = [PeftConfigMixin, *filter(dataclasses.is_dataclass, subclasses(PeftConfigMixin))]
KEYS = {field.name for config in CONFIGS for field in dataclasses.fields(config)}


def is_word(text: str, path: str) -> bool:
    """Whether a key stands at a place where it is an ordinary word."""
    return path.startswith(WORDS[text][1]) if text in WORDS else False


@cache
def strings_in(path: Path) -> list[ast.Constant]:
    """All string constants of a file."""
    return [node for node in nodes_of(path) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """The constants and imports of a file, wherever they stand."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.Import, ast.ImportFrom))]


def known_in(path: Path) -> set[str]:
    """What a file knows of PEFT's format: keys of its config, and names that it imports."""
    name = path.relative_to(PACKAGE).as_posix()
    found = set[str]()
    for node in nodes_of(path):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and node.value in KEYS and not is_word(node.value, name):
                found.add(f"{name}:{node.lineno}: {node.value!r}")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for dotted in (start + alias.name for alias in node.names):
                inside = f"{dotted}.".startswith("loratool.adapters.formats.peft.")
                if inside and (name, dotted) != (REGISTRY, "loratool.adapters.formats.peft.PEFT"):
                    found.add(f"{name}:{node.lineno}: {dotted}")
    return found


OUTSIDE = [path for path in PACKAGE.rglob("*.py") if FORMAT not in path.as_posix()]


def test_the_keys_are_those_of_pefts_configs() -> None:
    """As many as there are, some of LoRA's own among them: else the next test would look for nothing."""
    assert {"peft_type", "base_model_name_or_path", "lora_alpha", "rank_pattern", "modules_to_save"} <= KEYS
    assert len(CONFIGS) > 40


def test_no_file_outside_the_format_knows_keys_or_insides_of_it() -> None:
    """Neither as a string nor by an import, wherever it stands."""
    assert sorted(set[str]().union(*map(known_in, OUTSIDE))) == []


def test_files_know_neither_names_of_files_nor_of_tensors_of_any_format() -> None:
    """What an adapter's files and tensors are called is asked of its format; docstrings are looked at too."""
    names = {Path(name).stem for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)}
    words = {*names, "adapters.safetensors", "base_layer", *PEFT_TYPE_TO_PREFIX_MAPPING.values()}
    assert {"adapter_config", "adapter_model", "lora_"} <= words
    pattern = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, sorted(words)))})")
    found = [
        f"{path.name}:{node.lineno}: {match[0]}"
        for path in (PACKAGE / "files").glob("*.py")
        for node in strings_in(path)
        if (match := pattern.search(str(node.value)))
    ]
    assert found == []


def test_every_ordinary_word_is_still_one_where_it_is_allowed() -> None:
    """A word that nobody uses any more is taken off the list."""
    texts = {path.relative_to(PACKAGE).as_posix(): {node.value for node in strings_in(path)} for path in OUTSIDE}
    idle = {
        (word, place)
        for word, (_, places) in WORDS.items()
        for place in places
        if not any(name.startswith(place) and word in found for name, found in texts.items())
    }
    assert idle == set()
    assert WORDS.keys() <= KEYS
