"""Decide the next pass from the waiting and the running sequences, without ranks or tensors."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from longctx.config import Sampling
from longctx.serve.prefix_cache import NewPage, PrefixCache, TakenPage


@dataclass(frozen=True)
class NewSequence:
    """A sequence to answer: its prompt's tokens, the largest number of tokens of its answer, and its sampling settings.

    With ``score_prompt``, the prompt's tokens get log-probabilities, too.
    """

    number: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    score_prompt: bool = False

    @property
    def tokens(self) -> int:
        """Largest number of tokens that the sequence can have: its prompt's and those of its longest answer."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True)
class StepPlan:
    """The work of one step, the same on all ranks, in the order of the fields.

    Pages are dropped (``evict``) and copied from the caches of sequences (``store``).  Sequences are dropped and added.
    Sequences copy reused pages into their caches (``take``).  ``prefill`` has, for each sequence, the number of
    prompt tokens to run.  ``decode`` lists the sequences that get one more token.  `run_plan` decides whether prefill
    and decoding are one pass.  A plan with ``stop`` is the last one, and is not run.
    """

    evict: tuple[int, ...] = ()
    store: tuple[NewPage, ...] = ()
    drop: tuple[int, ...] = ()
    add: tuple[NewSequence, ...] = ()
    take: Mapping[int, tuple[TakenPage, ...]] = field(default_factory=dict)
    prefill: Mapping[int, int] = field(default_factory=dict)
    decode: tuple[int, ...] = ()
    stop: bool = False


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    A pass has at most ``prefill_tokens`` prompt tokens.  At most ``sequences`` sequences run at a time.  Their prompts
    and longest possible answers have at most ``cached_tokens`` tokens in all.  Each rank stores at most ``page_bytes``
    bytes of pages (0: no pages); a page has ``page_tokens`` tokens.
    """

    prefill_tokens: int
    sequences: int
    cached_tokens: int
    page_bytes: int = 0
    page_tokens: int = 64


class Scheduler:
    """Decides which sequences the next pass runs.

    Sequences are admitted in order of arrival, so that none waits forever.  Half of the prompt tokens of a pass are for
    the oldest prompts, so that each of them ends.  The other half are for the prompts with the fewest tokens left, so
    that a short prompt does not wait for a long one.  Every step decodes a token of each sequence whose prompt is
    cached.  A prompt reuses its stored first pages from ``prefixes``.  It waits while an earlier prompt computes the
    page that it needs next.
    """

    def __init__(self, limits: Limits, prefixes: PrefixCache) -> None:
        self.limits, self.prefixes = limits, prefixes
        self.waiting: deque[NewSequence] = deque()
        self.running: dict[int, NewSequence] = {}
        self._left: dict[int, int] = {}  # prompt tokens that are not cached, by running sequence
        self._dropped: list[int] = []

    @property
    def busy(self) -> bool:
        """True if a sequence waits or runs, or if an ended sequence is still cached."""
        return bool(self.waiting or self.running or self._dropped)

    def add(self, sequence: NewSequence) -> None:
        """Let ``sequence`` wait for its admission."""
        assert sequence.tokens <= self.limits.cached_tokens, "requests that never fit are refused"
        self.waiting.append(sequence)

    def end(self, number: int) -> None:
        """Remove the sequence ``number``, which is answered or whose client has gone; the next `plan` drops its cache.

        Does nothing if it was removed before.
        """
        if self.running.pop(number, None):
            self._dropped.append(number)
            self._left.pop(number, None)
        self.waiting = deque(one for one in self.waiting if one.number != number)

    def plan(self) -> StepPlan:
        """Return the next step, which must be run before the next call."""
        store, evict = self.prefixes.changes()
        drop, self._dropped = tuple(self._dropped), []
        for number in drop:
            self.prefixes.leave(number)
        add = tuple(self._admit())
        decode = tuple(number for number in self.running if number not in self._left)
        take = self._take()
        prefill = share_pass(self._left_to_compute(take), self.limits.prefill_tokens)
        for number, tokens in prefill.items():
            self._left[number] -= tokens
            if not self._left[number]:
                del self._left[number]
        return StepPlan(evict, store, drop, add, take, prefill, decode)

    def _take(self) -> dict[int, tuple[TakenPage, ...]]:
        """Let prompts reuse the whole stored pages that continue them; return the pages by sequence."""
        take = {}
        for number, left in self._left.items():
            cached = len(self.running[number].prompt) - left
            if pages := self.prefixes.take(number, cached):
                take[number] = pages
                self._left[number] -= sum(page.tokens for page in pages)
        return take

    def _left_to_compute(self, take: dict[int, tuple[TakenPage, ...]]) -> dict[int, int]:
        """Return, by sequence, the number of prompt tokens that are left to run.

        A sequence is left out if an earlier sequence computes its next page, which it can then reuse.  The others may
        reuse the first tokens of a page, which are added to ``take``.
        """
        left_to_compute, pages = {}, set()
        for number, left in self._left.items():
            cached = len(self.running[number].prompt) - left
            page = self.prefixes.page_at(number, cached)
            if page is None or page not in pages or not self.prefixes.can_take(number, cached):
                pages.add(page)
                if part := self.prefixes.take_part(number, cached):
                    take[number] = (*take.get(number, ()), part)
                    self._left[number] -= part.tokens
                left_to_compute[number] = self._left[number]
        return left_to_compute

    def _admit(self) -> list[NewSequence]:
        """Move the sequences that fit from waiting to running, in order of arrival, and return them."""
        admitted = []
        cached = sum(one.tokens for one in self.running.values())
        while self.waiting and len(self.running) < self.limits.sequences:
            cached += self.waiting[0].tokens
            if cached > self.limits.cached_tokens:
                break
            one = self.waiting.popleft()
            self.running[one.number], self._left[one.number] = one, len(one.prompt)
            self.prefixes.enter(one.number, one.prompt, takes=not one.score_prompt)
            admitted.append(one)
        return admitted


def share_pass(left: Mapping[int, int], total: int) -> dict[int, int]:
    """Share the ``total`` prompt tokens of a pass among prompts; return the numbers of tokens by sequence.

    ``left`` has the number of tokens left to run by sequence, the oldest prompt first.  A sequence that gets none is
    left out of the result.  Half are for the oldest prompts, and the rest for those with the fewest tokens left.  At
    most two prompts get a part of what they have left; a pass with many small parts would be slow.

    >>> share_pass({1: 100, 2: 3, 3: 50}, 24)
    {1: 12, 2: 3, 3: 9}
    """
    shares = dict.fromkeys(left, 0)

    def give(numbers: Iterable[int], tokens: int) -> int:
        for number in numbers:
            more = min(left[number] - shares[number], tokens)
            shares[number] += more
            tokens -= more
        return tokens

    unused = give(left, total - total // 2)
    give(sorted(left, key=lambda number: left[number] - shares[number]), total // 2 + unused)
    return {number: share for number, share in shares.items() if share}
