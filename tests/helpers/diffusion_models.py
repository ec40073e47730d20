"""Names and shapes of image models as their authors write them, narrow and with few blocks: written down from formats.md
and the authors' code, and not by way of `loratool.layouts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
WIDTH = 4


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def conv(name: str, rows: int = WIDTH, columns: int = WIDTH, size: int = 3) -> Shapes:
    return {f"{name}.weight": (rows, columns, size, size), f"{name}.bias": (rows,)}


def norm(name: str, width: int = WIDTH) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention(at: str, depth: int, matrix_ends: bool, h: int = WIDTH) -> Shapes:
    """A spatial transformer; its first and last layers are matrices since SD2, and convolutions before."""
    ends = [linear, linear] if matrix_ends else [lambda n, r, c: conv(n, r, c, 1)] * 2
    found = {**norm(f"{at}.norm"), **ends[0](f"{at}.proj_in", h, h), **ends[1](f"{at}.proj_out", h, h)}
    for block in range(depth):
        inner = f"{at}.transformer_blocks.{block}"
        for which in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v"):
                found |= linear(f"{inner}.{which}.{name}", h, h, bias=False)
            found |= linear(f"{inner}.{which}.to_out.0", h, h)
        found |= linear(f"{inner}.ff.net.0.proj", 8 * h, h) | linear(f"{inner}.ff.net.2", h, 4 * h)
        for number in (1, 2, 3):
            found |= norm(f"{inner}.norm{number}")
    return found


def resnet(at: str, shortcut: bool, h: int = WIDTH) -> Shapes:
    found = norm(f"{at}.in_layers.0") | conv(f"{at}.in_layers.2") | linear(f"{at}.emb_layers.1", h, h)
    found |= norm(f"{at}.out_layers.0") | conv(f"{at}.out_layers.3")
    return found | (conv(f"{at}.skip_connection", size=1) if shortcut else {})


def ldm_unet(depths: tuple[int, ...], matrix_ends: bool, added: bool) -> Shapes:
    """The U-Net of LDM and SGM: `depths` are those of the attention of each level, 0 for none."""
    h, found = WIDTH, conv("input_blocks.0.0")
    found |= linear("time_embed.0", h, h) | linear("time_embed.2", h, h)
    if added:
        found |= linear("label_emb.0.0", h, h) | linear("label_emb.0.2", h, h)
    at = 1
    for level, depth in enumerate(depths):
        for _ in range(2):
            found |= resnet(f"input_blocks.{at}.0", shortcut=True)
            found |= attention(f"input_blocks.{at}.1", depth, matrix_ends) if depth else {}
            at += 1
        if level < len(depths) - 1:
            found |= conv(f"input_blocks.{at}.0.op")
            at += 1
    found |= resnet("middle_block.0", shortcut=False) | resnet("middle_block.2", shortcut=False)
    found |= attention("middle_block.1", max(depths[-1], 1), matrix_ends)
    at = 0
    for level, depth in enumerate(reversed(depths)):
        for layer in range(3):
            found |= resnet(f"output_blocks.{at}.0", shortcut=True)
            found |= attention(f"output_blocks.{at}.1", depth, matrix_ends) if depth else {}
            if layer == 2 and level < len(depths) - 1:
                found |= conv(f"output_blocks.{at}.{2 if depth else 1}.conv")
            at += 1
    return found | norm("out.0") | conv("out.2")


def clip(h: int = WIDTH, layers: int = 2) -> Shapes:
    """CLIP's text model as transformers has it."""
    found: Shapes = {
        "text_model.embeddings.token_embedding.weight": (9, h),
        "text_model.embeddings.position_embedding.weight": (7, h),
        **norm("text_model.final_layer_norm", h),
    }
    for number in range(layers):
        at = f"text_model.encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{at}.self_attn.{name}", h, h)
        found |= linear(f"{at}.mlp.fc1", 4 * h, h) | linear(f"{at}.mlp.fc2", h, 4 * h)
        found |= norm(f"{at}.layer_norm1", h) | norm(f"{at}.layer_norm2", h)
    return found


def open_clip(h: int = WIDTH, layers: int = 2) -> Shapes:
    found: Shapes = {
        "positional_embedding": (7, h),
        "text_projection": (h, h),
        "token_embedding.weight": (9, h),
        **norm("ln_final", h),
    }
    for number in range(layers):
        at = f"transformer.resblocks.{number}"
        found |= {f"{at}.attn.in_proj_weight": (3 * h, h), f"{at}.attn.in_proj_bias": (3 * h,)}
        found |= linear(f"{at}.attn.out_proj", h, h) | norm(f"{at}.ln_1", h) | norm(f"{at}.ln_2", h)
        found |= linear(f"{at}.mlp.c_fc", 4 * h, h) | linear(f"{at}.mlp.c_proj", h, 4 * h)
    return found


def t5(h: int = WIDTH) -> Shapes:
    found: Shapes = {"shared.weight": (9, h), "encoder.final_layer_norm.weight": (h,)}
    for name in "qkvo":
        found |= linear(f"encoder.block.0.layer.0.SelfAttention.{name}", h, h, bias=False)
    found |= linear("encoder.block.0.layer.1.DenseReluDense.wi_0", 2 * h, h, bias=False)
    return found | linear("encoder.block.0.layer.1.DenseReluDense.wo", h, 2 * h, bias=False)


