"""What the tensors of a module come to, whatever the file calls them: each method against its formula."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import role_formulas
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool.adapters.adapter import StoredTensor, load_update
from loratool.adapters.formats.roles import Found, Module, RoleProblem, found_in, grouped, split
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


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


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


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "no up": ({"lora_down.weight": DOWN, "alpha": ALPHA}, r"x: lora_up.weight is missing .*x\.lora_down\.weight"),
    "no down": ({"lora_up.weight": UP}, r"x: lora_down.weight is missing"),
    "alpha alone": ({"alpha": ALPHA}, r"x\.alpha makes no update"),
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
    "lengths alone": ({"dora_scale": random(6, 1)}, r"x\.dora_scale has no factors"),
    "bias of another size": ({**LORA, "lora_up.bias": random(5)}, r"x\.lora_up\.bias has 5 values; expected 6"),
    "core of another rank": (
        {**KERNELS, "lora_down.weight": random(2, 4, 1, 1), "lora_mid.weight": random(3, 2, 3, 3)},
        r"x\.lora_mid\.weight, \[3, 2, 3, 3\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_module_is_refused_by_the_name_of_its_tensor(module_of: Any, case: str) -> None:
    roles, message = BROKEN[case]
    with pytest.raises(RoleProblem, match=message) as refused:
        found_in(module_of(roles))
    assert all(problem.code for problem in refused.value.problems)
