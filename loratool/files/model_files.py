"""The names under which loratool, transformers and PEFT write the files of a model or an adapter.

`--overwrite` replaces a folder of such files and no other. What a user writes by hand, or training leaves behind, is not
in the table although it may lie in a model's folder: source code, data, `checkpoint-5/`, the states of an optimizer.
"""

from __future__ import annotations

import re

# What a tokenizer is made of; an adapter that ships its own was trained with it.
TOKENIZER_FILES = frozenset(
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "chat_template.jinja",
        "chat_template.json",
    ]
)
# Vocabularies under other names, which tokenizers of single families write.
VOCABULARIES = frozenset(
    [
        *("bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json", "prophetnet.tokenizer"),
        *("sentencepiece.model", "spm.model", "spm_char.model", "target_vocab.json", "vocab-src.json"),
        *("vocab-tgt.json", "word_pronunciation.json", "word_shape.json", "tiktoken.model"),
    ]
)
CONFIGS = frozenset(
    [
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "audio_tokenizer_config.json",
        "normalizer.json",
        "quantize_config.json",
        "loratool.json",
        "README.md",
    ]
)
# Weights in one file or numbered ones, of a variant such as fp16 perhaps, with their index.
WEIGHTS = re.compile(
    r"(?:(?:model|adapter_model|diffusion_pytorch_model)(?:\.\w+)?(?:-\d{5}-of-\d{5})?\.safetensors)"
    r"|(?:(?:pytorch_model|adapter_model)(?:\.\w+)?(?:-\d{5}-of-\d{5})?\.bin)"
    r"|(?:(?:(?:model|adapter_model|diffusion_pytorch_model)\.safetensors|pytorch_model\.bin)\.index(?:\.\w+)?\.json)",
    re.ASCII,
)
TEMPLATES = re.compile(r"additional_chat_templates/[\w.-]+\.jinja", re.ASCII)
TERMS = re.compile(r"(?:LICEN[CS]E|NOTICE|USE_POLICY)(?:\.\w+)?", re.ASCII)


def is_model_file(name: str) -> bool:
    """Whether a file of that name, relative to the folder, is part of a model or an adapter wherever it lies in one."""
    known = TOKENIZER_FILES | VOCABULARIES | CONFIGS
    return name in known or any(pattern.fullmatch(name) for pattern in (WEIGHTS, TEMPLATES, TERMS))
