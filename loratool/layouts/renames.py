"""Names on disk ↔ names in memory, where a release of transformers renamed modules while loading.

Facts from the conversion mapping of transformers 5.23: checkpoints keep the old names, adapters
trained with the new release carry the new ones.
"""

from __future__ import annotations

# (pattern of a name on disk, the name in memory)
RENAMES: tuple[tuple[str, str], ...] = (
    # ViT and its kin: encoder.layer.N.attention.attention.query → layers.N.attention.q_proj
    (r"\bencoder\.layer\.(\d+)\.attention\.attention\.query\b", r"layers.\1.attention.q_proj"),
    (r"\bencoder\.layer\.(\d+)\.attention\.attention\.key\b", r"layers.\1.attention.k_proj"),
    (r"\bencoder\.layer\.(\d+)\.attention\.attention\.value\b", r"layers.\1.attention.v_proj"),
    (r"\bencoder\.layer\.(\d+)\.attention\.output\.dense\b", r"layers.\1.attention.o_proj"),
    (r"\bencoder\.layer\.(\d+)\.intermediate\.dense\b", r"layers.\1.mlp.fc1"),
    (r"\bencoder\.layer\.(\d+)\.output\.dense\b", r"layers.\1.mlp.fc2"),
    # DINOv2 keeps encoder.layer.N
    (r"\b(encoder\.layer\.\d+\.attention)\.attention\.query\b", r"\1.q_proj"),
    (r"\b(encoder\.layer\.\d+\.attention)\.attention\.key\b", r"\1.k_proj"),
    (r"\b(encoder\.layer\.\d+\.attention)\.attention\.value\b", r"\1.v_proj"),
    (r"\b(encoder\.layer\.\d+\.attention)\.output\.dense\b", r"\1.o_proj"),
    # Swin
    (r"\b(blocks\.\d+\.attention)\.self\.query\b", r"\1.q_proj"),
    (r"\b(blocks\.\d+\.attention)\.self\.key\b", r"\1.k_proj"),
    (r"\b(blocks\.\d+\.attention)\.self\.value\b", r"\1.v_proj"),
    (r"\b(blocks\.\d+\.attention)\.output\.dense\b", r"\1.o_proj"),
    (r"\b(blocks\.\d+)\.intermediate\.dense\b", r"\1.mlp.fc1"),
    (r"\b(blocks\.\d+)\.output\.dense\b", r"\1.mlp.fc2"),
    # GPT-NeoX
    (r"^embed_out\b", "lm_head"),
)
