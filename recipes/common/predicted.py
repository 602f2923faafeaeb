"""Times of a run that the cost model predicts for the machine of a hardware file, shown with the measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from longctx.cost.forward import Numbers, decode_cost, prefill_cost
from longctx.cost.numerals import three_digits

if TYPE_CHECKING:
    from longctx.config import Context, Mesh
    from longctx.cost.machine import Machine
    from longctx.infer.session import Session
    from longctx.infer.turn import Turn
    from recipes.common.target import Target

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def refuse_unpredicted(target: Target) -> None:
    """Raise ValueError for settings of inference for which the cost model has no times."""
    fix = "use hardware=null to run without a prediction"
    if target.shape.mixture:
        raise ValueError(f"hardware: times of a mixture of experts in inference are not modelled; {fix}")
    if target.reduce:
        raise ValueError(f"hardware: times of rounded reductions ({target.reduce}) are not modelled; {fix}")
    if target.context.chunk:
        raise ValueError(
            f"hardware: a prefill in parts (context.chunk={target.context.chunk}) is not modelled; {fix}, or "
            "context.chunk=null"
        )
    if not is_balanced(target.context, target.mesh):
        raise ValueError(
            f"hardware: times of context.layout={target.context.layout} are not modelled; {fix}, or "
            "context.layout=zigzag"
        )


def is_balanced(context: Context, mesh: Mesh) -> bool:
    """Return True if rows are divided as in the cost model: by the layout zigzag, or not at all over a ring."""
    return context.layout == "zigzag" or mesh.ring == 1


def predict_turn(
    target: Target, machine: Machine, prompts: Sequence[int], turn: Turn, session: Session
) -> dict[str, float | None]:
    """Return the predicted ``ttft_s`` and ``ttit_s`` of ``turn``, the measured first turn of ``session``.

    ``prompts`` are the lengths in tokens of its prompts, in the order of sequences.  The prediction uses the lengths of
    its answers and the session's decode strategy.  ``ttit_s`` is None if the turn had no decode step.
    """
    shape, mesh, numbers, strategy = target.shape, target.mesh, _numbers(target), target.context.strategy
    ttft_s = prefill_cost(shape, mesh, machine, prompts, [0] * len(prompts), strategy, numbers).seconds
    if turn.ttit_s is None:
        return {"ttft_s": ttft_s, "ttit_s": None}
    # The first of an answer's tokens needs no decode step.  On average, half of an answer is cached.
    cached = [n + len(turn.tokens[i]) // 2 for i, n in enumerate(prompts) if len(turn.tokens[i]) > 1]
    decode = target.context.decode
    if decode == "auto":
        decode = session.decode_strategy(len(cached))  # type: ignore[assignment]
    return {"ttft_s": ttft_s, "ttit_s": decode_cost(shape, mesh, machine, cached, decode, numbers).seconds}


def _numbers(target: Target) -> Numbers:
    size, dropped = ELEMENT_BYTES[target.model.dtype], target.plan.dropped if target.plan else ()
    return Numbers(size, size, len(dropped) / target.shape.layers)


def beside(measured: float | None, predicted: Mapping[str, float | None] | None, name: str) -> str:
    """Return text to append to the ``measured`` seconds: the predicted seconds and their error; empty if one is None.

    ``name`` is the key of the prediction, such as ``ttft_s``.
    """
    seconds = predicted[name] if predicted else None
    return (
        ""
        if seconds is None or not measured
        else f", predicted {three_digits(seconds)} s ({seconds / measured - 1:+.0%})"
    )
