"""Weights of mixtures of experts, and the bytes of expert parallelism that `longctx.parallel.experts` sends.

A rank has r rows of H numbers, of e bytes each.  A router chooses k of the E experts for each row.  The experts are
divided among the ranks of ep, n = E / ep each; tp ranks share each expert's neurons.  If all sets of k experts are
equally likely, a row has an expert on a given rank with probability

    q = 1 - C(E - n, k) / C(E, k)

A row is sent once to each rank that holds any of its experts, with n weights.  Per layer and forward, a rank sends

    choices     (ep - 1) r E over ep, then (tp - 1) ep r E over tp, one byte each
    dispatch    (ep - 1) r q (H + n) e over ep, then (tp - 1) ep r q (H + n) e over tp
    outputs     (tp - 1) ep r q H e over tp, then (ep - 1) r q H e over ep

The backward sends dispatch and outputs once more.
"""

from collections.abc import Iterator
from math import comb
from typing import NamedTuple

from longctx.cost.machine import Degrees, Machine
from longctx.cost.training import Decoder


class ExpertExchange(NamedTuple):
    """An exchange of a layer's forward over an ``axis`` of the mesh, in which a rank sends ``size`` bytes.

    ``passes`` is 2 if the backward sends as much as the forward, else 1.
    """

    axis: str
    size: float
    passes: int


def expert_layers(shape: Decoder) -> int:
    """Return the number of layers with experts."""
    return sum(experts is not None for experts in shape.experts)


def expert_weights(shape: Decoder) -> float:
    """Return the number of weights of all experts, per layer on average over all layers."""
    if shape.mixture is None:
        return 0.0
    one = (2 + shape.gated) * shape.hidden * shape.mixture.ffn
    return shape.mixture.count * one * expert_layers(shape) / shape.layers


def dense_ffn_weights(shape: Decoder) -> float:
    """Return the number of weights of feed-forward networks without experts, and of routers, per layer on average."""
    with_experts = expert_layers(shape)
    routers = shape.mixture.count * shape.hidden * with_experts if shape.mixture else 0
    return ((shape.layers - with_experts) * (2 + shape.gated) * shape.hidden * shape.ffn + routers) / shape.layers


def share_of_rows(count: int, per_token: int, ep: int) -> float:
    """Return the probability that a row has at least one of its experts on a given rank (q of the module docstring).

    There are ``count`` experts, of which the router chooses ``per_token`` for each row; ``ep`` ranks divide them
    equally.
    """
    return 1 - comb(count - count // ep, per_token) / comb(count, per_token)


def messages(shape: Decoder, mesh: Degrees, rows: float, element: float) -> Iterator[ExpertExchange]:
    """Yield the exchanges of one layer with experts, for ``rows`` rows per rank and numbers of ``element`` bytes.

    There are none if the model has no experts or ``mesh.ep`` is 1.
    """
    if shape.mixture is None or mesh.ep == 1:
        return
    count, per_rank = shape.mixture.count, shape.mixture.count // mesh.ep
    travelling = rows * share_of_rows(count, shape.mixture.per_token, mesh.ep) * element
    for axis, ranks, factor in (("ep", mesh.ep, 1), ("tp", mesh.tp, mesh.ep)):
        yield ExpertExchange(axis, (ranks - 1) * factor * rows * count, 1)
        yield ExpertExchange(axis, (ranks - 1) * factor * travelling * (shape.hidden + per_rank), 2)
        yield ExpertExchange(axis, (ranks - 1) * factor * travelling * shape.hidden, 2)


def experts_cost(
    shape: Decoder, mesh: Degrees, machine: Machine, rows: float, element: float, *, recomputed: bool
) -> tuple[float, float]:
    """Return the seconds, and the bytes that a rank sends, for expert parallelism in all layers of a pipeline stage.

    They are those of the forward and backward of one micro-batch, of which each rank has ``rows`` rows.  With
    ``recomputed``, the backward repeats the forward, which sends everything once more.
    """
    links = {"tp": machine.level(mesh.tp, 1).exchange, "ep": machine.level(mesh.ep, mesh.tp).exchange}
    seconds = sent = 0.0
    for axis, size, passes in messages(shape, mesh, rows, element):
        seconds += (passes + recomputed) * links[axis].seconds(size)
        sent += (passes + recomputed) * size
    layers = expert_layers(shape) / mesh.pp
    return layers * seconds, layers * sent
