"""Which tensor, and which rows of one, a name means: by the table of what was observed, and by the models' own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from headers import Shape, adapter_of, base_of, bias, dora, experts, landed, lora, rows_from, saved, stored
from layout_facts import PREFIX, Cell, expand, read_cells
from torch import Tensor

from loratool import plan_merge
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors
from loratool.bases.binding import Bound, bind, grouped, tell
from loratool.bases.binding.checking import uncut
from loratool.errors import FitError, InputError, UsageError

if TYPE_CHECKING:
    from loratool.algebra.updates.base import Update

CELLS = [cell for releases in read_cells().values() for cell in releases.values()]


def targets_of(cell: Cell) -> dict[str, tuple[Update, set[str]]]:
    """Target → its update, and the tensors that the table records for it."""
    found: dict[str, tuple[Update, set[str]]] = {}
    for step in cell.steps:
        tensors = {name for pattern in step.disk for name in expanded(pattern)}
        if step.rule.startswith("full-"):
            found[step.module] = (saved(cell.adapter[f"{PREFIX}{step.module}"]), tensors)
            continue
        a, b = (cell.adapter[f"{PREFIX}{step.module}.lora_{side}.weight"] for side in "AB")
        module = step.module
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        target = f"{module}.{step.parameter or 'weight'}"
        of_experts = step.parameter or len(cell.disk.get(target, ())) == 3
        update = ExpertFactors(stored("A", a), stored("B", b), 1.0) if of_experts else lora((b[0], a[1]))
        found[target] = (update, tensors)
    return found


def expanded(pattern: str) -> list[str]:
    return [name for names in expand(pattern) for name in names] if "{" in pattern else [pattern]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.model}-{cell.release}")
def test_each_module_lands_on_the_tensors_that_the_table_records(cell: Cell) -> None:
    wanted = targets_of(cell)
    base = base_of(cell.disk, model_type=cell.model_type)
    bound = bind(adapter_of({target: update for target, (update, _) in wanted.items()}), base)
    assert dict(bound.problems) == {}
    assert landed(bound) == {target: tensors for target, (_, tensors) in wanted.items()}
    rule = {step.rule for step in cell.steps}
    if rule == {"exact"}:
        assert {place.rule for places in bound.places.values() for place in places} == {"exact"}


# -- rows of fused tensors: the models' own code takes them apart ------------------------------------

H, HEADS, GROUPS, HEAD = 32, 4, 2, 8  # columns, heads, key heads, rows of a head


def blocks(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return list(torch.split(rows, list(sizes)))


def by_head(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """gpt_neox, bloom and persimmon: (heads, 3 · head)."""
    return [part.flatten() for part in torch.split(rows.view(HEADS, 3 * HEAD), HEAD, dim=1)]


def by_group(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """falcon and internlm2: (groups, heads of a group + 2, head)."""
    grouped = rows.view(GROUPS, HEADS // GROUPS + 2, HEAD)
    return [grouped[:, :-2].flatten(), grouped[:, -2].flatten(), grouped[:, -1].flatten()]


def four_blocks(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """codegen: (4, query + value + key)."""
    query, value, key = rows.view(4, -1).chunk(3, dim=1)
    return [query.flatten(), key.flatten(), value.flatten()]


def linear_attention(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """qwen3_next: (key heads, query + key + value heads of it + z heads of it)."""
    wide = HEADS // GROUPS * HEAD
    return [part.flatten() for part in torch.split(rows.view(GROUPS, -1), [HEAD, HEAD, wide, wide], dim=1)]


QKV = ("q_proj", "k_proj", "v_proj")
EQUAL, GROUPED, ONE_KEY = (32, 32, 32), (32, 16, 16), (32, 8, 8)
Split = Callable[[Tensor, Sequence[int]], list[Tensor]]
# (config, fused tensor, parts, their rows, how the model's code takes the rows apart)
FUSED: dict[str, tuple[dict[str, Any], str, Sequence[str], Sequence[int], Split]] = {
    "phi3": ({"model_type": "phi3"}, "model.layers.0.self_attn.qkv_proj", QKV, GROUPED, blocks),
    "mpt": ({"model_type": "mpt"}, "transformer.blocks.0.attn.Wqkv", QKV, EQUAL, blocks),
    "dbrx": ({"model_type": "dbrx"}, "transformer.blocks.0.norm_attn_norm.attn.Wqkv", QKV, GROUPED, blocks),
    "baichuan": ({"model_type": "baichuan"}, "model.layers.0.self_attn.W_pack", QKV, EQUAL, blocks),
    "qwen": ({"model_type": "qwen"}, "transformer.h.0.attn.c_attn", QKV, EQUAL, blocks),
    "gpt_neox": (
        {"model_type": "gpt_neox", "num_attention_heads": HEADS},
        "gpt_neox.layers.0.attention.query_key_value",
        *(QKV, EQUAL, by_head),
    ),
    "bloom": (
        {"model_type": "bloom", "n_head": HEADS},
        "transformer.h.0.self_attention.query_key_value",
        *(("query", "key", "value"), EQUAL, by_head),
    ),
    "persimmon": (
        {"model_type": "persimmon", "num_attention_heads": HEADS},
        "model.layers.0.self_attn.query_key_value",
        *(QKV, EQUAL, by_head),
    ),
    "falcon, groups": (
        {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": GROUPS, "multi_query": True},
        "transformer.h.0.self_attention.query_key_value",
        *(QKV, GROUPED, by_group),
    ),
    "falcon, one key": (
        {"model_type": "falcon", "new_decoder_architecture": False, "multi_query": True},
        "transformer.h.0.self_attention.query_key_value",
        *(QKV, ONE_KEY, blocks),
    ),
    "falcon, heads": (
        {"model_type": "falcon", "multi_query": False, "num_attention_heads": HEADS},
        "transformer.h.0.self_attention.query_key_value",
        *(QKV, EQUAL, by_head),
    ),
    "internlm2": (
        {"model_type": "internlm2", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS},
        "model.layers.0.attention.wqkv",
        *(("wq", "wk", "wv"), GROUPED, by_group),
    ),
    "chatglm, one key": (
        {"model_type": "chatglm", "multi_query_attention": True, "num_attention_heads": HEADS},
        "transformer.encoder.layers.0.self_attention.query_key_value",
        *(QKV, GROUPED, blocks),
    ),
    "chatglm, heads": (
        {"model_type": "chatglm", "num_attention_heads": HEADS},
        "transformer.encoder.layers.0.self_attention.query_key_value",
        *(QKV, EQUAL, by_head),
    ),
    "gpt_bigcode, one key": (
        {"model_type": "gpt_bigcode", "multi_query": True, "n_head": HEADS},
        "transformer.h.0.attn.c_attn",
        *(QKV, ONE_KEY, blocks),
    ),
    "gpt_bigcode, heads": (
        {"model_type": "gpt_bigcode", "multi_query": False, "n_head": HEADS},
        "transformer.h.0.attn.c_attn",
        *(QKV, EQUAL, by_head),
    ),
    "codegen": ({"model_type": "codegen"}, "transformer.h.0.attn.qkv_proj", QKV, EQUAL, four_blocks),
    "qwen3_next": (
        {"model_type": "qwen3_next", "linear_num_key_heads": GROUPS},
        "model.layers.0.linear_attn.in_proj_qkvz",
        ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"),
        (16, 16, 32, 32),
        linear_attention,
    ),
    "gate and up": ({}, "model.layers.0.mlp.gate_up_proj", ("gate_proj", "up_proj"), (24, 24), blocks),
    "gate and up of dinov2": ({}, "encoder.layer.0.mlp.weights_in", ("gate_proj", "up_proj"), (24, 24), blocks),
    "up and gate": ({}, "encoder.layer.0.mlp.up_gate_proj", ("up_proj", "gate_proj"), (24, 24), blocks),
}


@pytest.mark.parametrize("wanted", ["all parts", "one part", "biases", "DoRA"])
@pytest.mark.parametrize("name", FUSED)
def test_each_part_takes_the_rows_that_the_model_takes_for_it(name: str, wanted: str) -> None:
    config, fused, parts, sizes, take_apart = FUSED[name]
    parent = fused.rpartition(".")[0]
    base = base_of({f"{fused}.weight": (sum(sizes), H), f"{fused}.bias": (sum(sizes),)}, **config)
    kind = "bias" if wanted == "biases" else "weight"
    chosen = {f"{parent}.{part}.{kind}": size for part, size in zip(parts, sizes, strict=True)}
    if wanted == "one part":
        chosen = dict(list(chosen.items())[1:2])
    make: Callable[[int], Update] = {"biases": bias, "DoRA": lambda n: dora((n, H))}.get(wanted, lambda n: lora((n, H)))
    bound = bind(adapter_of({target: make(size) for target, size in chosen.items()}), base)
    assert dict(bound.problems) == {}
    labels = rows_from(bound, base, chosen)[f"{fused}.{kind}"].view(sum(sizes), -1)
    assert bool((labels == labels[:, :1]).all())
    apart = take_apart(torch.arange(sum(sizes)), sizes)
    numbers = {target: number for number, target in enumerate(chosen, 1)}
    for part, rows in zip(parts, apart, strict=True):
        number = numbers.get(f"{parent}.{part}.{kind}")
        expected = torch.arange(len(rows)) + 1000 * number if number else torch.zeros(len(rows), dtype=torch.long)
        assert torch.equal(labels[rows, 0], expected), part


def test_parts_of_a_conv1d_take_its_columns() -> None:
    base = base_of({"h.0.attn.c_attn.weight": (H, 96), "h.0.attn.c_attn.bias": (96,)}, model_type="gpt2")
    targets = [f"h.0.attn.{part}.weight" for part in QKV]
    bound = bind(adapter_of({target: dora((32, H)) for target in targets}), base)
    labels = rows_from(bound, base, targets)["h.0.attn.c_attn.weight"]
    assert torch.equal(labels, torch.cat([torch.arange(32) + 1000 * n for n in (1, 2, 3)]).expand(H, 96))
    for (place,) in bound.places.values():
        assert isinstance(place.update, Magnitude)
        assert place.update.by_column


@pytest.mark.parametrize(
    ("fused", "parts", "sizes"),
    [
        ("model.layers.3.self_attn.qkv_proj", QKV, GROUPED),
        ("model.layers.3.mlp.gate_up_proj", ("gate_proj", "up_proj"), (24, 24)),
        ("encoder.layer.3.mlp.weights_in", ("gate_proj", "up_proj"), (24, 24)),
    ],
)
@pytest.mark.parametrize("make", [lora, dora])
def test_a_fused_update_is_divided_among_the_parts_of_the_base(
    fused: str, parts: Sequence[str], sizes: Sequence[int], make: Callable[[Shape], Update]
) -> None:
    parent = fused.rpartition(".")[0]
    tensors = {f"{parent}.{part}.weight": (size, H) for part, size in zip(parts, sizes, strict=True)}
    base = base_of(tensors, model_type="llama")
    bound = bind(adapter_of({f"{fused}.weight": make((sum(sizes), H))}), base)
    labels = rows_from(bound, base, bound.places)
    together = torch.cat([labels[name][:, 0] for name in tensors])
    assert torch.equal(together, torch.arange(sum(sizes)) + 1000)
    assert len({id(place.update) for place in bound.places[f"{fused}.weight"]}) == 1, "it is loaded once"


def test_an_update_of_whole_columns_is_divided_among_all_parts_or_not_at_all() -> None:
    """Its norms are those of all rows, which an edit of some columns does not see."""
    base = base_of({"m.gate_proj.weight": (24, H), "m.up_proj.weight": (24, H)})
    by_column = Magnitude(lora((48, H)), stored("m", (H,)), by_column=True)
    bound = bind(adapter_of({"m.gate_up_proj.weight": by_column}), base)
    labels = rows_from(bound, base, bound.places)
    assert torch.equal(
        torch.cat([labels[f"m.{part}.weight"][:, 0] for part in ("gate_proj", "up_proj")]), torch.arange(48) + 1000
    )
    places = bound.places["m.gate_up_proj.weight"]
    assert uncut(places) == ""
    for some in (places[1:], (dataclasses.replace(places[0], columns=slice(0, 4)), places[1])):
        assert "cannot be applied to a part" in uncut(some)


@pytest.mark.parametrize(
    ("config", "sizes", "told"),
    [
        (
            {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 4},
            (32, 16),
            "4 heads and 4 key heads",
        ),
        ({"model_type": "phi3"}, (31, 16), "does not fit into 64 rows"),
        ({"model_type": "internlm2"}, (32, 16), "num_key_value_heads"),
    ],
    ids=["heads of the config", "odd rows", "nothing says how many groups"],
)
def test_parts_whose_sizes_cannot_be_are_refused(config: dict[str, Any], sizes: tuple[int, int], told: str) -> None:
    leaf = "wqkv" if config["model_type"] == "internlm2" else "qkv_proj"
    base = base_of({f"a.{leaf}.weight": (64, H)}, **config)
    bound = bind(adapter_of({"a.q_proj.weight": (sizes[0], H)}), base)
    assert told in bound.problems["a.q_proj.weight"]


def test_rows_that_a_base_keeps_in_another_order_are_refused() -> None:
    disk = "vision_encoder.transformer.layers.0.attention.wq.weight"
    base = base_of({disk: (H, H)}, model_type="mistral_large4")
    target = "model.vision_tower.transformer.layers.0.attention.q_proj.weight"
    assert "another order" in bind(adapter_of({target: (H, H)}), base).problems[target]
    assert landed(bind(adapter_of({disk: (H, H)}), base)) == {disk: {disk}}


# -- experts -----------------------------------------------------------------------------------------

E, MLP = 3, 24
CONTAINER = "model.layers.0.mlp.experts"


def per_expert(gate: str, up: str, down: str) -> dict[str, Shape]:
    shapes = {gate: (MLP, H), up: (MLP, H), down: (H, MLP)}
    return {f"{CONTAINER}.{e}.{leaf}.weight": shape for e in range(E) for leaf, shape in shapes.items()}


def fused_experts(in_out: bool = False) -> dict[str, Shape]:
    gate_up, down = ((E, H, 2 * MLP), (E, MLP, H)) if in_out else ((E, 2 * MLP, H), (E, H, MLP))
    return {f"{CONTAINER}.gate_up_proj": gate_up, f"{CONTAINER}.down_proj": down}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "gpt_oss"])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2")])
@pytest.mark.parametrize("make", [lora, dora])
def test_each_expert_takes_its_part_of_the_fused_tensor(
    model_type: str, names: tuple[str, str, str], make: Callable[[Shape], Update]
) -> None:
    in_out = model_type != "qwen3_moe"
    base = base_of(fused_experts(in_out), model_type=model_type)
    targets = per_expert(*names)
    bound = bind(adapter_of({target: make(shape) for target, shape in targets.items()}), base)
    assert dict(bound.problems) == {}
    labels = rows_from(bound, base, targets)
    gate_up, down = labels[f"{CONTAINER}.gate_up_proj"], labels[f"{CONTAINER}.down_proj"]
    for e in range(E):
        gate, up, back = (torch.arange(n) + 1000 * (3 * e + at) for n, at in ((MLP, 1), (MLP, 2), (H, 3)))
        if model_type == "qwen3_moe":  # rows, gate first
            assert torch.equal(gate_up[e], torch.cat([gate, up])[:, None].expand(2 * MLP, H))
            assert torch.equal(down[e], back[:, None].expand(H, MLP))
        elif model_type == "llama4_text":  # columns, gate first
            assert torch.equal(gate_up[e], torch.cat([gate, up]).expand(H, 2 * MLP))
        else:  # columns in turns
            assert torch.equal(gate_up[e, :, 0::2], gate.expand(H, MLP))
            assert torch.equal(gate_up[e, :, 1::2], up.expand(H, MLP))


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2")])
@pytest.mark.parametrize("turned", [False, True])
def test_an_update_of_all_experts_is_divided_among_each(names: tuple[str, str, str], turned: bool) -> None:
    base = base_of(per_expert(*names), model_type="qwen3_moe")
    sides = {"gate_up_proj": (2 * MLP, H), "down_proj": (H, MLP)}
    updates = {f"{CONTAINER}.{n}": experts(E, *(s if turned else s[::-1])) for n, s in sides.items()}
    bound = bind(adapter_of(updates), base)
    assert dict(bound.problems) == {}
    labels = rows_from(bound, base, updates)
    for e in range(E):
        gate, up, down = (labels[f"{CONTAINER}.{e}.{name}.weight"] for name in names)
        assert torch.equal(torch.cat([gate, up])[:, 0], torch.arange(2 * MLP) + e * 2 * MLP + 1000)
        assert torch.equal(down[:, 0], torch.arange(H) + e * H + 2000)
    assert {p.update.transposed for places in bound.places.values() for p in places} == {turned}  # type: ignore[attr-defined]


def test_experts_whose_gates_are_one_tensor_take_theirs() -> None:
    disk = {"l.0.moe.gate_proj.weight": (E, MLP, H), "l.0.moe.up_proj.weight": (E, MLP, H)}
    base = base_of(disk, model_type="step3p7")
    bound = bind(adapter_of({"l.0.mlp.experts.gate_up_proj": experts(E, H, 2 * MLP)}), base)
    labels = rows_from(bound, base, bound.places)
    for e in range(E):
        gate, up = (labels[name][e, :, 0] for name in disk)
        assert torch.equal(torch.cat([gate, up]), torch.arange(2 * MLP) + e * 2 * MLP + 1000)


@pytest.mark.parametrize(
    ("container", "disk"),
    [
        (
            "l.0.block_sparse_moe.experts",
            {"block_sparse_moe.input_linear": "gu", "block_sparse_moe.output_linear": "d"},
        ),
        ("l.0.mlp.experts", {"mlp.experts.fc1": "gu", "mlp.experts.fc2": "d"}),
        ("l.0.mlp.experts", {"moe.gate_proj": "g", "moe.up_proj": "u", "moe.down_proj": "d"}),
    ],
    ids=["granitemoe", "aria_text", "step3p7"],
)
def test_each_expert_takes_its_part_of_what_a_family_calls_the_fused_tensor(
    container: str, disk: dict[str, str], request: pytest.FixtureRequest
) -> None:
    """Under the names on disk that the conversion mapping of transformers has; only those of aria are (in, out)."""
    kind = request.node.callspec.id
    in_out = kind == "aria_text"
    sizes = {"gu": (2 * MLP, H), "g": (MLP, H), "u": (MLP, H), "d": (H, MLP)}
    stored = {f"l.0.{n}.weight": (E, *(sizes[p][::-1] if in_out else sizes[p])) for n, p in disk.items()}
    base = base_of(stored, model_type=kind)
    parts = {"gate_proj": (MLP, H), "up_proj": (MLP, H), "down_proj": (H, MLP)}
    targets = {f"{container}.{e}.{part}.weight": shape for e in range(E) for part, shape in parts.items()}
    bound = bind(adapter_of(targets), base)
    assert dict(bound.problems) == {}
    *first, down = rows_from(bound, base, targets).values()
    for e in range(E):
        gate, up = (torch.arange(MLP) + 1000 * (3 * e + at) for at in (1, 2))
        found = [each[e, 0] if in_out else each[e, :, 0] for each in first]
        assert torch.equal(torch.cat(found), torch.cat([gate, up]))
        assert torch.equal(down[e, :, 0], torch.arange(MLP if in_out else H) + 1000 * (3 * e + 3))


def test_an_expert_missing_from_the_base_is_named() -> None:
    disk = {name: shape for name, shape in per_expert("w1", "w3", "w2").items() if ".1.w3" not in name}
    updates = {f"{CONTAINER}.gate_up_proj": experts(E, H, 2 * MLP)}
    bound = bind(adapter_of(updates), base_of(disk, model_type="mixtral"))
    assert "w3.weight of expert 1 of 3" in bound.problems[f"{CONTAINER}.gate_up_proj"]
    every = base_of(per_expert("w1", "w3", "w2"), model_type="mixtral", num_local_experts=5)
    assert "of expert 3, 4 of 5" in bind(adapter_of(updates), every).problems[f"{CONTAINER}.gate_up_proj"]


def test_an_expert_that_the_fused_tensor_has_not_is_refused() -> None:
    target = f"{CONTAINER}.{E}.w2.weight"
    bound = bind(adapter_of({target: (H, MLP)}), base_of(fused_experts(), model_type="mixtral"))
    assert f"the base has {E} experts, numbered from 0; this is number {E}" in bound.problems[target]


@pytest.mark.parametrize(
    ("gate_up", "other"),
    [("gate_up_proj", "down_proj"), ("fc1.weight", "fc2.weight")],
)
def test_square_experts_lie_as_those_beside_them(gate_up: str, other: str) -> None:
    """2 · MLP = H, so that the fused tensor of gate and up is square; the other one tells."""
    half = H // 2
    for in_out in (False, True):
        down = (E, half, H) if in_out else (E, H, half)
        base = base_of({f"{CONTAINER}.{gate_up}": (E, H, H), f"{CONTAINER}.{other}": down}, model_type="mixtral")
        ((place,),) = bind(adapter_of({f"{CONTAINER}.1.up_proj.weight": (half, H)}), base).places.values()
        where = (place.first_row, place.rows, place.columns)
        assert where == ((H, H, slice(half, H)) if in_out else (H + half, half, slice(None)))


# -- which way round ---------------------------------------------------------------------------------


def is_turned(bound: Bound, target: str) -> bool:
    (place,) = bound.places[target]
    return bool(place.update.up.transposed)  # type: ignore[attr-defined]


def test_a_square_weight_that_no_conv1d_is_called_needs_no_answer() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not is_turned(bind(adapter_of({name: (H, H)}), base_of({name: (H, H)})), name)


def test_square_experts_of_two_possible_disks_ask() -> None:
    target = f"{CONTAINER}.down_proj"
    base = base_of({target: (E, H, H), f"{CONTAINER}.gate_up_proj": (E, H, 2 * H)}, model_type="qwen3_vl_moe")
    adapter = adapter_of({target: experts(E, H, H)}, peft_version="0.21.2")
    assert "--fan-in-fan-out" in bind(adapter, base).problems[target]
    for given in (False, True):
        (place,) = bind(adapter, base, fan_in_fan_out=given).places[target]
        assert place.update.transposed == given  # type: ignore[attr-defined]


def test_a_shape_that_fits_the_wrong_way_round_is_no_match_under_a_guessed_name() -> None:
    """Kimi's first linear layer is fc0 on disk and fc1 in memory, its second fc1 and fc2."""
    disk = {f"vision_tower.encoder.blocks.0.mlp.fc{n}.weight": s for n, s in enumerate([(48, H), (H, 48)])}
    targets = {f"model.vision_tower.layers.0.mlp.fc{n}.weight": s for n, s in enumerate(disk.values(), 1)}
    bound = bind(adapter_of(targets), base_of(disk, model_type="kimi_k25"))
    assert landed(bound) == {target: {name} for target, name in zip(targets, disk, strict=True)}


