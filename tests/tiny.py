"""A tiny Llama with random weights and a byte-level tokenizer, for tests that run in about a second."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte (0 to 255) and the ``special`` tokens from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_model(
    folder: Path, max_positions: int, heads: int = 9, kv_heads: int = 3, ffn: int = 51, std: float | None = None
) -> Path:
    """Write a 2-layer model without end token to ``folder``, and return ``folder``.

    ``std`` is the spread of the layers' weights; a large one makes small changes of the model visible in its tokens.
    """
    tiny_tokenizer().save_pretrained(folder)
    widths = {"head_dim": 4, "hidden_size": 4 * heads, "intermediate_size": ffn}
    sizes = {"vocab_size": 256, "num_hidden_layers": 2, "max_position_embeddings": max_positions}
    torch.manual_seed(7)
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **widths, **sizes)
    config.bos_token_id = config.eos_token_id = None
    model = LlamaForCausalLM(config)
    for parameter in model.model.layers.parameters() if std else ():
        torch.nn.init.normal_(parameter, std=std)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder
