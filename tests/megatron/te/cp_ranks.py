"""Functions that the ranks of test_cp.py run: Transformer Engine's context parallelism beside dense attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from longctx.attention.layout import zigzag
from longctx.config import Mesh, ModelSource
from longctx.parallel.launch import Rank
from tests import oracle


@dataclass(frozen=True)
class Case:
    """Attention to compare: a peer, the backend that Transformer Engine chooses, and the sizes of the inputs."""

    peer: str
    backend: str
    heads: tuple[int, int]
    window: int | None = None
    chunk: int = 7
    batch: int = 2


def compare(rank: Rank, mesh: Mesh, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return, for each case, the largest differences of out, dq, dk and dv from dense float64 attention.

    ``sent`` has the numbers that this rank sent, and ``kv`` the numbers of its keys and values.
    """
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        return [_compare(runtime, case) for case in cases]


def _compare(
    runtime: Any, case: Case, change: Callable[..., Any] = lambda attention: attention, row_rank: int | None = None
) -> dict[str, Any]:
    """Return the entry of `compare` for ``case``.

    For mutations, ``change`` changes the attention function, and this rank gets the rows of ``row_rank``.
    """
    from recipes.bench.te_peer import te_attention
    from tests.megatron.te import attention_stand_in

    # 1. Inputs of the whole sequence, and this rank's rows.
    (heads, kv_heads), ranks, head_dim = case.heads, runtime.context.size, 5
    length = 2 * ranks * case.chunk
    layout, generator = zigzag(length, ranks), torch.Generator().manual_seed(length)
    q, k, v, dout = (
        torch.randn(case.batch, length, n, head_dim, generator=generator, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    row_rank = runtime.context.rank if row_rank is None else row_rank
    *mine, my_dout = (layout.shard(x, row_rank, 1) for x in (q, k, v, dout))
    leaves = [x.clone().requires_grad_() for x in mine]

    # 2. Forward and backward by Transformer Engine.
    attention_stand_in.choose(case.backend)
    attention_stand_in.SENT.clear()
    shape = SimpleNamespace(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    out = change(te_attention(case.peer, runtime, shape, case.window))(*leaves)
    out.backward(my_dout)

    # 3. The same by one dense matrix.
    rows_of_all = oracle.pack_rows([length])
    mask = oracle.visible(rows_of_all, rows_of_all, None if case.window is None else case.window - 1)
    exact = (oracle.attention(q, k, v, mask)[0], *oracle.gradients(q, k, v, mask, dout))
    actual = (out.detach(), *(x.grad for x in leaves))
    errors = [float((a - layout.shard(e, row_rank, 1)).abs().max()) for a, e in zip(actual, exact, strict=True)]
    return {"errors": errors, "sent": dict(attention_stand_in.SENT), "kv": 2 * mine[1].numel(), "q": mine[0].numel()}


def noticed(rank: Rank, mesh: Mesh) -> dict[str, str]:
    """Return, for each mutation: "differs" from dense attention, "raised" by a check, or "equal"."""
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        return {name: _outcome(lambda mutation=mutation: mutation(runtime)) for name, mutation in MUTATIONS.items()}


def _outcome(run: Callable[[], dict[str, Any]]) -> str:
    try:
        return "equal" if all(error < 1e-6 for error in run()["errors"]) else "differs"  # NaN differs
    except (AssertionError, ValueError, RuntimeError):  # on all ranks, before they send anything
        return "raised"


def _halves_swapped(attention: Callable[..., Any]) -> Callable[..., Any]:
    def swap(x: torch.Tensor) -> torch.Tensor:
        return x.roll(x.shape[1] // 2, 1)

    return lambda *qkv: swap(attention(*map(swap, qkv)))


def _chunks_in_rank_order(runtime: Any, case: Case) -> dict[str, Any]:
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    name = "get_seq_chunk_ids_for_reordering_before_attn"
    with patch.object(context_parallel, name, lambda ranks, device: torch.arange(2 * ranks, dtype=torch.int32)):
        return _compare(runtime, case)


def _window_off_by_one(runtime: Any, case: Case) -> dict[str, Any]:
    from transformer_engine.pytorch import DotProductAttention

    construct = DotProductAttention.__init__

    def init(self: Any, *args: Any, window_size: tuple[int, int], **kwargs: Any) -> None:
        construct(self, *args, window_size=(window_size[0] + 1, 0), **kwargs)

    with patch.object(DotProductAttention, "__init__", init):
        return _compare(runtime, case)


P2P, A2A, ALL_GATHER, BOTH = (
    Case(peer, "flash", (12, 4)) for peer in ("te_p2p", "te_a2a", "te_all_gather", "te_a2a+p2p")
)
MUTATIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "none": lambda r: _compare(r, BOTH),
    "p2p: a rank's two chunks swapped": lambda r: _compare(r, P2P, _halves_swapped),
    "a2a+p2p: a rank's two chunks swapped": lambda r: _compare(r, BOTH, _halves_swapped),
    "p2p: rows of the rank at the other end": lambda r: _compare(r, P2P, row_rank=r.context.size - 1 - r.context.rank),
    "all_gather: chunks in the order of ranks": lambda r: _chunks_in_rank_order(r, ALL_GATHER),
    "a2a: chunks in the order of ranks": lambda r: _chunks_in_rank_order(r, A2A),
    "a2a: a window of one more": lambda r: _window_off_by_one(r, replace(A2A, window=9)),
    # The last one: after an error, these groups are of no further use.
    "a2a+p2p: the two groups exchanged": lambda r: _compare(replace(r, ulysses=r.ring, ring=r.ulysses), BOTH),
}


def run_bench(rank: Rank, mesh: Mesh, peers: tuple[str, ...]) -> Any:
    """Return the result of recipes.bench attention with ``peers`` and our variants, in float64 and without a GPU."""
    from longctx.megatron.runtime import open_runtime
    from recipes.bench import attention
    from tests.megatron.te import attention_stand_in

    attention_stand_in.choose("flash")
    settings = attention.AttentionSettings(
        (56,), ("pass_kv", "ulysses", "hybrid"), peers, kernel="reference", checked=41, rounds=1
    )
    target = SimpleNamespace(
        mesh=mesh, model=ModelSource("m", "m", dtype="float64"),
        shape=SimpleNamespace(heads=8, kv_heads=4, head_dim=5), runtime=lambda rank: open_runtime(rank, mesh),
    )  # fmt: skip
    return attention.run_rank(rank, attention.AttentionJob(settings, target))
