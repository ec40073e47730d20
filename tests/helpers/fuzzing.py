"""Mutations of the files that commands parse, and the promise that each outcome is held to. Seeded: the same every time.

A mutation puts an odd value somewhere into a JSON table, or spoils the bytes of its text. Whatever it is, a command ends
within seconds with exit code 0 and the right result, or with a code from 2 to 7 and one message; it is never a bug
(code 1), writes nothing to its inputs, and leaves nothing behind when it fails.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from malformed import (
    ADAPTER,
    ADAPTER_CONFIG,
    DOWN,
    INDEX,
    QUERY,
    SHARDS,
    WEIGHT,
    f32,
    frame,
    values,
    write_adapter,
    write_sharded,
)
from safetensors.numpy import save
from workbench import is_clean, tensors_of

HUGE = "<a number of four hundred digits>"  # what JSON can say and the writer cannot: put into its text afterwards
DEEP: Any = []
for _ in range(90):
    DEEP = [DEEP]
TOO_DEEP = "<arrays beyond the limit>"
LATIN = "<a byte of Latin-1>"
RAW = {HUGE: b"1" + b"0" * 400, TOO_DEEP: b"[" * 2000 + b"]" * 2000, LATIN: b'"caf\xe9"'}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 4, 7, 0.5, -0.0, 1e308, 1e-320, math.nan, math.inf, -math.inf),
    *(2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 2**200, HUGE),
    *(
        "",
        "x",
        "1",
        "none",
        "all",
        "true",
        "LORA",
        "q_proj",
        "caf\u00e9",
        "\ud800",
        "\u202e\x1b[31m",
        "a\0b",
        "x" * 5000,
    ),
    *("../../x", "/etc/passwd", "(", "(a|", "[", "*", ".*", "^", "q_proj$", "float16", "org/name", "file.safetensors"),
    *([], {}, [[]], [None], [0], [""], [1.5, "x"], ["q_proj", 7], ["q_proj"], [{}], [True]),
    *({"": 1}, {"q_proj": None}, {"q_proj": "x"}, {"q_proj": 4}, {"(": 1}, {"a": {"b": []}}, {"q_proj": math.nan}),
    *(DEEP, TOO_DEEP, LATIN),
)
# Fields that the files of each kind may have, for mutations that add one.
ADAPTER_FIELDS = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias"),
    *("corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_bias", "lora_dropout", "lora_B_layout", "megatron_config", "megatron_core", "modules_to_save", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "target_parameters"),
    *("task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "kasa_config"),
)
BASE_FIELDS = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "hidden_size", "id2label", "intermediate_size"),
    *("is_encoder_decoder", "label2id", "model_type", "num_attention_heads", "num_hidden_layers", "num_labels"),
    *("num_key_value_heads", "quantization_config", "text_config", "tie_word_embeddings", "torch_dtype"),
    *("transformers_version", "vocab_size", "head_dim", "num_local_experts", "num_experts", "llm_config"),
)
RECORD_FIELDS = ("made_by", "command", "versions", "base", "adapters", "dtype", "files", "shards", "notes", "tensors")
INDEX_FIELDS = ("metadata", "weight_map", "")
LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
RECORD: Mapping[str, Any] = {
    "made_by": "loratool merge",
    "command": "loratool merge base adapter -o merged",
    "versions": {"loratool": "0.1.0", "torch": "2.11.0"},
    "base": {"name": "base", "hub": "org/base@" + "0" * 40, "files": {"model.safetensors": 100}},
    "adapters": [{"name": "adapter", "format": "peft", "weight": 1.0, "rank": 2, "sha256": {ADAPTER: "0" * 64}}],
    "dtype": "keep",
    "dtypes": {"F32": 3},
    "device": "cpu",
    "tensors": {"edited": 1, "copied": 2, "all": 3},
    "notes": [{"code": "a-note", "text": "something"}],
    "files": {"config.json": {"size": 10, "sha256": "0" * 64}},
}
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizer", "chat_template": "{{ x }}", "added_tokens_decoder": {"0": {}}}
SCALED = {
    f"base_model.model.{QUERY}.ia3_l": f32(values(8, 1, seed=9)),
    f"base_model.model.{DOWN}.ia3_l": f32(values(1, 6, seed=8)),
}
CARD = b"---\nlicense: mit\nbase_model: org/base\ntags:\n- lora\npipeline_tag: text-generation\n---\n# A card\n"


def write_inputs(root: Path) -> None:
    """Sound inputs: two shards with an index and a tuned copy of them, two adapters, and every file beside them."""
    for name in ("base", "tuned"):
        write_sharded(root / name)
        (root / name / "config.json").write_text(json.dumps(LLAMA))
        (root / name / "README.md").write_bytes(CARD)
    for name in ("adapter", "second"):
        patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "use_rslora": False, "bias": "none"}
        write_adapter(root / name, **patterns, base_model_name_or_path="org/base", task_type="CAUSAL_LM")
        (root / name / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
        (root / name / "README.md").write_bytes(CARD)
    write_adapter(root / "scaled", SCALED, peft_type="IA3", feedforward_modules=["down_proj"], fan_in_fan_out=False)
    write_dialects(root)
    for name in ("base", "adapter"):
        (root / name / "loratool.json").write_text(json.dumps(RECORD))


def write_dialects(root: Path) -> None:
    """A file that names modules in several dialects, with what its tools write into the header, and the base it fits."""
    query, flat = "unet.mid_block.attn1.to_q", "lora_unet_mid_block_attn1_to_k"
    tensors = {
        f"{query}.lora_A.weight": values(2, 8, seed=1),
        f"{query}.lora_B.weight": values(8, 2, seed=2),
        f"{flat}.lora_down.weight": values(2, 8, seed=3),
        f"{flat}.lora_up.weight": values(8, 2, seed=4),
        f"{flat}.alpha": np.array(1.0),
    }
    metadata = {
        "lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {}}),
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_args": '{"split_qkv": "True"}',
    }
    (root / "dialects").mkdir()
    (root / "dialects" / DIALECTS).write_bytes(save(tensors, metadata))
    (root / "painter").mkdir()
    names = {f"unet.mid_block.attn1.to_{part}.weight": values(8, 8, seed=9) for part in "qkv"}
    (root / "painter" / "model.safetensors").write_bytes(save(names))


def places(table: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value there are values, the whole of it first."""
    keys = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return [path, *(found for key, value in keys for found in places(value, (*path, key)))]


