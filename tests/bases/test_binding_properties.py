"""What holds for every adapter and every base: each weight once or not at all, whatever the order of the names."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from headers import Headers, Shape, adapter_of, base_of, experts, lora, rows_from
from hypothesis import given, settings, strategies as st

from loratool import plan_merge
from loratool.bases.binding import Bound, bind, grouped
from loratool.errors import FitError, InputError

if TYPE_CHECKING:
    from loratool.adapters.adapter import Adapter
    from loratool.algebra.updates.base import Update

H, MLP, COUNT = 8, 6, 2  # columns, rows of gate and up, experts
Modules = dict[str, Shape]


def attention(names: tuple[str, ...]) -> Modules:
    return dict.fromkeys(names, (H, H))


# What a layer may hold: the same projections under different names, split, fused, by expert or together.
LAYERS: tuple[Modules, ...] = (
    attention(("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    {"self_attn.qkv_proj.weight": (3 * H, H)},
    {"self_attention.query_key_value.weight": (3 * H, H)},
    attention(("attention.attention.query.weight", "attention.attention.key.weight", "attention.output.dense.weight")),
    attention(("attention.q_proj.weight", "attention.k_proj.weight", "attention.o_proj.weight")),
    {"mlp.gate_proj.weight": (MLP, H), "mlp.up_proj.weight": (MLP, H), "mlp.down_proj.weight": (H, MLP)},
    {"mlp.gate_up_proj.weight": (2 * MLP, H), "mlp.down_proj.weight": (H, MLP)},
    {"mlp.fc1.weight": (MLP, H), "mlp.fc2.weight": (H, MLP)},
    {"intermediate.dense.weight": (MLP, H), "output.dense.weight": (H, MLP)},
    {"attn.c_attn.weight": (H, 3 * H), "attn.c_proj.weight": (H, H)},
    {"mlp.experts.gate_up_proj": (COUNT, 2 * MLP, H), "mlp.experts.down_proj": (COUNT, H, MLP)},
    {
        f"{container}.experts.{e}.{leaf}.weight": (H, MLP) if leaf in ("w2", "down_proj") else (MLP, H)
        for container, leaves in (("mlp", ("gate_proj", "up_proj", "down_proj")),)
        for e in range(COUNT)
        for leaf in leaves
    },
    {
        f"block_sparse_moe.experts.{e}.{leaf}.weight": (H, MLP) if leaf == "w2" else (MLP, H)
        for e in range(COUNT)
        for leaf in ("w1", "w3", "w2")
    },
)
PATHS = (
    *("model.layers", "layers", "model.language_model.layers", "language_model.model.layers", "transformer.h"),
    *(
        "encoder.layer",
        "vit.encoder.layer",
        "vit.layers",
        "model.vision_tower.layers",
        "vision_tower.vision_model.layers",
    ),
    *("strange.stack", "module.model.layers", "model._orig_mod.layers"),
)
TYPES = ("", "llama", "gpt2", "gpt_neox", "falcon", "mixtral", "gpt_oss", "qwen3_vl_moe", "phi3")


@st.composite
def models(draw: st.DrawFn) -> Modules:
    """Some layers of some kinds below one or two paths, with a tensor lost here and there."""
    found: Modules = {}
    for path in draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=2, unique=True)):
        kinds = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3))
        for number in range(draw(st.integers(1, 3))):
            for kind in kinds:
                found.update((f"{path}.{number}.{name}", shape) for name, shape in kind.items())
    lost = draw(st.sets(st.sampled_from(sorted(found)), max_size=2))
    return {name: shape for name, shape in found.items() if name not in lost} or found


def update_for(name: str, shape: Shape) -> Update:
    if len(shape) == 3:
        return experts(shape[0], shape[2], shape[1])
    return lora(shape[::-1] if name.rpartition(".")[0].endswith(("c_attn", "c_proj")) else shape)


def adapter_for(targets: Modules) -> Adapter:
    return adapter_of({name: update_for(name, shape) for name, shape in targets.items()}, target_modules=["q_proj"])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Modules, Headers]:
    """The targets of an adapter, and a base: related often, seldom alike."""
    disk = draw(models())
    targets = draw(st.one_of(models(), st.just(disk), st.just({**disk, **draw(models())})))
    kind = draw(st.sampled_from(TYPES))
    config: dict[str, Any] = (
        {"model_type": kind, "num_attention_heads": draw(st.sampled_from([1, 2, 4]))} if kind else {}
    )
    return targets, base_of(disk, **config)


def essence(bound: Bound) -> object:
    """All that was decided, in no order."""
    places = {
        target: {
            (p.tensor, p.rule, p.first_row, p.rows, p.update_row, str(p.columns), p.fold, shape_of(p.update))
            for p in found
        }
        for target, found in bound.places.items()
    }
    return places, dict(bound.problems), set(bound.notes), dict(bound.missing)


def shape_of(update: Update) -> object:
    return update.shape, getattr(update, "transposed", None), getattr(getattr(update, "up", None), "transposed", None)


@settings(max_examples=60, deadline=None)
@given(pair=pairs())
def test_every_target_has_places_or_a_reason_and_no_element_is_edited_twice(pair: tuple[Modules, Headers]) -> None:
    targets, base = pair
    bound = bind(adapter_for(targets), base)
    assert set(bound.places) | set(bound.problems) == set(targets)
    assert not set(bound.places) & set(bound.problems)
    assert all(bound.places.values())
    assert all(bound.problems.values())
    labels = rows_from(bound, base, bound.places)  # raises where two places meet
    for number, (target, places) in enumerate(bound.places.items(), 1):
        shape = targets[target]
        size = 1
        for each in shape:
            size *= each
        covered = sum(int((label // 1000 == number).sum()) for label in labels.values())
        assert covered == size, f"{target} is not used whole, or more than once: {places}"


@settings(max_examples=30, deadline=None)
@given(pair=pairs(), seed=st.integers(0, 1 << 30))
def test_the_order_of_names_decides_nothing(pair: tuple[Modules, Headers], seed: int) -> None:
    targets, base = pair
    shuffle: Callable[[list[tuple[str, Shape]]], None] = random.Random(seed).shuffle
    items, tensors = list(targets.items()), [(t.name, t.shape) for t in base.tensors.values()]
    shuffle(items)
    shuffle(tensors)
    once = essence(bind(adapter_for(targets), base))
    assert essence(bind(adapter_for(targets), base)) == once
    assert essence(bind(adapter_for(dict(items)), base_of(dict(tensors), **base.settings))) == once


@settings(max_examples=20, deadline=None)
@given(pair=pairs())
def test_an_adapter_is_merged_whole_or_refused(pair: tuple[Modules, Headers]) -> None:
    targets, base = pair
    adapter = adapter_for(targets)
    if bind(adapter, base).problems:
        with pytest.raises((FitError, InputError)):
            plan_merge(base, [adapter])


@given(
    names=st.lists(
        st.sampled_from(PATHS).flatmap(lambda p: st.integers(0, 40).map(lambda n: f"{p}.{n}.a.0.w")), max_size=30
    )
)
def test_ranges_tell_exactly_the_names(names: list[str]) -> None:
    told = set()
    for line in grouped(names):
        head, _, rest = line.partition("{")
        if not rest:
            told.add(line)
            continue
        numbers, _, tail = rest.partition("}")
        for span in numbers.split(","):
            first, _, last = span.partition("-")
            told |= {f"{head}{n}{tail}" for n in range(int(first), int(last or first) + 1)}
    assert told == set(names)
