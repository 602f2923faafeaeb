"""A Llama small enough for a test of a second: random weights, a token a byte."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A token a byte, and those that ``special`` adds, from 256 up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, **special)


def tiny_model(folder: Path, positions: int, heads: int = 9, kv_heads: int = 3, ffn: int = 51) -> Path:
    """``folder``, with a model of 2 layers and ``positions`` positions in it, and no end token."""
    tiny_tokenizer().save_pretrained(folder)
    widths = {"head_dim": 4, "hidden_size": 4 * heads, "intermediate_size": ffn}
    sizes = {"vocab_size": 256, "num_hidden_layers": 2, "max_position_embeddings": positions}
    torch.manual_seed(7)
    shape = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **widths, **sizes)
    shape.bos_token_id = shape.eos_token_id = None
    model = LlamaForCausalLM(shape)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder
