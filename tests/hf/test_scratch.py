"""Folders that are described, not fetched; and models whose context is to be another."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from longctx.config import ModelSource
from longctx.hf.checkpoint import tensor_files
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from tests.hf.test_locate import LLAMA3, SIZES, kept, saved


@pytest.fixture
def described(tmp_path):
    config = {"model_type": "llama", **SIZES, "tie_word_embeddings": True}
    del config["eos_token_id"]
    return ModelSource("new", config=config, tokenizer="bytes", cache=str(tmp_path / "cache"))


def test_a_described_model_is_a_folder_without_weights(described):
    folder = locate(described)
    shape = shape_of(folder)
    assert (shape.layers, shape.hidden, shape.ffn, shape.vocab_size, shape.max_positions) == (5, 60, 59, 307, 97)
    assert (shape.tied, shape.end_tokens) == (True, (256,))
    assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).config.architectures == [
        "LlamaForCausalLM"
    ]
    with pytest.raises(ValueError, match=r"this model has no weights yet, train it with recipes\.pretrain"):
        tensor_files(folder)


def test_a_described_models_tokens_are_bytes(described):
    tokenizer = tokenizer_of(locate(described))
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (257, 256, None)
    for text in (bytes(range(128)).decode(), "".join(map(chr, range(128, 0x900, 7))), " isn't  it?\r\n\n", "􏿿"):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [97, 256, 98]


def test_a_description_has_one_folder_and_another_another(described, monkeypatch):
    first = locate(described)
    made = (first / "config.json").stat()
    turned = replace(described, config=dict(reversed(described.config.items())))
    assert locate(turned) == first and (first / "config.json").stat() == made, "made once, in whatever order told"
    assert locate(replace(described, config=described.config | {"num_hidden_layers": 3})) != first
    assert len(kept(described)) == 2


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"model_type": "alpaca"}, "model_type=alpaca is no language model"),
        ({"hidden_sise": 3}, r"model\.config\.hidden_sise: a model of type llama has no such field"),
        ({"vocab_size": 251}, "vocab_size=251: the tokenizer has 257 tokens"),
        ({"hidden_size": "wide"}, "describes no model of type llama.*hidden_size"),
        ({"num_attention_heads": 0}, "describes no model of type llama"),
    ],
    ids=str,
)
def test_a_description_of_nothing_is_refused_and_nothing_kept(described, field, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        locate(replace(described, config=described.config | field))
    assert not kept(described)


@pytest.mark.parametrize(
    ("asked", "positions", "rope"),
    [
        ({"max_positions": 307}, 307, None),
        ({"rope_theta": 77777.0}, 97, {"rope_type": "default", "rope_theta": 77777.0}),
        ({"rope_factor": 3.0}, 291, {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}),
        (
            {"rope_factor": 3.0, "max_positions": 211},
            211,
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
        ),
    ],
    ids=str,
)
def test_of_another_context_config_is_changed_and_weights_are_links(tmp_path, asked, positions, rope):
    plain = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    source = saved(tmp_path / "source", plain)
    save_file({"x": torch.ones(2)}, tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")  # as in the hub's own cache
    model = ModelSource("m", source=str(source), cache=str(tmp_path / "cache"), **asked)
    folder = locate(model)
    expected = saved(tmp_path, LlamaConfig(**SIZES, rope_parameters=rope or plain.rope_parameters))
    assert (shape_of(folder).max_positions, shape_of(folder).rotary) == (positions, shape_of(expected).rotary)
    (weights,) = set(tensor_files(folder).values())
    assert weights.is_symlink() and weights.resolve() == tmp_path / "blob"
    assert locate(model) == folder and shape_of(source).max_positions == 97


def test_a_rotary_embedding_is_not_scaled_twice(tmp_path):
    source = saved(tmp_path / "source", LlamaConfig(**SIZES, rope_parameters=LLAMA3))
    with pytest.raises(ValueError, match=r"model\.rope_factor=2\.0: .* type llama3 already; use model\.rope_theta"):
        locate(ModelSource("m", source=str(source), cache=str(tmp_path / "cache"), rope_factor=2.0))


def test_a_model_comes_in_one_way(described):
    with pytest.raises(ValueError, match=r"either model\.source, .*model\.wheel.*model\.config and model\.tokenizer"):
        replace(described, source="somewhere")
    with pytest.raises(ValueError, match="either"):
        replace(described, tokenizer=None)
