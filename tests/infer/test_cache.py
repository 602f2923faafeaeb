"""The cache holds what was appended, in order, however it grew; growing within its room copies nothing."""

import pytest
import torch

from longctx.attention.layout import Layout, contiguous, single, striped, zigzag
from longctx.infer.cache import KVCache, PrefixView

BATCH, HEADS, WIDTH, LAYERS = 2, 3, 5, 2


def keys(rows: int) -> torch.Tensor:
    return torch.randn(BATCH, rows, HEADS, WIDTH)


def turns(size: int) -> list[Layout]:
    """A prompt, seven decoded tokens, each owned by the next rank in turn, and a second prompt, twice over."""
    out: list[Layout] = []
    total = 0
    for prompt, within in ((23, zigzag), (11, striped), (2, contiguous)):
        out.append(within(prompt, size))
        out += [single(size, position % size) for position in range(total + prompt, total + prompt + 7)]
        total += prompt + 7
    return out


@pytest.mark.parametrize("reserve", [0, 13, 101])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (3, 0), (3, 2), (5, 1)])
def test_every_layer_holds_its_rows_in_the_order_in_which_they_came(size, rank, reserve):
    cache = KVCache(size, rank, reserve)
    came: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(LAYERS)]
    for turn in turns(size):
        later = turn.after(cache.layout)
        cache.extend(later)
        for layer in range(LAYERS):
            came[layer].append((keys(later.rows(rank)), keys(later.rows(rank))))
            held = cache.append(layer, *came[layer][-1])
            for got, parts in zip(held, zip(*came[layer], strict=True), strict=True):
                assert torch.equal(got, torch.cat(parts, 1))
    assert cache.layout.total == 23 + 11 + 2 + 3 * 7
    assert cache.rows == cache.layout.rows(rank) == held[0].shape[1]


def test_rows_are_those_of_the_layout():
    size, whole = 3, keys(23 + 7)
    caches = [KVCache(size, rank) for rank in range(size)]
    for turn in turns(size)[:8]:
        for rank, cache in enumerate(caches):
            later = turn.after(cache.layout)
            cache.extend(later)
            mine = whole[:, later.positions(rank)]
            held, _ = cache.append(0, mine, mine)
            assert torch.equal(held, cache.layout.shard(whole, rank, 1))
    assert torch.equal(cache.layout.unshard([c.append(0, keys(0), keys(0))[0] for c in caches], 1), whole)


def addresses(cache: KVCache, tokens: int) -> list[int]:
    """Where the keys lie after each of ``tokens`` decoded tokens on a ring of one."""
    found = []
    for _ in range(tokens):
        cache.extend(single(1, 0).after(cache.layout))
        held, _ = cache.append(0, keys(1), keys(1))
        found.append(held.data_ptr())
    return found


def filled(rows: int, reserve: int) -> tuple[KVCache, int]:
    cache = KVCache(1, 0, reserve)
    cache.extend(contiguous(rows, 1).after(cache.layout))
    held, _ = cache.append(0, keys(rows), keys(rows))
    return cache, held.data_ptr()


def test_growing_within_the_reserve_moves_nothing():
    cache, begin = filled(11, reserve=11 + 7)
    assert addresses(cache, 7) == [begin] * 7
    assert addresses(cache, 1) != [begin]


def test_room_is_doubled_when_it_runs_out():
    cache, begin = filled(11, reserve=0)
    moved = addresses(cache, 11 + 1)
    assert moved[0] != begin
    assert moved[:11] == [moved[0]] * 11, "22 rows have room"
    assert moved[11] != moved[0]


def test_bytes_count_what_is_held_and_not_the_reserve():
    cache, _ = filled(11, reserve=101)
    assert cache.bytes == 2 * 11 * BATCH * HEADS * WIDTH * 4
    cache.append(1, keys(11), keys(11))
    assert cache.bytes == 2 * 2 * 11 * BATCH * HEADS * WIDTH * 4


def test_half_precision_stays_and_takes_half_the_bytes():
    cache = KVCache(1, 0)
    cache.extend(contiguous(3, 1).after(cache.layout))
    held, _ = cache.append(0, keys(3).bfloat16(), keys(3).bfloat16())
    assert held.dtype == torch.bfloat16
    assert cache.bytes == 2 * 3 * BATCH * HEADS * WIDTH * 2


def test_a_rank_without_rows_holds_nothing_until_its_turn_comes():
    cache = KVCache(3, 2, reserve=7)
    for turn, rows in ((zigzag(1, 3), 0), (single(3, 1), 0), (single(3, 2), 1)):
        later = turn.after(cache.layout)
        cache.extend(later)
        k, v = keys(later.rows(2)), keys(later.rows(2))
        held = cache.append(0, k, v)
        assert cache.rows == rows
        assert torch.equal(held[0], k) and torch.equal(held[1], v)
        assert cache.bytes == 2 * rows * BATCH * HEADS * WIDTH * 4


def test_a_branch_reads_its_stem_and_leaves_it_as_it_was():
    stem = KVCache(1, 0)
    stem.extend(contiguous(5, 1))
    k, v = (torch.randn(1, 5, 3, 7) for _ in range(2))
    stem.append(0, k, v)
    for length in (2, 3):
        branch = PrefixView(stem)
        branch.extend(contiguous(length, 1).after(branch.layout))
        new = [torch.randn(1, length, 3, 7) for _ in range(2)]
        keys, values = branch.append(0, *new)
        assert torch.equal(keys, torch.cat([k, new[0]], 1)) and torch.equal(values, torch.cat([v, new[1]], 1))
        assert branch.layout.total == 5 + length and stem.layout.total == 5
        assert torch.equal(stem.layer(0)[0], k)
