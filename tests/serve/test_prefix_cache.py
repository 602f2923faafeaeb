"""Prompts take pages with exactly their own tokens; every page is counted, bounded and finally free."""

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest

from longctx.attention.layout import Layout, striped, zigzag
from longctx.attention.spans import Span
from longctx.config import Sampling
from longctx.serve.prefix_cache import ROOT, PrefixCache, StoredPage, TakenPage, count_equal, fitting
from longctx.serve.schedule import Limits, NewSequence, Scheduler, StepPlan

PAGE, RANKS = 3, 2
LIMITS = Limits(prefill_tokens=17, sequences=5, cached_tokens=211)


def sequence(number: int, prompt: list[int], most: int, *, score: bool = False) -> NewSequence:
    return NewSequence(number, tuple(prompt), most, Sampling(), score)


layout_of = cache(lambda rows: striped(rows, RANKS))


@dataclass
class Cached:
    """A sequence's tokens, and the number of those that are cached."""

    new: NewSequence
    tokens: list[int]
    rows: int = 0


class Ranks:
    """Stand-in for the ranks, which run the scheduler's plans.

    A page of cached keys and values is represented by all tokens from the prompt's beginning to the page's end.
    """

    def __init__(self, limit: int, draw: random.Random) -> None:
        self.limit, self.draw = limit, draw
        self.prefixes = PrefixCache(PAGE, limit, RANKS)
        self.cached: dict[int, Cached] = {}
        self.pages: dict[int, tuple[int, ...]] = {}
        self.stored: Counter[int] = Counter()  # rows by rank
        self.computed = 0

    def step(self, scheduler: Scheduler) -> StepPlan:
        """Tell the prefix cache which tokens are cached, then take the next plan from ``scheduler`` and run it."""
        for number, one in self.cached.items():
            self.prefixes.give(number, one.tokens, layout_of(one.rows))
        plan = scheduler.plan()
        self.store(plan)
        for number in plan.drop:
            del self.cached[number]
        for new in plan.add:
            self.cached[new.number] = Cached(new, list(new.prompt))
        for number, pages in plan.take.items():
            self.take(self.cached[number], pages)
        for number, rows in (*plan.prefill.items(), *((number, 1) for number in plan.decode)):
            self.compute(self.cached[number], rows)
        return plan

    def store(self, plan: StepPlan) -> None:
        for page in plan.evict:
            self.count(page, -1)
            del self.pages[page]
        for page, number, begin, end, before in plan.store:
            one = self.cached[number]
            assert end - begin == PAGE and end <= one.rows, "rows that are not cached"
            tokens = tuple(one.tokens[:end])
            assert tokens not in self.pages.values(), "a page is stored twice"
            assert self.pages.get(before, ()) == tokens[:begin]
            self.pages[page] = tokens
            self.count(page, 1)
        assert self.prefixes.rows == [self.stored[rank] for rank in range(RANKS)]
        assert max(self.prefixes.rows) <= self.limit

    def count(self, page: int, sign: int) -> None:
        for position in range(len(self.pages[page]) - PAGE, len(self.pages[page])):
            self.stored[position % RANKS] += sign

    def take(self, one: Cached, pages: tuple[TakenPage, ...]) -> None:
        for page, tokens in pages:
            begin = len(self.pages[page]) - PAGE
            assert one.rows == begin and tokens <= PAGE
            one.rows += tokens
            assert one.new.prompt[: one.rows] == self.pages[page][: one.rows], "rows of other tokens"
        assert one.rows < len(one.new.prompt), "no row is left to compute"
        assert not one.new.score_prompt

    def compute(self, one: Cached, rows: int) -> None:
        one.rows += rows
        self.computed += rows
        if one.rows >= len(one.new.prompt):
            one.tokens.append(self.draw.randrange(2))
        assert one.rows < len(one.tokens)


def play(seed: int, requests: int, limit: int) -> tuple[Ranks, int]:
    """Answer random requests, which begin as earlier ones did, end at random or are cancelled; return their tokens."""
    draw = random.Random(seed)
    ranks = Ranks(limit, draw)
    scheduler, texts, tokens, arrived, idle = Scheduler(LIMITS, ranks.prefixes), [[0]], 0, 0, 0
    while arrived < requests or scheduler.busy:
        while arrived < requests and len(scheduler.waiting) < 3:
            earlier = draw.choice(texts)
            fork = [*earlier[: draw.randint(0, 25)], *draw.choices(range(2), k=draw.randint(1, 5))]
            scheduler.add(sequence(arrived, fork, draw.randint(1, 4), score=draw.random() < 0.1))
            tokens, arrived = tokens + len(fork), arrived + 1
        plan = ranks.step(scheduler)
        idle = 0 if plan.prefill or plan.decode or plan.drop else idle + 1
        assert idle < 2, "sequences wait for each other"
        for number in list(scheduler.running):
            one = ranks.cached[number]
            if len(one.tokens) == one.new.tokens or draw.random() < 0.05:
                texts = [*texts[-19:], list(one.tokens)]
                scheduler.end(number)
        if draw.random() < 0.02 and (failed := {*plan.prefill, *plan.decode} & scheduler.running.keys()):
            for number in failed:
                scheduler.end(number)
            ranks.prefixes.distrust(failed)
    return ranks, tokens


