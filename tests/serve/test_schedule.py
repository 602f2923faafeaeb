"""The scheduler keeps its bounds, serves every sequence in order of arrival, and leaves none behind."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import Sampling
from longctx.serve.prefix_cache import PrefixCache
from longctx.serve.schedule import Limits, NewSequence, Scheduler, StepPlan, share_pass

LIMITS = Limits(prefill_tokens=13, sequences=3, cached_tokens=97)


def sequence(number: int, prompt: int, most: int = 5) -> NewSequence:
    return NewSequence(number, tuple(range(prompt)), most, Sampling())


class Ranks:
    """The tokens that ranks cache of each of ``sequences``, as they run plans; every plan is checked."""

    def __init__(self, sequences: list[NewSequence]) -> None:
        self.sequences, self.admitted = sequences, list[int]()
        self.cached: dict[int, int] = {}

    def whole(self) -> list[int]:
        """Return the sequences whose prompt is cached."""
        return [i for i in self.cached if self.cached[i] >= len(self.sequences[i].prompt)]

    def run(self, plan: StepPlan) -> None:
        for number in plan.drop:
            del self.cached[number]
        for new in plan.add:
            assert new.number not in self.cached
            self.cached[new.number] = 0
            self.admitted.append(new.number)
        assert set(plan.decode) == {*self.whole()}, "each sequence with a whole prompt gets a token in every step"
        assert sum(plan.prefill.values()) <= LIMITS.prefill_tokens and all(plan.prefill.values())
        for number, tokens in (*plan.prefill.items(), *((i, 1) for i in plan.decode)):
            self.cached[number] += tokens
        assert all(self.cached[i] <= len(self.sequences[i].prompt) for i in plan.prefill)
        assert len(self.cached) <= LIMITS.sequences
        assert sum(self.sequences[i].tokens for i in self.cached) <= LIMITS.cached_tokens


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 29))
def test_every_sequence_is_run_once_within_the_bounds(seed: int, count: int):
    """Sequences arrive between steps, answers end at random, and some are cancelled at any time."""
    scheduler, draw = Scheduler(LIMITS, PrefixCache(7, 0, 1)), random.Random(seed)
    ranks = Ranks([sequence(i, draw.randint(1, 60), draw.randint(1, 37)) for i in range(count)])
    waiting, gone, steps = list(ranks.sequences), set(), 0
    while waiting or scheduler.busy:
        for new in waiting[: draw.randint(0, 2)]:
            scheduler.add(new)
            waiting.remove(new)
        if len(waiting) < count and draw.random() < 0.1:
            gone.add(number := draw.randrange(count - len(waiting)))
            scheduler.end(number)
        ranks.run(scheduler.plan())
        for number in ranks.whole():
            if draw.random() < 0.3 or ranks.cached[number] == ranks.sequences[number].tokens:
                scheduler.end(number)
        steps += 1
        assert steps < 10_000
    assert not ranks.cached, "a sequence is left behind"
    assert ranks.admitted == sorted(ranks.admitted), "not in order of arrival"
    assert {*range(count)} - {*ranks.admitted} <= gone


def test_short_prompt_does_not_wait_for_a_long_one():
    scheduler = Scheduler(Limits(10, 5, 10_000), PrefixCache(7, 0, 1))
    scheduler.add(sequence(0, 1_000))
    assert scheduler.plan().prefill == {0: 10}
    scheduler.add(sequence(1, 4))
    assert scheduler.plan().prefill == {0: 6, 1: 4}
    plan = scheduler.plan()
    assert (plan.prefill, plan.decode) == ({0: 10}, (1,))


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 50), max_size=7), st.integers(0, 99))
def test_a_pass_is_for_the_oldest_and_the_shortest_prompts(left, total):
    shares = share_pass(left, total)
    assert sum(shares.values()) == min(total, sum(left.values()))
    assert all(0 < shares[number] <= left[number] for number in shares)
    assert sum(shares[number] < left[number] for number in shares) <= 2, "few parts"
    if left:
        oldest, shortest = next(iter(left)), min(left.values())
        assert shares.get(oldest, 0) >= min(left[oldest], total - total // 2)
        if total // 2 >= shortest:
            assert any(shares.get(number) == left[number] for number in left)


def test_a_long_prompt_ends_though_short_ones_keep_arriving():
    scheduler = Scheduler(Limits(10, 5, 10_000), PrefixCache(7, 0, 1))
    scheduler.add(sequence(0, 50))
    for number in range(1, 10):
        scheduler.add(sequence(number, 5))
        plan = scheduler.plan()
        assert plan.prefill[0] >= 5 and not plan.decode
        scheduler.end(number)
    scheduler.plan()
    assert scheduler.plan().decode == (0,)


def test_end_of_an_unknown_or_waiting_sequence_changes_no_plan():
    scheduler = Scheduler(LIMITS, PrefixCache(7, 0, 1))
    scheduler.end(5)
    scheduler.add(sequence(0, 7))
    scheduler.end(0)
    assert not scheduler.busy and scheduler.plan().drop == ()
    with pytest.raises(AssertionError, match="never fit"):
        scheduler.add(sequence(1, 93))
