"""Keys of config.json: each is read as transformers reads it, changes nothing there, or is refused."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from longctx import models
from longctx.hf import keys
from longctx.hf.config import refuse_untrainable, shape_of
from longctx.hf.keys import GENERATION
from longctx.hf.scratch import config_for_context
from longctx.models import FAMILIES

SIZES = {
    "vocab_size": 53, "hidden_size": 12, "intermediate_size": 11, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 31, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.5,
}  # fmt: skip
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}


def long_factors(name, value):
    """Settings of LongRoPE for heads of 4 channels, with ``value`` in place of the field ``name``."""
    factors = {"factor": 2.0, "short_factor": [1.0, 1.5], "long_factor": [2, 3.0]}
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **factors, name: value}}


def write(folder, model_type="llama", **changed):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, **changed}))
    return folder


def logits(folder):
    """Logits of transformers' model of ``folder``/config.json, with the same random weights for every configuration."""
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    return AutoModelForCausalLM.from_config(config)(torch.arange(23)[None]).logits


@pytest.mark.parametrize(
    ("model_type", "changed", "words"),
    [
        ("llama", {"sliding_window": 8}, "sliding_window=8 is not a setting of transformers' llama models"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "layer_types="),
        ("llama", {"is_causal": False}, "is_causal=False is not a setting"),
        ("qwen2", {"is_causal": False}, "is_causal=False is not a setting of transformers' qwen2 models"),
        ("mistral", {"is_causal": False}, "is_causal=False is not a setting of transformers' mistral models"),
        ("mistral", {"use_sliding_window": False}, "use_sliding_window=False is not a setting"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has chunked_attention"),
        ("gemma3_text", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types has linear_attention"),
        ("smollm3", {"is_causal": False}, "is_causal=False is not a setting of transformers' smollm3 models"),
        ("granite", {"sliding_window": 8}, "sliding_window=8 is not a setting of transformers' granite models"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is not in use"),
        ("llama", {"per_layer_config": {"1": {"hidden_act": "gelu"}}}, "per_layer_config="),
        ("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights="),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"min_new_tokens": 3}, "min_new_tokens=3"),
        ("llama", {"hidden_sise": 3}, "hidden_sise=3"),
        ("llama", {"rope_parameters": NESTED}, "does not implement full_attention=.* with rope_type=default"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}},
            "not implement factor=2.0",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}}, "mrope_sec"),
    ],
    ids=str,
)
def test_key_that_is_not_read_is_refused(tmp_path, model_type, changed, words):
    shape_of(write(tmp_path, model_type))
    with pytest.raises(ValueError, match=words):
        shape_of(write(tmp_path, model_type, **changed))


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("llama", dict.fromkeys(["sliding_window", "layer_types", "per_layer_config", "anything"])),
        (
            "llama",
            keys._NEUTRAL | {"is_decoder": True, "num_labels": 3, "pretraining_tp": 2, "gradient_checkpointing": True},
        ),
        ("qwen2", keys._NEUTRAL | {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
        ("mistral", {**keys._NEUTRAL, "sliding_window": None}),
        ("gemma3_text", {"use_bidirectional_attention": None}),
        (
            "llama",
            {"temperature": 0.3, "max_length": 5, "repetition_penalty": 1.3, "tokenizer_class": "LlamaTokenizer"},
        ),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3"}, "lm_head_bias": False}),
        ("smollm3", {"max_window_layers": 1, "mlp_bias": False}),
        ("starcoder2", dict.fromkeys(FAMILIES["starcoder2"].undeclared, "x") | {"attention_bias": False}),
        ("llama", {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float32", "_name_or_path": "x"}),
    ],
)
def test_harmless_keys_change_nothing_in_transformers(tmp_path, model_type, changed):
    """The list is checked against transformers' logits."""
    plain = {"sliding_window": None} if model_type == "mistral" else {}
    expected, shape = logits(write(tmp_path, model_type, **plain)), shape_of(tmp_path)
    assert shape_of(write(tmp_path, model_type, **changed)) == shape
    assert torch.equal(logits(tmp_path), expected)


def test_head_dim_of_a_qwen2_is_read_as_in_transformers(tmp_path):
    """Its class does not declare it, its code reads it."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write(tmp_path, "qwen2", head_dim=6)))
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (18, 12)
    assert shape_of(tmp_path).head_dim == 6


def test_generation_settings_in_config_json_are_those_that_transformers_drops():
    assert {*GenerationConfig._get_default_generation_params()} - GENERATION <= {
        "use_cache", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "assistant_lookbehind", "target_lookbehind",
    }  # fmt: skip
    assert {*GENERATION} <= {*GenerationConfig._get_default_generation_params()}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_declared_key_is_known(model_type):
    """A key that a later transformers declares may change the model: this code must learn it first."""
    config = AutoConfig.for_model(model_type)
    declared = {each.name for each in fields(config)} - {each.name for each in fields(PreTrainedConfig)}
    source = "".join(file.read_text() for file in Path(models.__file__).parent.glob("*.py"))
    unread = {
        # Used by transformers alone: these do not change logits.
        "pad_token_id", "pretraining_tp", "use_cache",
        # Replaced by others: kinds of layers, and longrope's parameters.
        "max_window_layers", "no_rope_layer_interval", "use_sliding_window", "original_max_position_embeddings",
        # Refused in training, unused otherwise.
        "attention_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop",
        "router_jitter_noise",
        # The same as num_local_experts.
        "num_experts",
        # Read by `shape_of`.
        "eos_token_id", "bos_token_id",
    }  # fmt: skip
    assert [key for key in sorted(declared - unread) if not re.search(rf"\b{key}\b", source)] == []


@pytest.mark.parametrize(
    ("model_type", "changed", "words"),
    [
        ("mixtral", {"attention_dropout": 0.1}, "attention_dropout=0.1: longctx trains without dropout"),
        ("starcoder2", {"residual_dropout": 0.1}, "residual_dropout=0.1: longctx trains without dropout"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1: longctx trains without dropout"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: longctx trains without noise"),
    ],
    ids=str,
)
def test_model_is_refused_in_training_alone(tmp_path, model_type, changed, words):
    shape_of(write(tmp_path, model_type, **changed))
    with pytest.raises(ValueError, match=words):
        refuse_untrainable(tmp_path)
    refuse_untrainable(write(tmp_path, "mixtral", output_router_logits=True, router_aux_loss_coef=0.1))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_router_loss_is_read_as_in_transformers(tmp_path, model_type):
    """transformers adds the loss if output_router_logits is set; its default coefficient is 0.001."""
    assert shape_of(write(tmp_path, model_type, router_aux_loss_coef=0.3)).mixture.router_loss == 0
    assert shape_of(write(tmp_path, model_type, output_router_logits=True)).mixture.router_loss == 0.001
    set_both = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    assert shape_of(write(tmp_path, model_type, **set_both)).mixture.router_loss == 0.3
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=-0\.3 is not a number of 0 or more"):
        shape_of(write(tmp_path, model_type, **set_both | {"router_aux_loss_coef": -0.3}))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_attention_heads": -3}, "num_attention_heads=-3 is not a positive number"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads=4 does not divide .*_heads=6"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is not a positive number"),
        ({"head_dim": 7}, "even .*7"),
        ({"head_dim": -2}, "head_dim=-2 is not a positive even number"),
        ({"hidden_size": "12"}, "hidden_size"),
        ({"hidden_size": 12.0}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a positive number"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size=0 is not a positive number"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1 is not a positive number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 is not a number of 0 or more"),
        ({"model_type": "granite", "logits_scaling": 0.0}, "describes no model of type granite: ZeroDivisionError"),
        ({"model_type": "granite", "residual_multiplier": float("inf")}, "residual_scale=inf is not a finite number"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "is not a model's configuration"),
        (
            {
                "model_type": "smollm3",
                "use_sliding_window": False,
                "sliding_window": 4,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types has sliding_attention, but use_sliding_window is false",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 is not a positive number"),
        ({"model_type": 3}, "model type `3`"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a number of 0 or more"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"dtype": "float31"}, "float31"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_theta": float("nan")}, "of rope_type=.* is not a positive number"),
        ({"rope_theta": -1.0}, "of rope_type=.* is not a positive number"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "of rope_type=.* is not a positive number"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type="),
        ({"model_type": "olmo3", "rope_parameters": {"a": 1}}, "rope_type="),
        ({"rope_parameters": "default"}, "rope_parameters"),
        (long_factors("long_factor", [1.0]), "long_factor of rope_type=longrope must be a list of 2 .* a list of 1"),
        (long_factors("short_factor", [1.0] * 3), "short_factor of rope_type=longrope must be a list of 2 .* of 3"),
        (long_factors("short_factor", "ab"), "short_factor of rope_type=longrope must be a list of 2 .* is 'ab'"),
        (long_factors("long_factor", [1.0, "2"]), "long_factor of .* has a value that is not a positive number"),
        (long_factors("short_factor", [1.0, -1]), "short_factor of .* has a value that is not a positive number"),
        (long_factors("long_factor", [[1.0], [1.0]]), "long_factor of .* has a value that is not a positive number"),
        (long_factors("attention_factor", "x"), "rope_type=longrope with these settings gives no rotary embedding"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": -1.0}},
            r"rope_type=yarn with these settings gives no rotary embedding \(math domain error\): correct rope",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": -1.0}, r"partial_rotary_factor=-1\.0 is not above 0"),
        ({"model_type": "phi3", "partial_rotary_factor": 3.0}, r"partial_rotary_factor=3\.0 is not .* at most 1"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts=0 is not a positive number"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok=9 is not possible with 8 experts"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "describes no model of type qwen3_moe"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"the weights are quantised \(fp8\): use the model in bf"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, r"quantised \(mxfp4\)"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised: use the model in bf"),
    ],
    ids=str,
)
def test_impossible_models_are_refused(tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        shape_of(write(tmp_path, **changed))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}"])
def test_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration"):
        shape_of(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration"):
        config_for_context(tmp_path, 64, None, None)


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention"] * 3])
def test_layer_types_of_another_number_of_layers_are_refused(tmp_path, types):
    with pytest.raises(ValueError, match=r"layer_types|num_hidden_layers"):
        shape_of(write(tmp_path, "qwen2", layer_types=types))
