"""A tiny Llama as a GGUF file with a tokenizer and a chat template, as converters write them."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter, TokenType
from transformers import LlamaForCausalLM

from tests.tiny import tiny_model
from tests.tiny_chat import TEMPLATE

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def gguf_model() -> LlamaForCausalLM:
    """The model that `write_gguf` writes: tied, fp32, one token a byte."""
    vocab = len(SPECIAL) + 256 + 1
    model = tiny_model(dtype=torch.float32, vocab_size=vocab, tie_word_embeddings=True)
    assert isinstance(model, LlamaForCausalLM)
    return model


def write_gguf(path: Path) -> LlamaForCausalLM:
    """Write the model to a file, and return it."""
    model, writer = gguf_model(), GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(_gguf_name(name), _permuted(name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *byte_letters(), "de"])
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * 257)
    writer.add_token_merges(["d e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[name] + ".weight"
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner]}.weight"


def _permuted(name: str, weight: np.ndarray, config) -> np.ndarray:
    """Queries and keys in llama.cpp's order: rotary pairs side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if f".{part}." in name:
            rows = weight.reshape(count, 2, weight.shape[0] // count // 2, -1).swapaxes(1, 2)
            return np.ascontiguousarray(rows.reshape(weight.shape))
    return weight
