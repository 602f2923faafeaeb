"""Ulysses alone and over a ring is exact, also if members hold uneven rows or none."""

import re
from collections.abc import Sequence

import pytest
import torch

from longctx.attention.kernel import reference
from longctx.attention.layout import Layout, documents, striped, zigzag
from longctx.parallel.comm import Comm, SingleRankComm, Traffic
from longctx.parallel.ring import Ring, pass_kv, pass_q
from longctx.parallel.strategy import ring_attention
from longctx.parallel.threads import run_threads
from longctx.parallel.ulysses import over_heads, refuse_uneven_heads
from tests.parallel.problem import B, Problem, problem, solve

# Layouts over ulysses x ring ranks; those of `zigzag` gather to a zigzag of the ring.
LAYOUTS = {
    "zigzag": lambda u, n: zigzag(37, n).split(u),
    "1 row": lambda u, n: zigzag(1, n).split(u),  # the other members have no rows
    "zigzag over all": lambda u, n: zigzag(31, u * n),
    "striped over all": lambda u, n: striped(11, u * n),
    "documents": lambda u, n: documents([7, 0, 1, 11], n).split(u),
}
MESHES = [(2, 1), (3, 1), (2, 2), (3, 2), (2, 3)]  # ulysses, ring


def hybrid(task: Problem, u: int, n: int, strategy=pass_kv) -> tuple[list[list[torch.Tensor]], list[list[Traffic]]]:
    """Return each rank's results, and its traffic to the members of its Ulysses group."""

    def rank_main(world, rank):
        # Ulysses ranks are neighbours: rank = ring rank * u + ulysses rank.
        first, member = rank - rank % u, rank % u
        ulysses = world.group(rank, range(first, first + u))
        ring = world.group(rank, range(member, u * n, u))
        rows = [task.queries.rows(r) for r in range(first, first + u)]
        gathered = task.queries.gather(u)
        inner = ring_attention(Ring(ring, gathered, gathered), reference, strategy)
        return solve(over_heads(ulysses, rows, inner), task, rank, lambda: ulysses.traffic)

    results, traffic = zip(*run_threads(u * n, rank_main), strict=True)
    return list(results), list(traffic)


@pytest.mark.parametrize(("u", "n"), MESHES)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("strategy", [pass_kv, pass_q], ids=lambda strategy: strategy.__name__)
def test_forward_and_backward(u, n, name, strategy):
    task = problem(LAYOUTS[name](u, n), heads=(4 * u, 2 * u))
    results, _ = hybrid(task, u, n, strategy)
    task.assert_solved(results, 1e-10)


@pytest.mark.parametrize(("u", "n", "heads"), [(2, 2, (4, 1)), (3, 2, (9, 1)), (4, 1, (8, 2)), (6, 1, (6, 3))])
def test_fewer_kv_heads_than_members(u, n, heads):
    """Each KV head goes to all members that share it, and the gradients of its copies add up."""
    task = problem(zigzag(31, n).split(u), heads=heads)
    results, _ = hybrid(task, u, n)
    task.assert_solved(results, 1e-10)


def test_bfloat16_inputs_give_bfloat16_results():
    task = problem(zigzag(37, 1).split(2), dtype=torch.bfloat16)
    results, _ = hybrid(task, 2, 1)
    assert {x.dtype for result in results for x in result} == {torch.bfloat16}
    task.assert_solved(results, 2e-2)


# arXiv 2405.07719, section 3: each member sends its rows of the other members' heads, (hq + 2 hk) / u heads to each,
# and receives its rows of their outputs.  The backward sends the same bytes in the opposite direction.


def expected_bytes(rows: Sequence[int], member: int, hq: int, hk: int, d: int, e: int) -> tuple[int, int]:
    """Return the bytes that ``member`` sends to the others in the forward and in the backward."""
    u = len(rows)
    own, others = rows[member], sum(rows) - rows[member]
    qkv, out = (hq + 2 * hk) // u * d * e * B, hq // u * d * e * B
    return (u - 1) * own * qkv + others * out, others * qkv + (u - 1) * own * out


@pytest.mark.parametrize(("u", "n"), [(2, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("name", ["zigzag", "1 row"])
@pytest.mark.parametrize(("dtype", "e"), [(torch.bfloat16, 2), (torch.float32, 4)], ids=str)
def test_bytes(u, n, name, dtype, e):
    layout: Layout = LAYOUTS[name](u, n)
    _, traffic = hybrid(problem(layout, heads=(12, 6), d=5, dtype=dtype), u, n)
    for rank, (forward, total) in enumerate(traffic):
        members = range(rank - rank % u, rank - rank % u + u)
        forward_bytes, backward_bytes = expected_bytes([layout.rows(r) for r in members], rank % u, 12, 6, 5, e)
        assert forward.bytes == {"all_to_all": forward_bytes}
        assert total.bytes == {"all_to_all": forward_bytes + backward_bytes}


@pytest.mark.parametrize("u", [2, 3])
def test_each_member_gets_one_message_per_direction(u):
    """Queries, keys and values travel in one message, because latency dominates for few rows."""
    _, traffic = hybrid(problem(zigzag(37, 1).split(u), heads=(12, 6)), u, 1)
    for forward, total in traffic:
        assert forward.messages == {"all_to_all": 2 * (u - 1)}
        assert total.messages == {"all_to_all": 4 * (u - 1)}


def test_group_of_one_returns_the_inner_attention():
    def inner(q, k, v):
        return q

    assert over_heads(SingleRankComm(), [7], inner) is inner


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree", "nearest", "possible"),
    [
        (9, 3, 2, 1, "1, 3, 9"),  # 1 and 3 are equally near: the smaller one
        (9, 3, 4, 3, "1, 3, 9"),
        (32, 8, 64, 32, "1, 2, 4, 8, 16, 32"),
        (32, 8, 3, 2, "1, 2, 4, 8, 16, 32"),
        (12, 6, 5, 6, "1, 2, 3, 6, 12"),
        (6, 4, 4, 2, "1, 2"),  # divides the KV heads, but not the query heads
        (
            12,
            6,
            4,
            3,
            "1, 2, 3, 6, 12",
        ),  # divides the query heads, but neither divides the KV heads nor is a multiple of them
    ],
)
def test_uneven_heads_are_refused_with_the_nearest_degree(heads, kv_heads, degree, nearest, possible):
    message = (
        f"mesh.ulysses={degree} cannot share {heads} query heads and {kv_heads} KV heads evenly; "
        f"use mesh.ulysses={nearest} (possible: {possible}), and mesh.ring for the other ranks"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refuse_uneven_heads(heads, kv_heads, degree)


@pytest.mark.parametrize("degree", [1, 2, 3, 6, 12])
def test_fitting_degrees_are_accepted(degree):
    refuse_uneven_heads(12, 6, degree)


def test_uneven_heads_are_refused_before_anything_is_sent():
    def rank_main(world, rank):
        comm: Comm = world.group(rank)
        q, k = torch.zeros(B, 4, 9, 5), torch.zeros(B, 4, 3, 5)
        with pytest.raises(ValueError, match=r"use mesh\.ulysses=1 \(possible: 1, 3, 9\)"):
            over_heads(comm, [4, 4], lambda q, k, v: q)(q, k, k)
        return comm.traffic.total

    assert run_threads(2, rank_main) == [0, 0]
