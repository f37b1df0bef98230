"""Tokenizers that know single characters, and text encoders of a few layers of random weights."""

from __future__ import annotations

import string

import transformers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import models as _  # noqa: F401  (so that lazy imports do not seed anything later)

CHARACTERS = string.ascii_letters + string.digits + string.punctuation
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5_tokenizer() -> transformers.T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *CHARACTERS]
    return transformers.T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def clip_tokenizer() -> transformers.CLIPTokenizer:
    pieces = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    return transformers.CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def glm_tokenizer() -> transformers.Qwen2Tokenizer:
    """Texts begin with a token of its own: no text has none."""
    tokenizer, start = qwen_tokenizer(), "<|endoftext|>"
    of_start = [(start, tokenizer.convert_tokens_to_ids(start))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=of_start)
    return tokenizer


def bert_tokenizer() -> transformers.BertTokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    return transformers.BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, model_max_length=77)


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    return transformers.GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=1024)


def t5_encoder(width: int = 32, kind: str = "T5") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=128, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip_encoder(with_projection: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel)(config)


def bert_encoder() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77,
    )  # fmt: skip
    return transformers.BertModel(config)


def llama_encoder() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0
    )
    return transformers.LlamaModel(config)


def glm_encoder() -> nn.Module:
    config = transformers.GlmConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GlmModel(config)


def qwen3_encoder(layers: int = 2, causal: bool = False) -> nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    return (transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model)(config)


def gemma2_encoder() -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def qwen25_vl_encoder() -> nn.Module:
    text = {
        "vocab_size": 512, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
