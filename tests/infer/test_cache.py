"""KV caches return the appended rows in order, and growth within the allocated room copies nothing."""

from dataclasses import replace

import pytest
import torch

from longctx.attention.layout import Layout, contiguous, documents, side_by_side, single, striped, zigzag
from longctx.infer.cache import BatchCache, KVCache, PrefixView

BATCH, HEADS, HEAD_DIM, LAYERS = 2, 3, 5, 2


def keys(rows: int) -> torch.Tensor:
    return torch.randn(BATCH, rows, HEADS, HEAD_DIM)


def turns(size: int) -> list[Layout]:
    """Three turns of a prompt and seven decoded tokens, which the ranks own in turn."""
    out: list[Layout] = []
    total = 0
    for prompt, within in ((23, zigzag), (11, striped), (2, contiguous)):
        out.append(within(prompt, size))
        out += [single(size, position % size) for position in range(total + prompt, total + prompt + 7)]
        total += prompt + 7
    return out


@pytest.mark.parametrize("room", [0, 13, 101])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (3, 0), (3, 2), (5, 1)])
def test_layers_return_their_rows_in_append_order(size, rank, room):
    cache = KVCache(size, rank, room)
    appended: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(LAYERS)]
    for turn in turns(size):
        later = turn.after(cache.layout)
        cache.extend(later)
        for layer in range(LAYERS):
            appended[layer].append((keys(later.rows(rank)), keys(later.rows(rank))))
            cached = cache.append(layer, *appended[layer][-1])
            for got, parts in zip(cached, zip(*appended[layer], strict=True), strict=True):
                assert torch.equal(got, torch.cat(parts, 1))
    assert cache.layout.total == 23 + 11 + 2 + 3 * 7
    assert cache.rows == cache.layout.rows(rank) == cached[0].shape[1]


def test_rows_follow_the_layout():
    size, whole = 3, keys(23 + 7)
    caches = [KVCache(size, rank) for rank in range(size)]
    for turn in turns(size)[:8]:
        for rank, cache in enumerate(caches):
            later = turn.after(cache.layout)
            cache.extend(later)
            local = whole[:, later.positions(rank)]
            cached, _ = cache.append(0, local, local)
            assert torch.equal(cached, cache.layout.shard(whole, rank, 1))
    assert torch.equal(cache.layout.unshard([c.append(0, keys(0), keys(0))[0] for c in caches], 1), whole)


def addresses(cache: KVCache, tokens: int) -> list[int]:
    """Return the memory address of the keys after each of ``tokens`` decoded tokens on a ring of one."""
    out = []
    for _ in range(tokens):
        cache.extend(single(1, 0).after(cache.layout))
        cached, _ = cache.append(0, keys(1), keys(1))
        out.append(cached.data_ptr())
    return out


def fill_cache(rows: int, room: int) -> tuple[KVCache, int]:
    """Return a cache of ``rows`` rows and the memory address of its keys."""
    cache = KVCache(1, 0, room)
    cache.extend(contiguous(rows, 1).after(cache.layout))
    cached, _ = cache.append(0, keys(rows), keys(rows))
    return cache, cached.data_ptr()


def test_growth_within_the_room_moves_nothing():
    cache, begin = fill_cache(11, room=11 + 7)
    assert addresses(cache, 7) == [begin] * 7
    assert addresses(cache, 1) != [begin]


def allocated_rows(cache: KVCache) -> int:
    """Return the rows of memory that the keys of layer 0 take."""
    keys_of_layer, _ = cache.layer(0)
    return keys_of_layer.untyped_storage().nbytes() // (BATCH * HEADS * HEAD_DIM * keys_of_layer.element_size())


@pytest.mark.parametrize(("rows", "grown"), [(11, 12 + 64), (1024, 1025 + 128)])
def test_a_full_cache_grows_by_an_eighth(rows, grown):
    cache, begin = fill_cache(rows, room=0)
    moved = addresses(cache, grown - rows)
    assert moved == [moved[0]] * (grown - rows) and moved[0] != begin
    assert allocated_rows(cache) == grown
    assert addresses(cache, 1) != moved[:1]


