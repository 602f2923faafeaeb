"""Sessions on ranks that are threads and share one loaded model, so that tests can try many meshes quickly."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longctx.config import Mesh, ModelSource, Sampling
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank
from longctx.parallel.threads import ThreadWorld, run_threads
from tests.infer.talk import Record, Save, Segment, Step, run_steps


def play_on_threads(
    rank: Rank, folders: Sequence[Path], segments: Sequence[Segment], again: Sequence[Step], saves: Sequence[Path]
) -> list[list[tuple[Record, Record]]]:
    """For each model, run each segment on its mesh and save; then run ``again`` on the next segment's mesh.

    The first segment's mesh restores the session in the model's folder of ``saves``, which another process saved.
    Segment i is saved beside that folder, with -i in its name.  No pass may compute logits of more than one row for
    each sequence, since the logits of a whole prompt with a large vocabulary fill the memory.
    """
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import open_runtime

    results = []
    with open_runtime(rank, Mesh(), timeout_minutes=2) as runtime:
        for folder, saved in zip(folders, saves, strict=True):
            shape = shape_of(folder)
            # megatron-core's experts keep state during a pass, so that threads cannot share them.
            copies = max(segment.mesh.ranks for segment in segments) if shape.mixture else 1
            engines = [
                load_engine(runtime, ModelSource("test", str(folder)), shape, folder, "auto") for _ in range(copies)
            ]
            rows: list[int] = []  # rows of hidden states, by call of the output layer
            for engine in engines:
                output_layer = engine.model.output_layer
                output_layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))
            records, load_from = [], saved
            for i, segment in enumerate(segments):
                restored = _play(engines, replace(segment, steps=tuple(again)), load_from)
                load_from = saved.with_name(f"{saved.name}-{i}")
                records.append(
                    (_play(engines, replace(segment, steps=(*segment.steps, Save(load_from))), None), restored)
                )
            assert set(rows) == {1, 2}, "logits of more rows than one for each of the two sequences"
            results.append(records)
    return results


def _play(engines: Sequence[Any], segment: Segment, load_from: Path | None) -> Record:
    """Run ``segment`` on threads; every rank must decode the same tokens."""
    from longctx.infer.session import Session
    from longctx.infer.session_index import read_index
    from longctx.infer.store import load

    mesh = segment.mesh

    def rank_main(world: ThreadWorld, rank: int) -> Record:
        ring_rank, member = divmod(rank, mesh.ulysses)
        ulysses = world.group(rank, [ring_rank * mesh.ulysses + i for i in range(mesh.ulysses)])
        ring = world.group(rank, [i * mesh.ulysses + member for i in range(mesh.ring)])
        mine = replace(engines[rank % len(engines)], ulysses=ulysses, ring=ring, context=world.group(rank))
        session = Session(mine, segment.context, Sampling(), segment.choose)
        if load_from:
            load(session, load_from, read_index(load_from, "test", "torch.float32", mine.shape))
        return run_steps(session, segment.steps)

    first, *others = run_threads(mesh.ranks, rank_main)
    assert all(other.tokens == first.tokens for other in others)
    return first
