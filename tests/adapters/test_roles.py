"""What the tensors of a module come to, whatever the file calls them: each method against its formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import role_formulas
import torch
from role_formulas import random
from safetensors.torch import save_file
from torch import Tensor

from loratool.adapters.adapter import StoredTensor, load_update
from loratool.adapters.formats.roles.module import Found, Module, RoleProblem
from loratool.adapters.formats.roles.names import grouped, split
from loratool.adapters.formats.roles.reading import FAMILIES, found_in
from loratool.algebra.updates.additive import LowRank
from loratool.files.safefile import read_safefile

NUMBERS = itertools.count()


@pytest.fixture
def module_of(tmp_path: Path) -> Any:
    """A module of a file that holds the given tensors."""

    def make(roles: Mapping[str, Tensor], **more: Any) -> Module:
        path = tmp_path / f"{next(NUMBERS)}.safetensors"
        save_file(
            {f"x{role}" if role[0] == "_" else f"x.{role}": t.clone().contiguous() for role, t in roles.items()}, path
        )
        file = read_safefile(path)
        stored = {
            role: StoredTensor(file, file.tensors[f"x{role}" if role[0] == "_" else f"x.{role}"]) for role in roles
        }
        return Module("x", stored, **more)

    return make


def merged(found: Found, weight: Tensor, parameter: str = "weight", strength: float = 1.0) -> Tensor:
    """The weight with the update of a parameter, made in blocks of two rows as a merge makes it."""
    fitted = found.updates[parameter].fit(tuple(weight.shape))
    assert fitted is not None, f"{found.updates[parameter].shape} does not fit {tuple(weight.shape)}"
    update = load_update(fitted, torch.device("cpu"), torch.float64)
    before = weight.double().reshape(weight.shape[0], -1)

    def blocks(first: int = 0, count: int | None = None) -> Any:
        stop = before.shape[0] if count is None else first + count
        return ((at, before[at : min(at + 2, stop)]) for at in range(first, stop, 2))

    if update.needs_weight:
        update = update.prepared(blocks)
    after = before.clone()
    for at in range(0, after.shape[0], 2):
        update.add_rows(after[at : at + 2], at, strength, before[at : at + 2])
    return after.reshape(weight.shape)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-6)


DOWN, UP = random(2, 4), random(6, 2)
W = random(6, 4, seed=5)
ALPHA = torch.tensor(1.0)
LORA = {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": ALPHA}

NAMES = {
    "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": ("lora_unet_down_blocks_0_attn1_to_q", "lora_down.weight"),
    "lora_unet_down_blocks_0_attn1_to_q.alpha": ("lora_unet_down_blocks_0_attn1_to_q", "alpha"),
    "unet.mid.attn1.to_out.0.lora_B.weight": ("unet.mid.attn1.to_out.0", "lora_B.weight"),
    "unet.mid.attn1.processor.to_q_lora.up.weight": ("unet.mid.attn1.processor.to_q", "_lora.up.weight"),
    "text_encoder.a.q_proj.lora_linear_layer.down.weight": ("text_encoder.a.q_proj", "lora_linear_layer.down.weight"),
    "unet.a.to_q.lora.down.weight": ("unet.a.to_q", "lora.down.weight"),
    "transformer_blocks.0.attn.to_q.lora_B.default.weight": ("transformer_blocks.0.attn.to_q", "lora_B.default.weight"),
    "blocks.0.attn.qkv_x.lora_A": ("blocks.0.attn.qkv_x", "lora_A"),
    "layers.0.attn.q_proj.lora_a.weight": ("layers.0.attn.q_proj", "lora_a.weight"),
    "double_blocks.0.processor.qkv_lora1.down.weight": ("double_blocks.0.processor.qkv_lora1", "down.weight"),
    "single_blocks.0.processor.qkv_lora.up.weight": ("single_blocks.0.processor.qkv", "_lora.up.weight"),
    "double_blocks.0.img_attn.qkv.lora_B.bias": ("double_blocks.0.img_attn.qkv", "lora_B.bias"),
    "x.oft_R.scaled_oft": ("x", "oft_R.scaled_oft"),
    "a.lora_magnitude_vector.weight": ("a", "lora_magnitude_vector.weight"),
    "a.a1.weight": ("a", "a1.weight"),
    "model.layers.0.self_attn.q_proj.weight": None,
    "lora_controlnet": None,
    "alpha": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_split_where_its_role_begins(name: str) -> None:
    assert split(name) == NAMES[name]


def test_the_weight_of_ia3_is_told_from_others_by_its_partner() -> None:
    found = grouped(["x.weight", "x.on_input", "y.weight", "z.alpha"])
    assert found.modules == {"x": {"on_input": "x.on_input", "weight": "x.weight"}, "z": {"alpha": "z.alpha"}}
    assert found.rest == ("y.weight",)


PAIRS = [
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A", "lora_B"),
    ("lora_a.weight", "lora_b.weight"),
    ("down.weight", "up.weight"),
]


@pytest.mark.parametrize(("down", "up"), PAIRS)
def test_all_spellings_of_the_two_factors_are_lora(module_of: Any, down: str, up: str) -> None:
    found = found_in(module_of({down: DOWN, up: UP, "alpha": ALPHA}))
    close(merged(found, W), W.double() + role_formulas.lora(UP, DOWN, 0.5))
    assert found.used == {"weight": (down, up, "alpha")}
    assert (found.rank, found.notes, found.unsupported) == (2, (), ())


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(1.0),
        torch.tensor([1.0]),
        torch.tensor(1),
        torch.tensor(1.0, dtype=torch.float16),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.tensor(1.0, dtype=torch.float64),
        torch.tensor(1, dtype=torch.int32),
    ],
    ids=str,
)
def test_alpha_may_be_stored_in_any_dtype_and_with_a_dimension(module_of: Any, alpha: Tensor) -> None:
    found = found_in(module_of({**LORA, "alpha": alpha}))
    close(merged(found, W), W.double() + role_formulas.lora(UP, DOWN, 0.5))


def test_bfloat16_alpha_is_the_number_that_was_rounded(module_of: Any) -> None:
    update = found_in(module_of({**LORA, "alpha": torch.tensor(20.7, dtype=torch.bfloat16)})).updates["weight"]
    assert isinstance(update, LowRank)
    assert update.scale == 20.75 / 2


def test_without_alpha_the_scale_is_one_and_that_is_noted(module_of: Any) -> None:
    module = module_of({"lora_down.weight": DOWN, "lora_up.weight": UP})
    found = found_in(module)
    close(merged(found, W), W.double() + role_formulas.lora(UP, DOWN, 1.0))
    assert [note.code for note in found.notes] == ["alpha-missing"]
    told = found_in(replace(module, alpha=3.0))
    assert told.notes == ()
    close(merged(told, W), W.double() + role_formulas.lora(UP, DOWN, 1.5))


def test_a_scale_of_the_dialect_is_used_instead_of_alpha(module_of: Any) -> None:
    found = found_in(module_of(LORA, scale=3.0))
    close(merged(found, W), W.double() + role_formulas.lora(UP, DOWN, 3.0))
    assert found.notes == ()


@pytest.mark.parametrize("factors", ["matrices", "kernels of 1", "one of each"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1)])
def test_factors_of_a_convolution_of_kernel_1_fit_a_matrix_and_the_reverse(
    module_of: Any, factors: str, shape: tuple[int, ...]
) -> None:
    down = DOWN if factors == "matrices" else DOWN.reshape(2, 4, 1, 1)
    up = UP.reshape(6, 2, 1, 1) if factors == "kernels of 1" else UP
    found = found_in(module_of({"lora_down.weight": down, "lora_up.weight": up, "alpha": ALPHA}))
    assert isinstance(found.updates["weight"], LowRank)
    close(merged(found, W.reshape(shape)), (W.double() + role_formulas.lora(UP, DOWN, 0.5)).reshape(shape))


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (3, 1, 2)])
def test_a_convolution_has_kernels_in_its_first_factor(module_of: Any, kernel: tuple[int, ...]) -> None:
    ones = [1] * len(kernel)
    down, up, weight = random(2, 4, *kernel), random(6, 2, *ones), random(6, 4, *kernel, seed=1)
    found = found_in(module_of({"lora_down.weight": down, "lora_up.weight": up, "alpha": ALPHA}))
    update = found.updates["weight"]
    assert isinstance(update, LowRank)
    assert (update.kernel, update.rank, update.shape) == (kernel, 2, (6, 4, *kernel))
    close(merged(found, weight), weight.double() + role_formulas.lora(up, down, 0.5))
    assert update.fit((6, 4 * 9)) is None
    flat = found_in(module_of({"lora_down.weight": down.flatten(1), "lora_up.weight": up.flatten(1), "alpha": ALPHA}))
    close(merged(flat, weight), weight.double() + role_formulas.lora(up, down, 0.5))


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (1, 2, 3)])
def test_a_tucker_core_is_plain_lora_of_the_same_rank(module_of: Any, kernel: tuple[int, ...]) -> None:
    ones = [1] * len(kernel)
    up, down, mid = random(6, 2, *ones), random(2, 4, *ones), random(2, 2, *kernel)
    roles = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid, "alpha": ALPHA}
    found, weight = found_in(module_of(roles)), random(6, 4, *kernel, seed=1)
    update = found.updates["weight"]
    assert isinstance(update, LowRank)
    assert (update.rank, update.kernel) == (2, kernel)
    close(merged(found, weight), weight.double() + role_formulas.lora(up, down, 0.5, mid))


def test_an_embedding_is_changed_by_the_transpose(module_of: Any) -> None:
    table, down, up = random(9, 4, seed=3), random(2, 9), random(4, 2)
    wanted = table.double() + role_formulas.lora(up, down, 0.5).T
    found = found_in(module_of({"lora_A.weight": down, "lora_B.weight": up, "alpha": ALPHA}, table=True))
    close(merged(found, table), wanted)
    found = found_in(module_of({"lora_embedding_A": down, "lora_embedding_B": up, "alpha": ALPHA}))
    close(merged(found, table), wanted)
    update = found.updates["weight"]
    assert isinstance(update, LowRank)
    assert update.table


def test_a_bias_of_the_second_factor_is_scaled_like_its_product(module_of: Any) -> None:
    bias, own = random(6), random(6, seed=2)
    found = found_in(module_of({"lora_A.weight": DOWN, "lora_B.weight": UP, "lora_B.bias": bias, "alpha": ALPHA}))
    close(merged(found, own, "bias"), own.double() + 0.5 * bias.double())
    assert found.used["bias"] == ("lora_B.bias",)


SQUARE = {"lora_down.weight": random(2, 4), "lora_up.weight": random(4, 2, seed=9), "alpha": ALPHA}
KERNELS = {"lora_down.weight": random(2, 4, 3, 3), "lora_up.weight": random(6, 2, 1, 1), "alpha": ALPHA}
# factors, role of the lengths, their shape, whether they are those of input columns
DORA = {
    "output rows": (LORA, "dora_scale", (6, 1), False),
    "input columns": (LORA, "dora_scale", (1, 4), True),
    "one dimension": (LORA, "dora_scale", (6,), False),
    "PEFT": (LORA, "lora_magnitude_vector", (6,), False),
    "diffusers": (LORA, "lora_magnitude_vector.weight", (6,), False),
    "ai-toolkit": (LORA, "magnitude", (6,), False),
    "square, output rows": (SQUARE, "dora_scale", (4, 1), False),
    "square, input columns": (SQUARE, "dora_scale", (1, 4), True),
    "square, one dimension": (SQUARE, "dora_scale", (4,), False),
    "convolution, output rows": (KERNELS, "dora_scale", (6, 1, 1, 1), False),
    "convolution, input channels": (KERNELS, "dora_scale", (1, 4, 1, 1), True),
    "convolution of PEFT": (KERNELS, "lora_magnitude_vector.weight", (1, 6, 1, 1), False),
}


@pytest.mark.parametrize("case", DORA)
def test_dora_holds_rows_or_columns_at_their_lengths(module_of: Any, case: str) -> None:
    factors, role, shape, by_column = DORA[case]
    lengths = random(*shape, seed=7).abs() + 0.5
    found = found_in(module_of({**factors, role: lengths}))
    up, down = factors["lora_up.weight"], factors["lora_down.weight"]
    change = role_formulas.lora(up, down, 0.5)
    weight = random(*change.shape, seed=8)
    close(merged(found, weight), role_formulas.dora(weight, change, lengths, by_column))
    assert role in found.used["weight"]
    half = merged(found, weight, strength=0.5)
    close(half, 0.5 * weight.double() + 0.5 * merged(found, weight))


def test_what_is_stored_in_full_is_added_without_alpha(module_of: Any) -> None:
    diff, bias, own = random(6, 4), random(6), random(6, seed=2)
    found = found_in(module_of({"diff": diff, "diff_b": bias, "alpha": ALPHA}))
    close(merged(found, W), W.double() + diff.double())
    close(merged(found, own, "bias"), own.double() + bias.double())
    norm = found_in(module_of({"w_norm": random(6), "b_norm": bias}))
    close(merged(norm, own), own.double() + random(6).double())
    close(merged(norm, own, "bias"), own.double() + bias.double())


def test_factors_and_a_full_change_of_one_weight_add_up(module_of: Any) -> None:
    diff = random(6, 4, seed=4)
    found = found_in(module_of({**LORA, "diff": diff}))
    close(merged(found, W), W.double() + role_formulas.lora(UP, DOWN, 0.5) + diff.double())
    assert found.updates["weight"].adds_products


TUCKER_HALVES = {
    "hada_w1_a": random(2, 6, seed=1),
    "hada_w1_b": random(2, 4, seed=2),
    "hada_w2_a": random(2, 6, seed=3),
    "hada_w2_b": random(2, 4, seed=4),
}


def loha_factors(columns: int) -> dict[str, Tensor]:
    return {
        "hada_w1_a": random(6, 2, seed=1),
        "hada_w1_b": random(2, columns, seed=2),
        "hada_w2_a": random(6, 2, seed=3),
        "hada_w2_b": random(2, columns, seed=4),
        "alpha": ALPHA,
    }


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3), (6, 4, 3)])
def test_loha_is_the_product_of_two_products(module_of: Any, shape: tuple[int, ...]) -> None:
    roles, weight = loha_factors(math.prod(shape[1:])), random(*shape, seed=9)
    one = role_formulas.product_of(roles["hada_w1_a"], roles["hada_w1_b"])
    other = role_formulas.product_of(roles["hada_w2_a"], roles["hada_w2_b"])
    found = found_in(module_of(roles))
    close(merged(found, weight), weight.double() + (0.5 * one * other).reshape(shape))
    assert (found.rank, found.used["weight"]) == (2, tuple(roles))


@pytest.mark.parametrize("kernel", [(3, 3), (3,)])
def test_loha_with_cores_has_its_first_factors_transposed(module_of: Any, kernel: tuple[int, ...]) -> None:
    cores = {f"hada_t{side}": random(2, 2, *kernel, seed=int(side)) for side in "12"}
    roles, weight = {**TUCKER_HALVES, **cores, "alpha": ALPHA}, random(6, 4, *kernel, seed=9)
    halves = [
        role_formulas.tucker(roles[f"hada_t{side}"], roles[f"hada_w{side}_a"], roles[f"hada_w{side}_b"])
        for side in "12"
    ]
    close(merged(found_in(module_of(roles)), weight), weight.double() + 0.5 * halves[0] * halves[1])


W1, W1_A, W1_B = random(2, 2, seed=1), random(2, 1, seed=2), random(1, 2, seed=3)
W2, W2_A, W2_B = random(3, 2, seed=4), random(3, 2, seed=5), random(2, 2, seed=6)
# tensors, the two halves, the rank that divides α (0: there is none)
LOKR: dict[str, tuple[dict[str, Tensor], Tensor, Tensor, int]] = {
    "second half a product": (
        {"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B},
        W1,
        role_formulas.product_of(W2_A, W2_B),
        2,
    ),
    "both halves products": (
        {"lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2_a": W2_A[:, :1], "lokr_w2_b": W2_B[:1]},
        role_formulas.product_of(W1_A, W1_B),
        role_formulas.product_of(W2_A[:, :1], W2_B[:1]),
        1,
    ),
    "first half a product": (
        {"lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2": W2},
        role_formulas.product_of(W1_A, W1_B),
        W2,
        1,
    ),
    "both halves whole": ({"lokr_w1": W1, "lokr_w2": W2}, W1, W2, 0),
    "kernels": (
        {"lokr_w1": W1, "lokr_w2": random(3, 2, 3, 3)},
        W1,
        random(3, 2, 3, 3),
        0,
    ),
    "kernels of one dimension": ({"lokr_w1": W1, "lokr_w2": random(3, 2, 3)}, W1, random(3, 2, 3), 0),
    "flat kernels": (
        {"lokr_w1": W1, "lokr_w2_a": random(3, 1), "lokr_w2_b": random(1, 18)},
        W1,
        role_formulas.product_of(random(3, 1), random(1, 18)).reshape(3, 2, 3, 3),
        1,
    ),
    "a core": (
        {"lokr_w1": W1, "lokr_t2": random(2, 2, 3, 3), "lokr_w2_a": random(2, 3), "lokr_w2_b": random(2, 2, seed=8)},
        W1,
        role_formulas.tucker(random(2, 2, 3, 3), random(2, 3), random(2, 2, seed=8)),
        2,
    ),
}


@pytest.mark.parametrize("case", LOKR)
def test_lokr_is_a_kronecker_product(module_of: Any, case: str) -> None:
    roles, left, right, rank = LOKR[case]
    alpha = torch.tensor(3.0)
    found = found_in(module_of({**roles, "alpha": alpha}))
    change = role_formulas.kronecker(left, right, 3.0 / rank if rank else 1.0)
    weight = random(*change.shape, seed=9)
    close(merged(found, weight), weight.double() + change)
    assert found.rank == rank
    assert (found.notes == ()) == (alpha > 1 or rank > 0)


@pytest.mark.parametrize(
    ("alpha", "dim", "told"),
    [(1.0, None, True), (1.0, 32, True), (32.0, 32, False), (16.0, None, False), (0.5, None, True), (1.0, 1, False)],
)
def test_an_alpha_that_whole_lokr_does_not_use_is_told_where_it_may_have_meant_something(
    module_of: Any, alpha: float, dim: int | None, told: bool
) -> None:
    """LyCORIS stores the configured rank there; another number was perhaps divided by it in training."""
    found = found_in(module_of({"lokr_w1": W1, "lokr_w2": W2, "alpha": torch.tensor(alpha)}, dim=dim))
    assert [note.code for note in found.notes] == (["lokr-alpha-ignored"] if told else [])
    close(merged(found, W), W.double() + role_formulas.kronecker(W1, W2, 1.0))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
@pytest.mark.parametrize("of_inputs", [0, 1])
def test_ia3_adds_its_share_of_each_row_or_column(module_of: Any, shape: tuple[int, ...], of_inputs: int) -> None:
    count, weight = shape[of_inputs], random(*shape, seed=9)
    factors = random(count)
    stored = factors if len(shape) == 2 else factors.reshape(1, count, 1, 1)
    found = found_in(module_of({"weight": stored, "on_input": torch.tensor(of_inputs)}))
    wanted = weight.double()
    for at in range(count):
        if of_inputs:
            wanted[:, at] *= 1 + factors[at].double()
        else:
            wanted[at] *= 1 + factors[at].double()
    close(merged(found, weight), wanted)
    assert found.used == {"weight": ("weight", "on_input")}


GLORA = (random(4, 2), random(2, 4), random(6, 2, seed=1), random(2, 4, seed=2))
ORDER = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


@pytest.mark.parametrize("older", [False, True])
def test_glora_changes_the_weight_and_what_it_is_given(module_of: Any, older: bool) -> None:
    """An older LyCORIS multiplies the factors in the other order, which their shapes show."""
    a1, a2, b1, b2 = GLORA
    stored = (a2, a1, b2, b1) if older else GLORA
    found = found_in(module_of({**dict(zip(ORDER, stored, strict=True)), "alpha": ALPHA}))
    close(merged(found, W), role_formulas.glora(W, GLORA, 0.5))
    assert [note.code for note in found.notes] == (["glora-older-order"] if older else [])


def test_glora_of_a_convolution_changes_input_channels(module_of: Any) -> None:
    a1, a2, b1 = random(4, 2, 1, 1), random(2, 4, 1, 1), random(6, 2, 1, 1)
    factors, weight = (a1, a2, b1, random(2, 4, 3, 3)), random(6, 4, 3, 3, seed=9)
    found = found_in(module_of({**dict(zip(ORDER, factors, strict=True)), "alpha": ALPHA}))
    close(merged(found, weight), role_formulas.glora(weight, factors, 0.5))


def test_glora_of_a_square_weight_is_read_in_the_order_of_the_smaller_rank(module_of: Any) -> None:
    factors, weight = (random(4, 2), random(2, 4), random(4, 2, seed=1), random(2, 4, seed=2)), random(4, 4)
    found = found_in(module_of({**dict(zip(ORDER, factors, strict=True)), "alpha": ALPHA}))
    close(merged(found, weight), role_formulas.glora(weight, factors, 0.5))
    a1, a2, b1, b2 = factors
    found = found_in(module_of({**dict(zip(ORDER, (a2, a1, b2, b1), strict=True)), "alpha": ALPHA}))
    close(merged(found, weight), role_formulas.glora(weight, factors, 0.5))


@pytest.mark.parametrize("shape", [(12, 5), (12, 2, 3, 3)])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.05, 9.0])
def test_oft_rotates_blocks_of_outputs(
    module_of: Any, shape: tuple[int, ...], rescaled: bool, alpha: float | None
) -> None:
    """α times the number of outputs limits the rotation, and 0 does not."""
    blocks, weight = random(3, 4, 4), random(*shape, seed=9)
    rescale = random(12, *[1] * (len(shape) - 1), seed=7) if rescaled else None
    roles = {"oft_blocks": blocks}
    roles |= {"rescale": rescale} if rescale is not None else {}
    roles |= {"alpha": torch.tensor(alpha)} if alpha is not None else {}
    found = found_in(module_of(roles))
    wanted = role_formulas.oft(weight, blocks, alpha * 12 if alpha else None, rescale)
    close(merged(found, weight), wanted)
    close(merged(found, weight, strength=0.5), 0.5 * weight.double() + 0.5 * wanted)
    assert found.notes == ()


def test_oft_of_kohya_is_limited_by_any_alpha(module_of: Any) -> None:
    blocks, weight = random(3, 2, 2), random(6, 4, seed=9)
    roles = {"oft_blocks": blocks, "alpha": torch.tensor(1e-3)}
    close(merged(found_in(module_of(roles, constrained=True)), weight), role_formulas.oft(weight, blocks, 6e-3))
    roles["alpha"] = torch.tensor(0.0)
    close(merged(found_in(module_of(roles, constrained=True)), weight), weight.double())
    with pytest.raises(RoleProblem, match=r"x: alpha is missing, which limits the rotation"):
        found_in(module_of({"oft_blocks": blocks}, constrained=True))


@pytest.mark.parametrize("alpha", [None, 0.05])
@pytest.mark.parametrize(("shape", "stages", "size"), [((8, 3), 3, 2), ((24, 2, 1, 1), 2, 4), ((24, 3), 3, 4)])
def test_boft_mixes_rows_ever_further_apart(
    module_of: Any, shape: tuple[int, ...], stages: int, size: int, alpha: float | None
) -> None:
    blocks = random(stages, shape[0] // size, size, size)
    weight, rescale = random(*shape, seed=9), random(shape[0], *[1] * (len(shape) - 1))
    roles = {"oft_blocks": blocks, "rescale": rescale}
    if stages == 3 and size == 4:  # 24 rows make groups of 8, and none of 16
        with pytest.raises(RoleProblem, match=r"\[3, 6, 4, 4\], which makes no butterfly"):
            found_in(module_of(roles))
        return
    roles |= {"alpha": torch.tensor(alpha)} if alpha is not None else {}
    found = found_in(module_of(roles))
    close(merged(found, weight), role_formulas.boft(weight, blocks, alpha and alpha * shape[0], rescale))


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 2, 2)])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_oft_of_inputs_rotates_what_a_layer_is_given(
    module_of: Any, shape: tuple[int, ...], count: int, scaled: bool
) -> None:
    upper, weight = random(count, 6) / 9, random(*shape, seed=9)
    roles = {"oft_R.weight": upper} | ({"oft_R.scaled_oft": torch.tensor(True)} if scaled else {})
    found = found_in(module_of(roles))
    close(merged(found, weight), role_formulas.oft_of_inputs(weight, upper, scaled))
    assert [note.code for note in found.notes] == ["oft-series"]


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("by_column", [False, True])
def test_other_products_are_held_at_lengths_too(module_of: Any, method: str, by_column: bool) -> None:
    lengths = random(1, 4).abs() + 1 if by_column else random(6, 1).abs() + 1
    roles, left, right, _ = LOKR["second half a product"]
    change = role_formulas.kronecker(left, right, 0.5)
    if method == "loha":
        roles = loha_factors(4)
        halves = [role_formulas.product_of(roles[f"hada_w{n}_a"], roles[f"hada_w{n}_b"]) for n in "12"]
        change = 0.5 * halves[0] * halves[1]
    found = found_in(module_of({**roles, "alpha": ALPHA, "dora_scale": lengths}))
    close(merged(found, W), role_formulas.dora(W, change, lengths, by_column))


def test_lengths_of_input_channels_go_with_flat_factors_of_a_convolution(module_of: Any) -> None:
    roles, left, right, _ = LOKR["flat kernels"]
    lengths, change = random(1, 4, 1, 1).abs() + 1, role_formulas.kronecker(left, right, 1.0)
    weight = random(6, 4, 3, 3, seed=9)
    found = found_in(module_of({**roles, "alpha": ALPHA, "dora_scale": lengths}))
    close(merged(found, weight), role_formulas.dora(weight, change, lengths, by_column=True))


@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 2, 1)])
def test_single_elements_are_added_to_what_factors_make(module_of: Any, shape: tuple[int, ...]) -> None:
    """Their places are stored in 16 bits with a sign, which places from 32768 on lose."""
    index, values = torch.tensor([[0, 5, 2], [3, 1, 3]], dtype=torch.int16), random(3)
    sparse = {"bias_indices": index, "bias_values": values, "bias_size": torch.tensor([6, 4], dtype=torch.int16)}
    weight = random(*shape, seed=9)
    wanted = weight.double().flatten(1) + role_formulas.lora(UP, DOWN, 0.5)
    for row, column, value in zip(*index.tolist(), values.tolist(), strict=True):
        wanted[row, column] += value
    found = found_in(module_of({**LORA, **sparse}))
    close(merged(found, weight), wanted.reshape(shape))
    assert set(found.used["weight"]) == {*LORA, *sparse}


def test_places_beyond_15_bits_are_those_that_were_meant(module_of: Any) -> None:
    index, weight = torch.tensor([[1], [40000]]).to(torch.int16), torch.zeros(2, 40001)
    roles = {"lora_down.weight": torch.zeros(2, 40001), "lora_up.weight": torch.zeros(2, 2), "alpha": ALPHA}
    found = found_in(module_of({**roles, "bias_indices": index, "bias_values": torch.ones(1)}))
    after = merged(found, weight)
    assert after.nonzero().tolist() == [[1, 40000]]


def test_a_saved_value_takes_the_place_of_the_weight(module_of: Any) -> None:
    found = found_in(module_of({"set_weight": random(6, seed=3)}))
    close(merged(found, random(6)), random(6, seed=3))


FOREIGN = {
    "T-LoRA": {"lambda_layer": random(1, 2), "p_layer.weight": random(6, 2), "q_layer.weight": random(2, 4)},
    "AdaLoRA": {"lora_A": DOWN, "lora_B": UP, "lora_E": random(2, 1)},
    "VeRA": {"vera_lambda_b": random(6), "vera_lambda_d": random(2)},
}


@pytest.mark.parametrize("method", FOREIGN)
def test_methods_that_are_not_merged_are_named(module_of: Any, method: str) -> None:
    found = found_in(module_of({**FOREIGN[method], "alpha": ALPHA}))
    assert found.updates == {}
    assert found.unsupported[0].startswith(f"{method} (x); ")


def test_the_page_names_a_test_of_every_method() -> None:
    """docs/supported.md is made of the table that loratool reads with, and its last column of names of this file."""
    assert [family.test for family in FAMILIES if family.test not in globals()] == []


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "no up": ({"lora_down.weight": DOWN, "alpha": ALPHA}, r"x: lora_up.weight is missing .*x\.lora_down\.weight"),
    "no down": ({"lora_up.weight": UP}, r"x: lora_down.weight is missing"),
    "alpha alone": ({"alpha": ALPHA}, r"x: x\.alpha: nothing in the module"),
    "ranks differ": ({**LORA, "lora_up.weight": random(6, 3)}, r"x\.lora_up\.weight is \[6, 3\].*ranks differ"),
    "alpha is NaN": ({**LORA, "alpha": torch.tensor(float("nan"))}, r"x\.alpha is nan; expected a finite number"),
    "alpha is infinite": ({**LORA, "alpha": torch.tensor(float("inf"))}, r"x\.alpha is inf"),
    "alpha is negative": ({**LORA, "alpha": torch.tensor(-1.0)}, r"x\.alpha is -1; .*not negative"),
    "two alphas": ({**LORA, "alpha": torch.tensor([1.0, 1.0])}, r"x\.alpha is \[2\]; expected one number"),
    "whole numbers": ({**LORA, "lora_up.weight": UP.to(torch.int8)}, r"x\.lora_up\.weight is stored as I8"),
    "rank 0": ({**LORA, "lora_down.weight": random(0, 4), "lora_up.weight": random(6, 0)}, r"\[0, 4\].*no elements"),
    "three dimensions up": ({**LORA, "lora_up.weight": random(6, 2, 3, 3)}, r"expected .* a kernel of 1"),
    "two spellings": ({**LORA, "lora_A.weight": DOWN}, r"are two spellings of the same tensor"),
    "lengths of nothing": ({**LORA, "dora_scale": random(5, 1)}, r"x\.dora_scale is \[5, 1\]; expected 6 values"),
    "two lengths": ({**LORA, "dora_scale": random(6, 1), "magnitude": random(6)}, r"two spellings"),
    "lengths alone": ({"dora_scale": random(6, 1)}, r"x: x\.dora_scale: nothing in the module"),
    "bias of another size": ({**LORA, "lora_up.bias": random(5)}, r"x\.lora_up\.bias has 5 values; expected 6"),
    "core of another rank": (
        {**KERNELS, "lora_down.weight": random(2, 4, 1, 1), "lora_mid.weight": random(3, 2, 3, 3)},
        r"x\.lora_mid\.weight is \[3, 2, 3, 3\].*do not go together",
    ),
    "two methods": ({**LORA, **loha_factors(4)}, r"x: has tensors of LoRA \(x\.lora_\w+\.weight\) and LoHa \(x\.hada"),
    "a half of LoHa": (
        {k: v for k, v in loha_factors(4).items() if k != "hada_w2_b"},
        r"hada_w2_b is missing \(found only x\.hada_w1_a",
    ),
    "LoHa of two shapes": ({**loha_factors(4), "hada_w2_b": random(2, 5)}, r"different shapes: \[6, 4\] and \[6, 5\]"),
    "LoHa of two ranks": ({**loha_factors(4), "hada_w1_b": random(3, 4)}, r"hada_w1_b have different ranks"),
    "a core of LoHa": (
        {**TUCKER_HALVES, "hada_t1": random(3, 2, 3, 3), "hada_t2": random(2, 2, 3, 3)},
        r"hada_t1 is \[3, 2, 3, 3\]; the rank is 2",
    ),
    "a half of LoKr": ({"lokr_w1": W1, "lokr_w2_a": W2_A}, r"lokr_w2_b is missing"),
    "whole and product": ({"lokr_w1": W1, "lokr_w1_a": W1_A, "lokr_w2": W2}, r"lokr_w1 is stored both whole and"),
    "LoKr of two ranks": (
        {"lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B},
        r"lokr_w1_b and lokr_w2_b have different ranks: 1 and 2",
    ),
    "IA3 without its factors": ({"on_input": torch.tensor(1)}, r"weight is missing"),
    "IA3 on neither": ({"weight": random(6), "on_input": torch.tensor(2)}, r"x\.on_input is 2; expected 0 or 1"),
    "IA3 of a matrix": ({"weight": random(2, 3, 1), "on_input": torch.tensor(1)}, r"x\.weight is \[2, 3, 1\]"),
    "GLoRA that does not multiply": (
        dict(zip(ORDER, (DOWN, DOWN, UP, UP), strict=True)),
        r"do not multiply: a1.weight",
    ),
    "GLoRA that is all square": (dict.fromkeys(ORDER, random(3, 3)), r"factors are all square"),
    "OFT of blocks that are not square": ({"oft_blocks": random(3, 4, 5)}, r"\[3, 4, 5\]; expected square blocks"),
    "BOFT of odd blocks": ({"oft_blocks": random(1, 2, 3, 3)}, r"makes no butterfly"),
    "OFT of no triangle": ({"oft_R.weight": random(3, 5)}, r"x\.oft_R\.weight is \[3, 5\]; no square matrix"),
    "rescale of another size": ({"oft_blocks": random(3, 4, 4), "rescale": random(5, 1)}, r"x\.rescale is \[5, 1\]"),
    "places without values": ({**LORA, "bias_indices": torch.zeros(2, 1).short()}, r"bias_values is missing"),
    "places as floats": (
        {**LORA, "bias_indices": random(2, 3), "bias_values": random(3)},
        r"x\.bias_indices is stored as F32",
    ),
    "more values than places": (
        {**LORA, "bias_indices": torch.zeros(2, 1).short(), "bias_values": random(3)},
        r"x\.bias_indices is \[2, 1\] for 3 values",
    ),
    "another shape to fill up": (
        {**LORA, "reshape_weight": torch.tensor([6, 5])},
        r"x\.reshape_weight says \[6, 5\]; its update is \[6, 4\]",
    ),
    "a shape alone": ({"reshape_weight": torch.tensor([6, 4])}, r"x\.reshape_weight: nothing in the module"),
    "a value that others change": ({**LORA, "set_weight": W}, r"x\.set_weight replaces what others change"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_module_is_refused_by_the_name_of_its_tensor(module_of: Any, case: str) -> None:
    roles, message = BROKEN[case]
    with pytest.raises(RoleProblem, match=message) as refused:
        found_in(module_of(roles))
    assert all(problem.code for problem in refused.value.problems)
