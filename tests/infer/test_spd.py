"""Models with dropped reductions match the equations' logits and tokens on any mesh, with the expected all-reduces."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Mesh
from longctx.parallel.launch import run_ranks
from tests.infer.spd_ranks import generate_and_count, generate_and_count_each
from tests.megatron.kinds import random_model
from tests.oracle import assert_close
from tests.tiny import tiny_model
from tests.train.spd_oracle import drop

LAYERS, HIDDEN = 2, 36
TOKENS = [(7 * i * i + 3 * i) % 256 for i in range(23)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights so large that dropped reductions change the tokens."""
    return tiny_model(tmp_path_factory.mktemp("model"), max_positions=97, std=0.3)


@pytest.mark.parametrize("dropped", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("mesh", [Mesh(tp=3), Mesh(tp=3, ring=2)], ids=str)
def test_logits_tokens_and_all_reduces_match_the_equations(folder: Path, mesh: Mesh, dropped: tuple[int, ...]) -> None:
    net = drop(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), dropped, mesh.tp)
    with torch.inference_mode():
        ids = torch.tensor([TOKENS])
        exact = net(ids).logits[0]
        for _ in range(3):
            ids = torch.cat([ids, net(ids).logits[:, -1:].argmax(-1)], 1)
    for rank in run_ranks(mesh.ranks, generate_and_count, mesh, folder, TOKENS, dropped):
        assert_close(rank["logits"], exact, 2e-6)
        assert rank["tokens"] == ids[0, len(TOKENS) :].tolist()
        calls = 2 * LAYERS - len(dropped) + 1  # one more for the embedding
        assert rank["prefill"] == (calls, calls * rank["rows"] * HIDDEN * 4)
        assert rank["decode"] == (2 * calls, 2 * calls * HIDDEN * 4), "two tokens, of one row each"


NORMED = ("gemma3", "glm4", "olmo2", "olmo3")  # these normalise the outputs of attention and MLP
KINDS = ("qwen2, with biases", "qwen3", "smollm3", "mistral, a window in all layers", "phi3", "granite", *NORMED)


def test_other_families_match_the_equations(tmp_path: Path) -> None:
    """Logits, tokens and all-reduces; where outputs are normalised, one reduction has the bytes of two."""
    folders = [random_model(kind, tmp_path / kind, eos_token_id=None) for kind in KINDS]
    tokens = [token % 211 for token in TOKENS * 3]
    results, _ = run_ranks(2, generate_and_count_each, Mesh(tp=2), folders, tokens, (1,))
    for kind, folder, result in zip(KINDS, folders, results, strict=True):
        net = drop(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), (1,), 2)
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            assert_close(result["logits"], net(ids).logits[0], 1e-5)
            for _ in range(3):
                ids = torch.cat([ids, net(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert result["tokens"] == ids[0, len(tokens) :].tolist(), kind
        normed, summed = kind in NORMED, 2 * LAYERS * kind.startswith("olmo")  # sums of queries and keys
        calls, sizes = 2 * LAYERS - 1 + 1, 2 * LAYERS - (not normed) + 1
        per_row = sizes * net.config.hidden_size * 4 + summed * 4
        assert result["prefill"] == (calls + summed, len(tokens) * per_row), kind
        assert result["decode"] == (2 * (calls + summed), 2 * per_row), kind
