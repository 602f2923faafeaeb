"""Distillation of one block on tensors, with a linear student and teacher."""

import math

import pytest
import torch

from longctx.spd.distill import (
    Distillation,
    distill,
    error_of,
    position_weights,
    refuse_diverged,
    relative_squared_error,
)


def problem() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear student, inputs, and the outputs of a linear teacher."""
    torch.manual_seed(5)
    student, teacher = (torch.nn.Linear(7, 5, dtype=torch.float64) for _ in range(2))
    inputs = torch.randn(13, 11, 7, dtype=torch.float64)
    return student, inputs, teacher(inputs).detach()


def test_student_learns_the_teachers_outputs() -> None:
    student, inputs, outputs = problem()
    before = error_of(student, inputs, outputs, 4)
    losses = list(distill(student, list(student.parameters()), inputs, outputs, Distillation(80, 4, 0.05)))
    assert len(losses) == 80 * 3, "one sequence of 13 does not fill a batch of 4 and is left out"
    assert error_of(student, inputs, outputs, 4) < 1e-3 * before


def test_error_of_a_token_is_relative_to_its_norm() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    assert float(relative_squared_error(wanted * 1.1, wanted)) == pytest.approx(0.01)
    assert float(relative_squared_error(wanted + torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]), wanted)) == pytest.approx(
        0.5
    )


def test_beginnings_divide_half_of_the_weight_by_the_logarithm_of_the_position() -> None:
    weights = position_weights(255, "beginnings").double()
    assert weights.sum() == pytest.approx(255)
    octaves = [float(weights[2**n - 1 : 2 ** (n + 1) - 1].sum()) for n in range(8)]
    assert octaves == pytest.approx([0.5 * 2**n + 255 / 16 for n in range(8)], rel=1e-5)
    assert position_weights(7, "uniform").tolist() == [1.0] * 7


def test_token_counts_with_the_weight_of_its_position() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    predicted = wanted * torch.tensor([[[1.1], [1.2]]])
    assert float(relative_squared_error(predicted, wanted, torch.tensor([1.5, 0.5]))) == pytest.approx(
        (0.015 + 0.02) / 2
    )


@pytest.mark.parametrize("weights", ["uniform", "beginnings"])
def test_student_that_cannot_learn_all_learns_the_weighted_mean(weights) -> None:
    """A bias alone gives every position the same output; all outputs have the same norm."""
    outputs = torch.tensor([[[1.0, 2.0]] + [[2.0, 1.0]] * 62], dtype=torch.float64)
    bias = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    settings = Distillation(200, 1, 0.05, weights=weights)
    list(distill(lambda x: x + bias, [bias], torch.zeros_like(outputs), outputs, settings))
    mean = (outputs[0] * position_weights(63, weights)[:, None]).mean(0)
    assert bias.detach().numpy() == pytest.approx(mean.numpy(), rel=1e-4)


def test_error_is_the_mean_over_sequences_for_any_batch_size() -> None:
    student, inputs, outputs = problem()
    whole = float(relative_squared_error(student(inputs), outputs).detach())
    assert error_of(student, inputs, outputs, 4) == pytest.approx(whole) == error_of(student, inputs, outputs, 13)


def test_same_seed_gives_the_same_losses() -> None:
    losses = []
    for seed in (3, 3, 4):
        student, inputs, outputs = problem()
        losses.append(
            list(distill(student, list(student.parameters()), inputs, outputs, Distillation(2, 4, 0.01, seed)))
        )
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_diverged_loss_is_refused(loss: float) -> None:
    refuse_diverged(1e30, "repair of block 3", "repair.lr")
    with pytest.raises(FloatingPointError, match=r"repair of block 3 has diverged, .*use a lower repair\.lr"):
        refuse_diverged(loss, "repair of block 3", "repair.lr")
