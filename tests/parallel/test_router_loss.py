"""The router loss of rows on several ranks, and its gradient, against transformers' function."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from longctx.model_shape import Experts
from longctx.parallel.router_loss import RouterLoss
from longctx.parallel.threads import run_threads
from tests.float64 import KeepFloat64

EXPERTS, ROWS, LAYERS, WEIGHT = Experts(7, 3, 5), (5, 0, 11), 2, 0.3  # rows of the three ranks


def transformers_loss(logits: torch.Tensor) -> torch.Tensor:
    with KeepFloat64():
        return load_balancing_loss_func(tuple(logits), EXPERTS.count, EXPERTS.per_token)


def passes(loss: RouterLoss, logits: torch.Tensor, rows: int, recomputed: bool) -> torch.Tensor:
    """Return the gradient of a sum of squares over ``logits`` [layers rows 1 experts] and of their router loss."""
    loss.begin(rows)
    leaf = logits.clone().requires_grad_()
    if recomputed:
        with torch.no_grad():
            [loss.watch(layer) for layer in leaf]
    else:
        out = [layer * 1 for layer in leaf]
        [loss.watch(layer) for layer in out]
    loss.finish(WEIGHT)
    if recomputed:
        out = [layer * 1 for layer in leaf]
        [loss.watch(layer) for layer in out]
    sum(layer.square().sum() for layer in out).backward()
    return leaf.grad


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
def test_loss_and_gradient_equal_those_of_transformers(recomputed: bool, padding: int) -> None:
    """Two sequences, one after the other; padding changes neither."""
    torch.manual_seed(5)
    sequences = torch.randn(2, LAYERS, sum(ROWS), EXPERTS.count, dtype=torch.float64).requires_grad_()
    expected = torch.stack([transformers_loss(logits) for logits in sequences])
    (sequences.square().sum() + WEIGHT * expected.sum()).backward()

    def rank_main(world, rank):
        loss = RouterLoss(EXPERTS, world.group(rank))
        pad = torch.randn(LAYERS, padding, EXPERTS.count, dtype=torch.float64)
        mine = [torch.cat([logits.detach().split(ROWS, 1)[rank], pad], 1).unsqueeze(2) for logits in sequences]
        grads = [passes(loss, logits, ROWS[rank], recomputed).squeeze(2) for logits in mine]
        for grad in grads:
            torch.testing.assert_close(grad[:, ROWS[rank] :], 2 * pad, rtol=0, atol=0)
        return loss.take_mean(), torch.stack([grad[:, : ROWS[rank]] for grad in grads])

    means, grads = zip(*run_threads(len(ROWS), rank_main), strict=True)
    for mean in means:
        torch.testing.assert_close(mean, expected.mean().detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat(grads, 2), sequences.grad, rtol=1e-12, atol=1e-14)
