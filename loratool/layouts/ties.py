"""Which tensors are one and the same in memory: the head of a language model and its input embedding.

Facts from the model classes of transformers 5.23 and from checkpoints on the Hub. A checkpoint holds a tied tensor
once, under the embedding's name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tie:
    """One naming of an embedding and of what is tied to it. Names are modules, as they are on disk."""

    embedding: str  # pattern of the whole name
    heads: tuple[str, ...]  # the modules that are tied to it; groups of the pattern may stand in them
    beside: str = ""  # pattern of the beginning of a tensor's name; there must be one
    bias: str = ""  # the parameter that is the bias of the first head as well
    types: tuple[str, ...] = ()  # model types of which the model is one, or a part of it; any where there are none


PREFIXED = r"(?:\w+\.)?embeddings\.word_embeddings"

# The first row that matches an embedding's name counts.
TIES: tuple[Tie, ...] = (
    Tie(r"token_embd", ("output",)),  # of GGUF files
    # families that call them as others do, and tie something else
    Tie(PREFIXED, ("cls.predictions.decoder",), types=("lxmert",)),
    Tie(PREFIXED, ("lm_head.decoder",), bias="lm_head.bias", types=("bert-generation",)),
    Tie(PREFIXED, ("lm_head",), r"lm_head\.bias", types=("funnel",)),
    Tie(
        r"model\.decoder\.embed_tokens",
        ("model.encoder.embed_tokens", "model.decoder.output_projection"),
        types=("fsmt",),
    ),
    Tie(r"decoder\.embed_tokens", ("decoder.lm_head",), types=("pix2struct",)),
    Tie(r"model\.decoder\.embed_tokens", ("lm_head.out_proj",), types=("t5gemma",)),
    Tie(r"(?P<at>decoder\.)?model\.decoder\.embed_tokens", ("{at}output_projection",), types=("trocr",)),
    Tie(r"model\.embed_tokens", ("head.decoder",), types=("ultrabert",)),
    Tie(r"(?:model\.)?decoder\.embed_tokens", ("proj_out",), types=("whisper", "canary", "cohere_asr", "moonshine")),
    # encoders with a masked language model's head: the other parts of the head tell which one
    Tie(
        rf"(?P<at>(?:text_)?decoder\.)?{PREFIXED}",
        ("{at}cls.predictions.decoder",),
        r"{at}cls\.predictions\.",
        "{at}cls.predictions.bias",
    ),
    Tie(
        rf"(?P<at>decoder\.)?{PREFIXED}",
        ("{at}lm_head.decoder",),
        r"{at}lm_head\.(?:dense|layer_norm)\.",
        "{at}lm_head.bias",
    ),
    Tie(PREFIXED, ("predictions.decoder",), r"predictions\.dense\.", "predictions.bias"),
    Tie(PREFIXED, ("vocab_projector",), r"vocab_transform\."),
    Tie(PREFIXED, ("generator_lm_head",), r"generator_predictions\."),
    Tie(PREFIXED, ("output",), r"output\.bias"),
    Tie(r"(?:model\.)?embeddings\.tok_embeddings", ("decoder",), r"(?:lm_)?head\.dense\."),
    Tie(r"(?:model\.)?text_model\.embeddings\.tok_embeddings", ("lm_head",)),
    Tie(r"(?:transformer\.)?embeddings", ("pred_layer.proj",), r"pred_layer\."),
    Tie(r"transformer\.word_embedding", ("lm_loss",)),
    # encoder and decoder with one embedding
    Tie(r"shared", ("lm_head", "text_encoder.embed_tokens", "text_decoder.embed_tokens"), r"text_encoder\."),
    Tie(r"shared", ("lm_head", "text_decoder.embed_tokens"), r"text_decoder\."),
    Tie(
        r"(?P<at>(?:model\.|led\.)?(?:language_model\.)?)shared",
        ("lm_head", "{at}encoder.embed_tokens", "{at}decoder.embed_tokens"),
    ),
    Tie(
        r"prophetnet\.word_embeddings",
        ("lm_head", "prophetnet.encoder.word_embeddings", "prophetnet.decoder.word_embeddings"),
        r"prophetnet\.encoder\.",
    ),
    Tie(r"prophetnet\.word_embeddings", ("lm_head", "prophetnet.decoder.word_embeddings")),
    # speech to text
    Tie(r"(?:model\.)?decoder\.embed_tokens", ("proj_out",), r"(?:model\.)?encoder\.conv1\."),
    Tie(r"speecht5\.decoder\.prenet\.embed_tokens", ("text_decoder_postnet.lm_head",)),
    Tie(r"model\.embed_tokens\.embed_tokens", ("lm_head",)),
    # decoders
    Tie(r"biogpt\.embed_tokens", ("output_projection",)),
    Tie(r"(?:model\.)?(?:language_model|text_model)\.embed_tokens", ("lm_head",)),
    Tie(r"(?P<at>.+\.)?model\.decoder\.embed_tokens", ("{at}lm_head",)),
    Tie(r"decoder\.embed_tokens", ("lm_head",)),
    Tie(r"(?P<at>.+\.)?model\.embed_tokens", ("{at}lm_head",)),
    Tie(r"embed_tokens", ("lm_head",)),
    Tie(r"model\.transformer\.wte", ("model.transformer.ff_out",)),
    Tie(r"(?P<at>.+\.)?transformer\.wte", ("{at}lm_head",)),
    Tie(r"wte", ("lm_head",)),
    Tie(r"(?:transformer\.)?(?:word_embeddings|w|tokens_embed)", ("lm_head",)),
    Tie(r"gpt_neox(?:_japanese)?\.embed_in", ("embed_out",)),
    Tie(r"backbone\.embeddings?", ("lm_head",)),
    Tie(r"rwkv\.embeddings", ("head",)),
    # families with code of their own
    Tie(r"model\.tok_embeddings", ("output",)),
    Tie(r"transformer\.embedding\.word_embeddings", ("transformer.output_layer",)),
)

# What a config calls the flag; the second name is that of LFM2's first configs.
TIE_FLAGS = ("tie_word_embeddings", "tie_embedding")

# Parts of a config that describe the language model within a larger one.
TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "text_decoder", "decoder", "thinker_config")

# Model types whose forward depends on the tie, whose config sets the flag whatever the file says, or in which the same
# flag ties more than one tensor to the head, or layers to each other.
TIED_FOREVER = frozenset(
    ["t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano", "udop", "zamba", "zamba2", "idefics"]
)

# Model types that tie where their config says nothing.
TIED_BY_DEFAULT = frozenset(
    [
        *("albert", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot"),
        *("blenderbot-small", "bloom", "camembert", "cohere", "cohere2", "convbert", "ctrl", "data2vec-text"),
        *("deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "falcon", "falcon_mamba", "flaubert"),
        *("fnet", "funnel", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gpt2", "gpt_bigcode", "gpt_neo"),
        *("gpt_neox_japanese", "ibert", "led", "lfm2", "longformer", "longt5", "luke", "m2m_100", "mamba", "marian"),
        *("mbart", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mpt", "mt5", "mvp", "openai-gpt", "opt"),
        *("paligemma", "pegasus", "pegasus_x", "plbart", "pop2piano", "prophetnet", "qwen3_vl_moe", "recurrent_gemma"),
        *("roberta", "roberta-prelayernorm", "roformer", "smollm3", "starcoder2", "switch_transformers", "t5"),
        *("t5gemma", "trocr", "udop", "umt5", "whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet"),
        *("xmod"),
    ]
)
