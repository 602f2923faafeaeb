"""Blocks run one at a time have transformers' loss; regrouping keeps the function; repair reduces the error."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Mesh, Repair
from longctx.megatron.spd import joint
from longctx.parallel.launch import run_ranks
from tests.disk import full_disk
from tests.megatron.kinds import random_model
from tests.megatron.spd.repair_ranks import measure_divergence, measure_neuron_errors, run_repair, train_jointly
from tests.oracle import assert_close

KV_HEADS = 6
SIZES = {"num_attention_heads": 12, "num_key_value_heads": KV_HEADS, "intermediate_size": 90}
REPAIR = Repair(("SB", "ESB"), ("SB", "ESB"), (), "neurons", "teacher", False, 96, 19, 7, 5, 2, 3, 1e-3)
FIT = replace(REPAIR, fit=("ESB",), sequences=384, calibration_sequences=96, lr=2e-4)


@pytest.fixture(scope="module", params=["qwen3", "llama with all biases", "mistral, a window in all layers"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param == "qwen3"
    return random_model(request.param, tmp_path_factory.mktemp("model"), **SIZES, tie_word_embeddings=tied)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("grouping", ["neurons", "shards"])
def test_loss_and_attention_weights_equal_transformers_and_grouping_keeps_the_function(
    folder: Path, tp: int, grouping: str
) -> None:
    ranks = run_ranks(tp, run_repair, folder, None, grouping, ())
    draw = torch.Generator().manual_seed(31)
    ids = torch.randint(211, (7, 20), generator=draw)
    mask = torch.rand(7, 19, generator=draw) < 0.8
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(ids[:, :-1], output_attentions=True)
    features = expected.attentions[1].unflatten(1, (KV_HEADS, -1)).mean(2).transpose(0, 1).flatten(1)
    losses = torch.nn.functional.cross_entropy(expected.logits.transpose(1, 2), ids[:, 1:], reduction="none")
    for rank in ranks:
        assert rank["loss"] == pytest.approx(float(losses[mask].sum()), rel=2e-6)
        assert rank["moved"] >= 3, "grouping changed the tensors"
        assert_close(rank["grouped"], rank["y"].double(), 2e-6)
        assert_close(rank["features"], features[:, : rank["features"].shape[1]], 2e-6)


@pytest.fixture(scope="module")
def repaired(folder: Path) -> list[dict[str, Any]]:
    """Each rank's results of a repair of ``folder``."""
    return run_ranks(3, run_repair, folder, REPAIR, "neurons", ())


def test_repair_reduces_the_held_out_error(repaired: list[dict[str, Any]]) -> None:
    for rank in repaired:
        zero_shot, grouped, fitted, distilled = rank["errors"]
        assert distilled < fitted == grouped < zero_shot


def test_fit_reduces_the_held_out_error_before_distillation(folder: Path) -> None:
    for rank in run_ranks(3, run_repair, folder, FIT, "neurons", ()):
        zero_shot, _, fitted, distilled = rank["errors"]
        assert distilled < fitted < zero_shot / 3


def test_neuron_errors_are_those_that_remain_after_fitting(folder: Path) -> None:
    """The oracle folds each rank's linear map into the weights; `neuron_errors` applies it to the MLP's input."""

    def activations(normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up = (normed.double() @ weight.T + rank["up_bias"]).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    ranks = run_ranks(3, measure_neuron_errors, folder)
    expected = []
    for rank in ranks:
        (full, *inputs), up = rank["normed"], rank["up"].double()
        exact, square = activations(full, up), rank["output"].double().square().sum(-1, keepdim=True)
        square /= rank["weights"].double()[:, None]
        errors = [
            activations(normed, up @ linear_map.double()) - exact
            for normed, linear_map in zip(inputs, rank["maps"], strict=True)
        ]
        column = rank["down"].double().square().sum(0)
        expected.append(torch.stack([(e.square() / square).mean((0, 1)) * column for e in errors], 1))
        assert all(torch.equal(*pair) for pair in zip(rank["maps"], ranks[0]["maps"], strict=True))
    assert_close(ranks[0]["errors"], torch.cat(expected), 1e-5)


def test_replicated_weights_differ_by_rank_only_with_own_norms(folder: Path, repaired: list[dict[str, Any]]) -> None:
    """Norms, also of queries and keys, and biases of outputs learn from the gradients of all ranks."""
    first, *others = (rank["replicated"] for rank in repaired)
    own = [rank["norms"] for rank in run_ranks(3, run_repair, folder, replace(REPAIR, own_norms=True), "neurons", ())]
    assert len(first) >= 2
    for name, weight in first.items():
        assert all(torch.equal(weight, rank[name]) for rank in others), name
    assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("tp", [1, 3])
def test_divergence_over_shards_equals_that_of_full_predictions(folder: Path, tp: int) -> None:
    """Values and gradients agree, also with padding: 211 tokens are not a multiple of 3."""
    unembedding = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).get_output_embeddings().weight
    for rank in run_ranks(tp, measure_divergence, folder):
        student, teacher = rank["student"].double().requires_grad_(), rank["teacher"].double()
        q, p = student.log_softmax(-1), teacher.log_softmax(-1)
        rows = (p.exp() * (p - q)).sum(-1)
        assert_close(rank["rows"], rows.detach(), 2e-6)
        (rows * rank["weights"]).sum().backward()
        assert_close(rank["gradient"], student.grad @ unembedding.detach(), 2e-6)


def test_joint_distillation_reduces_the_divergence(folder: Path, tmp_path: Path) -> None:
    for rank in run_ranks(3, train_jointly, folder, Mesh(tp=3), True, tmp_path):
        assert 0 < rank["after"] < 0.99 * rank["before"], "with all of them dropped"
        assert rank["alone"] == pytest.approx(rank["only"], rel=1e-4) and min(rank["alone"].values()) > 0


def test_joint_distillation_resumes_exactly_and_is_data_parallel(folder: Path, tmp_path: Path) -> None:
    whole = run_ranks(2, train_jointly, folder, Mesh(tp=2), True, tmp_path)[0]
    resumed = run_ranks(2, train_jointly, folder, Mesh(tp=2), False, tmp_path)[0]
    assert resumed["losses"] == whole["losses"]
    assert all(torch.equal(resumed["tensors"][name], tensor) for name, tensor in whole["tensors"].items())
    both = Mesh(tp=2, dp=2)
    shared, stopped = (run_ranks(4, train_jointly, folder, both, at_once, tmp_path / "dp") for at_once in (True, False))
    # Only the first step is compared across meshes: Adam turns rounding differences of small gradients into large ones.
    assert shared[0]["losses"][0] == pytest.approx(whole["losses"][0], rel=2e-6)
    for name, gradient in whole["gradients"].items():
        assert_close(shared[0]["gradients"][name], gradient.double(), 2e-5)
    for name, tensor in shared[0]["tensors"].items():
        assert all(torch.equal(rank["tensors"][name], tensor) for rank in (*shared, *stopped))


def test_state_that_a_full_disk_cuts_is_named(tmp_path: Path) -> None:
    with full_disk(2**12), pytest.raises(OSError, match=r"File too large: .*rank-0\.pt"):
        joint._save({"x": torch.zeros(2**12)}, tmp_path / "rank-0.pt")
