"""Settings of generation_config.json: those that change transformers' text are named, since they are not applied."""

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from longctx.hf.config import shape_of
from longctx.hf.generation import _GREEDY, _SAMPLED, end_tokens, unapplied_settings, unread_end_tokens
from tests.hf.test_tensors import SIZES

PROMPT = torch.tensor([[3, 5, 7, 3, 5, 11, 3, 5]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.4)).eval()


def greedy(model, **settings):
    """Return transformers' greedy ids with ``settings`` in generation_config.json."""
    config = GenerationConfig(**{"max_new_tokens": 9, "pad_token_id": 0, **settings})
    return model.generate(PROMPT, generation_config=config, do_sample=False)[0].tolist()


def test_settings_that_change_the_greedy_text_are_named(model, tmp_path):
    plain = greedy(model)
    first = plain[PROMPT.shape[1]]
    for name, value in {
        "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "forced_eos_token_id": 13, "forced_bos_token_id": None,
        "suppress_tokens": [first], "begin_suppress_tokens": [first], "bad_words_ids": [[first]],
        "sequence_bias": [[[first], -90.0]], "num_beams": 3,
    }.items():  # fmt: skip
        settings = {name: value}
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        changes = value is not None and greedy(model, **settings) != plain
        assert unapplied_settings(tmp_path, sampled=False) == (settings if changes else {}), name


def test_settings_that_change_nothing_are_not_named(model, tmp_path):
    neutral = {
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "num_beams": 1,
        "suppress_tokens": None, "do_sample": False, "max_length": 20, "renormalize_logits": True, "use_cache": True,
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(neutral))
    assert unapplied_settings(tmp_path, sampled=False) == {} == unapplied_settings(tmp_path, sampled=True)
    assert greedy(model, **neutral) == greedy(model)


def test_settings_of_sampling_are_named_if_tokens_are_drawn(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 20, "min_p": 0.1, "temperature": 2}')
    assert unapplied_settings(tmp_path, sampled=False) == {}
    assert unapplied_settings(tmp_path, sampled=True) == {"top_k": 20, "min_p": 0.1}
    (tmp_path / "generation_config.json").write_text("{}")
    assert unapplied_settings(tmp_path, sampled=True) == {}


@pytest.mark.parametrize("in_generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": [5, 7]}], ids=str)
@pytest.mark.parametrize("in_config", [{}, {"eos_token_id": None}, {"eos_token_id": 3}], ids=str)
def test_settings_come_from_the_same_file_as_in_transformers(model, tmp_path, in_config, in_generation):
    """config.json's count only without a generation_config.json; the class's default of eos_token_id never does."""
    model.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    del stated["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps({**stated, "repetition_penalty": 5.0, **in_config}))
    (tmp_path / "generation_config.json").unlink()
    if in_generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(in_generation))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).generation_config
    ends = end_tokens(tmp_path)
    assert list(ends) == ([] if theirs.eos_token_id is None else np.atleast_1d(theirs.eos_token_id).tolist())
    assert unapplied_settings(tmp_path, sampled=False).get("repetition_penalty") == theirs.repetition_penalty
    is_hidden = in_generation is not None and not ends
    assert unread_end_tokens(tmp_path) == (in_config.get("eos_token_id") if is_hidden else None)


def test_every_setting_of_transformers_is_known():
    """A setting that a later transformers adds may change the text: this code must learn it first."""
    unread = {
        # The number of tokens, and the tokens that end a text: `max_new_tokens` here, and `end_tokens`.
        "max_length", "max_new_tokens", "eos_token_id", "bos_token_id", "pad_token_id",
        # Replaced by the settings in `sampling`.
        "do_sample", "temperature", "top_p",
        # They change no greedy text: speed, memory, output, beams, speculation, encoder-decoder models.
        "early_stopping", "length_penalty", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
        "renormalize_logits", "remove_invalid_values", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "decoder_start_token_id",
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
        "continuous_batching_config", "low_memory", "prefill_chunk_size", "use_mtp", "_from_model_config",
        "transformers_version",
    }  # fmt: skip
    assert {*GenerationConfig().to_dict()} - unread == {*_GREEDY, *_SAMPLED}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}', '{"eos_token_id": true}']
)
def test_damaged_generation_config_is_refused(tmp_path, content):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=r"generation_config\.json cannot be read.*; correct or remove the file|eos_token_id=.* is not a token",
    ):
        shape_of(tmp_path)
