"""Rows that travel to the experts' ranks and back give the dense sum over experts, its gradients, and few bytes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from longctx.parallel.experts import EXPERTS, return_rows, routes_of, send_rows
from longctx.parallel.threads import ThreadWorld, run_threads

ROWS, HIDDEN, FFN, PER_RANK = 7, 5, 6, 3  # rows of a rank, sizes of an expert, experts of a rank
GRIDS = [(2, 1), (3, 1), (2, 2), (3, 2), (2, 3)]  # ep, tp


@dataclass
class Problem:
    """Rows of all ranks [ep * tp * ROWS ...], numbered by ep rank, then tp rank; the weights of all experts."""

    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    grad: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [tensor.clone().requires_grad_() for tensor in (self.x, self.weights, self.up, self.down)]


def problem(ep: int, tp: int, chosen: str) -> Problem:
    torch.manual_seed(13)
    total, experts = ep * tp * ROWS, ep * PER_RANK
    best = torch.rand(total, experts).topk(2, -1).indices
    if chosen == "one rank's":
        best = torch.tensor([[0, 2]]).expand(total, 2)
    mask = torch.zeros(total, experts, dtype=torch.bool).scatter(1, best, True)
    draw = [torch.randn(*size, dtype=torch.float64) for size in (
        (total, HIDDEN), (total, experts), (experts, HIDDEN, FFN), (experts, FFN, HIDDEN), (total, HIDDEN)
    )]  # fmt: skip
    return Problem(draw[0], mask, *draw[1:])


def outputs(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, up: Any, down: Any) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs, one expert after the other."""
    out = torch.zeros_like(x)
    for expert in range(chosen.shape[1]):
        out = out + ((x @ up[expert]).square() @ down[expert]) * (weights[:, expert] * chosen[:, expert])[:, None]
    return out


def on_ranks(task: Problem, ep: int, tp: int) -> list[tuple[list[torch.Tensor], dict[str, int], dict[str, int]]]:
    """Return each rank's output and gradients, and the bytes that it sent over both groups."""

    def rank_main(world: ThreadWorld, rank: int) -> Any:
        e, t = divmod(rank, tp)
        across, along = world.group(rank, range(t, ep * tp, tp)), world.group(rank, range(e * tp, (e + 1) * tp))
        rows, experts = slice(rank * ROWS, (rank + 1) * ROWS), slice(e * PER_RANK, (e + 1) * PER_RANK)
        share = slice(t * FFN // tp, (t + 1) * FFN // tp)
        mine = (task.x[rows], task.weights[rows], task.up[experts][..., share], task.down[experts][:, share])
        x, weights, up, down = (tensor.clone().requires_grad_() for tensor in mine)
        routes = routes_of(across, along, task.chosen[rows])
        out = return_rows(routes, outputs(*send_rows(routes, x, weights), routes.chosen, up, down))
        out.backward(task.grad[rows])
        return [out.detach(), x.grad, weights.grad, up.grad, down.grad], across.traffic.purposes, along.traffic.purposes

    return run_threads(ep * tp, rank_main)


@pytest.mark.parametrize("chosen", ["any", "one rank's"])
@pytest.mark.parametrize(("ep", "tp"), GRIDS)
def test_equals_the_dense_sum_over_experts(ep: int, tp: int, chosen: str) -> None:
    task = problem(ep, tp, chosen)
    x, weights, up, down = task.leaves()
    right = outputs(x, weights, task.chosen, up, down)
    right.backward(task.grad)
    results = on_ranks(task, ep, tp)
    for rank, (got, *_) in enumerate(results):
        e, t = divmod(rank, tp)
        rows, experts = slice(rank * ROWS, (rank + 1) * ROWS), slice(e * PER_RANK, (e + 1) * PER_RANK)
        share = slice(t * FFN // tp, (t + 1) * FFN // tp)
        wanted = (
            right[rows],
            x.grad[rows],
            weights.grad[rows],
            up.grad[experts][..., share],
            down.grad[experts][:, share],
        )
        for tensor, expected in zip(got, wanted, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ep", "tp"), GRIDS)
def test_each_row_travels_once_to_each_rank_that_holds_any_of_its_experts(ep: int, tp: int) -> None:
    """Forward and backward together: a row's hidden state there and back, twice, and the weights of its experts."""
    task = problem(ep, tp, "any")
    size = (2 * HIDDEN + PER_RANK) * 8
    needs = task.chosen.view(ep, tp, ROWS, ep, PER_RANK).any(-1).sum(2)  # [from ep rank, tp rank, to ep rank]
    experts = ep * PER_RANK
    for rank, (_, across, along) in enumerate(on_ranks(task, ep, tp)):
        e, t = divmod(rank, tp)
        others = [other for other in range(ep) if other != e]
        rows = needs[e, t, others].sum() + needs[others, t, e].sum()
        assert across[EXPERTS] == rows * size + (ep - 1) * ROWS * experts
        if tp > 1:
            arrived = needs[:, :, e].sum(0)  # by tp rank
            rows = (tp - 1) * arrived[t] + arrived.sum() - arrived[t]
            assert along[EXPERTS] == rows * size + (tp - 1) * ep * ROWS * experts
