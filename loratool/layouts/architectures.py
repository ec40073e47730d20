"""Facts about model families that neither shapes nor names on disk can tell."""

from __future__ import annotations

import re

# What Conv1D layers are called, which store W (in, out); other families give the same names to nn.Linear.
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
# Model type → those of its modules that are Conv1D.
CONV1D_TYPES = {
    **dict.fromkeys(("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer", "jais"), CONV1D_MODULES),
    **dict.fromkeys(("clvp", "clvp_decoder"), frozenset({"c_fc", "c_proj"})),
}
# What the names of classes begin with → their model type, for configs that name a class and no type.
CONV1D_CLASSES = (
    ("GPT2", "gpt2"),
    ("OpenAIGPT", "openai-gpt"),
    ("ImageGPT", "imagegpt"),
    ("DecisionTransformer", "decision_transformer"),
    ("JAIS", "jais"),
    ("Clvp", "clvp"),
)
# Model types with code of their own that give Conv1D's names to nn.Linear.
LINEAR_TYPES = frozenset({"qwen", "exaone", "codeshell"})

# What a model's own class puts before the names of the model that it wraps.
PREFIXES = (
    *("model", "transformer", "gpt_neox", "bert", "roberta", "vit", "backbone", "encoder", "decoder", "language_model"),
    *(
        "distilbert",
        "albert",
        "electra",
        "deberta",
        "xlm_roberta",
        "mpnet",
        "camembert",
        "esm",
        "layoutlm",
        "longformer",
    ),
    *(
        "rembert",
        "nezha",
        "ernie",
        "convbert",
        "funnel",
        "mobilebert",
        "squeezebert",
        "big_bird",
        "fnet",
        "nystromformer",
    ),
    *("wav2vec2", "hubert", "wavlm", "unispeech", "data2vec_audio", "whisper", "audio_spectrogram_transformer"),
    *(
        "deit",
        "beit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3",
        "swin",
        "swinv2",
        "segformer",
        "convnext",
        "vit_mae",
    ),
    *("clip", "siglip", "vision_model", "text_model", "model.decoder", "thinker", "rwkv", "mamba", "opt", "new", "vlm"),
    *(
        "timm_model",
        "audio_tower",
        "ast",
        "vivit",
        "videomae",
        "ijepa",
        "radio_model",
        "base_model",
        "ultrabert",
        "tracker_model",
        "video_tower",
        "vision_encoder",
    ),
)

# Weights whose rows lie in another order on disk than in memory, since rotary positions pair neighbours there and
# halves here: (model type, names on disk).
REORDERED = (
    ("mistral_large4", ("transformer.layers.#.attention.wq", "transformer.layers.#.attention.wk")),
    ("kimi_k25", ("wqkv",)),
    ("step3p7", ("in_proj_weight", "in_proj_bias")),
    ("gradium_phonon_tts", ("self_attn.in_proj",)),
)

# Wrappers that training leaves in names; a name means the same without them.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
LEADING_WRAPPERS = frozenset({"module"})

# Components that tell which tower of a multimodal model a name belongs to.
TOWERS = {
    "vision": frozenset(
        {
            "visual",
            "vision_tower",
            "vision_model",
            "vision_encoder",
            "image_tower",
            "video_tower",
            "vit",
            "image_encoder",
            "sam_model",
            "image_vit",
        }
    ),
    "audio": frozenset({"audio_tower", "audio_model", "audio_encoder", "sound_encoder", "speech_encoder", "audio"}),
    "text": frozenset({"language_model", "text_model", "text_encoder", "llm"}),
}

# What stands in the place of `X.weight` where X is quantised, and what the name of a packed parameter ends with.
PACKED_WEIGHTS = ("qweight", "weight_packed", "W_q", "weight_qdata", "_weight_qdata")
# The same in AQLM, VPTQ, SpQR, EXL2, EXL3 and QuIP#, in whose names plain models may have buffers.
PACKED_CODES = ("codes", "indices", "dense_weights", "q_weight", "trellis", "Qidxs")
PACKED_WITHIN = ".weight._data."  # of quanto, whose tensors have longer names
PACKED_ENDS = ("_blocks",)

# Modules that hold the input embedding, and those that turn hidden states into logits.
INPUT_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"})
OUTPUT_HEADS = frozenset({"lm_head", "embed_out", "proj_out", "output_projection"})

# Parts of the class names of models that turn hidden states into token logits, so that a head may be tied.
GENERATIVE = (
    *("ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "DoubleHeads", "MTModel"),
    *("ForImageTextToText", "Vision2Seq", "Vision2Text", "ForSpeechSeq2Seq", "SpeechToText", "TextToText", "Text2Text"),
    *("EncoderDecoder", "GenerationDecoder"),
)

# task_type of an adapter → the end of the class of transformers that was trained.
TASK_CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
CLASS_ENDS = r"(?:For[A-Z]\w*|LMHeadModel|WithLMHeadModel|DoubleHeadsModel|MTModel|Model)$"
# Where taking one end off and putting the other on does not give the class of the task.
IRREGULAR_CLASSES = {
    ("gemma3_text", "ForSequenceClassification"): "Gemma3TextForSequenceClassification",
    ("qwen3_5_text", "ForSequenceClassification"): "Qwen3_5TextForSequenceClassification",
    ("cohere_compass_text", "ForSequenceClassification"): "CohereCompassTextForSequenceClassification",
    ("reformer", "ForSequenceClassification"): "ReformerForSequenceClassification",
    ("reformer", "ForQuestionAnswering"): "ReformerForQuestionAnswering",
    ("funnel", "ForSequenceClassification"): "FunnelForSequenceClassification",
    ("funnel", "ForTokenClassification"): "FunnelForTokenClassification",
    ("funnel", "ForQuestionAnswering"): "FunnelForQuestionAnswering",
    ("flaubert", "ForQuestionAnswering"): "FlaubertForQuestionAnsweringSimple",
    ("xlm", "ForQuestionAnswering"): "XLMForQuestionAnsweringSimple",
    ("xlnet", "ForQuestionAnswering"): "XLNetForQuestionAnsweringSimple",
}
# The last modules of classifiers: a row of their weight is a label.
LABEL_HEADS = frozenset({"score", "classifier", "out_proj", "qa_outputs", "classification_head", "fc", "summary"})

# Model types whose classifier of whole sequences reads a pooler, which models with other heads are saved without.
POOLED = frozenset(
    [
        *("albert", "bert", "big_bird", "canine", "deberta", "deberta-v2", "ernie", "fnet", "gte", "layoutlm", "luke"),
        *("markuplm", "megatron-bert", "mobilebert", "nomic_bert", "rembert", "roc_bert", "squeezebert", "tapas"),
    ]
)

# How modules that are tables of embeddings, of positions and relative biases too, are called besides.
EMBEDDING_NAMES = re.compile(
    r"(?:.+_)?emb(?:ed|edding)?s?|embed_(?:tokens|positions|in)(?:_.+)?|(?:tokens|positions)_embed|wte|wpe|w|relative_attention_bias"
)
