"""Batches: consecutive sequences, of which each data-parallel rank takes every so many-th; the room's front door."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from longctx.config import DataSettings
from longctx.data.documents import documents
from longctx.data.mixing import interleaved
from longctx.data.packing import Packed, empty_packed, packed
from longctx.data.stage import Stage, State
from longctx.shapes import Bool, Tensor, Tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Sequences one above the other, each with the ``lengths`` of its documents (see `Packed`).

    ``counted`` are the targets with a loss in the whole batch, all parts of it: what sums of losses are divided
    by, however the batch is shared between ranks.
    """

    tokens: Tokens
    targets: Tokens
    mask: Bool[Tensor, "b s"]
    lengths: tuple[tuple[int, ...], ...]
    counted: int


def training_batches(data: DataSettings, tokenizer: Any, part: int = 0, parts: int = 1) -> Stage[Batch]:
    """What ``data`` describes, from files to batches: see `documents`, `interleaved`, `packed`, `batches`."""
    sources = [documents(source, tokenizer, data) for source in data.sources]
    mixed = interleaved(sources, [source.weight for source in data.sources])
    return batches(packed(mixed, data.length, data.last), data.batch, part, parts, data.last)


def batches(
    sequences: Stage[Packed], size: int, part: int = 0, parts: int = 1, last: Literal["drop", "pad"] = "drop"
) -> Stage[Batch]:
    """Batches of ``size`` consecutive sequences; of each the rows that are ``part`` of ``parts``: every parts-th.

    Every part reads everything, so that batches and states are the same however many parts there are, and a run
    may go on with another number.  An incomplete last batch is dropped and logged, or filled with padding.

    Raises ValueError if the parts would not be even.
    """
    if size % parts:
        raise ValueError(
            f"data.batch={size} sequences do not divide over {parts} data-parallel ranks: "
            f"use data.batch={size + -size % parts}, or another mesh.dp"
        )
    assert 0 <= part < parts, f"part {part} of {parts}"

    def run(state: State | None) -> Iterator[tuple[Batch, State]]:
        rows: list[Packed] = []
        behind: State = {}
        for sequence, behind in sequences(state):
            rows.append(sequence)
            if len(rows) == size:
                yield _stacked(rows, part, parts), behind
                rows = []
        if rows and last == "pad":
            yield _stacked([*rows, *[empty_packed(len(rows[0].tokens))] * (size - len(rows))], part, parts), behind
        elif rows:
            log.warning("the last %d sequences do not fill a batch of %d: dropped", len(rows), size)

    return run


def _stacked(rows: list[Packed], part: int, parts: int) -> Batch:
    mine = rows[part::parts]
    return Batch(
        torch.stack([row.tokens for row in mine]),
        torch.stack([row.targets for row in mine]),
        torch.stack([row.mask for row in mine]),
        tuple(row.lengths for row in mine),
        sum(int(row.mask.sum()) for row in rows),
    )


def left_out(state: State) -> dict[str, int]:
    """How many records a state of `training_batches` has left out so far: those that were empty, and no text."""
    documents = state["documents"] or {"sources": []}  # None while the very first document is being cut
    sources = [source for source in documents["sources"] if source]
    return {count: sum(source[count] for source in sources) for count in ("empty", "skipped")}