# -- names -------------------------------------------------------------------------------------------

Q = "layers.{}.self_attn.q_proj.weight"


def disk_of(prefix: str, count: int = 4, shape: Shape = (H, H)) -> dict[str, Shape]:
    return {prefix + Q.format(n): shape for n in range(count)}


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod.", "model._fsdp_wrapped_module."])
def test_wrappers_in_the_names_of_the_base_do_not_count(wrapper: str) -> None:
    base = base_of(disk_of("model." if wrapper.startswith("model.") else f"{wrapper}model."))
    if wrapper.startswith("model."):
        base = base_of({name.replace("model.", wrapper, 1): shape for name, shape in disk_of("model.").items()})
    bound = bind(adapter_of(disk_of("model.")), base)
    assert len(bound.places) == 4
    assert landed(bound)["model." + Q.format(2)] == {list(base.tensors)[2]}


def test_an_unknown_prefix_is_explained_once_for_all_and_told() -> None:
    base = base_of(disk_of("strange.stack."), model_type="llama")
    bound = bind(adapter_of(disk_of("model.")), base)
    assert landed(bound)["model." + Q.format(3)] == {"strange.stack." + Q.format(3)}
    assert len(bound.notes) == 1
    assert "model → strange.stack" in str(bound.notes[0])


def test_two_prefixes_that_explain_as_much_explain_nothing() -> None:
    base = base_of({**disk_of("strange.stack."), **disk_of("odd.stack.")})
    assert bind(adapter_of(disk_of("model.")), base).places == {}


