"""A folder's config.json becomes a shape and end tokens; unsupported architectures are refused."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longctx.hf.config import shape_of
from tests.hf.configs import LLAMA3, SIZES, save_config

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 31}


def test_shape_of_a_llama(tmp_path):
    shape = shape_of(save_config(tmp_path, LlamaConfig(**SIZES, head_dim=14, tie_word_embeddings=True)))
    assert (shape.layers, shape.hidden, shape.ffn, shape.vocab_size, shape.max_positions) == (5, 60, 59, 307, 97)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (6, 2, 14)
    assert (shape.norm_eps, shape.tied, shape.qkv_bias, shape.end_tokens) == (3e-5, True, False, (13,))


def test_shape_of_a_qwen2(tmp_path):
    shape = shape_of(save_config(tmp_path, Qwen2Config(**SIZES)))
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (6, 2, 60 // 6)
    assert (shape.tied, shape.qkv_bias) == (False, True)


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default", "rope_theta": 7e4}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}, LLAMA3],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_frequencies_equal_those_of_transformers(tmp_path, rope):
    config = LlamaConfig(**SIZES, head_dim=62, rope_parameters=rope)
    shape = shape_of(save_config(tmp_path, config))
    assert torch.equal(torch.tensor(shape.rotaries[0].frequencies), LlamaRotaryEmbedding(config).inv_freq)
    plain = rope["rope_theta"] ** (-torch.arange(0, 62, 2) / 62)
    assert torch.allclose(torch.tensor(shape.rotaries[0].frequencies), plain) == (rope["rope_type"] == "default")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(n_layer=2, n_head=2, n_embd=14), "model_type=gpt2 .*needs learned positions.*: use one of gemma3"),
        (DeepseekV3Config(), "model_type=deepseek_v3 .*needs multi-head latent attention"),
        (Qwen2MoeConfig(), "model_type=qwen2_moe .*needs a shared expert.*; the nearest is qwen3_moe$"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act=gelu, .* with hidden_act=silu"),
        (LlamaConfig(**SIZES, rope_parameters=DYNAMIC), "rope_type=dynamic is not implemented: .*linear, llama3, yarn"),
        (Gemma3TextConfig(**SIZES, final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    ],
    ids=lambda value: value.split("=")[0] if isinstance(value, str) else value.model_type,
)
def test_unsupported_architecture_is_refused(tmp_path, config, words):
    with pytest.raises(ValueError, match=words):
        shape_of(save_config(tmp_path, config))


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LlamaConfig(**SIZES), (None,) * 5),
        (MistralConfig(**SIZES, sliding_window=11), (11,) * 5),
        (MistralConfig(**SIZES, sliding_window=None), (None,) * 5),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=11, max_window_layers=2),
            (None, None, 11, 11, 11),
        ),
        (Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=11), (None,) * 5),
    ],
)
def test_each_layer_has_its_window(tmp_path, config, windows):
    assert shape_of(save_config(tmp_path, config)).windows == windows


@pytest.mark.parametrize(
    ("config_ends", "generation_ends", "ends"),
    [(13, None, (13,)), (None, None, ()), ([3, 5], None, (3, 5)), (13, 7, (7,)), (13, [7, 11], (7, 11)), (13, 0, (0,))],
)
def test_generation_config_overrides_end_tokens(tmp_path, config_ends, generation_ends, ends):
    save_config(tmp_path, LlamaConfig(**SIZES | {"eos_token_id": config_ends}))
    if generation_ends is not None:
        GenerationConfig(eos_token_id=generation_ends).save_pretrained(tmp_path)
    assert shape_of(tmp_path).end_tokens == ends


def test_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        shape_of(tmp_path)
