"""The choice for each pass of whether one rank runs it, because context parallelism would cost more than it gains."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from longctx.infer.session import Session


@dataclass(frozen=True)
class OneRank:
    """When one ring rank runs a pass, with ``threads``: if neither a sequence nor the pass has over ``tokens``."""

    tokens: int = 0
    threads: int = 1

    def choose(self, session: Session, prefill: Mapping[int, int], page_rows: Sequence[int]) -> int | None:
        """Return the ring rank that runs ``prefill`` alone, or None if all do; the same on all ranks.

        ``prefill`` is the number of tokens to run by sequence.

        A rank can if no other one has cached rows of the sequences.  Of several, the one with the fewest rows does,
        counting those of pages, ``page_rows`` of each ring rank.
        """
        chosen, ranks = [session.sequences[i] for i in prefill], range(session.engine.ring.size)
        longest = max(sum(prefill.values()), *(len(one.tokens) for one in chosen))
        if len(ranks) == 1 or longest > self.tokens:
            return None
        cached = [sum(one.cache.layout.rows(rank) for one in chosen) for rank in ranks]
        able = [rank for rank in ranks if cached[rank] == sum(cached)]
        return min(able, key=lambda rank: session.rows_per_rank[rank] + page_rows[rank], default=None)

    @contextmanager
    def borrow_threads(self, session: Session, rank: int | None) -> Iterator[None]:
        """Let ring rank ``rank`` use the threads of all during the block; None changes nothing."""
        before = torch.get_num_threads()
        if rank == session.engine.ring.rank and self.threads > before:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


ALL_RANKS = OneRank()