@pytest.mark.parametrize(("limit", "requests"), [(0, 100), (1, 100), (29, 5_000), (307, 5_000)])
def test_random_requests_leave_no_page_in_use_and_no_row_uncounted(limit: int, requests: int):
    ranks, tokens = play(limit, requests, limit)
    ranks.store(StepPlan(evict=ranks.prefixes.changes()[1]))
    assert not ranks.cached
    assert (ranks.prefixes.reused > tokens / 5) == (limit > 1)
    ranks.prefixes.distrust(())
    store, evict = ranks.prefixes.changes()
    assert not store and {*evict} == {*ranks.pages} and ranks.prefixes.rows == [0] * RANKS, "a page is still in use"


def test_restored_pages_are_taken_and_evicted_from_their_ends():
    pages = [StoredPage(0, ROOT, (1, 2, 3), (2, 1)), StoredPage(1, ROOT, (4, 5, 6), (1, 2)),
             StoredPage(2, 0, (7, 8, 9), (3, 0)), StoredPage(3, 2, (1, 1, 1), (0, 3)),
             StoredPage(4, 1, (7, 8, 9), (1, 2))]  # fmt: skip
    # 1. The third page has no room, so the fourth, which follows it, is left out too.
    assert fitting(pages, 5, RANKS) == [0, 1, 4]
    assert fitting(pages, 7, RANKS) == [0, 1, 2, 3] and fitting(pages, 8, RANKS) == [0, 1, 2, 3, 4]
    prefixes = PrefixCache(PAGE, 5, RANKS)
    prefixes.restore([pages[0], pages[1], pages[4]._replace(number=2)])
    assert prefixes.changes() == ((), ()) and prefixes.rows == [4, 5]
    prefixes.enter(9, [4, 5, 6, 7, 8, 9, 1])
    assert prefixes.take(9, 0) == ((1, PAGE), (2, PAGE))
    assert (prefixes.reused, prefixes.reused_restored) == (6, 6)
    # 2. A new page takes the place of the one without users, and an unused number.
    prefixes.enter(8, [2, 2, 2, 2])
    prefixes.give(8, [2, 2, 2, 2], Layout((4,), ((Span(0, 4),), ())))
    (store,), evict = prefixes.changes()
    assert store == (3, 8, 0, 3, ROOT) and evict == (0,)


def test_no_page_is_evicted_for_one_that_does_not_fit_anyway():
    """Rank 0 is full of pages in use; evicting rank 1's page would not help."""
    prefixes = PrefixCache(PAGE, 3, RANKS)
    prefixes.restore([StoredPage(0, ROOT, (1, 2, 3), (3, 0)), StoredPage(1, ROOT, (4, 5, 6), (0, 3))])
    prefixes.enter(9, [1, 2, 3, 4])
    assert prefixes.take(9, 0) == ((0, PAGE),)
    prefixes.enter(8, [2, 2, 2, 2])
    prefixes.give(8, [2, 2, 2, 2], Layout((4,), ((Span(0, 2),), (Span(2, 2),))))
    assert prefixes.changes() == ((), ()) and prefixes.rows == [3, 3]
    prefixes.leave(9)
    prefixes.give(8, [2, 2, 2, 2], Layout((4,), ((Span(0, 2),), (Span(2, 2),))))
    assert [page.number for page in prefixes.changes()[0]] == [2]


def test_sequences_that_arrive_together_compute_their_common_beginning_once():
    ranks = Ranks(1_000, random.Random(3))
    scheduler = Scheduler(LIMITS, ranks.prefixes)
    common = [i % 7 for i in range(40)]
    for number in range(4):
        scheduler.add(sequence(number, [*common, number], 1))
    for _ in range(9):
        ranks.step(scheduler)
    decoded = sum(one.rows - 41 for one in ranks.cached.values())
    assert ranks.computed - decoded == 41 + 3 * 2, "the three others compute the last two rows each"


