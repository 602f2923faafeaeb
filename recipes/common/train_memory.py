"""Memory of a training step by part: the cost model's prediction, and measured memory in words."""

from __future__ import annotations

from collections.abc import Mapping

from longctx.cost.forward import Numbers
from longctx.cost.memory import step_bytes
from longctx.cost.step import StepWork
from recipes.common.train_job import TrainJob

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def predict_memory(job: TrainJob) -> dict[str, float] | None:
    """Return the predicted bytes of a step by part; None for a mixture of experts, which the cost model lacks."""
    target, settings = job.target, job.settings
    if target.shape.mixture:
        return None
    element = _ELEMENT_BYTES[target.model.dtype]
    work = StepWork(
        job.data.length,
        job.data.batch,
        zero1=job.optim.zero1,
        recompute=settings.recompute,
        loss_rows=settings.loss_rows,
        mlp_rows=settings.mlp_rows,
        operations="cuda" if target.run.device == "cuda" else "cpu",
    )
    return step_bytes(target.shape, target.mesh, work, target.context.strategy, Numbers(element, element))


def describe_memory(measured: Mapping[str, float], predicted: Mapping[str, float] | None) -> str:
    """Return both in words: the sum, the prediction of the sum, and the measured parts, the largest first."""
    parts = sorted(measured.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in parts)
    expected = f", predicted {sum(predicted.values()) / 1e6:,.1f}" if predicted else ""
    return f"{sum(measured.values()) / 1e6:,.1f} MB{expected}: {listed}"
