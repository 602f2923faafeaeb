"""Every kind of model: turns, batches, saves and restores on other meshes decode the tokens of transformers."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Context, Mesh
from longctx.parallel.launch import run_ranks
from tests.infer.on_threads import play_on_threads
from tests.infer.talk import Save, Say, Segment, Step, play_each
from tests.infer.test_session import check
from tests.megatron.kinds import KINDS, SMALL, random_model


def by_window(_new: Sequence[int], _cached: Sequence[int], window: int | None) -> tuple[str, str]:
    """Choose as ``context.strategy=auto`` may: another strategy for the layers of each window."""
    return ("pass_q" if window else "pass_kv"), "test"


def prompt(tokens: int, draw: random.Random) -> list[int]:
    return [draw.randrange(SMALL["vocab_size"]) for _ in range(tokens)]


def turns() -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Return three turns of two sequences, and one after a restore.

    Prompts are longer than the windows, and longer than the original context of LongRoPE.
    """
    draw = random.Random(3)
    begin = (
        Say({0: prompt(151, draw), 1: prompt(133, draw)}, {0: 3, 1: 2}),
        Say({1: prompt(7, draw)}, {1: 2}),
        Say({0: prompt(11, draw), 1: prompt(1, draw)}, {0: 1, 1: 2}),
    )
    return begin, (Say({0: prompt(5, draw)}, {0: 2}),)


# Each strategy of prefill and of decoding, each layout, several passes of a chunk, and each mesh without tp.
CELLS = [
    Segment(Mesh(), Context(), ()),
    Segment(Mesh(ring=2), Context(strategy="pass_kv"), ()),
    Segment(Mesh(ring=3), Context(strategy="pass_q", decode="pass_q"), ()),
    Segment(Mesh(ring=2), Context(strategy="all_gather_kv", decode="pass_kv", layout="striped"), ()),
    Segment(Mesh(ulysses=2), Context(chunk=97), ()),
    Segment(Mesh(ring=3), Context(decode="all_gather_kv", layout="contiguous"), (), by_window),
    Segment(Mesh(ulysses=2, ring=2), Context(strategy="pass_q", layout="striped"), ()),
]


@pytest.mark.parametrize("kinds", [list(KINDS)[::2], list(KINDS)[1::2]], ids=["one half", "the other half"])
def test_conversations_on_every_mesh(kinds: list[str], tmp_path: Path) -> None:
    """A session begins on each mesh and is restored on the next one; those of tp x ring go to the first mesh."""
    folders = {kind: random_model(kind, tmp_path / f"model of {kind}", eos_token_id=None) for kind in kinds}
    begin, again = turns()
    saves = {kind: tmp_path / kind for kind in folders}
    tensor_parallel = [
        (folder, Segment(Mesh(tp=2, ring=2), Context(decode="sharded"), (*begin, Save(saves[kind]))), None)
        for kind, folder in folders.items()
    ]
    with_tp = run_ranks(4, play_each, tensor_parallel)[0]
    cells = [Segment(cell.mesh, cell.context, begin, cell.choose) for cell in CELLS]
    on_threads = run_ranks(1, play_on_threads, list(folders.values()), cells, again, list(saves.values()))[0]
    last_saves = [saves[kind].with_name(f"{kind}-{len(CELLS) - 1}") for kind in folders]
    restored = [
        (folder, Segment(Mesh(tp=2), Context(strategy="pass_q"), again), save)
        for folder, save in zip(folders.values(), last_saves, strict=True)
    ]
    tp_again = run_ranks(2, play_each, restored)[0]
    for kind, first, records, last in zip(folders, with_tp, on_threads, tp_again, strict=True):
        reference = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32)
        tokens: dict[int, list[int]] = {}
        check(reference, tokens, begin, first.tokens)
        check(reference, tokens, again, last.tokens)
        for cell, (begun, after_restore) in zip(CELLS, records, strict=True):
            assert begun.tokens == first.tokens, (kind, cell)
            assert after_restore.tokens == last.tokens, (kind, cell)
