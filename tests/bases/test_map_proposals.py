"""The `--map` that an error proposes: given again, it merges into what was meant; where there is doubt there is none.

The oracle is the formula W + (α/r)·BA on the tensor that the base was built with.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from headers import Shape, adapter_of, base_of
from malformed import Stored, f32, random, write_adapter, write_base, write_json
from workbench import Workbench, tensors_of

from loratool.bases.binding import bind

PREFIX = "base_model.model."
H, MLP = 6, 10


def layers(pattern: str, **shapes: Shape) -> dict[str, Shape]:
    return {pattern.format(n) + leaf: shape for n in range(2) for leaf, shape in shapes.items()}


ATTENTION = {"q_proj": (H, H), "v_proj": (H, H)}
# (layers of the base, layers of the adapter → the one each means)
MEANT: dict[str, tuple[dict[str, Shape], dict[str, str]]] = {
    "another stack": (
        {**layers("model.layers.{}.self_attn.", **ATTENTION), **layers("model.layers.{}.mlp.", up_proj=(MLP, H))},
        {
            **{f"net.{n}.attn.{leaf}": f"model.layers.{n}.self_attn.{leaf}" for n in range(2) for leaf in ATTENTION},
            **{f"net.{n}.ff.up_proj": f"model.layers.{n}.mlp.up_proj" for n in range(2)},
        },
    ),
    "a name of the table": (
        layers("model.layers.{}.self_attn.", **ATTENTION),
        {
            f"net.{n}.a.{old}": f"model.layers.{n}.self_attn.{new}"
            for n in range(2)
            for old, new in (("query", "q_proj"), ("value", "v_proj"))
        },
    ),
    "two numbers": (
        {f"m.stage.{s}.block.{n}.proj": (H, H) for s in range(2) for n in range(2)},
        {f"x.{s}.y.{n}.proj": f"m.stage.{s}.block.{n}.proj" for s in range(2) for n in range(2)},
    ),
    "a sequence of one": ({"lm_head": (MLP, H), "model.layers.0.q_proj": (H, H)}, {"lm_head.0": "lm_head"}),
}


def make(bench: Workbench, shapes: Mapping[str, Shape], meant: Mapping[str, str]) -> dict[str, Any]:
    """A base, and an adapter whose names are not the base's; target → what its tensor must become."""
    base = {name: random(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    write_base(bench.base, {f"{name}.weight": f32(weight) for name, weight in base.items()})
    write_json(bench.base / "config.json", {"model_type": "mystery", "tie_word_embeddings": False})
    tensors: dict[str, Stored] = {}
    wanted = {}
    for number, (target, name) in enumerate(meant.items()):
        out, into = shapes[name]
        a, b = random(2, into, seed=100 + number), random(out, 2, seed=200 + number)
        tensors |= {f"{PREFIX}{target}.lora_A.weight": f32(a), f"{PREFIX}{target}.lora_B.weight": f32(b)}
        wanted[f"{name}.weight"] = base[name] + 2 * b @ a
    write_adapter(bench.adapter, tensors, r=2, lora_alpha=4, fan_in_fan_out=False, target_modules=None)
    return wanted


def proposed(message: str) -> list[str]:
    """The options that a message proposes, each once."""
    found = re.findall(r"--map (?:'[^']*'|\S+)", message)
    return [word for text in dict.fromkeys(found) for word in shlex.split(text)]


@pytest.mark.parametrize("name", MEANT)
def test_a_proposed_map_merges_into_what_was_meant(bench: Workbench, name: str) -> None:
    """Copied from the message to the command line, it leads every weight to its tensor, and the report says so."""
    shapes, meant = MEANT[name]
    wanted = make(bench, shapes, meant)
    outcome = bench.refuses_to_merge("--map", code=4)
    after, report = bench.merges(*proposed(outcome.err))
    before = tensors_of(bench.base)
    for tensor, weight in before.items():
        assert np.allclose(after[tensor], wanted.get(tensor, weight), rtol=0, atol=1e-5)
    assert "map-used" in [note["code"] for note in report["notes"]]


# (layers of the base, layers of the adapter): what a guess would lead astray
DOUBTFUL: dict[str, tuple[dict[str, Shape], dict[str, Shape]]] = {
    "another name of the same shape": (
        {"model.layers.0.self_attn.v_proj": (H, H)},
        {"model.layers.0.self_attn.q_proj": (H, H)},
    ),
    "a number less": ({"model.q_proj": (H, H)}, {"model.layers.0.q_proj": (H, H)}),
    "a number more": ({"model.layers.0.q_proj": (H, H)}, {"model.q_proj": (H, H)}),
    "another shape": ({"model.layers.0.a.q_proj": (H, MLP)}, {"net.0.b.q_proj": (H, H)}),
    "a layer that is missing": (
        {"model.layers.0.a.q_proj": (H, H)},
        {f"net.{n}.b.q_proj": (H, H) for n in range(2)},
    ),
    "one of two has no place": (
        {"model.layers.0.a.q_proj": (H, H)},
        {"net.0.b.q_proj": (H, H), "net.0.b.strange": (H, H)},
    ),
    "two for one": (
        {"model.layers.0.a.q_proj": (H, H)},
        {"net.0.b.q_proj": (H, H), "web.0.b.q_proj": (H, H)},
    ),
    "one for two": (
        {"encoder.0.a.q_proj": (H, H), "decoder.0.a.q_proj": (H, H)},
        {"net.0.b.q_proj": (H, H)},
    ),
    "taken already": (
        {"model.layers.0.a.q_proj": (H, H)},
        {"model.layers.0.a.q_proj": (H, H), "net.0.b.q_proj": (H, H)},
    ),
    "more than one in the sequence": ({"head": (H, H)}, {"head.0": (H, H), "head.2": (H, H)}),
    "the second of a sequence": ({"head": (H, H)}, {"head.1": (H, H)}),
    "a head for an embedding": ({"model.embed_tokens": (H, H)}, {"lm_head": (H, H)}),
    "another tower": (
        {"vision_tower.blocks.0.a.q_proj": (H, H), "model.layers.0.x": (H, H)},
        {"language_model.net.0.b.q_proj": (H, H)},
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_nothing_is_proposed_where_it_may_be_wrong(name: str) -> None:
    """A proposal maps all unmatched weights, one to one, by shape, last name and numbers; else there is none."""
    disk, targets = DOUBTFUL[name]
    base = base_of({f"{n}.weight": s for n, s in disk.items()}, model_type="mystery")
    bound = bind(adapter_of({f"{n}.weight": s for n, s in targets.items()}, fan_in_fan_out=False), base)
    assert bound.problems
    assert not any("--map REGEX=TEMPLATE" not in why and "--map" in why for why in bound.problems.values()), (
        bound.problems
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["factors", "saved whole"])
def test_a_head_in_a_sequence_of_one_is_merged_by_the_map_that_is_proposed(
    bench: Workbench, whole: bool, tied: bool
) -> None:
    """`lm_head.0.weight`, of a head that was wrapped in nn.Sequential: the map makes it the head, tied or not."""
    embedding, head = random(MLP, H, seed=1), random(MLP, H, seed=2)
    tensors = {
        "model.embed_tokens.weight": f32(embedding),
        "model.layers.0.self_attn.q_proj.weight": f32(random(H, H, seed=3)),
    }
    write_base(bench.base, tensors if tied else {**tensors, "lm_head.weight": f32(head)})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    write_json(bench.base / "config.json", config)
    a, b, new = random(2, H, seed=4), random(MLP, 2, seed=5), random(MLP, H, seed=6)
    if whole:
        q = {
            f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{s}.weight": f32(random(*n, seed=7))
            for s, n in (("A", (2, H)), ("B", (H, 2)))
        }
        write_adapter(
            bench.adapter,
            {**q, f"{PREFIX}lm_head.0.weight": f32(new)},
            r=2,
            lora_alpha=4,
            target_modules=None,
            modules_to_save=["lm_head"],
        )
    else:
        write_adapter(
            bench.adapter,
            {f"{PREFIX}lm_head.0.lora_A.weight": f32(a), f"{PREFIX}lm_head.0.lora_B.weight": f32(b)},
            r=2,
            lora_alpha=4,
            target_modules=None,
        )
    outcome = bench.refuses_to_merge("lm_head.0.weight", "--map", code=4)
    after, _ = bench.merges(*proposed(outcome.err))
    wanted = new if whole else (embedding if tied else head) + 2 * b @ a
    assert np.allclose(after["lm_head.weight"], wanted, rtol=0, atol=1e-5)
    assert np.allclose(after["model.embed_tokens.weight"], embedding, rtol=0, atol=1e-6)