@pytest.mark.parametrize("prefix", ["net.vision_tower.", "net.audio_tower.", "vision_tower."])
def test_a_text_adapter_never_lands_in_another_tower(prefix: str) -> None:
    text = {"model.layers.0.mlp.gate_proj.weight": (H, H)}
    base = base_of({**text, **disk_of(prefix)}, model_type="llava")
    assert bind(adapter_of(disk_of("model.")), base).places == {}


def test_two_tensors_that_a_name_may_mean_are_an_error() -> None:
    base = base_of({**disk_of("encoder."), **disk_of("decoder.")})
    bound = bind(adapter_of(disk_of("")), base)
    assert bound.places == {}
    assert "it could be any of decoder.layers.0" in bound.problems[Q.format(0)]


def test_an_exact_name_whose_shape_does_not_fit_is_not_looked_for_elsewhere() -> None:
    base = base_of({**disk_of("model."), **disk_of("model.language_model.", shape=(H, 24))})
    bound = bind(adapter_of(disk_of("model.", shape=(H, 24))), base)
    assert bound.problems["model." + Q.format(0)] == (
        f"the update is [{H}, 24], but model.layers.0.self_attn.q_proj.weight is [{H}, {H}]"
    )


def test_a_map_comes_before_the_exact_name() -> None:
    base = base_of({**disk_of("model."), **disk_of("other.")}, model_type="llama")
    bound = bind(adapter_of(disk_of("model.")), base, maps=[r"^model\.=other.", "nowhere=x"])
    assert landed(bound)["model." + Q.format(1)] == {"other." + Q.format(1)}
    assert {place.rule for places in bound.places.values() for place in places} == {"map"}
    assert [note.code for note in bound.notes] == ["map-used", "map-unused"]
    assert (
        str(bound.notes[1])
        == "--map 'nowhere=x' matches no weight name of this adapter; names are matched without PEFT's prefix"
    )


