"""Schedules of every strategy match on every mesh to 8 ranks, and planted faults are found."""

import pytest
import torch

from longctx.attention.kernel import reference
from longctx.attention.layout import contiguous, documents, striped, zigzag
from longctx.attention.mask import CAUSAL, causal_within
from longctx.attention.partial import empty_partial
from longctx.config import Mesh
from longctx.parallel.merge import gather_merge, scatter_merge
from longctx.parallel.recording import META, SHAPES_ONLY, attention_schedules, record
from longctx.parallel.ring import Ring, pass_kv, pass_q, rotate
from longctx.parallel.schedule import Group, Message, Operation, ScheduleError, refuse_faulty
from longctx.parallel.strategy import STRATEGIES, ring_attention
from tests.parallel.problem import B, on_threads, problem

MESHES = [Mesh(ulysses=u, ring=r) for u in range(1, 9) for r in range(1, 9) if u * r <= 8]
LAYOUTS = {
    "zigzag": (lambda size: zigzag(37, size), CAUSAL),
    "one row": (lambda size: striped(1, size), CAUSAL),  # the other ranks have no rows
    "documents": (lambda size: documents([7, 0, 1, 13], size), CAUSAL),
    "window": (lambda size: contiguous(41, size), causal_within(6)),
}
F32, CPU = torch.float32, torch.device("cpu")


def heads_for(ulysses: int) -> dict[str, int]:
    """Return a number of heads that ``ulysses`` ranks share, with fewer KV heads than ranks or one for each."""
    return {"heads": 2 * ulysses, "kv_heads": 1 if ulysses % 2 else ulysses, "head_dim": 3}


