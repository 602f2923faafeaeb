"""Every kind of model: turns, batches, saves and restores on other meshes decode the tokens of transformers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Context, Mesh
from longctx.parallel.launch import run_ranks
from tests.infer.talk import Save, Say, Segment, play_each
from tests.infer.test_session import check
from tests.megatron.kinds import KINDS, SMALL, random_model

# Pairs of meshes: where the session begins, and where it is restored.
MESHES = [
    (
        Mesh(tp=2, ring=2),
        Context(strategy="pass_q", decode="sharded"),
        Mesh(ulysses=2, ring=2),
        Context(chunk=31, layout="striped"),
    ),
    (Mesh(ring=3), Context(decode="pass_kv"), Mesh(tp=2), Context(strategy="all_gather_kv")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {kind: random_model(kind, folder / kind, eos_token_id=None) for kind in KINDS}


def prompt(tokens: int, draw: random.Random) -> list[int]:
    return [draw.randrange(SMALL["vocab_size"]) for _ in range(tokens)]


@pytest.mark.parametrize("meshes", MESHES, ids=lambda meshes: f"{meshes[0]}, then {meshes[2]}")
def test_conversation_on_two_meshes(meshes: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Prompts are longer than the windows and than the original context of LongRoPE's long factors."""
    first, first_context, second, second_context = meshes
    draw = random.Random(3)
    begin = (
        Say({0: prompt(151, draw), 1: prompt(133, draw)}, {0: 3, 1: 2}),
        Say({1: prompt(7, draw)}, {1: 3}),
    )
    again = (Say({0: prompt(11, draw), 1: prompt(1, draw)}, {0: 3, 1: 4}),)
    saves = {kind: tmp_path / kind for kind in folders}
    jobs = [(folders[kind], Segment(first, first_context, (*begin, Save(saves[kind]))), None) for kind in folders]
    begun = run_ranks(first.ranks, play_each, jobs)[0]
    jobs_again = [(folders[kind], Segment(second, second_context, again), saves[kind]) for kind in folders]
    restored = run_ranks(second.ranks, play_each, jobs_again)[0]
    for folder, before, after in zip(folders.values(), begun, restored, strict=True):
        reference, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dict[int, list[int]]()
        check(reference, tokens, begin, before.tokens)
        check(reference, tokens, again, after.tokens)
