"""Logits of the mapped model against transformers': SmolLM2 for real, and small models of each kind it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from longctx.parallel.launch import run_ranks
from longctx.schema import Mesh, ModelSource
from tests.megatron.ranks import all_logits

LENGTH = 499
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "vocab_size": 211,
    "max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
KINDS = {
    "tied llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama 3.1": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "qwen2, with biases": Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"} | {"hidden_size": 84}),
    "mistral, a window in all layers": MistralConfig(**SMALL, sliding_window=37),
    "qwen2, a window in the second layer": Qwen2Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"} | {"hidden_size": 84},
        use_sliding_window=True,
        sliding_window=101,
        max_window_layers=1,
    ),
}


def error_against_transformers(folder: Path, mesh: Mesh, vocabulary: int, dtype: Any = "float32") -> float:
    """Largest difference over the largest logit."""
    tokens = torch.randint(vocabulary, (LENGTH,)).tolist()
    ours = run_ranks(mesh.ranks, all_logits, mesh, folder, tokens, dtype)[0]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=3), Mesh(ring=2)], ids=str)
def test_smollm2(mesh: Mesh, smollm2: tuple[ModelSource, Path]) -> None:
    assert error_against_transformers(smollm2[1], mesh, 49152) < 1e-4


@pytest.fixture(scope="session", params=KINDS)
def small_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, in several files as large ones come."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(KINDS[request.param])
    for parameter in model.parameters():  # biases and norms too: what is left at its default is not tested
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(ring=2), Mesh(ulysses=2, ring=2)], ids=str)
def test_every_kind_of_model(mesh: Mesh, small_model: Path) -> None:
    assert error_against_transformers(small_model, mesh, SMALL["vocab_size"]) < 1e-5


def test_bfloat16_is_as_good_as_bfloat16_gets(small_model: Path) -> None:
    assert error_against_transformers(small_model, Mesh(ring=2), SMALL["vocab_size"], "bfloat16") < 0.05