def test_a_map_leads_into_the_other_rules() -> None:
    base = base_of({f"model.layers.{n}.self_attn.qkv_proj.weight": (96, H) for n in range(2)}, model_type="phi3")
    targets = {f"net.{n}.att.query.weight": (H, H) for n in range(2)}
    maps = [r"^net\.(\d+)\.att\.query=model.layers.\1.self_attn.q_proj"]
    bound = bind(adapter_of(targets), base, maps=maps)
    assert {place.rule for places in bound.places.values() for place in places} == {"map, q_proj of qkv_proj"}
    assert bind(adapter_of(targets), base).places == {}


@pytest.mark.parametrize("text", ["", "=", "=x", "no equals sign", "(=x", r"a=\1", r"a=\g<name>"])
def test_a_map_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--map"):
        bind(adapter_of(disk_of("model.")), base_of(disk_of("model.")), maps=[text])


def test_two_edits_of_one_tensor_are_refused_with_both_names() -> None:
    targets = {"a.weight": (H, H), "b.weight": (H, H)}
    bound = bind(adapter_of(targets), base_of({"a.weight": (H, H)}), maps=["^b=a"])
    assert dict(bound.problems) == {"b.weight": "a.weight is already edited by a.weight"}


@pytest.mark.parametrize(
    ("packed", "dtype"),
    [("qweight", "I32"), ("weight_packed", "I32"), ("weight", "U8"), ("weight", "F8_E4M3FNUZ")],
)
def test_a_quantised_weight_is_refused_with_what_to_do(packed: str, dtype: str) -> None:
    module = "model.layers.0.self_attn.q_proj"
    base = base_of({f"{module}.{packed}": (64, 1)}, {f"{module}.{packed}": dtype})
    with pytest.raises(InputError, match="pass the unquantised model") as error:
        plan_merge(base, [adapter_of({f"{module}.weight": (H, H)})])
    assert f"{module}.{packed} is stored as {dtype}" in str(error.value)


