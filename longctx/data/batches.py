"""Training batches of consecutive packed sequences; each data-parallel rank takes every dp-th sequence."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from longctx.config import DataSettings
from longctx.data.documents import Document, documents
from longctx.data.mixing import interleave
from longctx.data.packing import PackedSequence, learnable, pack, pack_whole, padding_sequence, unused
from longctx.data.stage import Stage, StageWithStart, State
from longctx.shapes import Bool, Tensor, Tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A data-parallel rank's sequences, stacked; ``lengths[i]`` has the lengths of the pieces of sequence i.

    A piece is a part of one document, or padding.  ``tokens``, ``targets`` and ``mask`` are as in `PackedSequence`.
    ``counted`` is the number of targets with a loss in the whole batch, over all data-parallel ranks.  Sums of losses
    are divided by it, so that the loss does not depend on how ranks share the batch.  ``documents`` has
    the lengths of the pieces of documents, without padding, of each sequence in the whole batch.
    """

    tokens: Tokens
    targets: Tokens
    mask: Bool[Tensor, "b s"]
    lengths: tuple[tuple[int, ...], ...]
    counted: int
    documents: tuple[tuple[int, ...], ...] = ()

    @property
    def largest_token(self) -> int:
        """Largest id among tokens and targets."""
        return max(int(self.tokens.max()), int(self.targets.max()))


def training_batches(
    data: DataSettings, tokenizer: Any, dp_rank: int = 0, dp_size: int = 1, ends: tuple[int, ...] = ()
) -> Stage[Batch]:
    """Return the whole pipeline for ``data``, from files to batches: `documents`, `interleave`, `pack`, `batches`.

    With ``data.conversations``, ``ends`` must have the tokens that end the model's answers, and "whole" conversations
    are packed by `pack_whole`.  Sequences in which no target counts are left out, if there may be any: in
    conversations, and with ``data.last`` "pad", where a single token may be left over.

    Raises ValueError as these stages do.
    """
    mixed = _mixed_documents(data, tokenizer, ends)
    sequences = (pack_whole if data.conversations == "whole" else pack)(mixed, data.length, data.last)
    if data.conversations or data.last == "pad":
        sequences = learnable(sequences)
    return batches(sequences, data.batch, dp_rank, dp_size, data.last)


def refuse_state(state: State, data: DataSettings, tokenizer: Any, ends: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless `training_batches` of ``data``, ``tokenizer`` and ``ends`` can resume from ``state``.

    Reads the text from ``state`` to the next document's first part, or to the end of its shuffle window, and past all
    records that are left out.  Later text may still have a fault.
    """
    next(unused(_mixed_documents(data, tokenizer, ends), state["documents"], state["used"]), None)


def _mixed_documents(data: DataSettings, tokenizer: Any, ends: tuple[int, ...]) -> StageWithStart[Document]:
    sources = [documents(source, tokenizer, data, ends) for source in data.sources]
    return interleave(sources, [source.weight for source in data.sources])


def batches(
    sequences: Stage[PackedSequence],
    size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    last: Literal["drop", "pad"] = "drop",
) -> Stage[Batch]:
    """Return batches of ``size`` sequences in order; this rank gets sequences dp_rank, dp_rank + dp_size, ... of each.

    Every data-parallel rank reads all sequences.  Batches and states are therefore the same for any ``dp_size``, and a
    run may resume with another ``dp_size``.  An incomplete last batch is dropped and logged (``last="drop"``), or
    filled with padding (``last="pad"``).

    Raises ValueError if ``dp_size`` does not divide ``size``.
    """
    refuse_uneven_batch(size, dp_size)
    assert 0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}"

    def run(state: State | None) -> Iterator[tuple[Batch, State]]:
        rows: list[PackedSequence] = []
        resume_state: State = {}
        for sequence, resume_state in sequences(state):
            rows.append(sequence)
            if len(rows) == size:
                yield _stack(rows, dp_rank, dp_size), resume_state
                rows = []
        if rows and last == "pad":
            rows += [padding_sequence(len(rows[0].tokens))] * (size - len(rows))
            yield _stack(rows, dp_rank, dp_size), resume_state
        elif rows:
            log.warning(
                "the last %d sequences do not fill a batch of %d: dropped (data.last=pad keeps them)", len(rows), size
            )

    return run


def _stack(rows: list[PackedSequence], dp_rank: int, dp_size: int) -> Batch:
    mine = rows[dp_rank::dp_size]
    return Batch(
        torch.stack([row.tokens for row in mine]),
        torch.stack([row.targets for row in mine]),
        torch.stack([row.mask for row in mine]),
        tuple(row.lengths for row in mine),
        sum(int(row.mask.sum()) for row in rows),
        tuple(row.lengths[:-1] if row.padding else row.lengths for row in rows),
    )


def refuse_uneven_batch(size: int, dp_size: int) -> None:
    """Raise ValueError unless ``dp_size`` data-parallel ranks can share ``size`` sequences evenly."""
    if size % dp_size:
        raise ValueError(
            f"data.batch={size} sequences do not divide over {dp_size} data-parallel ranks: "
            f"use data.batch={size + -size % dp_size}, or another mesh.dp"
        )


def left_out(state: State) -> dict[str, int]:
    """Return the numbers of records left out before a state of `training_batches`, over all sources and epochs.

    The keys are "empty", for records without text, and "skipped", for faulty records.
    """
    documents = state["documents"] or {"sources": []}  # None: version 0.2, inside the first document
    sources = [source for source in documents["sources"] if source]
    return {count: sum(source[count] for source in sources) for count in ("empty", "skipped")}
