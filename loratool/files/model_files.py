"""The names under which loratool and transformers write the files of a model; each format of adapters has its own.

`--overwrite` replaces a folder of such files and no other. What a user writes by hand, or training leaves behind, is not
in the table although it may lie in a model's folder: source code, data, `checkpoint-5/`, the states of an optimizer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RECORD_KEY = "loratool"  # the key of a file's metadata that says how it was made, where it stands alone
NOTHING = "(?!)"  # a pattern of no name
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


@dataclass(frozen=True)
class FileNames:
    """What the files of something are called, as patterns of names relative to its folder."""

    weights: str = NOTHING
    others: str = NOTHING

    def are_weights(self, name: str) -> bool:
        """Whether a file of that name holds weights, or is their index."""
        return re.fullmatch(self.weights, name, re.ASCII) is not None

    def know(self, name: str) -> bool:
        """Whether a file of that name is a part, wherever it lies in the folder."""
        return self.are_weights(name) or re.fullmatch(self.others, name, re.ASCII) is not None

    def __or__(self, other: FileNames) -> FileNames:
        return FileNames(f"{self.weights}|{other.weights}", f"{self.others}|{other.others}")


MODEL_FILES = FileNames(
    # weights in one file or numbered ones, of a variant such as fp16 perhaps, with their index
    weights=r"(?:model|diffusion_pytorch_model)(?:\.\w+)?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"|pytorch_model(?:\.\w+)?(?:-\d{5}-of-\d{5})?\.bin"
    r"|(?:(?:model|diffusion_pytorch_model)\.safetensors|pytorch_model\.bin)\.index(?:\.\w+)?\.json",
    others="|".join(map(re.escape, sorted(TOKENIZER_FILES | VOCABULARIES | CONFIGS)))
    + r"|additional_chat_templates/[\w.-]+\.jinja|(?:LICEN[CS]E|NOTICE|USE_POLICY)(?:\.\w+)?",
)
