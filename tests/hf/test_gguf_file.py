"""A GGUF file becomes a folder with the same tensors and tokenizer; one that would lose a part is refused."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from longctx.config import ModelSource
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.gguf_file import convert
from longctx.hf.locate import locate
from longctx.hf.scratch import bytes_tokenizer

CONFIG = Qwen2Config(
    vocab_size=258, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=97, rms_norm_eps=3e-5, tie_word_embeddings=True,
    bos_token_id=None, eos_token_id=257,
)  # fmt: skip
# Names in the file, from those of transformers.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(5)
    state = Qwen2ForCausalLM(CONFIG).state_dict()
    return {name: torch.randn_like(x) for name, x in state.items() if name != "lm_head.weight"}


def write(file: Path, tensors: Mapping[str, Tensor], ends: Mapping[str, int] | None = None, **metadata: float) -> Path:
    """Write a GGUF file of `CONFIG` with a byte tokenizer; ``metadata`` has more keys, "." as "__".

    ``ends`` has end tokens besides that of a text, by their names in keys.
    """
    writer = GGUFWriter(file, "qwen2")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(7e4)
    for key, value in metadata.items():
        writer.add_float32(key.replace("__", "."), value)
    tokenizer = bytes_tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokenizer.convert_ids_to_tokens(i) for i in range(256)] + ["ab", "<end>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    for name, token in (ends or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for name, tensor in tensors.items():
        writer.add_tensor(reduce(lambda x, pair: x.replace(*pair), NAMES.items(), name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def source_of(file: Path) -> ModelSource:
    return ModelSource("tiny", source=str(file), cache=str(file.parent / "cache"))


def test_folder_has_the_tensors_and_the_tokenizer(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    model, lines = source_of(write(tmp_path / "tiny.gguf", tensors)), list[str]()
    folder = locate(model, lines.append)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    shape = shape_of(folder)
    assert (shape.tied, shape.heads, shape.max_positions, shape.end_tokens) == (True, 6, 97, (257,))
    assert tokenizer_of(folder)("Zürich, ab")["input_ids"] == [*"Zürich, ".encode(), 256]
    assert locate(model, lines.append) == folder
    assert len(lines) == 1 and "converting tiny.gguf" in lines[0]
    write(tmp_path / "tiny.gguf", {name: 2 * x for name, x in tensors.items()})
    assert locate(replace(model)) != folder


def test_all_end_tokens_of_the_file_end_an_answer(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", tensors, ends={"eot": 256, "eom": 257})
    assert shape_of(locate(source_of(file))).end_tokens == (257, 256)


def test_folder_of_an_earlier_conversion_is_not_used_again(tensors, tmp_path, monkeypatch) -> None:
    model = source_of(write(tmp_path / "tiny.gguf", tensors))
    monkeypatch.setattr("longctx.hf.locate.CONVERSION", 1)
    earlier = locate(model)
    monkeypatch.undo()
    assert locate(model) != earlier


@pytest.mark.parametrize(
    ("extra", "metadata", "words"),
    [
        ({"rope_freqs.weight": torch.ones(2)}, {}, "has tensors that transformers does not read"),
        ({}, {"qwen2__attention__sliding_window": 37.0}, r"does not read qwen2\.attention\.sliding_window from GGUF"),
        (
            {},
            {"qwen2__rope__dimension_count": 2.0},
            "rotates only a part of each head, which transformers does not read from GGUF files",
        ),
        ({}, {"qwen2__rope__scaling__factor": 4.0}, r"does not read qwen2\.rope\.scaling\.factor from GGUF"),
        ({"blk.1.attn_extra.weight": torch.ones(3)}, {}, "has tensors that transformers does not read"),
    ],
)
def test_file_of_which_a_part_would_be_left_out_is_refused(tensors, tmp_path, extra, metadata, words) -> None:
    model = source_of(write(tmp_path / "tiny.gguf", tensors | extra, **metadata))
    with pytest.raises(ValueError, match=words):
        locate(model)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny.lock"]


def test_refused_rotation_leaves_no_weights(tensors, tmp_path) -> None:
    file = write(tmp_path / "tiny.gguf", tensors, qwen2__rope__dimension_count=2.0)
    with pytest.raises(ValueError, match="rotates only a part of each head"):
        convert(file, tmp_path / "folder", lambda _: None)
    assert not (tmp_path / "folder" / "model.safetensors").exists()


def test_file_without_a_tensor_is_refused(tensors, tmp_path) -> None:
    fewer = {name: x for name, x in tensors.items() if "layers.1.mlp.up" not in name}
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight; use the model's Hugging"):
        locate(source_of(write(tmp_path / "tiny.gguf", fewer)))


def test_file_that_is_no_gguf_is_refused(tmp_path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUX" + bytes(99))
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be converted: .*; use the model's Hugging Face folder"):
        locate(source_of(tmp_path / "tiny.gguf"))
