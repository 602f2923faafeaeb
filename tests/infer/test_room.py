"""A session's caches take the memory of its tokens, and not of the model's longest conversation."""

from pathlib import Path

import pytest

from longctx.config import Context, Mesh, ModelSource, Sampling
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank, run_ranks
from tests.tiny import tiny_model

TURNS = ((101, 37), (23, 41), (3, 5))  # tokens of a prompt, and of its answer


def rooms_of_two(rank: Rank, mesh: Mesh, folder: Path) -> list[int]:
    """Return the rows that this rank's caches have memory for, in the first layer, after a turn of two sequences."""
    from longctx.infer.engine import load_engine
    from longctx.infer.session import Session
    from longctx.megatron.runtime import open_runtime

    shape, prompt = shape_of(folder), [7 + i % 11 for i in range(23)]
    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        engine = load_engine(runtime, ModelSource("test", str(folder)), shape, folder, "auto")
        session = Session(engine, Context(), Sampling())
        session.turn({0: prompt, 1: prompt}, {0: 71, 1: 71}, stopped=lambda *_: False)
        caches, result = [session.sequences[i].cache for i in (0, 1)], []
        for cache in caches:
            keys, _ = cache.layer(0)
            result.append(keys.untyped_storage().nbytes() // (keys[:, 0].numel() * keys.element_size()))
        return result


def test_room_of_several_sequences_is_for_all_decoded_tokens_on_one_rank(tmp_path):
    folder = tiny_model(tmp_path / "tiny", max_positions=9973)
    for rooms in run_ranks(2, rooms_of_two, Mesh(ring=2), folder):
        assert all(23 // 2 + 71 <= room <= 23 // 2 + 71 + 5 for room in rooms), "none has grown while decoding"


def allocated_rows(rank: Rank, mesh: Mesh, folder: Path) -> list[int]:
    """Return the rows that this rank's cache has memory for, in the first layer, after each turn."""
    from longctx.infer.engine import load_engine
    from longctx.infer.session import Session
    from longctx.megatron.runtime import open_runtime

    shape = shape_of(folder)
    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        engine = load_engine(runtime, ModelSource("test", str(folder)), shape, folder, "auto")
        session, result = Session(engine, Context(), Sampling()), []
        for prompt, answer in TURNS:
            session.turn({0: [7 + i % 11 for i in range(prompt)]}, {0: answer}, stopped=lambda *_: False)
            keys, _ = session.sequences[0].cache.layer(0)
            result.append(keys.untyped_storage().nbytes() // (keys[:, 0].numel() * keys.element_size()))
    return result


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ring=3)], ids=str)
def test_room_is_for_the_tokens_of_the_turns(tmp_path, mesh):
    folder = tiny_model(tmp_path / "tiny", max_positions=9973)
    for rows in run_ranks(mesh.ranks, allocated_rows, mesh, folder):
        tokens = 0
        for (prompt, answer), allocated in zip(TURNS, rows, strict=True):
            tokens += prompt + answer
            assert (tokens - 1) // mesh.ring <= allocated + 1 and allocated <= tokens / mesh.ring + 7
