"""Pages give a cache the rows that another cache had at the same positions, on every rank."""

import pytest
import torch

from longctx.attention.layout import Layout, contiguous, single, striped, zigzag
from longctx.infer.cache import KVCache
from longctx.infer.pages import PageStore

LAYERS, HEADS, HEAD_DIM, PAGE = 2, 3, 5, 7


@torch.inference_mode()
def fill(caches: list[KVCache], turns: list[Layout], rows: torch.Tensor) -> None:
    """Append ``turns`` to the caches of all ranks: in layer l, keys are ``rows`` [1 total hk d] + l, values -keys."""
    for turn in turns:
        for rank, cache in enumerate(caches):
            later = turn.after(cache.layout)
            cache.extend(later)
            for layer in range(LAYERS):
                local = rows[:, later.positions(rank)] + layer
                cache.append(layer, local, -local)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pages_restore_the_rows_of_their_positions(size):
    rows = torch.randn(1, 53, HEADS, HEAD_DIM)
    turns = [zigzag(23, size), *(single(size, i % size) for i in range(5)), striped(11, size), contiguous(14, size)]
    first, second = ([KVCache(size, rank) for rank in range(size)] for _ in range(2))
    stores = [PageStore(rank, LAYERS, size) for rank in range(size)]
    fill(first, turns, rows)
    for rank, store in enumerate(stores):
        for page in range(6):
            store.store(page, first[rank], page * PAGE, (page + 1) * PAGE)
        with torch.inference_mode():
            first[rank].layer(0)[0].zero_()  # pages are copies
        store.copy_to(second[rank], [(0, PAGE), (1, PAGE), (2, PAGE)])
        store.copy_to(second[rank], [(3, PAGE), (4, PAGE), (5, 4)])
    fill(second, [contiguous(53 - 5 * PAGE - 4, size)], rows)
    for layer in range(LAYERS):
        for kind, sign in enumerate((1, -1)):
            restored = second[0].layout.unshard([cache.layer(layer)[kind] for cache in second], 1)
            assert torch.equal(restored, sign * (rows + layer))
    assert {cache.layout for cache in second} == {second[0].layout}
    bytes_of_row = 2 * LAYERS * HEADS * HEAD_DIM * 4
    assert sum(store.bytes for store in stores) == 6 * PAGE * bytes_of_row, "every page is stored once over all ranks"
    for store in stores:
        assert store.rows_per_rank == [sum(at < 6 * PAGE for at in cache.layout.positions(rank)) for rank, cache
                                       in enumerate(first)]  # fmt: skip
        for page in range(6):
            store.drop(page)
        assert (len(store), store.bytes, store.rows_per_rank) == (0, 0, [0] * size)
