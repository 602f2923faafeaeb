"""Training that has diverged ends with a line that names a checkpoint from which it can resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import checkpoint_index

if TYPE_CHECKING:
    from longctx.megatron.training.checkpoint import Checkpoints

_FINITE = ("loss", "grad_norm", "eval/loss")  # figures that are finite unless training has diverged


def refuse_diverged_step(
    step: int, figures: Mapping[str, float | None], checkpoints: Checkpoints, folder: Path, dtype: str
) -> None:
    """Raise FloatingPointError, on every rank, if a loss or the gradient norm of ``step`` is NaN or infinite.

    ``figures`` has the losses of training and of held-out text, and the norm.  ``folder`` is that of ``checkpoints``;
    checkpoints that are being written are completed first.  ``dtype`` is the model's.  Every rank calls this.
    """
    finite = {name: figures.get(name) for name in _FINITE}
    wrong = [f"{name} is {value}" for name, value in finite.items() if value is not None and not math.isfinite(value)]
    if not wrong:
        return
    checkpoints.poll(wait=True)
    # The loss and the norm are those of the weights before the step; held-out text is evaluated after it.
    from_weights = any(not math.isfinite(finite[name] or 0.0) for name in ("loss", "grad_norm"))
    resume = _describe_resume(folder, step, from_weights)
    wider = "; or begin again in another out= with model.dtype=float32" if dtype != "float32" else ""
    raise FloatingPointError(
        f"training has diverged: {' and '.join(wrong)} in step {step} ({resume}): "
        f"use a lower optim.lr, a longer optim.warmup, or a lower optim.clip above 0{wider}"
    )


def _describe_resume(folder: Path, step: int, from_weights: bool) -> str:
    """Return in words from which checkpoint in ``folder`` a run can resume that diverged in ``step``.

    ``from_weights`` says that the weights before the step had diverged already, and with them a checkpoint of theirs.
    """
    whole = [place for place in checkpoint_index.checkpoint_folders(folder) if not checkpoint_index.fault_of(place)]
    last = step - 1 if from_weights else None
    bad = [place for place in whole if checkpoint_index.read_metadata(place)["step"] == last]
    good = [place for place in whole if place not in bad]
    resumes = f"the last good checkpoint is {good[-1]}, from which the same out= resumes" if good else ""
    if bad:
        then = f": remove it; {resumes}" if good else ": give another out="
        return f"the weights in {bad[0]} have diverged{then}"
    return resumes or "no checkpoint exists"