def test_a_cache_grows_once_to_the_room_that_was_asked_for():
    cache, begin = fill_cache(11, room=0)
    cache.make_room(37)
    assert cache.layer(0)[0].data_ptr() == begin, "nothing moves before the next append"
    moved = addresses(cache, 37)
    assert moved == [moved[0]] * 37 and moved[0] != begin
    assert allocated_rows(cache) == 11 + 37


def test_bytes_exclude_room_for_more():
    cache, _ = fill_cache(11, room=101)
    assert cache.bytes == 2 * 11 * BATCH * HEADS * HEAD_DIM * 4
    cache.append(1, keys(11), keys(11))
    assert cache.bytes == 2 * 2 * 11 * BATCH * HEADS * HEAD_DIM * 4


def test_bfloat16_keeps_its_dtype_and_takes_half_the_bytes():
    cache = KVCache(1, 0)
    cache.extend(contiguous(3, 1).after(cache.layout))
    cached, _ = cache.append(0, keys(3).bfloat16(), keys(3).bfloat16())
    assert cached.dtype == torch.bfloat16
    assert cache.bytes == 2 * 3 * BATCH * HEADS * HEAD_DIM * 2


def test_rank_without_rows_caches_nothing_until_it_owns_a_token():
    cache = KVCache(3, 2, room=7)
    for turn, rows in ((zigzag(1, 3), 0), (single(3, 1), 0), (single(3, 2), 1)):
        later = turn.after(cache.layout)
        cache.extend(later)
        k, v = keys(later.rows(2)), keys(later.rows(2))
        cached = cache.append(0, k, v)
        assert cache.rows == rows
        assert torch.equal(cached[0], k) and torch.equal(cached[1], v)
        assert cache.bytes == 2 * rows * BATCH * HEADS * HEAD_DIM * 4


def test_prefix_view_reads_its_prefix_and_does_not_change_it():
    prefix = KVCache(1, 0)
    prefix.extend(contiguous(5, 1))
    k, v = (torch.randn(1, 5, 3, 7) for _ in range(2))
    prefix.append(0, k, v)
    for length in (2, 3):
        view = PrefixView(prefix)
        view.extend(contiguous(length, 1).after(view.layout))
        new = [torch.randn(1, length, 3, 7) for _ in range(2)]
        keys, values = view.append(0, *new)
        assert torch.equal(keys, torch.cat([k, new[0]], 1)) and torch.equal(values, torch.cat([v, new[1]], 1))
        assert view.layout.total == 5 + length and prefix.layout.total == 5
        assert torch.equal(prefix.layer(0)[0], k)


class Visited(tuple):
    """Spans that count accesses to their entries."""

    count = 0

    def __iter__(self):
        for span in super().__iter__():
            Visited.count += 1
            yield span


def test_extending_a_batch_is_linear_in_its_sequences():
    """Looking for each sequence's spans among all spans is quadratic."""

    def visits(sequences: int) -> int:
        later = documents([7] * sequences, 3)
        Visited.count = 0
        caches = [KVCache(3, 1) for _ in range(sequences)]
        BatchCache(caches, 1).extend(replace(later, ranks=tuple(map(Visited, later.ranks))))
        assert all(torch.equal(cache.layout.positions(1), zigzag(7, 3).positions(1)) for cache in caches)
        return Visited.count

    assert visits(202) <= 2.1 * visits(101)


def test_batch_gives_each_sequence_alone_without_a_copy():
    caches = [KVCache(2, 1, room=29) for _ in range(3)]
    batch = BatchCache(caches, 1)
    lengths = [5, 1, 3]
    later = side_by_side([contiguous(n, 2) for n in lengths])
    batch.extend(later)
    k, v = (torch.randn(1, later.rows(1), 3, 7) for _ in range(2))
    appended = batch.append(0, k, v)
    batch.extend(side_by_side([contiguous(n, 2) for n in lengths]).after(later))
    k2, v2 = (torch.randn(1, later.rows(1), 3, 7) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(appended, (k, v), strict=True))
    parts = batch.append_each(0, k2, v2)
    for cache, pair, rows in zip(caches, parts, later.rows_by_document(1), strict=True):
        for got, one, old, new in zip(pair, cache.layer(0), (k, v), (k2, v2), strict=True):
            assert torch.equal(got, torch.cat([old[:, rows], new[:, rows]], 1))
            assert got.data_ptr() == one.data_ptr() or not got.numel()
