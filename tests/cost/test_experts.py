"""Bytes of expert parallelism: predicted for even routing, and counted between threads for random routing."""

from typing import Any

import pytest
import torch

from longctx.config import Mesh
from longctx.cost.experts import messages, share_of_rows
from longctx.model_shape import Experts, ModelShape
from longctx.parallel.experts import bytes_of_experts, return_rows, routes_of, send_rows
from longctx.parallel.threads import ThreadWorld, run_threads

ROWS, COUNT, CHOSEN = 501, 12, 3
SHAPE = ModelShape(2, 20, 6, 2, 8, 48, 97, 512, 1e-5, True, False, experts=(None, Experts(COUNT, CHOSEN, 28)))


def counted(ep: int, tp: int) -> list[int]:
    """Return the bytes that each rank sends for `ROWS` rows, forward and backward, each with a random choice."""

    def rank_main(world: ThreadWorld, rank: int) -> Any:
        e, t = divmod(rank, tp)
        across, along = world.group(rank, range(t, ep * tp, tp)), world.group(rank, range(e * tp, (e + 1) * tp))
        generator = torch.Generator().manual_seed(rank)
        best = torch.rand(ROWS, COUNT, generator=generator).topk(CHOSEN, -1).indices
        chosen = torch.zeros(ROWS, COUNT, dtype=torch.bool).scatter(1, best, True)
        x, weights = (torch.randn(ROWS, n, generator=generator).requires_grad_() for n in (SHAPE.hidden, COUNT))
        routes = routes_of(across, along, chosen)
        rows, row_weights = send_rows(routes, x, weights)
        return_rows(routes, rows * row_weights.sum(-1, keepdim=True)).sum().backward()
        return bytes_of_experts(across, along)

    return run_threads(ep * tp, rank_main)


@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (4, 1), (12, 1), (3, 2), (2, 3)])
def test_predicted_bytes_are_those_of_random_routing(ep: int, tp: int) -> None:
    predicted = sum(passes * size for _, size, passes in messages(SHAPE, Mesh(tp=tp, dp=ep, ep=ep), ROWS, 4))
    of_ranks = counted(ep, tp)
    assert sum(of_ranks) / len(of_ranks) == pytest.approx(predicted, rel=0.02)


def test_share_of_rows_by_hand() -> None:
    """With 4 experts on 2 ranks, a row with 2 experts misses a rank only if both are the other rank's: 1 case of 6."""
    assert share_of_rows(4, 2, 2) == pytest.approx(5 / 6)
    assert share_of_rows(4, 1, 4) == pytest.approx(1 / 4)
    assert share_of_rows(4, 3, 2) == share_of_rows(4, 1, 1) == 1
