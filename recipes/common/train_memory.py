"""Memory of a training step by part: the cost model's prediction, and measured memory in words."""

from __future__ import annotations

from collections.abc import Mapping

from longctx.cost.forward import Numbers
from longctx.cost.memory import step_bytes
from longctx.cost.step import StepWork
from recipes.common.predicted import ELEMENT_BYTES
from recipes.common.train_job import TrainJob


def predict_memory(job: TrainJob) -> dict[str, float]:
    """Return the predicted bytes of a rank at the peak of a training step, by part."""
    target = job.target
    element = ELEMENT_BYTES[target.model.dtype]
    return step_bytes(target.shape, target.mesh, step_work(job), target.context.strategy, Numbers(element, element))


def step_work(job: TrainJob, documents: tuple[tuple[int, ...], ...] = ()) -> StepWork:
    """Return the cost model's `StepWork` of ``job``, with the settings that save memory; ``documents`` are its own."""
    settings = job.settings
    return StepWork(
        job.data.length,
        job.data.batch,
        zero1=job.optim.zero1,
        recompute=settings.recompute,
        loss_rows=settings.loss_rows,
        mlp_rows=settings.mlp_rows,
        offload=settings.offload is not None,
        operations="cuda" if job.target.run.device == "cuda" else "cpu",
        documents=documents,
    )


def describe_memory(measured: Mapping[str, float], predicted: Mapping[str, float]) -> str:
    """Return the memory of a step as text: the measured sum, the predicted sum, and the measured parts.

    Both arguments are bytes by part.  The largest part comes first.
    """
    parts = sorted(measured.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in parts)
    sums = [sum(parts.values()) / 1e6 for parts in (measured, predicted)]
    return f"{sums[0]:,.1f} MB, predicted {sums[1]:,.1f}: {listed}"
