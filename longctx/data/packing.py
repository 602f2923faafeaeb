"""Packing: documents cut and joined into sequences of one length, without padding between them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from longctx.data.documents import Document
from longctx.data.stage import Stage, State
from longctx.shapes import Bool, Positions, Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packed:
    """A sequence of pieces of documents, ``lengths`` tokens each: what `longctx.attention.layout.documents` shards.

    ``targets`` are the tokens that follow; where ``mask`` is False none does, as behind a document's last token,
    and the target is 0.  The last ``padding`` tokens are of no document; they are a piece of their own.
    """

    tokens: Positions
    targets: Positions
    mask: Bool[Tensor, " s"]
    lengths: tuple[int, ...]
    padding: int = 0


def packed(documents: Stage[Document], length: int, last: Literal["drop", "pad"] = "drop") -> Stage[Packed]:
    """The documents' tokens in sequences of ``length``: each token is an input once.

    A document that does not fit goes on in the next sequence, as a document from position 0 there: it does not see
    what came before.  The target of its last token here is its first one there, so that each token of a document
    but the first is a target once, too.  An incomplete last sequence is dropped and logged, or padded.
    """

    def run(state: State | None) -> Iterator[tuple[Packed, State]]:
        before, used = (state["documents"], state["used"]) if state else (None, 0)
        pieces: list[Packed] = []
        missing = length
        for document, after in documents(before):
            tokens = document.tokens
            if used and used >= len(tokens):
                raise ValueError(f"{document.where} is shorter than when the state to resume from was made: begin anew")
            while used < len(tokens):
                pieces.append(_piece(tokens, used, min(used + missing, len(tokens))))
                used += len(pieces[-1].tokens)
                missing -= len(pieces[-1].tokens)
                if not missing:
                    whole = used == len(tokens)
                    stands = {"documents": after, "used": 0} if whole else {"documents": before, "used": used}
                    yield _joined(pieces), stands
                    pieces, missing = [], length
            before, used = after, 0
        if pieces and last == "pad":
            yield _joined([*pieces, empty_packed(missing)]), {"documents": before, "used": 0}
        elif pieces:
            log.warning("the last %d tokens do not fill a sequence of %d: dropped", length - missing, length)

    return run


def empty_packed(length: int) -> Packed:
    """A sequence of padding."""
    zeros = torch.zeros(length, dtype=torch.long)
    return Packed(zeros, zeros, zeros.bool(), (length,), length)


def _piece(tokens: Positions, first: int, end: int) -> Packed:
    targets = tokens[first + 1 : end + 1]
    known = len(targets)
    targets = torch.cat([targets, tokens.new_zeros(end - first - known)])
    mask = torch.arange(end - first) < known
    return Packed(tokens[first:end], targets, mask, (end - first,))


def _joined(pieces: list[Packed]) -> Packed:
    return Packed(
        torch.cat([piece.tokens for piece in pieces]),
        torch.cat([piece.targets for piece in pieces]),
        torch.cat([piece.mask for piece in pieces]),
        tuple(length for piece in pieces for length in piece.lengths),
        sum(piece.padding for piece in pieces),
    )