# -- what is told ------------------------------------------------------------------------------------


def test_names_that_are_not_found_are_told_in_a_line_with_their_layers_and_the_nearest() -> None:
    """Where no `--map` can be proposed: q is no name of q_proj that a table knows."""
    lost = {f"decoder.{n}.attn.q.weight": (H, H) for n in (0, 1, 2, 5)}
    bound = bind(adapter_of(lost), base_of(disk_of("model."), model_type="llama"))
    assert tell(bound.problems) == [
        "decoder.{0-2,5}.attn.q.weight: the base has no such weight; the closest name is "
        f"model.layers.0.self_attn.q_proj.weight [{H}, {H}]; if the base has this layer under another name, pass "
        "--map REGEX=TEMPLATE"
    ]


def test_an_adapter_with_one_lost_weight_is_refused_whole() -> None:
    updates = {**disk_of("model."), "model.layers.0.lost.weight": (H, H)}
    with pytest.raises(FitError, match="lost"):
        plan_merge(base_of(disk_of("model.")), [adapter_of(updates)])


@pytest.mark.parametrize("module", ["lm_head", "embed_out", "model.embed_tokens", "transformer.wte"])
def test_a_head_or_embedding_that_the_base_has_not_is_marked_as_missing(module: str) -> None:
    bound = bind(adapter_of({f"{module}.weight": (96, H)}), base_of(disk_of("model.")))
    kind = "output head" if module in ("lm_head", "embed_out") else "input embedding"
    assert dict(bound.missing) == {f"{module}.weight": kind}
    assert set(bound.problems) == {f"{module}.weight"}