def test_least_recently_used_page_goes_first_and_ends_go_before_beginnings():
    prefixes, layout = PrefixCache(2, 6, 1), zigzag(4, 1)
    for number, tokens in enumerate([(0, 0, 1, 1), (0, 0, 2, 2), (3, 3)]):
        prefixes.enter(number, tokens)
        prefixes.give(number, tokens, layout if len(tokens) == 4 else zigzag(2, 1))
    assert [page.number for page in prefixes.changes()[0]] == [0, 1, 2], "four pages, without room for the last"
    for number in (1, 0, 2):
        prefixes.leave(number)
    prefixes.enter(4, (4, 4, 5, 5))
    prefixes.give(4, (4, 4, 5, 5), layout)
    assert prefixes.changes()[1] == (2, 1), "the page that was left first, then the other end; their beginning stays"
    prefixes.enter(5, (0, 0, 1, 1, 6))
    assert prefixes.take(5, 0) == ((0, 2),)
    assert (prefixes.asked, prefixes.reused, prefixes.evicted) == (4 + 4 + 2 + 4 + 5, 2, 2)


def test_last_token_of_a_prompt_is_computed():
    prefixes = PrefixCache(2, 99, 1)
    prefixes.enter(0, (1, 2, 3, 4))
    prefixes.give(0, (1, 2, 3, 4), zigzag(4, 1))
    for number, prompt, pages, part in (
        (1, (1, 2, 3, 4), (0,), (1, 1)),
        (2, (1, 2, 3, 4, 5), (0, 1), None),
        (3, (1, 2), (), (0, 1)),
        (4, (9,), (), None),
        (5, (1,), (), None),
    ):
        prefixes.enter(number, prompt)
        assert prefixes.take(number, 0) == tuple((page, 2) for page in pages)
        assert prefixes.take_part(number, 2 * len(pages)) == part


def test_first_tokens_of_the_page_that_agrees_longest_are_taken():
    prefixes, layout = PrefixCache(8, 24, 1), zigzag(8, 1)
    for number, tokens in enumerate([(1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 9, 9, 9, 9, 9), (7, 1, 1, 1, 1, 1, 1, 1)]):
        prefixes.enter(number, tokens)
        prefixes.give(number, tokens, layout)
        prefixes.leave(number)
    for number, prompt, part in ((3, (1, 2, 3, 4, 0), (0, 4)), (4, (1, 2, 3, 9, 9, 9), (1, 5)), (5, (7, 5, 5), None)):
        prefixes.enter(number, prompt)
        assert not prefixes.take(number, 0)
        assert prefixes.take_part(number, 0) == part, "a single token is less than a quarter of a page"
        assert prefixes.take_part(number, 1) is None, "only where a page begins"
    prefixes.enter(6, (1, 2, 3, 4, 0), takes=False)
    assert prefixes.take_part(6, 0) is None
    assert prefixes.reused == 4 + 5
    # The pages of which a part was taken were used last, so that the third leaves for a new one.
    prefixes.enter(7, (6,) * 8)
    prefixes.give(7, (6,) * 8, layout)
    assert prefixes.changes()[1] == (2,)


def test_part_is_the_longest_of_all_pages():
    draw = random.Random(5)
    prefixes, layout, pages = PrefixCache(7, 10_000, 1), zigzag(7, 1), {}
    for number in range(300):
        tokens = tuple(draw.choices(range(3), k=7))
        prefixes.enter(number, tokens)
        prefixes.give(number, tokens, layout)
        prefixes.leave(number)
        pages.setdefault(tokens, len(pages))
    for number in range(300, 400):
        prompt = tuple(draw.choices(range(4), k=draw.randint(1, 9)))
        prefixes.enter(number, prompt)
        part = prefixes.take_part(number, 0)
        equal = {page: count_equal(tokens, prompt[:-1]) for tokens, page in pages.items()}
        longest = max(equal.values())
        assert part == ((part.number, longest) if longest >= 2 else None)
        assert part is None or equal[part.number] == longest


def test_sequence_that_waits_for_a_page_takes_no_part_of_another():
    """Both prompts begin as a stored page does; the second would otherwise compute what the first computes."""
    ranks = Ranks(1_000, random.Random(3))
    scheduler = Scheduler(LIMITS, ranks.prefixes)
    scheduler.add(sequence(0, [1, 2, 3, 4], 1))
    ranks.step(scheduler)
    scheduler.end(0)
    for number in (1, 2):
        scheduler.add(sequence(number, [1, 2, *range(10, 50), number], 1))
    computed = ranks.computed
    for _ in range(6):
        ranks.step(scheduler)
    decoded = sum(one.rows - 43 for one in ranks.cached.values())
    assert ranks.computed - computed - decoded == (43 - 2) + 1, "the second computes its last row"