def schedules_of(mesh, name, strategy, device=CPU):
    layout, mask = LAYOUTS[name]
    rows = layout(mesh.ring).split(mesh.ulysses)
    return attention_schedules(mesh, rows, strategy, mask=mask, device=device, **heads_for(mesh.ulysses))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_strategies_are_proved(strategy, name):
    """Forward and backward; tests/infer/prove_meshes.py takes every mesh of up to 8 ranks."""
    for mesh in (Mesh(ring=3), Mesh(ulysses=3), Mesh(ulysses=2, ring=2)):
        schedules = schedules_of(mesh, name, STRATEGIES[strategy])
        refuse_faulty(schedules)
        assert name == "one row" or all(any(op.called for op in schedule) for schedule in schedules)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tensors_without_data_give_the_same_schedules(strategy):
    mesh = Mesh(ulysses=2, ring=3)
    on_meta, on_cpu = (schedules_of(mesh, "window", STRATEGIES[strategy], device) for device in (META, CPU))
    assert on_meta == on_cpu and sum(map(len, on_meta)) > mesh.context


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("sequences", [1, 3])
def test_merges_of_decoding_on_every_mesh_to_eight_ranks(mesh, sequences):
    ranks, heads = mesh.context, 2 * mesh.ulysses
    owned = [range(heads * rank // ranks, heads * (rank + 1) // ranks) for rank in range(ranks)]
    partial = empty_partial(torch.empty(1, sequences, 2, 5, device=META))
    refuse_faulty(record(mesh, lambda groups: gather_merge(partial, groups.context, mesh.ulysses)))
    refuse_faulty(record(mesh, lambda groups: scatter_merge(partial, groups.context, mesh.ulysses, owned)))


def forward_schedules(layout, strategy, mask=CAUSAL):
    """Return the schedules of a forward on a ring, without Ulysses and without a backward."""

    def rank_main(groups):
        q = torch.empty(B, layout.rows(groups.rank), 6, 5, device=META)
        ring_attention(Ring(groups.ring, layout, layout, mask), SHAPES_ONLY, strategy)(q, q[:, :, :2], q[:, :, 2:4])

    return record(Mesh(ring=layout.size), rank_main)


@pytest.mark.parametrize("strategy", [pass_kv, pass_q])
@pytest.mark.parametrize(
    ("tokens", "rows", "calls"), [(1, [1, 0, 0, 0], [1, 1, 0, 0]), (2, [1, 0, 0, 1], [1, 1, 0, 1])]
)
def test_first_exchange_that_leaves_out_a_rank(strategy, tokens, rows, calls):
    """A rank calls the first hop if it or the previous rank has rows.  NCCL would connect the group in it."""
    layout = zigzag(tokens, 4)
    schedules = forward_schedules(layout, strategy)
    assert [layout.rows(rank) for rank in range(4)] == rows
    assert [schedule[0].called for schedule in schedules] == calls
    refuse_faulty(schedules)
    with pytest.raises(ScheduleError, match=r"first exchange of ring .*.* rank 2 does not take part.*device_id"):
        refuse_faulty(schedules, connected=False)
    refuse_faulty(forward_schedules(zigzag(37, 4), strategy), connected=False)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["window", "one row", "documents"])
def test_recorded_bytes_are_those_that_threads_send(strategy, name):
    layout, mask = LAYOUTS[name][0](3), LAYOUTS[name][1]
    _, traffic = on_threads(
        problem(layout, dtype=F32),
        lambda comm: ring_attention(Ring(comm, layout, layout, mask), reference, STRATEGIES[strategy]),
    )
    for schedule, (forward, _) in zip(forward_schedules(layout, STRATEGIES[strategy], mask), traffic, strict=True):
        sent = [m.elements * m.dtype.itemsize for operation in schedule for m in operation.sends]
        assert (sum(sent), len(sent)) == (forward.total, sum(forward.messages.values()))


# Planted faults, as schedules.

RING = Group("ring", (0, 1, 2))


def exchange(to=None, of=None, elements=7, dtype=F32, group=RING):
    """Return an exchange that sends to ``to`` and receives from ``of``."""
    sends = () if to is None else (Message(to, elements, dtype),)
    receives = () if of is None else (Message(of, elements, dtype),)
    return Operation("exchange", group, sends, receives)


def collective(name, rank, sizes, group=RING):
    """Return a collective in which ``rank`` sends ``sizes[rank]`` elements to each other rank."""
    others = [other for other in group.ranks if other != rank]
    sends = tuple(Message(other, sizes[rank], F32) for other in others)
    return Operation(name, group, sends, tuple(Message(other, sizes[other], F32) for other in others))


def test_exchanges_and_collectives_that_match():
    gather = [collective("all_gather", rank, [3, 5, 7]) for rank in range(3)]
    hop = [exchange((rank + 1) % 3, (rank - 1) % 3) for rank in range(3)]
    refuse_faulty([[hop[rank], gather[rank], hop[rank]] for rank in range(3)])
    refuse_faulty([[exchange(to=1), exchange(to=1, elements=2)], [exchange(of=0), exchange(of=0, elements=2)], []])


CYCLE = [[exchange(of=(rank - 1) % 3), exchange(to=(rank + 1) % 3)] for rank in range(3)]
PAIR = Group("context", (0, 1))
FAULTS = {
    "each rank receives before it sends": (CYCLE, "deadlock: rank 0 waits in exchange of ring .*28 bytes.*from rank 2"),
    "no rank sends": ([[exchange(of=1)], [], []], "deadlock: rank 0 waits .* to receive 28 bytes .* from rank 1$"),
    "another peer": ([[exchange(to=1)], [], [exchange(of=0)]], "deadlock: rank 0 .* to rank 1; rank 2 .* from rank 0"),
    "another size": (
        [[exchange(to=1)], [exchange(of=0, elements=8)], []],
        r"mismatch: .* rank 0 sends 28 bytes \(float32\) to rank 1, which expects 32 bytes",
    ),
    "another dtype": ([[exchange(to=1)], [exchange(of=0, dtype=torch.int32)], []], r"28 bytes \(int32\)"),
    "another order of messages": (
        [[exchange(to=1), exchange(to=1, elements=2)], [exchange(of=0, elements=2), exchange(of=0)], []],
        "mismatch: .* sends 28 bytes .* expects 8 bytes",
    ),
    "another group": (
        [[exchange(to=1)], [exchange(of=0, group=Group("context", (0, 1, 2)))], []],
        "deadlock: rank 0 waits in exchange of ring .*; rank 1 waits in exchange of context",
    ),
    "another collective": (
        [[collective("all_gather" if rank else "all_to_all", rank, [3] * 3)] for rank in range(3)],
        "mismatch: collectives of ring .* in another order: rank 0 calls all_to_all, rank 1 calls all_gather",
    ),
    "another size in a collective": (
        [[collective("all_gather", rank, [3, 5, 7] if rank else [3, 5, 8])] for rank in range(3)],
        "mismatch: in all_gather of ring .*, rank 2 sends 28 bytes .* to rank 0, which expects 32 bytes",
    ),
    "a rank that leaves a collective out": (
        [[collective("all_gather", rank, [3] * 3)] if rank else [] for rank in range(3)],
        "deadlock: rank 1 waits in all_gather of ring .*; rank 2 waits in all_gather",
    ),
    "collectives of two groups in another order": (
        [[collective("all_gather", r, [3] * 3, g) for g in ((RING, PAIR) if r else (PAIR, RING)) if r in g.ranks]
         for r in range(3)],
        "deadlock: rank 0 waits in all_gather of context .*; rank 1 waits in all_gather of ring",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("schedules", "message"), FAULTS.values(), ids=FAULTS)
def test_planted_fault(schedules, message):
    with pytest.raises(ScheduleError, match=message):
        refuse_faulty(schedules)


# Planted faults, in strategies.


def deadlocked(q, k, v, ring, kernel):
    """Pass-KV in which the last rank merges partial results first."""
    partial = empty_partial(q)
    if ring.comm.rank == ring.comm.size - 1:
        gather_merge(partial, ring.comm, 1)
    for _ in rotate(ring.comm, ring.keys, k, v):
        pass
    if ring.comm.rank != ring.comm.size - 1:
        gather_merge(partial, ring.comm, 1)
    return partial


def short_of_a_row(q, k, v, ring, kernel):
    """Pass-KV in which rank 1 does not send the last row of its keys."""
    if ring.comm.rank == 1:
        k, v = k[:, :-1], v[:, :-1]
    return pass_kv(q, k, v, ring, kernel)


@pytest.mark.parametrize("mesh", [Mesh(ring=3), Mesh(ulysses=2, ring=4)], ids=str)
@pytest.mark.parametrize(
    ("strategy", "message"),
    [(deadlocked, "deadlock: .* waits in exchange of ring"), (short_of_a_row, "mismatch: in exchange of ring")],
)
def test_planted_fault_of_a_strategy(mesh, strategy, message):
    with pytest.raises(ScheduleError, match=message):
        refuse_faulty(schedules_of(mesh, "documents", strategy))
