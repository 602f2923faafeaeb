"""Functions that the tests' ranks run; apart from the tests, so that a rank imports little."""

from collections.abc import Sequence
from pathlib import Path

from eval.answers.requests import Answer, Request
from longctx.config import Context, Mesh, ModelSource, Run
from longctx.parallel.launch import Rank


def answer_on_rank(
    rank: Rank, mesh: Mesh, folder: Path, requests: Sequence[Request], max_batch_tokens: int
) -> dict[Request, Answer]:
    """Return the answers to ``requests`` of the model in ``folder``, in float64; a batch has ``max_batch_tokens``."""
    from eval.answers.worker import EvalWork, answer_requests
    from eval.variants import Variant
    from longctx.hf.config import shape_of
    from recipes.common.target import Target

    run = Run(threads=1, timeout_minutes=2)
    target = Target(ModelSource("test", str(folder), dtype="float64"), folder, shape_of(folder), mesh, Context(), run)
    work = EvalWork("test", Variant("test", target), tuple(requests), folder, max_batch_tokens)
    with target.runtime(rank) as runtime:
        engine = target.load_engine(runtime)
        return {request: answer for batch, _ in answer_requests(engine, work) for request, answer in batch}
