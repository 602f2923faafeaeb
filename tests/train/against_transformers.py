"""A training step in float64 against transformers': the loss and every gradient."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config import Mesh
from longctx.parallel.launch import run_ranks
from tests.train.ranks import Run, Step, train_each
from tests.train.test_step import exact_model, tensors


def exact(run: Run, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss, and the gradients by names of transformers' files; parameters of experts have other names."""
    loss, net = exact_model(run)
    return loss, written_gradients(net, folder)


def written_gradients(net: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Save the gradients of ``net`` as its weights in ``folder``, and return them; 0 for a parameter without one."""
    for parameter in net.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    net.save_pretrained(folder)
    return tensors(folder)


def assert_steps_equal(
    mesh: Mesh, settings: dict[str, Any], runs: dict[str, Run], right: Mapping[str, tuple[float, Any]], folder: Path
) -> list[Step]:
    """Compare loss (1e-13) and every gradient (1e-11) of a float64 step on ``mesh`` with transformers'.

    Return the step of each run.
    """
    folders = {kind: folder / kind for kind in runs}
    jobs = [replace(runs[kind], mesh=mesh, gradients=folders[kind], dtype="float64", **settings) for kind in runs]
    steps = [step for (step,) in run_ranks(mesh.ranks, train_each, jobs)[0]]
    for (kind, wanted), step in zip(right.items(), steps, strict=True):
        assert_step_equals(step, folders[kind], wanted, kind)
    return steps


def assert_step_equals(step: Step, folder: Path, wanted: tuple[float, Mapping[str, torch.Tensor]], name: Any) -> None:
    """Compare the loss of ``step`` (1e-13) and its gradients in ``folder`` (1e-11) with the ``wanted`` ones."""
    loss, gradients = wanted
    assert step.loss == pytest.approx(loss, rel=1e-13), name
    # megatron-core divides by the number of tokens in float32.
    rounding = float(1.0 / torch.tensor(step.tokens)) * step.tokens
    got = tensors(folder)
    assert set(got) == set(gradients), name
    for parameter, gradient in gradients.items():
        assert (got[parameter] / rounding - gradient).norm() <= 1e-11 * gradient.norm(), (name, parameter)