def mutated(table: Any, fields: tuple[str, ...], chance: random.Random) -> Any:
    """A copy with one to three odd values in it."""
    table = deepcopy(table)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        odd = deepcopy(chance.choice(ODD))
        everywhere = places(table)
        if chance.random() < 0.3 and isinstance(table, dict) and fields:
            table[chance.choice(fields)] = odd
            continue
        *above, last = (None, *chance.choice(everywhere[1:] or [()]))
        if last is None:
            return odd
        node = table
        for key in above[1:]:
            node = node[key]
        match chance.randrange(5):
            case 0 if isinstance(node, dict):
                del node[last]
            case 1:
                node[last] = [node[last]]
            case 2 if isinstance(node, dict) and isinstance(odd, str):
                node[odd] = node.pop(last)
            case _:
                node[last] = odd
    return table


def text_of(table: Any) -> bytes:
    """The table as JSON, with what only bytes can say."""
    text = json.dumps(table).encode()
    for word, raw in RAW.items():
        text = text.replace(json.dumps(word).encode(), raw)
    return text


def spoilt(text: bytes, chance: random.Random) -> bytes:
    """Some bytes replaced, put in, left out, doubled or cut off."""
    found = bytearray(text)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(found) + 1)
        match chance.randrange(6):
            case 0:
                found[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                found[at:at] = chance.choice(
                    (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\xe9", b"\0", b"1e999", b"-0")
                )
            case 2:
                del found[at : at + chance.randrange(1, 9)]
            case 3:
                found[at:at] = found[at : at + chance.randrange(1, 40)]
            case 4:
                del found[at:]
            case _:
                found[at:at] = chance.choice(
                    (b"\\ud800", b"NaN", b"Infinity", b"\xef\xbb\xbf", b"/*x*/", b"null", b"1" * 5000)
                )
    return bytes(found)


def mutation_of(text: bytes, fields: tuple[str, ...], chance: random.Random) -> bytes:
    """A JSON text with an odd value, or odd bytes, in it."""
    if chance.random() < 0.25:
        return spoilt(text, chance)
    made = text_of(mutated(json.loads(text), fields, chance))
    if chance.random() < 0.05 and made.startswith(b"{") and len(made) > 2:  # a key twice
        first = json.dumps(next(iter(json.loads(text)))).encode()
        made = b"{" + first + b": null, " + made[1:]
    return made


Spoil = Callable[[bytes, random.Random], bytes]


def json_file(*fields: str) -> Spoil:
    return lambda text, chance: mutation_of(text, fields, chance)


def header(text: bytes, chance: random.Random) -> bytes:
    """A safetensors file with an odd header, whose length mostly fits."""
    length = int.from_bytes(text[:8], "little")
    made = mutation_of(text[8 : 8 + length], ("__metadata__", ""), chance)
    claimed = (
        len(made) if chance.random() < 0.9 else chance.choice((0, 1, len(made) - 1, len(made) + 1, 2**63, 2**64 - 1))
    )
    return frame(made, text[8 + length :], claimed)


@dataclass(frozen=True)
class Kind:
    """A file that is mutated, and the commands that read it."""

    path: str
    spoil: Spoil
    commands: tuple[str, ...]


OUT, DIALECTS = "-o OUT", "lora.safetensors"
NAMES = ("base", "tuned", "adapter", "second", "scaled", "dialects", "painter", "base/config.json")
ADAPTER_COMMANDS = (
    *("inspect adapter --json", "inspect adapter --check --json", "inspect adapter --base base --check"),
    *(f"merge base adapter {OUT}", f"merge base adapter {OUT} --dry-run --json", f"rescale adapter {OUT} --scale 2"),
    *(f"rescale adapter {OUT} --bake", f"resize adapter {OUT} --rank 1", f"combine adapter second {OUT}"),
    *("compare adapter second --json", "push adapter org/name --dry-run", f"merge auto adapter {OUT}"),
)
MODEL_COMMANDS = (
    *("inspect base --check --json", f"merge base adapter {OUT}", f"merge base adapter {OUT} --dtype bfloat16"),
    *("inspect adapter --base base", "estimate base --rank 2 --target q_proj --json", "push base org/name --dry-run"),
    *(
        f"extract base tuned {OUT} --rank 1",
        f"merge base adapter {OUT} --dry-run",
        f"extract tuned base {OUT} --rank 1",
    ),
)
DIALECT_COMMANDS = (
    *("inspect dialects --json", "inspect dialects --check --metadata --json", f"merge painter dialects {OUT}"),
    *(
        f"merge painter dialects {OUT} --dry-run --json",
        f"rescale dialects {OUT} --scale 2",
        f"resize dialects {OUT} --rank 1",
    ),
    *(f"convert dialects {OUT} --to kohya", f"combine dialects dialects {OUT}", "push dialects org/name --dry-run"),
)
SCALED_COMMANDS = tuple(command.replace(" adapter", " scaled") for command in ADAPTER_COMMANDS[:-2])
KINDS: Mapping[str, Kind] = {
    "config of the adapter": Kind(f"adapter/{ADAPTER_CONFIG}", json_file(*ADAPTER_FIELDS), ADAPTER_COMMANDS),
    "config of the base": Kind(
        "base/config.json",
        json_file(*BASE_FIELDS),
        (
            *MODEL_COMMANDS,
            "estimate base/config.json --rank 2 --target q_proj",
            "inspect adapter --base-config base/config.json",
        ),
    ),
    "index": Kind(f"base/{INDEX}", json_file(*INDEX_FIELDS), MODEL_COMMANDS),
    "header of the base": Kind(f"base/{SHARDS[0]}", header, MODEL_COMMANDS),
    "header of the adapter": Kind(f"adapter/{ADAPTER}", header, ADAPTER_COMMANDS),
    "header of dialects": Kind(f"dialects/{DIALECTS}", header, DIALECT_COMMANDS),
    "record of the base": Kind("base/loratool.json", json_file(*RECORD_FIELDS), MODEL_COMMANDS),
    "record of the adapter": Kind("adapter/loratool.json", json_file(*RECORD_FIELDS), ADAPTER_COMMANDS),
    "config of another method": Kind(
        f"scaled/{ADAPTER_CONFIG}", json_file(*ADAPTER_FIELDS, "feedforward_modules"), SCALED_COMMANDS
    ),
    "config of the tokenizer": Kind(
        "adapter/tokenizer_config.json", json_file("chat_template", "vocab"), ADAPTER_COMMANDS
    ),
    "card": Kind("base/README.md", spoilt, MODEL_COMMANDS),
}


@dataclass(frozen=True)
class Mutation:
    """One mutated file and one command."""

    path: str
    content: bytes
    command: str

    def __str__(self) -> str:
        return f"{self.command} with {self.path} = {self.content!r}"


def mutations(kind: str, count: int, seed: int, sound: bytes) -> list[Mutation]:
    """The first mutations of a kind that a seed stands for."""
    return mutations_of(KINDS[kind], kind, count, seed, sound)


def mutations_of(found: Kind, name: str, count: int, seed: int, sound: bytes) -> list[Mutation]:
    """The first mutations of a kind that a seed and its name stand for."""
    chance = random.Random(f"{seed} {name}")
    return [Mutation(found.path, found.spoil(sound, chance), chance.choice(found.commands)) for _ in range(count)]


def words_of(command: str, root: Path, out: Path) -> list[str]:
    places = {name: str(root / name) for name in NAMES}
    return [{**places, "OUT": str(out)}.get(word, word) for word in command.split()]


def check_outcome(mutation: Mutation, code: int, stdout: str, stderr: str, root: Path, out: Path) -> None:
    """Hold the outcome of a mutation to the promise; an `AssertionError` says what it broke."""
    about = f"{mutation}\ncode {code}\n{stdout}\n{stderr}"
    assert code in (0, 2, 3, 4, 5, 6, 7), about
    assert "bug in loratool" not in stderr, about
    assert "Traceback" not in stderr, about
    assert is_clean(stdout), about
    assert is_clean(stderr), about
    if "--json" in mutation.command and stdout:
        json.loads(stdout, parse_constant=not_json)
    left = os.listdir(out.parent)
    if code == 0 and OUT in mutation.command and "--dry-run" not in mutation.command:
        assert left == [out.name], about
        if mutation.command.startswith("merge") and "adapter" in mutation.command:
            check_merged(mutation, root, out, about)
        check_output(out, about)
        shutil.rmtree(out)
    else:
        assert left == [], about
        assert code or "--check" not in mutation.command or stdout, about
        if code and "--check" not in mutation.command:
            assert stderr.startswith(("Error: ", "Usage: ", "warning: ", "note: ")), about
            told = json.loads(stdout)["error"]["exit_code"] if "--json" in mutation.command else stdout
            assert told in (code, ""), about


def not_json(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


def check_output(out: Path, about: str) -> None:
    """What is written parses as what it is called."""
    for path in out.rglob("*.json"):
        if path.name != "tokenizer_config.json":  # a copy of what was there
            json.loads(path.read_bytes()), about
    assert tensors_of(out) or [*out.rglob("*.gguf")], about


def check_merged(mutation: Mutation, root: Path, out: Path, about: str) -> None:
    """W + s·BA in the adapted weight, s worked out of the config here again; all other tensors as they were."""
    merged, base = tensors_of(out), tensors_of(root / "base")
    assert merged.keys() == base.keys(), about
    scale = scale_in(json.loads((root / f"adapter/{ADAPTER_CONFIG}").read_bytes()))
    exact = "--dtype" not in mutation.command
    for name, tensor in base.items():
        wanted = tensor
        if name == WEIGHT:
            tensors = tensors_of(root / "adapter")
            down = next(t for n, t in tensors.items() if "lora_A" in n)
            up = next(t for n, t in tensors.items() if "lora_B" in n)
            wanted = tensor + scale * (up @ down)
        same = np.allclose(merged[name], wanted, rtol=1e-6 if exact else 2**-8, atol=1e-6 if exact else 1e-2)
        assert same, f"{name} is not what it should be\n{about}"


def scale_in(config: Mapping[str, Any]) -> float:
    """α/r or α/√r of q_proj, as PEFT's documentation defines it; ranks are those of the tensors."""
    rank, alpha = 2, config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", QUERY):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