def test_a_target_that_a_base_may_be_without_is_no_problem() -> None:
    adapter = dataclasses.replace(adapter_of({"a.bias": bias(H)}), optional=frozenset(["a.bias"]))
    bound = bind(adapter, base_of({"a.weight": (H, H)}))
    assert (bound.places, bound.problems) == ({}, {})
    wrong = bind(adapter, base_of({"a.weight": (H, H), "a.bias": (H + 1,)}))
    assert set(wrong.problems) == {"a.bias"}, "one that is there must fit"


LISTED = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LISTED, True),
        ({"target_modules": ["self_attn.q_proj"]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": r".*\.q_proj"}, False),
        ({**LISTED, "layers_to_transform": [0, 1, 3]}, False),
        ({**LISTED, "layers_to_transform": 2}, True),
        ({**LISTED, "exclude_modules": ["model.layers.2.self_attn.q_proj"]}, False),
        ({**LISTED, "exclude_modules": ["k_proj"]}, True),
        ({}, False),
    ],
)
def test_a_hole_in_the_layers_is_told_unless_the_config_explains_it(config: Mapping[str, Any], told: bool) -> None:
    updates = {name: shape for name, shape in disk_of("model.").items() if ".2." not in name}
    bound = bind(adapter_of(updates, **config), base_of(disk_of("model."), model_type="llama"))
    notes = list(map(str, bound.notes))
    assert [note for note in notes if "model.layers.2.self_attn.q_proj" in note] == notes
    assert bool(bound.notes) == told


def test_names_are_told_with_ranges_of_their_numbers() -> None:
    names = [f"l.{n}.e.{e}.w" for n in range(3) for e in range(4)] + ["l.7.e.0.w", "head"]
    assert grouped(names) == ["l.{0-2}.e.{0-3}.w", "l.7.e.0.w", "head"]


@pytest.mark.parametrize(
    "names",
    [
        [".".join(["1"] * 5000)],
        [f"layers.{'9' * 5000}.q.weight"],
        [f"m{n}.x.weight" for n in range(3000)],
        ["", ".", "..", "#", "#.1.#", "a.#.b.weight"],
        ["layers.\u0663.q.weight", "layers.-1.q.weight", "layers.1e3.q.weight"],
    ],
    ids=["many numbers", "a long number", "many patterns", "no path", "no numbers"],
)
def test_strange_names_are_refused_in_no_time(names: list[str]) -> None:
    adapter = adapter_of(dict.fromkeys(names, (H, H)))
    bound = bind(adapter, base_of({**disk_of("model."), "layers.1.#.weight": (H, H)}))
    assert set(bound.problems) == set(names)
    assert len(tell(bound.problems)) == len(names)