def bfl_flux(h: int = WIDTH, mlp: int = 4 * WIDTH, head: int = 2) -> Shapes:
    """FLUX.1 with guidance; two blocks of two streams, and two of one."""
    found = linear("img_in", h, h) | linear("txt_in", h, 2 * h)
    for name in ("time_in", "vector_in", "guidance_in"):
        found |= linear(f"{name}.in_layer", h, h) | linear(f"{name}.out_layer", h, h)
    for number in range(2):
        for stream in ("img", "txt"):
            at = f"double_blocks.{number}.{stream}"
            found |= linear(f"{at}_attn.qkv", 3 * h, h) | linear(f"{at}_attn.proj", h, h)
            found |= {f"{at}_attn.norm.query_norm.scale": (head,), f"{at}_attn.norm.key_norm.scale": (head,)}
            found |= linear(f"{at}_mlp.0", mlp, h) | linear(f"{at}_mlp.2", h, mlp) | linear(f"{at}_mod.lin", 6 * h, h)
        at = f"single_blocks.{number}"
        found |= linear(f"{at}.linear1", 3 * h + mlp, h) | linear(f"{at}.linear2", h, h + mlp)
        found |= linear(f"{at}.modulation.lin", 3 * h, h)
        found |= {f"{at}.norm.query_norm.scale": (head,), f"{at}.norm.key_norm.scale": (head,)}
    return found | linear("final_layer.linear", h, h) | linear("final_layer.adaLN_modulation.1", 2 * h, h)


def sd3(h: int = WIDTH) -> Shapes:
    found: Shapes = {"pos_embed": (1, 9, h), **conv("x_embedder.proj", h, h, 2), **linear("context_embedder", h, h)}
    for name in ("t_embedder", "y_embedder"):
        found |= linear(f"{name}.mlp.0", h, h) | linear(f"{name}.mlp.2", h, h)
    for number, last in enumerate((False, True)):
        for stream in ("x", "context"):
            at, ends = f"joint_blocks.{number}.{stream}_block", not last or stream == "x"
            found |= linear(f"{at}.attn.qkv", 3 * h, h)
            found |= {f"{at}.attn.ln_q.weight": (2,), f"{at}.attn.ln_k.weight": (2,)}
            found |= linear(f"{at}.adaLN_modulation.1", (6 if ends else 2) * h, h)
            if ends:
                found |= linear(f"{at}.attn.proj", h, h)
                found |= linear(f"{at}.mlp.fc1", 4 * h, h) | linear(f"{at}.mlp.fc2", h, 4 * h)
    at = "joint_blocks.0.x_block.attn2"  # of SD3.5 medium
    found |= linear(f"{at}.qkv", 3 * h, h) | linear(f"{at}.proj", h, h)
    found |= {f"{at}.ln_q.weight": (2,), f"{at}.ln_k.weight": (2,)}
    return found | linear("final_layer.linear", h, h) | linear("final_layer.adaLN_modulation.1", 2 * h, h)


def lumina(h: int = 6, keys: int = 2) -> Shapes:
    found = linear("x_embedder", h, h) | linear("cap_embedder.1", h, h) | {"cap_embedder.0.weight": (h,)}
    found |= linear("t_embedder.mlp.0", h, h) | linear("t_embedder.mlp.2", h, h)
    for stack in ("layers", "noise_refiner", "context_refiner"):
        for number in range(2):
            at = f"{stack}.{number}"
            found |= linear(f"{at}.attention.qkv", h + 2 * keys, h, bias=False)
            found |= linear(f"{at}.attention.out", h, h, bias=False)
            found |= {f"{at}.attention.q_norm.weight": (2,), f"{at}.attention.k_norm.weight": (2,)}
            for name, rows, columns in (("w1", 2 * h, h), ("w2", h, 2 * h), ("w3", 2 * h, h)):
                found |= linear(f"{at}.feed_forward.{name}", rows, columns, bias=False)
            for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                found[f"{at}.{name}.weight"] = (h,)
            if stack != "context_refiner":
                found |= linear(f"{at}.adaLN_modulation.1", 4 * h, h)
    return found | linear("final_layer.linear", h, h) | linear("final_layer.adaLN_modulation.1", h, h)


def wan(h: int = WIDTH) -> Shapes:
    found: Shapes = {"patch_embedding.weight": (h, 2, 1, 2, 2), "patch_embedding.bias": (h,)}
    for name in ("text_embedding", "time_embedding"):
        found |= linear(f"{name}.0", h, h) | linear(f"{name}.2", h, h)
    found |= linear("time_projection.1", 6 * h, h)
    for number in range(2):
        at = f"blocks.{number}"
        for which in ("self_attn", "cross_attn"):
            for name in "qkvo":
                found |= linear(f"{at}.{which}.{name}", h, h)
            found |= {f"{at}.{which}.norm_q.weight": (h,), f"{at}.{which}.norm_k.weight": (h,)}
        found |= linear(f"{at}.cross_attn.k_img", h, h) | linear(f"{at}.cross_attn.v_img", h, h)
        found |= {f"{at}.cross_attn.norm_k_img.weight": (h,), f"{at}.modulation": (1, 6, h)}
        found |= linear(f"{at}.ffn.0", 2 * h, h) | linear(f"{at}.ffn.2", h, 2 * h) | norm(f"{at}.norm3")
    return found | linear("head.head", h, h) | {"head.modulation": (1, 2, h)}


