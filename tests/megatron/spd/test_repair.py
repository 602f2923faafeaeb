"""A model taken block by block: transformers' loss; grouped, the same function; repaired, a smaller error."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Mesh, Repair
from longctx.parallel.launch import run_ranks
from tests.megatron.kinds import random_model
from tests.megatron.spd.repair_ranks import guessed, learned, predictions, states
from tests.oracle import assert_close

SIZES = {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 90}
HOW = Repair(("SB", "ESB"), ("SB", "ESB"), (), "neurons", "teacher", False, 96, 19, 7, 5, 2, 3, 1e-3)
FITTED = replace(HOW, fit=("ESB",), sequences=384, calibration_sequences=96, lr=2e-4)


@pytest.fixture(scope="module", params=["tied llama", "qwen2, with biases", "mistral, a window in all layers"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wider = {"hidden_size": 168} if "qwen2" in request.param else {}  # its heads' width follows from that
    return random_model(request.param, tmp_path_factory.mktemp("model"), **SIZES, **wider)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("grouping", ["neurons", "shards"])
def test_the_losses_are_those_of_transformers_and_grouping_leaves_the_function(
    folder: Path, tp: int, grouping: str
) -> None:
    ranks = run_ranks(tp, states, folder, None, grouping, ())
    draw = torch.Generator().manual_seed(31)
    ids = torch.randint(211, (7, 20), generator=draw)
    mask = torch.rand(7, 19, generator=draw) < 0.8
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(ids[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    for rank in ranks:
        assert rank["loss"] == pytest.approx(float(losses[mask].sum()), rel=2e-6)
        assert rank["moved"] >= 3, "something was moved"
        assert_close(rank["grouped"], rank["y"].double(), 2e-6)


def test_a_repaired_block_errs_less_on_text_that_it_has_not_learned_from(folder: Path) -> None:
    for rank in run_ranks(3, states, folder, HOW, "neurons", ()):
        zero_shot, grouped, fitted, distilled = rank["errors"]
        assert distilled < fitted == grouped < zero_shot


def test_a_fitted_block_errs_less_before_it_has_learned_anything(folder: Path) -> None:
    for rank in run_ranks(3, states, folder, FITTED, "neurons", ()):
        zero_shot, _, fitted, distilled = rank["errors"]
        assert distilled < fitted < zero_shot / 3


def test_neurons_are_placed_by_what_is_left_once_they_are_fitted(folder: Path) -> None:
    """Neuron by neuron, rank by rank: with the guess in the weights, where `neuron_errors` has it in what enters."""

    def activations(normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up = (normed.double() @ weight.T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    ranks = run_ranks(3, guessed, folder)
    found = []
    for rank in ranks:
        (whole, *seen), up = rank["normed"], rank["up"].double()
        exact, square = activations(whole, up), rank["leaving"].double().square().sum(-1, keepdim=True)
        off = [activations(n, up @ guess.double()) - exact for n, guess in zip(seen, rank["guesses"], strict=True)]
        column = rank["down"].double().square().sum(0)
        found.append(torch.stack([(each.square() / square).mean((0, 1)) * column for each in off], 1))
        assert all(torch.equal(*pair) for pair in zip(rank["guesses"], ranks[0]["guesses"], strict=True))
    assert_close(ranks[0]["errors"], torch.cat(found), 1e-5)


def test_norms_are_the_same_on_every_rank_unless_they_are_its_own(folder: Path) -> None:
    shared = [rank["norms"] for rank in run_ranks(3, states, folder, HOW, "neurons", ())]
    own = [rank["norms"] for rank in run_ranks(3, states, folder, replace(HOW, own_norms=True), "neurons", ())]
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])
    assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("tp", [1, 3])
def test_the_divergence_of_shares_is_that_of_whole_predictions(folder: Path, tp: int) -> None:
    """And so is its gradient: 211 tokens are no multiple of 3."""
    unembedding = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).get_output_embeddings().weight
    for rank in run_ranks(tp, predictions, folder):
        got, wanted = rank["got"].double().requires_grad_(), rank["wanted"].double()
        q, p = got.log_softmax(-1), wanted.log_softmax(-1)
        rows = (p.exp() * (p - q)).sum(-1)
        assert_close(rank["rows"], rows.detach(), 2e-6)
        (rows * rank["weights"]).sum().backward()
        assert_close(rank["gradient"], got.grad @ unembedding.detach(), 2e-6)


def test_blocks_that_learn_together_predict_more_like_the_model(folder: Path, tmp_path: Path) -> None:
    for rank in run_ranks(3, learned, folder, Mesh(tp=3), True, tmp_path):
        assert 0 < rank["after"] < 0.99 * rank["before"], "with all of them dropped"
        assert rank["alone"] == pytest.approx(rank["only"], rel=1e-4) and min(rank["alone"].values()) > 0


def test_learning_together_is_resumed_and_shared_by_data_parallel_ranks(folder: Path, tmp_path: Path) -> None:
    whole = run_ranks(2, learned, folder, Mesh(tp=2), True, tmp_path)[0]
    resumed = run_ranks(2, learned, folder, Mesh(tp=2), False, tmp_path)[0]
    assert resumed["losses"] == whole["losses"]
    assert all(torch.equal(resumed["tensors"][name], tensor) for name, tensor in whole["tensors"].items())
    both = Mesh(tp=2, dp=2)
    shared, stopped = (run_ranks(4, learned, folder, both, at_once, tmp_path / "dp") for at_once in (True, False))
    # Of the first step alone: Adam makes as much of a gradient that rounding has changed as of any other.
    assert shared[0]["losses"][0] == pytest.approx(whole["losses"][0], rel=2e-6)
    for name, gradient in whole["gradients"].items():
        assert_close(shared[0]["gradients"][name], gradient.double(), 2e-5)
    for name, tensor in shared[0]["tensors"].items():
        assert all(torch.equal(rank["tensors"][name], tensor) for rank in (*shared, *stopped))
