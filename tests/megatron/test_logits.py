"""Logits of the megatron-core model against transformers: SmolLM2, and a small random model of each kind."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Mesh, ModelSource
from longctx.parallel.launch import run_ranks
from tests.float64 import KeepFloat64, float64_model
from tests.megatron.kinds import KINDS, SMALL, random_model
from tests.megatron.ranks import all_logits_of_each

LENGTH = 499


def errors_against_transformers(
    folders: Iterable[Path], mesh: Mesh, vocab_size: int, dtype: str = "float32"
) -> list[float]:
    """Return each model's largest difference of the logits, relative to the largest logit."""
    folders, tokens = list(folders), torch.randint(vocab_size, (LENGTH,)).tolist()
    each = run_ranks(mesh.ranks, all_logits_of_each, mesh, folders, tokens, dtype)[0]
    errors = []
    for folder, ours in zip(folders, each, strict=True):
        with torch.inference_mode():
            if dtype == "float64":
                net = float64_model(folder)
                with KeepFloat64():
                    theirs = net(torch.tensor([tokens])).logits[0]
            else:
                net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                theirs = net(torch.tensor([tokens])).logits[0]
        errors.append(float((ours - theirs).abs().max() / theirs.abs().max()))
    return errors


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=3), Mesh(ring=2)], ids=str)
def test_smollm2_matches_transformers(mesh: Mesh, smollm2: tuple[ModelSource, Path]) -> None:
    assert errors_against_transformers([smollm2[1]], mesh, 49152)[0] < 1e-4


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("small")
    return {kind: random_model(kind, folder / kind) for kind in KINDS}


def assert_errors_below(bound: float, mesh: Mesh, models: dict[str, Path], dtype: str = "float32") -> None:
    errors = errors_against_transformers(models.values(), mesh, SMALL["vocab_size"], dtype)
    assert not {kind: error for kind, error in zip(models, errors, strict=True) if error >= bound}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(ring=2), Mesh(ulysses=2, ring=2)], ids=str)
def test_every_kind_of_model_matches_transformers(mesh: Mesh, small_models: dict[str, Path]) -> None:
    assert_errors_below(1e-5, mesh, small_models)


def test_every_kind_of_model_matches_transformers_in_float64(small_models: dict[str, Path]) -> None:
    """An error of float32 size, such as a rounded angle or norm, is 1e-7 or more."""
    assert_errors_below(1e-12, Mesh(), small_models, "float64")


def test_bfloat16_error_is_within_bfloat16_precision(small_models: dict[str, Path], tmp_path: Path) -> None:
    """Rounding can change a router's choice, so the routers of this test choose all experts."""
    mixtures = {
        kind: config.num_local_experts for kind, config in KINDS.items() if hasattr(config, "num_local_experts")
    }
    all_experts = {kind: random_model(kind, tmp_path / kind, num_experts_per_tok=n) for kind, n in mixtures.items()}
    assert_errors_below(0.05, Mesh(ring=2), small_models | all_experts, "bfloat16")
