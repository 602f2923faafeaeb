"""Logits of the megatron-core model against transformers: SmolLM2, and a small random model of each kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Mesh, ModelSource
from longctx.parallel.launch import run_ranks
from tests.megatron.kinds import KINDS, SMALL, random_model
from tests.megatron.ranks import all_logits

LENGTH = 499


def error_against_transformers(folder: Path, mesh: Mesh, vocab_size: int, dtype: Any = "float32") -> float:
    """Return the largest difference of the logits, relative to the largest logit."""
    tokens = torch.randint(vocab_size, (LENGTH,)).tolist()
    ours = run_ranks(mesh.ranks, all_logits, mesh, folder, tokens, dtype)[0]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=3), Mesh(ring=2)], ids=str)
def test_smollm2_matches_transformers(mesh: Mesh, smollm2: tuple[ModelSource, Path]) -> None:
    assert error_against_transformers(smollm2[1], mesh, 49152) < 1e-4


@pytest.fixture(scope="session", params=KINDS)
def small_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(request.param, tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(ring=2), Mesh(ulysses=2, ring=2)], ids=str)
def test_every_kind_of_model_matches_transformers(mesh: Mesh, small_model: Path) -> None:
    assert error_against_transformers(small_model, mesh, SMALL["vocab_size"]) < 1e-5


def test_bfloat16_error_is_within_bfloat16_precision(small_model: Path) -> None:
    assert error_against_transformers(small_model, Mesh(ring=2), SMALL["vocab_size"], "bfloat16") < 0.05
