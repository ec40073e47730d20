"""`loratool.nn`: a model with LoRA layers are the formula, learn, and are PEFT's on disk."""

from __future__ import annotations

import ast
import inspect
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from checkpoints import save_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import loratool
from loratool import FitError, InputError, UsageError, nn as lora
from loratool.nn import LoRALinear, apply_lora, load_adapter, print_trainable_parameters, save_adapter

WIDTH, OUT = 12, 7


class Block(nn.Module):
    """Two linear layers by the names that language models have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def inputs(count: int = 5) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


def randomise(layers: dict[str, LoRALinear]) -> None:
    """Give B values, as training does."""
    generator = torch.Generator().manual_seed(2)
    for layer in layers.values():
        layer.lora_B.data.normal_(generator=generator).mul_(0.3)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def trained() -> Net:
    """A net with LoRA whose B is not zero; its layers have rank 3 and scale 2."""
    net = Net()
    randomise(apply_lora(net, ["q_proj", "v_proj"], rank=3, alpha=6))
    return net


def plain_net(folder: Path) -> None:
    """`Net` as a checkpoint of loratool's, without LoRA."""
    save_model(folder, Net().state_dict(), {"architectures": ["Net"]})


# The formula


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_the_output_is_the_formula_in_float64(rslora: bool, scale: float) -> None:
    base = nn.Linear(WIDTH, OUT)
    layer = LoRALinear.from_linear(base, rank=4, alpha=16, rslora=rslora)
    randomise({"": layer})
    x = inputs()
    w, a, b = (t.detach().double() for t in (base.weight, layer.lora_A, layer.lora_B))
    wanted = x.double() @ (w + scale * b @ a).T + base.bias.detach().double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_before_training_the_output_is_the_base_s_to_the_bit(dtype: torch.dtype) -> None:
    base = nn.Linear(WIDTH, OUT).to(dtype)
    x = inputs().to(dtype)
    layer = LoRALinear.from_linear(base, rank=4, dropout=0.5)
    assert layer.lora_A.abs().min() > 0
    assert torch.equal(layer(x), base(x))
    assert layer(x).dtype == dtype


def test_a_is_kaiming_s_as_peft_draws_it_or_gaussian_with_the_given_deviation() -> None:
    base = nn.Linear(1000, 10)
    bound = math.sqrt(6 / (1 + 5) / 1000)  # nn.init.kaiming_uniform_(a=√5): gain √(2/6), times √(3/in)
    kaiming = LoRALinear.from_linear(base, rank=64).lora_A
    assert 0.99 * bound < kaiming.abs().max() <= bound
    gaussian = LoRALinear.from_linear(base, rank=64, sigma=0.05).lora_A
    assert gaussian.std().item() == pytest.approx(0.05, rel=0.02)
    assert gaussian.abs().max() > 3 * 0.05


