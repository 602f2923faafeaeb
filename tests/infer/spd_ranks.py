"""Rank functions of test_spd.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.config import Context, Mesh, ModelSource, Reduce, Sampling
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime


def generate_and_count(
    rank: Rank, mesh: Mesh, folder: Path, tokens: list[int], dropped: tuple[int, ...]
) -> dict[str, Any]:
    """Return a prompt's logits and three tokens, and (calls, bytes) of the all-reduces in prefill and decode."""
    return generate_and_count_each(rank, mesh, [folder], tokens, dropped)[0]


def generate_and_count_each(
    rank: Rank, mesh: Mesh, folders: list[Path], tokens: list[int], dropped: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return the results of `generate_and_count` for each model, on the same ranks."""
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        return [_generate(runtime, folder, tokens, dropped) for folder in folders]


def generate_in_cases(
    rank: Rank, mesh: Mesh, tokens: list[int], cases: list[tuple[Path, tuple[int, ...], Reduce | None]]
) -> list[dict[str, Any]]:
    """Return the results of `generate_and_count` for each case: a model, its dropped blocks, its rounded reductions."""
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        return [_generate(runtime, folder, tokens, dropped, reduce) for folder, dropped, reduce in cases]


def _generate(
    runtime: "Runtime", folder: Path, tokens: list[int], dropped: tuple[int, ...], reduce: Reduce | None = None
) -> dict[str, Any]:
    from longctx.infer.engine import load_engine, next_logits
    from longctx.infer.session import Session
    from longctx.parallel.measure.all_reduce import count_all_reduces
    from longctx.parallel.quantised import REDUCTION

    shape = shape_of(folder)
    plan = SPDPlan(shape.layers, runtime.mesh.tp, dropped) if dropped or not reduce else None
    engine = load_engine(runtime, ModelSource("test", str(folder)), shape, folder, "auto", plan, reduce)
    before = runtime.tp.traffic.purposes.get(REDUCTION, 0)
    session = Session(engine, Context(), Sampling())
    with count_all_reduces() as prefill:
        turn = session.turn({0: tokens}, {0: 1}, keep_states=True)
    sent = runtime.tp.traffic.purposes.get(REDUCTION, 0) - before
    tokens_out = turn.tokens[0]
    with count_all_reduces() as decode:
        for _ in range(2):
            tokens_out.append(session.decode([0])[0])
    hidden, layout = turn.passes[0]
    shapes = [(layout.rows(r), *hidden.shape[1:]) for r in range(engine.ranks)]
    whole = layout.unshard(runtime.context.all_gather(hidden, shapes))
    return {
        "logits": next_logits(engine, whole)[:, 0],
        "tokens": tokens_out,
        "prefill": (prefill.calls, prefill.bytes),
        "decode": (decode.calls, decode.bytes),
        "rows": layout.rows(engine.rank),
        "sent": sent,
        "tp_rank": runtime.tp.rank,
    }
