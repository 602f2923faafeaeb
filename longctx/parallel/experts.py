"""Expert parallelism: rows travel to the ranks that hold their experts, and the experts' outputs travel back.

Tensor-parallel ranks share every expert's neurons.  All of them therefore get a row, and the sum of their outputs
travels back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longctx.parallel.comm import Comm
from longctx.shapes import Bool, Float, Int, Tensor

EXPERTS = "experts"  # purpose under which both groups count the bytes of this module


@dataclass(frozen=True)
class Routes:
    """Rows that travel between the ranks of ``ep``, which hold different experts, and of ``tp``, which share them.

    Rank e of ``ep`` holds n experts: e * n to (e + 1) * n - 1.  This rank has ``rows`` rows.  It sends row ``row[i]``
    to rank ``to[i]`` of ``ep``, in order of ``to``: once to each rank that holds any of the row's experts.
    ``sent[e]`` is the number of rows sent to rank e.  ``received[t][e]`` is the number of rows from rank e of ``ep``
    that rank t of ``tp`` passes on to this rank.  Arriving rows lie in order of t, then of e.  ``chosen`` marks, for
    each arriving row, the experts of this rank that the row has chosen.
    """

    ep: Comm
    tp: Comm
    rows: int
    row: Int[Tensor, " sent"]
    to: Int[Tensor, " sent"]
    sent: list[int]
    received: list[list[int]]
    chosen: Bool[Tensor, "received n"]

    @property
    def per_tp_rank(self) -> list[int]:
        """Number of the arriving rows that each rank of ``tp`` has passed on."""
        return [sum(counts) for counts in self.received]


def routes_of(ep: Comm, tp: Comm, chosen: Bool[Tensor, "rows experts"]) -> Routes:
    """Return the routes of this rank's rows; ``chosen`` marks the experts that each row has chosen.

    Every rank of both groups calls this with equally many rows.  The ranks exchange ``chosen``, one byte per entry.
    """
    gathered = chosen.to(torch.uint8)
    for comm in (ep, tp):
        with comm.traffic.counted_as(EXPERTS):
            gathered = torch.stack(comm.all_gather(gathered, [tuple(gathered.shape)] * comm.size))
    chosen_here = gathered.bool().unflatten(-1, (ep.size, -1))[:, :, :, ep.rank]  # [tp ep rows n]
    arriving = chosen_here.any(-1)
    leaving = chosen.unflatten(-1, (ep.size, -1)).any(-1).T  # [ep rows]
    to, row = leaving.nonzero().unbind(1)
    return Routes(
        ep, tp, len(chosen), row, to, leaving.sum(-1).tolist(), arriving.sum(-1).tolist(), chosen_here[arriving]
    )


def send_rows(
    routes: Routes, x: Float[Tensor, "rows hidden"], weights: Float[Tensor, "rows experts"]
) -> tuple[Float[Tensor, "received hidden"], Float[Tensor, "received n"]]:
    """Send the rows of ``x`` to their experts; return the arriving rows and their ``weights`` for this rank's experts.

    Differentiable.  Every rank of both groups calls this and runs its backward.
    """
    by_rank = weights.unflatten(-1, (routes.ep.size, -1))
    packed = torch.cat([x[routes.row], by_rank[routes.row, routes.to]], -1)  # one message to each rank
    arrived = _exchange(routes.ep, packed.split(routes.sent), routes.received[routes.tp.rank])
    arrived = _exchange(routes.tp, [arrived] * routes.tp.size, routes.per_tp_rank)
    rows, row_weights = arrived.split([x.shape[1], by_rank.shape[-1]], -1)
    return rows, row_weights


def return_rows(routes: Routes, out: Float[Tensor, "received hidden"]) -> Float[Tensor, "rows hidden"]:
    """Send back ``out``, one output per arriving row; return the sum of the outputs of each of this rank's rows.

    The sum is over the ranks that got the row, and 0 for a row without experts.  Differentiable.  Every rank of both
    groups calls this and runs its backward.
    """
    passed_on = routes.per_tp_rank
    parts = _exchange(routes.tp, out.split(passed_on), [passed_on[routes.tp.rank]] * routes.tp.size)
    summed = parts.unflatten(0, (routes.tp.size, -1)).sum(0)
    arrived = _exchange(routes.ep, summed.split(routes.received[routes.tp.rank]), routes.sent)
    return out.new_zeros(routes.rows, out.shape[1]).index_add(0, routes.row, arrived)


def bytes_of_experts(ep: Comm, tp: Comm) -> int:
    """Return the bytes that this rank has sent so far over ``ep`` and ``tp`` for routes, rows and their gradients."""
    return sum(comm.traffic.purposes.get(EXPERTS, 0) for comm in (ep, tp))


def _exchange(
    comm: Comm, parts: Sequence[Float[Tensor, "_ n"]], received: Sequence[int]
) -> Float[Tensor, "received n"]:
    """Send ``parts[i]`` to rank i; return the rows of all ranks, of which ``received[i]`` come from rank i."""
    if comm.size == 1:
        return parts[0]
    arrived: Tensor = _Exchange.apply(comm, received, *parts)  # type: ignore[no-untyped-call]
    return arrived


class _Exchange(torch.autograd.Function):
    """Autograd node of `_exchange`: the gradients of the rows return to the ranks that sent the rows."""

    @staticmethod
    def forward(ctx: Any, comm: Comm, received: Sequence[int], *parts: Tensor) -> Tensor:
        ctx.comm, ctx.received, ctx.sent = comm, list(received), [len(part) for part in parts]
        return torch.cat(_all_to_all(comm, parts, received))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_all_to_all(ctx.comm, grad.split(ctx.received), ctx.sent)


def _all_to_all(comm: Comm, parts: Sequence[Tensor], received: Sequence[int]) -> list[Tensor]:
    with comm.traffic.counted_as(EXPERTS):
        return comm.all_to_all(parts, [(n, *parts[0].shape[1:]) for n in received])
