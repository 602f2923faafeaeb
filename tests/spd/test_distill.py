"""Distillation of one block, from and to tensors."""

import pytest
import torch

from longctx.spd.distill import Distillation, distil, error_of, relative_error


def problem() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear student whose teacher is another linear map."""
    torch.manual_seed(5)
    student, teacher = (torch.nn.Linear(7, 5, dtype=torch.float64) for _ in range(2))
    inputs = torch.randn(13, 11, 7, dtype=torch.float64)
    return student, inputs, teacher(inputs).detach()


def test_a_student_comes_to_do_what_its_teacher_does() -> None:
    student, inputs, outputs = problem()
    before = error_of(student, inputs, outputs, 4)
    losses = list(distil(student, list(student.parameters()), inputs, outputs, Distillation(80, 4, 0.05)))
    assert len(losses) == 80 * 3, "an incomplete batch is left out"
    assert error_of(student, inputs, outputs, 4) < 1e-3 * before


def test_a_token_s_error_counts_relative_to_its_own_size() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    assert float(relative_error(wanted * 1.1, wanted)) == pytest.approx(0.01)
    assert float(relative_error(wanted + torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]), wanted)) == pytest.approx(0.5)


def test_the_error_of_all_is_the_mean_over_sequences_however_they_are_split() -> None:
    student, inputs, outputs = problem()
    whole = float(relative_error(student(inputs), outputs).detach())
    assert error_of(student, inputs, outputs, 4) == pytest.approx(whole) == error_of(student, inputs, outputs, 13)


def test_the_same_seed_gives_the_same_course() -> None:
    courses = []
    for seed in (3, 3, 4):
        student, inputs, outputs = problem()
        courses.append(
            list(distil(student, list(student.parameters()), inputs, outputs, Distillation(2, 4, 0.01, seed)))
        )
    assert courses[0] == courses[1] != courses[2]
