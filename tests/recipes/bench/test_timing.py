"""recipes.bench.timing: order of rounds, sums over ranks, random caches and text of a given length."""

import time
from types import SimpleNamespace

import pytest
import torch

from longctx.attention.layout import zigzag
from longctx.config import ModelSource, Run
from longctx.hf.config import shape_of
from longctx.infer.cache import KVCache
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.threads import run_threads
from recipes.bench import timing


def test_variants_take_turns_and_the_first_round_is_the_warm_up():
    calls, steps = [], []

    def measure(variant):
        calls.append(variant)
        return len(calls)

    first, second = timing.measure_in_rounds(("a", "b"), 2, measure, lambda: steps.append(1))
    assert calls == ["a", "b"] * 3 and len(steps) == 6
    assert (first.warm_up, first.timed) == (1, [3, 5])
    assert (second.warm_up, second.timed) == (2, [4, 6])


def test_a_variant_listed_twice_is_measured_twice():
    results = timing.measure_in_rounds((0.5, 0.5), 1, lambda variant: variant)
    assert [of_variant.timed for of_variant in results] == [[0.5], [0.5]]


def test_numbers_are_gathered_in_rank_order():
    def rank_main(world, rank):
        return timing.gather_numbers(world.group(rank), rank, 10 + rank)

    assert run_threads(3, rank_main) == [[[0, 1, 2], [10, 11, 12]]] * 3
    assert timing.gather_numbers(SingleRankComm(), 7.0) == [[7.0]]


def test_no_rank_passes_the_barrier_before_the_last_one_reaches_it():
    def rank_main(world, rank):
        time.sleep(0.05 * rank)
        reached = time.monotonic()
        timing.barrier(world.group(rank))
        return reached, time.monotonic()

    reached, passed = zip(*run_threads(3, rank_main), strict=True)
    assert min(passed) >= max(reached)


@pytest.mark.parametrize("only_first", [False, True])
def test_every_rank_gets_the_seconds_of_the_slowest(only_first):
    worked = []

    def rank_main(world, rank):
        def work():
            worked.append(rank)
            time.sleep(0.05 * (1 + rank))

        return timing.time_on_ranks(world.group(rank), work, only_first=only_first)

    seconds = run_threads(3, rank_main)
    assert len(set(seconds)) == 1 and seconds[0] >= (0.05 if only_first else 0.15)
    assert sorted(worked) == ([0] if only_first else [0, 1, 2])


def test_random_rows_are_appended_after_those_a_cache_holds():
    cache = KVCache(3, 1)
    for tokens in (23, 7):
        timing.append_random_rows(cache, zigzag(tokens, 3), layers=2, kv_heads=3, head_dim=5, dtype=torch.bfloat16)
    rows = zigzag(23, 3).rows(1) + zigzag(7, 3).rows(1)
    assert (cache.rows, cache.layout.total) == (rows, 30)
    for layer in range(2):
        for x in cache.layer(layer):
            assert x.shape == (1, rows, 3, 5) and x.dtype == torch.bfloat16
            assert all(row.any() for row in x[0])


@pytest.fixture
def target(tiny):
    """A target with what `read_tokens` and `refuse_beyond_model` read."""
    return SimpleNamespace(folder=tiny, model=ModelSource("tiny", str(tiny)), shape=shape_of(tiny))


def test_text_is_cut_to_the_tokens_asked_for(target):
    long = timing.read_tokens(target, "tokens", 61)
    assert len(long) == 61 and long[:23] == timing.read_tokens(target, "tokens", 23)


def test_a_text_that_is_too_short_is_refused(target):
    with pytest.raises(ValueError, match=r"total=1000000: Python's documentation has [0-9,]+ tokens; use at most that"):
        timing.read_tokens(target, "total", 10**6)


def test_more_tokens_than_the_model_has_positions_are_refused(target):
    timing.refuse_beyond_model(target, tokens=90, new_tokens=7)
    with pytest.raises(ValueError, match="tokens=90 and new_tokens=8: tiny has 97 positions; use at most 97 tokens"):
        timing.refuse_beyond_model(target, tokens=90, new_tokens=8)


def test_gpu_is_refused_where_its_work_is_not_waited_for():
    timing.refuse_gpu(SimpleNamespace(run=Run()), "recipes.bench rivals")
    with pytest.raises(ValueError, match=r"run\.device=cuda: recipes\.bench rivals measures cpu only; use run=local"):
        timing.refuse_gpu(SimpleNamespace(run=Run(device="cuda")), "recipes.bench rivals")
