"""Decide for each pass whether one rank runs it: with few tokens, context parallelism costs more than it gains."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from longctx.infer.continuous import ContinuousSession


@dataclass(frozen=True)
class OneRank:
    """The rule by which a prefill pass runs on one ring rank alone instead of on all of them.

    This is allowed only if the pass has at most ``tokens`` tokens, and none of its sequences has more (0: never).  The
    rank then uses ``threads`` CPU threads, or its usual number if that is larger.  `choose` has all conditions.
    """

    tokens: int = 0
    threads: int = 1

    def choose(self, session: ContinuousSession, prefill: Mapping[int, int], page_rows: Sequence[int]) -> int | None:
        """Return the ring rank that runs ``prefill`` alone, or None if all ranks run it; all ranks get the same answer.

        ``prefill`` has the number of tokens to run by sequence.  All ranks run it if

        * the ring has one rank;
        * the pass, or one of its sequences, has more than ``tokens`` tokens;
        * more than one rank has cached rows of these sequences.

        Otherwise, a rank qualifies if no other rank has cached rows of these sequences.  The qualified rank with the
        fewest rows is chosen.  Its rows are those of all sequences plus its pages' rows, ``page_rows[rank]``.
        """
        chosen, ranks = [session.sequences[i] for i in prefill], range(session.engine.ring.size)
        longest = max(sum(prefill.values()), *(len(one.tokens) for one in chosen))
        if len(ranks) == 1 or longest > self.tokens:
            return None
        cached = [sum(one.cache.layout.rows(rank) for one in chosen) for rank in ranks]
        able = [rank for rank in ranks if cached[rank] == sum(cached)]
        return min(able, key=lambda rank: session.rows_per_rank[rank] + page_rows[rank], default=None)

    @contextmanager
    def borrow_threads(self, session: ContinuousSession, rank: int | None) -> Iterator[None]:
        """Let ring rank ``rank``, which runs a pass alone, use ``threads`` CPU threads during the block.

        Nothing changes on the other ranks, with ``rank`` None, or if the rank uses as many threads already.
        """
        before = torch.get_num_threads()
        if rank == session.engine.ring.rank and self.threads > before:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


ALL_RANKS = OneRank()
