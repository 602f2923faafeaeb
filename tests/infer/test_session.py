"""Sessions of several sequences, on any mesh, through saves and restores: the tokens of transformers."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from longctx.parallel.launch import run_ranks
from longctx.schema import Context, Mesh
from tests.infer.talk import Drop, Say, Seen, Segment, fails_once, play
from tests.tiny import tiny_model

TURNS = 40
MESHES = [
    Mesh(),
    Mesh(ring=2),
    Mesh(ring=3),
    Mesh(ulysses=3),
    Mesh(ulysses=9),
    Mesh(ring=2, ulysses=3),
    Mesh(tp=3),
    Mesh(tp=3, ring=2),
    Mesh(ring=5),
]
CONTEXTS = [
    Context(strategy=strategy, decode=decode, layout=layout, chunk=chunk)
    for strategy, decode, layout, chunk in [
        ("pass_kv", "one_exchange", "zigzag", None),
        ("pass_q", "pass_q", "zigzag", 7),
        ("all_gather_kv", "pass_kv", "striped", None),
        ("pass_kv", "all_gather_kv", "contiguous", 5),
        ("pass_q", "one_exchange", "striped", 1),
    ]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("session") / "tiny", positions=499)


def expected(folder: Path, steps: Sequence[Say | Drop]) -> list[dict[int, list[int]]]:
    """What transformers decodes, greedily, from all tokens of a sequence at once."""
    from transformers import AutoModelForCausalLM

    lone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sequences: dict[int, list[int]] = {}
    out = []
    for step in steps:
        if isinstance(step, Drop):
            del sequences[step.sequence]
            continue
        out.append({})
        for i, prompt in step.prompts.items():
            tokens = torch.tensor([sequences.get(i, []) + prompt])
            made = tokens
            if step.max_new_tokens[i]:
                made = lone.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=step.max_new_tokens[i],
                    do_sample=False,
                )
            sequences[i] = made[0].tolist()
            out[-1][i] = made[0, tokens.shape[1] :].tolist()
    return out


def trace(seed: int, turns: int) -> list[Say | Drop]:
    """Random turns of up to 4 sequences, some of which are dropped."""
    draw, there, out = random.Random(seed), {}, []
    while sum(isinstance(step, Say) for step in out) < turns:
        if there and draw.random() < 0.15:
            gone = draw.choice(sorted(there))
            del there[gone]
            out.append(Drop(gone))
        speakers = draw.sample(range(4), draw.randint(1, 3))
        prompts = {i: [draw.randrange(256) for _ in range(draw.choice([1, 2, 11, 23]))] for i in speakers}
        new = {i: draw.choice([0, 1, 3, 5]) for i in speakers}
        for i in [i for i in speakers if there.get(i, 0) + len(prompts[i]) + new[i] > 490]:
            out.append(Drop(i))
            del there[i]
        there |= {i: there.get(i, 0) + len(prompts[i]) + new[i] for i in speakers}
        out.append(Say(prompts, new))
    return out


def played(folder: Path, segments: Sequence[Segment], scratch: Path) -> list[Seen]:
    """All segments, each on its own ranks, with the session on disk in between."""
    out = []
    for i, segment in enumerate(segments):
        load, save = (scratch / "talk" if i else None), scratch / "talk"
        out.append(run_ranks(segment.mesh.ranks, play, folder, segment, load, save)[0])
    return out


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(seed=st.integers(0, 10**6), order=st.permutations(range(len(MESHES))))
def test_forty_turns_on_changing_meshes_are_those_of_transformers(model, tmp_path_factory, seed, order):
    steps = trace(seed, TURNS)
    parts = 5
    cuts = [len(steps) * part // parts for part in range(parts + 1)]
    segments = [
        Segment(MESHES[order[i]], CONTEXTS[(seed + i) % len(CONTEXTS)], tuple(steps[cuts[i] : cuts[i + 1]]))
        for i in range(parts)
    ]
    seen = played(model, segments, tmp_path_factory.mktemp("trace"))
    assert [tokens for one in seen for tokens in one.tokens] == expected(model, steps)


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda c: f"{c.strategy}-{c.decode}-{c.layout}-{c.chunk}")
@pytest.mark.parametrize("mesh", [Mesh(ring=3), Mesh(ring=2, ulysses=3)], ids=str)
def test_three_turns_of_a_ragged_batch(model, mesh, context):
    """Every strategy of prefill and decode; cached rows stay even."""
    draw = random.Random(1)
    lengths = [{0: 37, 1: 1, 2: 13}, {1: 29}, {0: 2, 2: 17}]
    steps = [
        Say({i: [draw.randrange(256) for _ in range(n)] for i, n in turn.items()}, {i: 3 + i for i in turn})
        for turn in lengths
    ]
    seen = run_ranks(mesh.ranks, play, model, Segment(mesh, context, tuple(steps)), None, None)
    assert all(one.tokens == expected(model, steps) for one in seen)
    if context.chunk is None:
        for held in seen[0].held:
            assert max(held) - min(held) <= 37 // (2 * mesh.ring) + 1, "more than a chunk from even"


@pytest.mark.parametrize(("fault", "words"), [("too long", "the model's context is 499"), ("in the middle", "a fault")])
def test_a_turn_that_fails_leaves_the_session_as_it_was(model, fault, words):
    step = Say({0: [5, 6, 7, 8, 9, 10, 11], 3: [1, 2, 3]}, {0: 3, 3: 4})
    for one, other, said in run_ranks(2, fails_once, model, Mesh(ring=2), step, fault):
        assert one == other
        assert words in said
