"""Folders without weights, written from settings; and folders with another context that link to the weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from longctx.config import ModelSource
from longctx.hf.checkpoint import tensor_files
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.hf.scratch import config_for_context
from tests.hf.configs import LLAMA3, SIZES, cached_folders, save_config
from tests.megatron.kinds import random_model


@pytest.fixture
def scratch(tmp_path):
    config = {"model_type": "llama", **SIZES, "tie_word_embeddings": True}
    del config["eos_token_id"]
    return ModelSource("new", config=config, tokenizer="bytes", cache=str(tmp_path / "cache"))


def test_scratch_model_is_a_folder_without_weights(scratch):
    folder = locate(scratch)
    shape = shape_of(folder)
    assert (shape.layers, shape.hidden, shape.ffn, shape.vocab_size, shape.max_positions) == (5, 60, 59, 307, 97)
    assert (shape.tied, shape.end_tokens) == (True, (256,))
    assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).config.architectures == [
        "LlamaForCausalLM"
    ]
    with pytest.raises(ValueError, match=r"this model has no weights yet, train it with recipes\.pretrain"):
        tensor_files(folder)


def test_tokens_of_a_scratch_model_are_bytes(scratch):
    tokenizer = tokenizer_of(locate(scratch))
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (257, 256, None)
    for text in (bytes(range(128)).decode(), "".join(map(chr, range(128, 0x900, 7))), " isn't  it?\r\n\n", "􏿿"):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [97, 256, 98]


def test_each_config_has_its_own_folder_in_any_field_order(scratch, monkeypatch):
    first = locate(scratch)
    written = (first / "config.json").stat()
    reordered = replace(scratch, config=dict(reversed(scratch.config.items())))
    assert locate(reordered) == first and (first / "config.json").stat() == written, "written once"
    assert locate(replace(scratch, config=scratch.config | {"num_hidden_layers": 3})) != first
    assert len(cached_folders(scratch)) == 2


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"model_type": "alpaca"}, "model_type=alpaca is not a language model"),
        ({"hidden_sise": 3}, r"model\.config\.hidden_sise: a model of type llama has no such field"),
        ({"vocab_size": 251}, "vocab_size=251: the tokenizer has 257 tokens"),
        ({"num_hidden_layers": 0}, "model.config.num_hidden_layers=0: use a whole number, 1 or more"),
        ({"num_hidden_layers": -1}, "model.config.num_hidden_layers=-1: use a whole number"),
        ({"intermediate_size": 0}, "model.config.intermediate_size=0: use a whole number"),
        ({"hidden_size": "wide"}, "describes no model of type llama.*hidden_size"),
        ({"num_attention_heads": 0}, "describes no model of type llama"),
        ({"dtype": "float31"}, "describes no model of type llama"),
    ],
    ids=str,
)
def test_invalid_config_is_refused_and_leaves_no_folder(scratch, field, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        locate(replace(scratch, config=scratch.config | field))
    assert not cached_folders(scratch)


@pytest.mark.parametrize(
    ("changes", "positions", "rope"),
    [
        ({"max_positions": 307}, 307, None),
        ({"rope_theta": 77777.0}, 97, {"rope_type": "default", "rope_theta": 77777.0}),
        ({"rope_factor": 3.0}, 291, {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}),
        (
            {"rope_factor": 4.0, "rope_type": "yarn"},
            388,
            {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 97,
            },
        ),
        (
            {"rope_factor": 3.0, "max_positions": 211},
            211,
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
        ),
    ],
    ids=str,
)
def test_changed_context_links_weights_and_edits_config(tmp_path, changes, positions, rope):
    plain = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    source = save_config(tmp_path / "source", plain)
    save_file({"x": torch.ones(2)}, tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")  # as in the hub's own cache
    model = ModelSource("m", source=str(source), cache=str(tmp_path / "cache"), **changes)
    folder = locate(model)
    expected = save_config(tmp_path, LlamaConfig(**SIZES, rope_parameters=rope or plain.rope_parameters))
    assert (shape_of(folder).max_positions, shape_of(folder).rotaries) == (positions, shape_of(expected).rotaries)
    (weights,) = set(tensor_files(folder).values())
    assert weights.is_symlink() and weights.resolve() == tmp_path / "blob"
    assert locate(model) == folder and shape_of(source).max_positions == 97


def test_scaled_rotary_embedding_is_not_scaled_again(tmp_path):
    source = save_config(tmp_path / "source", LlamaConfig(**SIZES, rope_parameters=LLAMA3))
    with pytest.raises(ValueError, match=r"model\.rope_factor=2\.0: .* type llama3 already; use model\.rope_theta"):
        locate(ModelSource("m", source=str(source), cache=str(tmp_path / "cache"), rope_factor=2.0))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_longer_context_leaves_a_scaled_rotary_embedding_as_it_is(rope, tmp_path):
    """transformers derives a missing original length from the longest context."""
    source = save_config(tmp_path / "source", LlamaConfig(**SIZES))
    values = json.loads((source / "config.json").read_text())
    del values["rope_parameters"]
    (source / "config.json").write_text(json.dumps({**values, "rope_scaling": rope, "rope_theta": 10_000.0}))
    longer = shape_of(locate(ModelSource("m", source=str(source), cache=str(tmp_path / "cache"), max_positions=388)))
    assert longer.max_positions == 388 and longer.rotaries == shape_of(source).rotaries


def test_longer_context_changes_one_field_if_the_original_length_is_stated(tmp_path):
    """The file's fingerprint stays that of version 0.2, and with it sessions, runs and stored answers."""
    source = save_config(tmp_path / "source", LlamaConfig(**SIZES, rope_parameters=LLAMA3))
    assert config_for_context(source, 388, None, None) == {"max_position_embeddings": 388}
    plain = save_config(tmp_path / "plain", LlamaConfig(**SIZES))
    assert config_for_context(plain, 388, None, None) == {"max_position_embeddings": 388}


