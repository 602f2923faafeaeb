"""The check of a folder's weights against its config.json, before any rank reads them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longctx.hf.checkpoint import ADAPTED, tensor_files, tensor_headers
from longctx.hf.config import family_in, shape_of
from longctx.hf.tensors import refuse_other_tensors, stored_shapes
from tests.megatron.kinds import KINDS, random_model

SIZES = {
    "vocab_size": 53, "hidden_size": 12, "intermediate_size": 11, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 31, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    """A tied model in one file."""
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path)
    return tmp_path


def check(folder, **options):
    refuse_other_tensors(folder, shape_of(folder), **options)


def edit(folder, change):
    """Apply ``change`` to the tensors of ``folder``, a dict that it edits."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder):
    """Write the tensors of ``folder`` to two files and an index, and return the first of them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: x for name, x in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_transformers(tmp_path, kind):
    expected = {name: header.shape for name, header in tensor_headers(random_model(kind, tmp_path)).items()}
    assert stored_shapes(family_in(tmp_path), shape_of(tmp_path)) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(UP), f"lacks 1 tensors .*{UP}: use a complete checkpoint"),
        (lambda tensors: tensors.update(extra=torch.ones(3)), r"no part of the model takes: \['extra'\]"),
        (lambda tensors: tensors.update({"dropped.x": torch.ones(3)}), r"no part of the model takes"),
        (lambda tensors: tensors.update({f"dropped.{UP}": tensors[UP].clone()}), r"no part of the model takes"),
        (lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}), r"shape \(12, 11\).*requires \(11, 12\)"),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}), f"{UP} is F8_E4M3: use an unquant"),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}), f"{UP} is I8: use an unquantised"),
        (lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}), "differs from the embedding.*set it to false"),
        (lambda tensors: tensors.update({HEAD: torch.ones(2, 3)}), r"lm_head\.weight has shape"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, 0.5])}),
            r"rotary_emb\.inv_freq are not those of its config\.json",
        ),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(folder, change, words):
    check(folder)
    edit(folder, change)
    with pytest.raises(ValueError, match=words):
        check(folder)


def test_last_rows_of_a_head_are_compared(folder, monkeypatch):
    """In pieces of 7 of 53 rows, only the last row differs."""
    monkeypatch.setattr("longctx.hf.tensors._ROWS", 7)
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    check(folder)
    edit(folder, lambda tensors: tensors[HEAD][-1].mul_(2))
    with pytest.raises(ValueError, match="differs from the embedding"):
        check(folder)


def test_a_head_that_differs_is_what_transformers_uses(folder):
    """With the stored head, transformers gives other greedy ids than with the embedding."""
    ids = torch.arange(7)[None]
    tied = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.argmax(-1)
    edit(folder, lambda tensors: tensors.update({HEAD: -tensors[EMBEDDING]}))
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits.argmax(-1), tied)
    config = json.loads((folder / "config.json").read_text())
    stored = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    check(folder)  # as the message advises
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, stored)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_stored_frequencies_of_the_model_are_accepted(folder, scale):
    """Before linear scaling (4) or without it (1), in the precision in which they were stored."""
    stored = (scale * torch.tensor(shape_of(folder).rotaries[0].frequencies)).to(torch.float16)
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": stored}))
    check(folder)


def test_stored_frequencies_are_not_compared_if_the_settings_replace_them(folder):
    edit(folder, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.tensor([1.0, 0.5])}))
    check(folder, rotary_changed=True)


def test_norms_of_dropped_blocks_may_have_a_copy_for_each_rank(folder):
    name = "dropped.model.layers.1.input_layernorm.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(36), f"dropped.{UP}": tensors[UP].clone()}))
    (folder / "model.safetensors").rename(folder / ADAPTED)
    check(folder, norm_copies=3)
    with pytest.raises(ValueError, match=r"shape \(36,\)"):
        check(folder)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"PEFT adapter.*merge it first"):
        check(folder)


def test_files_and_index_hold_the_same_tensors(folder):
    file = split(folder)
    check(folder)
    tensors = load_file(file)
    save_file({**tensors, "extra": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"00001-of-00002.*do not agree on extra"):
        check(folder)
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(ValueError, match=r"00001-of-00002.*do not agree on"):
        check(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is missing, although the index names it"):
        check(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: whole[:-1], "truncated or damaged"),
        (lambda whole: whole[:100], "truncated or damaged"),
        (lambda whole: whole[:5], "truncated or damaged"),
        (lambda whole: b"", "truncated or damaged"),
        (lambda whole: whole + b"x", "truncated or damaged"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "run git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_damaged_file_is_named(folder, name, content, words):
    if name != "model.safetensors":
        split(folder)
    (folder / name).write_bytes(content((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is .*{words}"):
        check(folder)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 3}}',
                                   '{"weight_map": {"x": "../model.safetensors"}}'])  # fmt: skip
def test_damaged_index_is_refused(folder, index):
    split(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        check(folder)


def test_a_single_file_is_read_before_an_index(folder):
    """As in transformers, which reads the single file; both in one folder is what a re-save leaves."""
    new = load_file(folder / "model.safetensors")
    split(folder)
    save_file({name: x + 1 for name, x in new.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    check(folder)
    read = load_file(tensor_files(folder)[UP])[UP]
    assert torch.equal(read, model.state_dict()[UP]) and torch.equal(read, new[UP] + 1)


def test_weights_of_two_models_are_refused(folder):
    save_file({"x": torch.ones(2)}, folder / "spd.safetensors")
    with pytest.raises(ValueError, match=r"two models, spd\.safetensors and model\.safetensors: move one"):
        check(folder)
