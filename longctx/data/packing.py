"""Packing: cut documents and join them into sequences of one length, without padding between documents."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from longctx.data.documents import Document
from longctx.data.stage import Stage, State
from longctx.shapes import Bool, Positions, Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedSequence:
    """A training sequence of pieces of documents; piece i has ``lengths[i]`` tokens.

    ``targets`` are the next tokens.  ``mask`` is False where no next token exists, as after a document's last token;
    the target is 0 there.  `longctx.attention.layout.documents` shards a sequence by its ``lengths``.  The last
    ``padding`` tokens belong to no document; they are a piece themselves.
    """

    tokens: Positions
    targets: Positions
    mask: Bool[Tensor, " s"]
    lengths: tuple[int, ...]
    padding: int = 0


def pack(documents: Stage[Document], length: int, last: Literal["drop", "pad"] = "drop") -> Stage[PackedSequence]:
    """Sequences of ``length`` tokens from the tokens of ``documents``, in order; each token is an input once.

    For example, documents [1 2 3 4 5] and [6 7] with length 4 give [1 2 3 4] and [5 6 7 ...].  The rest of a cut
    document is a document in the next sequence: it starts at position 0 and does not see the first part.  The last
    target of the first part is the first token of the rest (4 predicts 5).  Every token but a document's first is
    therefore a target once.  An incomplete last sequence is dropped and logged (``last="drop"``), or padded
    (``last="pad"``).

    Raises ValueError, while it runs, if the cut document of a resume state has become shorter.
    """

    def run(state: State | None) -> Iterator[tuple[PackedSequence, State]]:
        before, used = (state["documents"], state["used"]) if state else (None, 0)
        pieces: list[PackedSequence] = []
        missing = length
        rest = torch.empty(0, dtype=torch.int32)  # tokens of the document that no sequence has yet
        for document, after in _unused(documents, before, used):
            tokens = torch.cat([rest, document.tokens])
            # A sequence has one piece of a document.  The piece's last target may be in the next part: wait for it.
            while len(tokens) > missing or (document.ends and len(tokens)):
                pieces.append(_piece(tokens, missing))
                added = len(pieces[-1].tokens)
                tokens, used, missing = tokens[added:], used + added, missing - added
                if not missing:
                    # A cut document is tokenized again on resume, hence the state before it and its used tokens.
                    resume = {"documents": before, "used": used} if len(tokens) else {"documents": after, "used": 0}
                    yield _concatenate(pieces), resume
                    pieces, missing = [], length
            rest = tokens
            if document.ends:
                before, used = after, 0
        if pieces and last == "pad":
            yield _concatenate([*pieces, padding_sequence(missing)]), {"documents": before, "used": 0}
        elif pieces:
            log.warning("the last %d tokens do not fill a sequence of %d: dropped", length - missing, length)

    return run


def _unused(documents: Stage[Document], before: State | None, used: int) -> Iterator[tuple[Document, State]]:
    """Yield the documents after state ``before``; leave out the first ``used`` tokens of the first document.

    Raises ValueError if the first document has only ``used`` tokens or fewer.
    """
    skip, is_long_enough = used, not used
    for document, after in documents(before):
        tokens = document.tokens[skip:]
        skip -= len(document.tokens) - len(tokens)
        is_long_enough = is_long_enough or len(tokens) > 0
        if document.ends and not is_long_enough:
            raise ValueError(
                f"{document.where} is shorter than when the state to resume from was made: "
                "restore the file, or start a new run"
            )
        yield replace(document, tokens=tokens), after


def padding_sequence(length: int) -> PackedSequence:
    """A sequence of ``length`` padding tokens, none of which counts in the loss."""
    zeros = torch.zeros(length, dtype=torch.long)
    return PackedSequence(zeros, zeros, zeros.bool(), (length,), length)


def _piece(tokens: Positions, length: int) -> PackedSequence:
    """Return the first ``length`` of ``tokens``, or all if there are fewer, with their targets."""
    inputs, targets = tokens[:length].long(), tokens[1 : length + 1].long()
    missing = len(inputs) - len(targets)
    mask = torch.arange(len(inputs)) < len(targets)
    return PackedSequence(inputs, torch.cat([targets, targets.new_zeros(missing)]), mask, (len(inputs),))


def _concatenate(pieces: list[PackedSequence]) -> PackedSequence:
    return PackedSequence(
        torch.cat([piece.tokens for piece in pieces]),
        torch.cat([piece.targets for piece in pieces]),
        torch.cat([piece.mask for piece in pieces]),
        tuple(length for piece in pieces for length in piece.lengths),
        sum(piece.padding for piece in pieces),
    )