def test_longer_context_leaves_longrope_as_it_is(tmp_path):
    source = random_model("phi3, longrope", tmp_path / "source")
    longer = shape_of(locate(ModelSource("m", source=str(source), cache=str(tmp_path / "cache"), max_positions=3001)))
    assert longer.max_positions == 3001 and longer.rotaries == shape_of(source).rotaries


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_factor_that_a_family_does_not_take_is_refused_before_a_folder_is_made(tmp_path, rope_type):
    source, cache = random_model("phi3", tmp_path / "source"), tmp_path / "cache"
    model = ModelSource("m", source=str(source), cache=str(cache), rope_factor=2.0, rope_type=rope_type)
    with pytest.raises(ValueError, match=r"phi3 takes neither a linear factor nor YaRN; use model\.rope_theta"):
        locate(model)
    assert not cache.exists() or not any(cache.iterdir())


def test_model_has_exactly_one_source(scratch):
    with pytest.raises(ValueError, match=r"either model\.source, .*model\.wheel.*model\.config and model\.tokenizer"):
        replace(scratch, source="somewhere")
    with pytest.raises(ValueError, match="either"):
        replace(scratch, tokenizer=None)


def test_changed_context_follows_every_file_of_the_source(tmp_path):
    """Edited, added and removed after the folder was made: nothing in it is an old copy."""
    source = save_config(tmp_path / "source", LlamaConfig(**SIZES))
    (source / "tokenizer.json").write_text("old")
    (source / "vocab.json").write_text("old")
    model = ModelSource("m", source=str(source), cache=str(tmp_path / "cache"), max_positions=307)
    assert shape_of(locate(model)).end_tokens == (13,)
    (source / "tokenizer.json").write_text("new")
    (source / "generation_config.json").write_text('{"eos_token_id": [256, 155]}')
    (source / "vocab.json").unlink()
    folder = locate(model)
    assert (folder / "tokenizer.json").read_text() == "new" and shape_of(folder).end_tokens == (256, 155)
    assert not (folder / "vocab.json").exists() and shape_of(folder).max_positions == 307
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert shape_of(locate(model)).end_tokens == (7,)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": 1}', '{"version": "1.0"}'])
def test_damaged_tokenizer_is_refused(tmp_path, content):
    save_config(tmp_path, LlamaConfig(**SIZES))
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="has no tokenizer that transformers can read"):
        tokenizer_of(tmp_path)


YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10_000.0}


def write_without_defaults(source: Path, **stated: object) -> Path:
    """Write ``stated`` to the config.json in ``source``, which transformers' own values of rope_parameters leave."""
    values = json.loads((source / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling"):
        values.pop(name, None)
    values.pop("original_max_position_embeddings", None)
    (source / "config.json").write_text(json.dumps({**values, **stated}))
    return source


@pytest.mark.parametrize("nested", [True, False])
def test_longer_context_needs_the_original_length_of_each_type_of_layers(tmp_path, nested):
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    by_type = {"rope_parameters": {"full_attention": YARN, "sliding_attention": plain}}
    stated = by_type if nested else {"rope_scaling": YARN, "rope_theta": 10_000.0}
    source = write_without_defaults(random_model("olmo3", tmp_path / "source"), **stated)
    with pytest.raises(
        ValueError, match="full_attention in this model has no original_max_position_embeddings; add it"
    ):
        config_for_context(source, 3001, None, None)
    YARN_STATED = {**YARN, "original_max_position_embeddings": 97}
    stated = {"rope_parameters": {"full_attention": YARN_STATED, "sliding_attention": plain}}
    assert config_for_context(write_without_defaults(source, **stated), 3001, None, None).keys() == {
        "max_position_embeddings"
    }


def test_original_length_of_longrope_is_the_class_s_if_the_file_has_none(tmp_path):
    source = random_model("phi3, longrope", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    rope = {name: value for name, value in config["rope_parameters"].items() if name.endswith("_factor")}
    source = write_without_defaults(source, rope_scaling={"type": "longrope", **rope}, max_position_embeddings=8192)
    fields = config_for_context(source, 16384, None, None)
    assert fields["rope_parameters"]["original_max_position_embeddings"] == 4096
    assert fields["rope_parameters"]["factor"] == 2


def test_yarn_replaces_an_original_length_at_the_top_of_the_file(tmp_path):
    """transformers prefers the one at the top, which a model without scaling may have for no reason."""
    source = save_config(tmp_path / "source", LlamaConfig(**SIZES))
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "original_max_position_embeddings": 23}))
    longer = locate(ModelSource("m", source=str(source), cache=str(tmp_path / "c"), rope_factor=4.0, rope_type="yarn"))
    rope = {**YARN, "factor": 4.0, "original_max_position_embeddings": 97}
    expected = save_config(tmp_path / "expected", LlamaConfig(**SIZES, rope_parameters=rope))
    assert shape_of(longer).rotaries == shape_of(expected).rotaries
