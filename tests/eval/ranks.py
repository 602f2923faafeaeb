"""What the ranks of the tests here run; apart from the tests, so that a rank imports no more than it needs."""

from collections.abc import Sequence
from pathlib import Path

from eval.answers.requests import Answer, Request
from longctx.config import Context, Mesh, ModelSource
from longctx.parallel.launch import Rank


def answers(
    rank: Rank, mesh: Mesh, folder: Path, requests: Sequence[Request], together: int, dtype: str = "float32"
) -> dict[Request, Answer]:
    """The answers to ``requests``, so many tokens together."""
    from eval.answers.worker import EvalWork, answered
    from eval.variants import Variant
    from longctx.hf.config import shape_of
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime

    shape, model = shape_of(folder), ModelSource("test", str(folder), dtype=dtype)  # type: ignore[arg-type]
    variant = Variant("test", model, folder, shape, mesh, Context(), None, "cpu")
    work = EvalWork("test", variant, tuple(requests), folder, together, threads=1, timeout_minutes=2)
    with runtime(rank, mesh, timeout_minutes=2) as here:
        engine = load_engine(here, model, shape, folder, "auto")
        return {request: answer for found, _ in answered(engine, work) for request, answer in found.items()}