def test_factors_of_a_half_precision_base_are_float32_as_peft_makes_them() -> None:
    layer = LoRALinear.from_linear(nn.Linear(WIDTH, OUT).bfloat16())
    assert (layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


def test_dropout_acts_on_the_update_alone_and_only_in_training() -> None:
    base = nn.Linear(WIDTH, OUT)
    layer = LoRALinear.from_linear(base, dropout=0.9)
    randomise({"": layer})
    x = inputs(200)
    quiet = layer.eval()(x)
    torch.manual_seed(3)
    noisy = layer.train()(x)
    torch.manual_seed(3)
    update = functional.linear(functional.dropout(x, 0.9), layer.lora_B @ layer.lora_A)
    torch.testing.assert_close(noisy, base(x) + layer.scale * update)
    assert not torch.allclose(noisy, quiet)


def test_the_module_is_short_enough_to_be_read_in_one_sitting() -> None:
    """Under 150 lines of code: docstrings and empty lines apart."""
    source = inspect.getsource(lora)
    told: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            told |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    assert sum(bool(line.strip()) and n not in told for n, line in enumerate(source.splitlines(), 1)) < 150


# The lesson's own words


def test_the_lesson_s_layer_is_d_by_k_starts_at_w0_and_trains_a_and_b() -> None:
    """`LoRALinear(d, k, r, alpha)`: W₀ (d, k) frozen, A (r, k) random, B (d, r) zero, s = α/r."""
    layer = LoRALinear(OUT, WIDTH, r=3, alpha=6)
    shapes = {name: (tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": ((OUT, WIDTH), False),
        "lora_A": ((3, WIDTH), True),
        "lora_B": ((OUT, 3), True),
    }
    assert layer.lora_A.abs().min() > 0
    x = inputs()
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    randomise({"": layer})
    change = 6 / 3 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    torch.testing.assert_close(layer.delta().double(), change)
    torch.testing.assert_close(layer(x).double(), x.double() @ (layer.weight.double() + change).T, rtol=1e-5, atol=1e-5)
    default = LoRALinear(4096, 16)
    assert (default.rank, default.alpha, default.scale) == (8, 16, 2)


def test_its_w0_has_the_deviation_of_a_new_linear_layer() -> None:
    torch.manual_seed(0)
    assert LoRALinear(64, 1000).weight.std().item() == pytest.approx(nn.Linear(1000, 64).weight.std().item(), rel=0.05)


def test_names_and_places_of_0_1_0_mean_what_they_meant() -> None:
    weight, bias = torch.randn(OUT, WIDTH), torch.randn(OUT)
    for layer in (
        LoRALinear(weight, bias, 4, 12.0),
        LoRALinear(weight=weight, bias=bias, rank=4, alpha=12),
        LoRALinear(weight, bias=bias, r=4, alpha=12),
    ):
        assert (layer.rank, layer.scale) == (4, 3)
        torch.testing.assert_close(layer(inputs()), functional.linear(inputs(), weight, bias))
    assert LoRALinear(weight).bias is None


@pytest.mark.parametrize("sizes", [(4,), (4, None), (0, 4), (4, -1), (4.0, 4), ("4", 4)])
def test_sizes_that_make_no_weight_are_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError, match=r"^d .* and k .* must be whole numbers of at least 1"):
        LoRALinear(*sizes)


def test_the_printed_line_is_peft_s_and_the_lesson_s(capsys: pytest.CaptureFixture[str]) -> None:
    """On the real class of Llama-2-7B, without its values, r = 8 on q_proj and v_proj."""

    def model() -> Any:
        config = transformers.LlamaConfig(num_hidden_layers=32, vocab_size=32000, tie_word_embeddings=False)
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(config)

    theirs = get_peft_model(model(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    theirs.print_trainable_parameters()
    wanted = capsys.readouterr().out
    mine = model()
    apply_lora(mine, ["q_proj", "v_proj"], r=8)
    print_trainable_parameters(mine)
    assert capsys.readouterr().out == wanted
    assert wanted == "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622\n"
    LoRALinear(6, 4, r=2).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 20 || all params: 44 || trainable%: 45.4545\n"


# Training


def test_it_learns_another_task_while_the_base_stays_as_it_is() -> None:
    """The task is the base with a change of rank 2: what rank 2 can learn, and rank 1 cannot."""
    torch.manual_seed(0)
    base = nn.Linear(16, 8)
    change = torch.randn(8, 2) @ torch.randn(2, 16) / 4
    x = torch.randn(256, 16)
    y = functional.linear(x, base.weight.detach() + change, base.bias.detach())
    losses = {}
    for rank in (1, 2):
        net = nn.Sequential(nn.Linear(16, 8))
        net[0].load_state_dict(base.state_dict())
        before = bits(base.weight)
        layer = apply_lora(net, "0", rank=rank)["0"]
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        assert names == ["0.lora_A", "0.lora_B"]
        optimiser = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=0.02)
        first = functional.mse_loss(net(x), y).item()
        for _ in range(400):
            optimiser.zero_grad()
            loss = functional.mse_loss(net(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        losses[rank] = loss.item() / first
        assert bits(layer.weight) == before
    assert losses[2] < 1e-4
    assert losses[1] > 1e-2


# Merging


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_merged_gives_what_unmerged_gives_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    layer = LoRALinear.from_linear(nn.Linear(WIDTH, OUT).to(dtype), rank=3)
    randomise({"": layer})
    x = inputs().to(dtype)
    before = layer(x)
    layer.merge()
    assert not torch.equal(layer.weight, layer.unmerged)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)


def test_a_merged_weight_is_rounded_once() -> None:
    layer = LoRALinear.from_linear(nn.Linear(64, 64).bfloat16(), rank=8)
    randomise({"": layer})
    exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    # float32 is exact enough that fewer than one value in a thousand falls on the other side of a rounding boundary
    assert (layer.weight != exact.float().bfloat16()).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unmerging_any_number_of_times_gives_the_same_bits(dtype: torch.dtype) -> None:
    layer = LoRALinear.from_linear(nn.Linear(WIDTH, OUT).to(dtype))
    randomise({"": layer})
    before = bits(layer.weight)
    for _ in range(3):
        layer.merge()
        once = bits(layer.weight)
        layer.merge()
        assert bits(layer.weight) == once != before
        layer.lora_B.data.mul_(2)  # whatever happens to the factors meanwhile
        layer.unmerge()
        layer.unmerge()
        assert bits(layer.weight) == before


def test_merging_leaves_a_weight_that_another_layer_shares() -> None:
    embedding, head = nn.Embedding(OUT, WIDTH), nn.Linear(WIDTH, OUT, bias=False)
    head.weight = embedding.weight
    layer = LoRALinear.from_linear(head)
    randomise({"": layer})
    before = bits(embedding.weight)
    layer.merge()
    assert bits(embedding.weight) == before


# PEFT's layout


def test_peft_loads_what_is_saved_and_gives_the_same_outputs(trained: Net, tmp_path: Path) -> None:
    save_adapter(trained, tmp_path / "adapter", base="some/net")
    theirs = PeftModel.from_pretrained(Net(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(inputs()), trained(inputs()))
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 6, "some/net")
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        f"base_model.model.blocks.{n}.{name}_proj.lora_{ab}.weight" for n in (0, 1) for name in "qv" for ab in "AB"
    }


def test_ranks_and_alphas_that_differ_reach_peft(tmp_path: Path) -> None:
    net = Net(12)
    randomise(apply_lora(net, "q_proj", rank=2, alpha=8, rslora=True))
    randomise(apply_lora(net, "blocks.1.v_proj", rank=5, alpha=3, rslora=True))
    save_adapter(net, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(Net(12), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(inputs()), net(inputs()))


def test_a_name_that_is_the_end_of_another_layer_s_path_reaches_peft(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, OUT)))

    mine = net()
    layers = {"0": LoRALinear.from_linear(mine[0])}  # type: ignore[arg-type]
    mine[0] = layers["0"]
    randomise(layers)
    save_adapter(mine, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(net(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(inputs()), mine(inputs()))
    torch.testing.assert_close(loaded(net(), tmp_path / "adapter")(inputs()), mine(inputs()))


def loaded(net: nn.Module, folder: Path) -> nn.Module:
    load_adapter(net, folder)
    return net.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "head"]},
        {"r": 4, "lora_alpha": 3, "target_modules": ["v_proj"], "use_rslora": True, "lora_dropout": 0.1},
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 1}},
    ],
)
def test_what_peft_saves_is_loaded_and_gives_the_same_outputs(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = get_peft_model(Net(), LoraConfig(**settings))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    theirs.eval().save_pretrained(str(tmp_path))
    mine = loaded(Net(), tmp_path)
    torch.testing.assert_close(mine(inputs()), theirs(inputs()))
    trainable = sum(p.numel() for p in mine.parameters() if p.requires_grad)
    assert trainable == theirs.get_nb_trainable_parameters()[0]

    save_adapter(mine, tmp_path / "again")
    again = PeftModel.from_pretrained(Net(), str(tmp_path / "again")).eval()
    torch.testing.assert_close(again(inputs()), theirs(inputs()))


def test_merging_the_saved_adapter_into_the_files_gives_the_merged_layers(trained: Net, tmp_path: Path) -> None:
    plain_net(tmp_path / "base")
    save_adapter(trained, tmp_path / "adapter")
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", device="cpu")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for layer in trained.modules():
        if isinstance(layer, LoRALinear):
            layer.merge()
    wanted = {name: t for name, t in trained.state_dict().items() if "lora_" not in name}
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_saving_while_merged_saves_the_same_adapter(trained: Net, tmp_path: Path) -> None:
    save_adapter(trained, tmp_path / "one")
    for layer in trained.modules():
        if isinstance(layer, LoRALinear):
            layer.merge()
    save_adapter(trained, tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# What cannot be meant


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": -2}, "rank -2"),
        ({"alpha": 0}, "alpha 0"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_settings_that_make_no_layer_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        LoRALinear.from_linear(nn.Linear(WIDTH, OUT), **settings)


@pytest.mark.parametrize("weight", [torch.zeros(OUT, WIDTH, dtype=torch.int8), torch.zeros(OUT)])
def test_a_weight_that_is_no_matrix_of_floats_is_refused(weight: Tensor) -> None:
    with pytest.raises(UsageError, match=r"weight \(7,.*\) of torch\.\w+: .*a float matrix"):
        LoRALinear(weight)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("q_prj", "q_prj: the closest are q_proj"),
        (["q_proj", "norm"], "norm: the closest are head, q_proj, v_proj"),  # is there, and no linear layer
        (["proj"], "proj: the closest are"),
        ("", "the closest are"),
        ([], "every target must be"),
    ],
)
def test_targets_that_match_nothing_are_told_with_the_nearest_and_nothing_is_changed(
    targets: str | list[str], told: str
) -> None:
    net = Net()
    with pytest.raises(UsageError) as caught:
        apply_lora(net, targets)
    assert told in str(caught.value)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(isinstance(m, LoRALinear) for m in net.modules())


def test_layers_that_read_a_weight_past_the_module_are_no_targets() -> None:
    """The output projection of `nn.MultiheadAttention` is of another class: its forward is never called."""
    with pytest.raises(UsageError, match="out_proj: the closest are"):
        apply_lora(nn.MultiheadAttention(WIDTH, 2), "out_proj")


def test_all_layers_that_do_not_fit_are_told_at_once(trained: Net, tmp_path: Path) -> None:
    save_adapter(trained, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    a = "base_model.model.blocks.0.q_proj.lora_A.weight"
    tensors[a] = torch.zeros(3, WIDTH + 1)
    for ab in "AB":
        tensors[f"base_model.model.blocks.9.q_proj.lora_{ab}.weight"] = torch.zeros(
            *((3, WIDTH) if ab == "A" else (WIDTH, 3))
        )
    save_file(tensors, file)
    net = Net()
    with pytest.raises(FitError) as caught:
        load_adapter(net, tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        f"  blocks.0.q_proj: update is ({WIDTH}, {WIDTH + 1}), nn.Linear is ({WIDTH}, {WIDTH})",
        f"  blocks.9.q_proj: update is ({WIDTH}, {WIDTH}), nn.Linear is missing",
    ]
    assert not any(isinstance(m, LoRALinear) for m in net.modules())


def test_factors_that_do_not_fit_each_other_are_refused(trained: Net, tmp_path: Path) -> None:
    save_adapter(trained, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.blocks.0.q_proj.lora_A.weight"] = torch.zeros(5, WIDTH)
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"blocks\.0\.q_proj"):
        load_adapter(Net(), tmp_path)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["head"]}])
def test_an_adapter_that_is_more_than_lora_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q_proj"], **more))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="more than LoRA on linear layers"):
        load_adapter(Net(), tmp_path)


def test_saving_needs_layers_with_lora_and_a_folder_without_an_adapter(trained: Net, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a model with LoRA layers"):
        save_adapter(Net(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    save_adapter(trained, tmp_path / "one")
    before = (tmp_path / "one" / "adapter_config.json").read_text()
    with pytest.raises(UsageError, match="a folder without an adapter"):
        save_adapter(trained, tmp_path / "one")
    assert (tmp_path / "one" / "adapter_config.json").read_text() == before
    assert json.loads(before)["peft_type"] == peft.PeftType.LORA.value


def test_the_layer_counts_in_an_encoder_of_torch_once_its_fast_path_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `apply_lora` says of `nn.TransformerEncoderLayer`."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True).eval()
    x = torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        before = encoder(x)
        randomise(apply_lora(encoder, ["linear1", "linear2"]))
        monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        assert (encoder(x) - before).abs().max() > 0.01
