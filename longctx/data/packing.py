"""Packing: cut documents and join them into sequences of one length, without padding between documents."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from longctx.data.documents import Document
from longctx.data.mixing import beginning_with
from longctx.data.stage import Stage, State, start_of
from longctx.shapes import Bool, Int, Positions, Tensor

log = logging.getLogger(__name__)
_FRUITLESS = 10_000  # sequences without a target that counts


@dataclass(frozen=True)
class PackedSequence:
    """A training sequence of pieces of documents; piece i has ``lengths[i]`` tokens.

    ``targets`` are the next tokens.  ``mask`` is False where a target does not count in the loss.  This is so where no
    next token exists, as after a document's last token (the target is then 0), and where `Document.learned` is False
    for the next token.  `longctx.attention.layout.shard_balanced` shards a sequence by its ``lengths``.  The last
    ``padding`` tokens belong to no document; they form a separate piece.
    """

    tokens: Positions
    targets: Positions
    mask: Bool[Tensor, " s"]
    lengths: tuple[int, ...]
    padding: int = 0


def pack(documents: Stage[Document], length: int, last: Literal["drop", "pad"] = "drop") -> Stage[PackedSequence]:
    """Return sequences of ``length`` tokens from ``documents``, in order; each token is an input once.

    For example, documents [1 2 3 4 5] and [6 7] with length 4 give [1 2 3 4] and [5 6 7 ...].  The rest of a cut
    document becomes a separate document in the next sequence: it starts at position 0 and does not see the first part.
    The last target of the first part is the first token of the rest (4 predicts 5).  Every token except a document's
    first is therefore a target once.  An incomplete last sequence is dropped and logged (``last="drop"``), or padded
    (``last="pad"``).

    The iteration raises ValueError as `unused` does.
    """

    def run(state: State | None) -> Iterator[tuple[PackedSequence, State]]:
        before, used = (state["documents"], state["used"]) if state else (None, 0)
        before = before or start_of(documents)  # version 0.2 wrote None inside the first document
        pieces: list[PackedSequence] = []
        missing = length
        rest = torch.empty(2, 0, dtype=torch.int32)  # the document's tokens that are in no sequence yet, and `learned`
        for document, after in unused(documents, before, used):
            tokens = torch.cat([rest, _with_learned(document)], 1)
            # A sequence has one piece of a document.  The piece's last target may be in the next part: wait for it.
            while tokens.shape[1] > missing or (document.ends and tokens.shape[1]):
                pieces.append(_piece(tokens, missing))
                added = len(pieces[-1].tokens)
                tokens, used, missing = tokens[:, added:], used + added, missing - added
                if not missing:
                    # A cut document is tokenized again on resume.  The state therefore has the state before it, and its
                    # number of used tokens.
                    is_cut = tokens.shape[1] > 0
                    cut = {"documents": beginning_with(before, document.source), "used": used}
                    resume = cut if is_cut else {"documents": after, "used": 0}
                    yield _concatenate(pieces), resume
                    pieces, missing = [], length
            rest = tokens
            if document.ends:
                before, used = after, 0
        if pieces and last == "pad":
            yield _concatenate([*pieces, padding_sequence(missing)]), {"documents": before, "used": 0}
        elif pieces:
            log.warning(
                "the last %d tokens do not fill a sequence of %d: dropped (data.last=pad keeps them)",
                length - missing,
                length,
            )

    return run


def pack_whole(documents: Stage[Document], length: int, last: Literal["drop", "pad"] = "drop") -> Stage[PackedSequence]:
    """Return sequences of ``length`` tokens from uncut ``documents``, in order; no document may be longer.

    A document that does not fit into the rest of a sequence begins the next one, and the rest is padding.  ``last`` is
    as in `pack`.

    The iteration raises ValueError for the resume state of a run that has cut a document.
    """

    def run(state: State | None) -> Iterator[tuple[PackedSequence, State]]:
        before, used = (state["documents"], state["used"]) if state else (None, 0)
        before = before or start_of(documents)  # version 0.2 wrote None inside the first document
        if used:
            raise ValueError(
                "the state to resume from has cut a conversation: use data.conversations=split, or start a new run"
            )
        pieces: list[PackedSequence] = []
        missing = length
        for document, after in documents(before):
            assert document.ends and len(document.tokens) <= length, f"{document.where} is longer than a sequence"
            if len(document.tokens) > missing:
                yield _padded(pieces, missing), {"documents": before, "used": 0}
                pieces, missing = [], length
            pieces.append(_piece(_with_learned(document), length))
            missing, before = missing - len(document.tokens), after
        if pieces and (last == "pad" or not missing):
            yield _padded(pieces, missing), {"documents": before, "used": 0}
        elif pieces:
            log.warning(
                "the last %d tokens do not fill a sequence of %d: dropped (data.last=pad keeps them)",
                length - missing,
                length,
            )

    return run


def learnable(sequences: Stage[PackedSequence]) -> Stage[PackedSequence]:
    """Return ``sequences`` without those in which no target counts in the loss.

    The iteration raises ValueError after `_FRUITLESS` such sequences in a row: the text may be endless.
    """

    def run(state: State | None) -> Iterator[tuple[PackedSequence, State]]:
        in_a_row = 0
        for sequence, after in sequences(state):
            in_a_row = 0 if sequence.mask.any() else in_a_row + 1
            if not in_a_row:
                yield sequence, after
            elif in_a_row == _FRUITLESS:
                refuse_nothing_to_learn(0, f"a stretch of {_FRUITLESS:,} sequences")

    return run


def refuse_nothing_to_learn(counted: int, where: str) -> None:
    """Raise ValueError if ``counted``, the number of targets with a loss in the text or batch ``where``, is 0."""
    if not counted:
        raise ValueError(
            f"{where} has nothing to learn from: no token is followed by another one of its document that counts in "
            "the loss; give longer documents, or set data.end_token=true"
        )


def unused(documents: Stage[Document], before: State | None, used: int) -> Iterator[tuple[Document, State]]:
    """Yield the documents after state ``before``; leave out the first ``used`` tokens of the first document.

    A document of exactly ``used`` tokens, which had an end token before, is yielded without tokens.

    Raises ValueError if the first document has fewer than ``used`` tokens, and if ``used`` is not 0 but there is no
    document.
    """
    skip, document = used, None
    for document, after in documents(before):
        tokens, learned = document.tokens[skip:], document.learned
        learned = None if learned is None else learned[skip:]
        skip -= len(document.tokens) - len(tokens)
        if document.ends and skip:
            raise ValueError(
                f"{document.where} is shorter than it was when the state to resume from was saved: "
                "restore the file, or start a new run"
            )
        yield replace(document, tokens=tokens, learned=learned), after
    if used and document is None:
        raise ValueError(
            "the state to resume from is inside a document that data.epochs now leaves out: use as many epochs as "
            "before, or more"
        )


def padding_sequence(length: int) -> PackedSequence:
    """Return a sequence of ``length`` padding tokens, none of which counts in the loss."""
    zeros = torch.zeros(length, dtype=torch.long)
    return PackedSequence(zeros, zeros, zeros.bool(), (length,), length)


def _with_learned(document: Document) -> Int[Tensor, "2 s"]:
    """Return two rows: the tokens of ``document``, and 1 for each token that counts in the loss."""
    learned = torch.ones_like(document.tokens) if document.learned is None else document.learned
    return torch.stack([document.tokens, learned.to(document.tokens.dtype)])


def _piece(tokens: Int[Tensor, "2 s"], length: int) -> PackedSequence:
    """Return the first ``length`` of ``tokens``, or all if there are fewer, with their targets.

    ``tokens`` has the two rows of `_with_learned`.
    """
    inputs, (targets, learned) = tokens[0, :length].long(), tokens[:, 1 : length + 1].long()
    missing = len(inputs) - len(targets)
    targets, mask = F.pad(targets, (0, missing)), F.pad(learned.bool(), (0, missing))
    return PackedSequence(inputs, targets, mask, (len(inputs),))


def _padded(pieces: list[PackedSequence], missing: int) -> PackedSequence:
    return _concatenate([*pieces, padding_sequence(missing)] if missing else pieces)


def _concatenate(pieces: list[PackedSequence]) -> PackedSequence:
    return PackedSequence(
        torch.cat([piece.tokens for piece in pieces]),
        torch.cat([piece.targets for piece in pieces]),
        torch.cat([piece.mask for piece in pieces]),
        tuple(length for piece in pieces for length in piece.lengths),
        sum(piece.padding for piece in pieces),
    )
