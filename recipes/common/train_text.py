"""A rank's text in a training run: a batch for each step, until the text ends or has a fault; and held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from recipes.common.train_job import TrainJob

if TYPE_CHECKING:
    from longctx.data.batches import Batch
    from longctx.data.stage import State
    from longctx.megatron.runtime import Runtime
    from longctx.train.stop import StopRequest

Item = TypeVar("Item")


class FaultyText(ValueError):
    """The text of a rank cannot be read any further, or a batch has nothing to learn from; every rank raises this."""


class TrainingText:
    """Batches of the steps after ``step``, from the text's resume state ``data`` on (None: from its beginning).

    A fault of the text ends them like the text's end, and is then in ``fault``.
    """

    def __init__(self, job: TrainJob, runtime: Runtime, step: int, data: State | None) -> None:
        self.fault: ValueError | None = None
        self._job, self._runtime, self._step, self._data = job, runtime, step, data

    def __iter__(self) -> Iterator[tuple[int, Batch, State, bool]]:
        """Yield each step's number, batch and resume state, and True if it is the last one.  Reads one batch ahead."""
        batches = islice(self._until_fault(), self._job.settings.steps - self._step)
        for step, ((batch, data), is_last) in enumerate(mark_last(batches), self._step + 1):
            yield step, batch, data, is_last

    def refuse_fault(self, stop: StopRequest, step: int) -> None:
        """Raise `FaultyText` if the ranks of ``stop`` have agreed, after ``step``, that one of them has a fault.

        Every rank names the first of these faults.  Without an agreement, which needs a step, raises this rank's own.
        """
        from longctx.parallel.comm import gather_bytes

        if stop.has_fault:
            own = str(self.fault or "").encode()
            cause = next(filter(None, gather_bytes(self._runtime.world, own, self._runtime.device))).decode()
            note = "; a run that goes on takes data.on_error=skip, not other text" if "data.on_error" in cause else ""
            raise FaultyText(f"{cause}; the {step:,} steps before it are saved{note}") from self.fault
        if self.fault:
            raise self.fault

    def _until_fault(self) -> Iterator[tuple[Batch, State]]:
        from longctx.data.packing import refuse_nothing_to_learn

        shape = self._job.target.shape
        try:
            for step, (batch, data) in enumerate(_batches(self._job, self._runtime, self._data), self._step + 1):
                refuse_nothing_to_learn(batch.counted, f"the batch of step {step}")
                shape.refuse_unknown_token(batch.largest_token, f"the batch of step {step}")
                yield batch, data
        except ValueError as error:
            self.fault = error


def held_out_text(job: TrainJob, runtime: Runtime) -> list[Batch]:
    """Return this data-parallel rank's batches of held-out text.

    Raises ValueError for a token beyond the model's vocabulary.
    """
    if not job.test:
        return []
    batches = [batch for batch, _ in islice(_batches(job, runtime, None, held_out=True), job.evaluation.batches)]
    for batch in batches:
        job.target.shape.refuse_unknown_token(batch.largest_token, "the held-out text")
    return batches


def _batches(
    job: TrainJob, runtime: Runtime, data: State | None, *, held_out: bool = False
) -> Iterable[tuple[Batch, State]]:
    from longctx.data.batches import training_batches
    from longctx.hf.config import tokenizer_of

    text, target = job.test if held_out else job.data, job.target
    assert text
    dp = runtime.groups.dp
    stage = training_batches(text, tokenizer_of(target.folder), dp.rank(), dp.size(), target.shape.end_tokens)
    return stage(data)


def mark_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yield each of ``items`` with True if it is the last, else False; this reads one item ahead."""
    pending: list[Item] = []
    for item in items:
        if pending:
            yield pending.pop(), False
        pending.append(item)
    for item in pending:
        yield item, True
