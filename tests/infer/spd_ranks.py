"""What the ranks of test_spd.py run."""

from pathlib import Path
from typing import Any

from longctx.config import Context, Mesh, ModelSource, Sampling
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan


def answered(rank: Rank, mesh: Mesh, folder: Path, tokens: list[int], dropped: tuple[int, ...]) -> dict[str, Any]:
    """A prompt's logits and three decoded tokens, and the all-reduces of either."""
    from longctx.infer.engine import load_engine
    from longctx.infer.session import Session, next_logits
    from longctx.megatron.runtime import runtime
    from longctx.parallel.measure.all_reduce import count_all_reduces

    shape = shape_of(folder)
    with runtime(rank, mesh, timeout_minutes=2) as here:
        plan = SPDPlan(shape.layers, mesh.tp, dropped)
        engine = load_engine(here, ModelSource("test", str(folder)), shape, folder, "auto", plan)
        session = Session(engine, Context(), Sampling())
        with count_all_reduces() as prefill:
            made = session.turn({0: tokens}, {0: 1}, keep_states=True)
        chosen = made.tokens[0]
        with count_all_reduces() as decode:
            for _ in range(2):
                chosen.append(session.decode([0])[0])
        hidden, layout = made.passes[0]
        shapes = [(layout.rows(r), *hidden.shape[1:]) for r in range(engine.ranks)]
        whole = layout.unshard(here.context.all_gather(hidden, shapes))
        return {
            "logits": next_logits(engine, whole)[:, 0],
            "tokens": chosen,
            "prefill": (prefill.calls, prefill.bytes),
            "decode": (decode.calls, decode.bytes),
            "rows": layout.rows(engine.rank),
        }