def hunyuan_video(h: int = WIDTH, mlp: int = 4 * WIDTH) -> Shapes:
    found = conv("img_in.proj", h, h, 2) | linear("final_layer.linear", h, h)
    found |= linear("final_layer.adaLN_modulation.1", 2 * h, h) | linear("txt_in.input_embedder", h, 2 * h)
    for name in ("time_in", "guidance_in", "txt_in.t_embedder"):
        found |= linear(f"{name}.mlp.0", h, h) | linear(f"{name}.mlp.2", h, h)
    found |= linear("vector_in.in_layer", h, h) | linear("vector_in.out_layer", h, h)
    found |= linear("txt_in.c_embedder.linear_1", h, h) | linear("txt_in.c_embedder.linear_2", h, h)
    at = "txt_in.individual_token_refiner.blocks.0"
    found |= linear(f"{at}.self_attn_qkv", 3 * h, h) | linear(f"{at}.self_attn_proj", h, h)
    found |= norm(f"{at}.norm1") | norm(f"{at}.norm2") | linear(f"{at}.adaLN_modulation.1", 2 * h, h)
    found |= linear(f"{at}.mlp.fc1", 4 * h, h) | linear(f"{at}.mlp.fc2", h, 4 * h)
    for number in range(2):
        for stream in ("img", "txt"):
            at = f"double_blocks.{number}.{stream}"
            found |= linear(f"{at}_attn_qkv", 3 * h, h) | linear(f"{at}_attn_proj", h, h)
            found |= {f"{at}_attn_q_norm.weight": (2,), f"{at}_attn_k_norm.weight": (2,)}
            found |= linear(f"{at}_mod.linear", 6 * h, h)
            found |= linear(f"{at}_mlp.fc1", mlp, h) | linear(f"{at}_mlp.fc2", h, mlp)
        at = f"single_blocks.{number}"
        found |= linear(f"{at}.linear1", 3 * h + mlp, h) | linear(f"{at}.linear2", h, h + mlp)
        found |= {f"{at}.q_norm.weight": (2,), f"{at}.k_norm.weight": (2,)} | linear(
            f"{at}.modulation.linear", 3 * h, h
        )
    return found


def ldm_vae(h: int = WIDTH) -> Shapes:
    """The autoencoder of LDM: a shortcut where the width changes, and attention of 1 × 1 convolutions in the middle."""

    def layer(at: str, shortcut: bool = False) -> Shapes:
        found = norm(f"{at}.norm1") | conv(f"{at}.conv1") | norm(f"{at}.norm2") | conv(f"{at}.conv2")
        return found | (conv(f"{at}.nin_shortcut", size=1) if shortcut else {})

    found: Shapes = {}
    for side, inner, layers in (("encoder", "down", 2), ("decoder", "up", 3)):
        found |= conv(f"{side}.conv_in") | norm(f"{side}.norm_out") | conv(f"{side}.conv_out")
        for level in range(4):
            for number in range(layers):
                found |= layer(f"{side}.{inner}.{level}.block.{number}", number == 0 and level > 0)
            if side == "encoder" and level < 3:
                found |= conv(f"{side}.down.{level}.downsample.conv")
            if side == "decoder" and level > 0:
                found |= conv(f"{side}.up.{level}.upsample.conv")
        found |= layer(f"{side}.mid.block_1") | layer(f"{side}.mid.block_2") | norm(f"{side}.mid.attn_1.norm")
        for name in ("q", "k", "v", "proj_out"):
            found |= conv(f"{side}.mid.attn_1.{name}", size=1)
    return found | conv("quant_conv", size=1) | conv("post_quant_conv", size=1)


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def sd15_file() -> Shapes:
    """An LDM single file: U-Net, CLIP, and a little of a VAE."""
    found = under("model.diffusion_model.", ldm_unet((1, 1, 1, 0), matrix_ends=False, added=False))
    found |= under("cond_stage_model.transformer.", clip())
    return found | conv("first_stage_model.decoder.conv_in")


def sdxl_file() -> Shapes:
    found = under("model.diffusion_model.", ldm_unet((0, 2, 2), matrix_ends=True, added=True))
    found |= under("conditioner.embedders.0.transformer.", clip())
    return found | under("conditioner.embedders.1.model.", open_clip()) | conv("first_stage_model.decoder.conv_in")


def values(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Eighths, of which every product and sum in these tests is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-16, 17, shape, generator=generator) / 8 for name, shape in shapes.items()}


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in which every row of the model has a number of its own, without memory for their columns."""
    at = 0
    for name, shape in shapes.items():
        yield name, torch.arange(at, at + shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        at += shape[0]
