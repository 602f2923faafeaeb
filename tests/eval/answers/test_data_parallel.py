"""Data-parallel groups: the batches are those of one group, each is answered once, and the answers are the same."""

import json
from dataclasses import replace

import pytest
import torch

from eval.answers import score
from eval.answers.gather import gather_answers
from eval.answers.requests import Continue, Score, key
from eval.answers.worker import EvalWork, answer_requests, run_rank
from longctx.parallel.launch import run_ranks
from longctx.parallel.threads import run_threads

REQUESTS = (
    *(Score(tuple(range(5, 9 + i)), 3 + i % 4, f"q{i // 2}") for i in range(11)),
    *(Continue(tuple(range(7, 20 + i)), ("\n",), 5) for i in range(5)),
)


@pytest.mark.parametrize("size", [1, 3])
def test_answers_of_all_ranks_are_gathered_in_order(size):
    mine = [({"b": (-0.1234567890123456, True), "é": "a\nboat"}, 7), ({}, 0), ({"a": (-1e-300, False)}, 4)][:size]

    def gather(world, rank):
        return gather_answers(world.group(rank), torch.device("cpu"), *mine[rank])

    for answers, tokens in run_threads(size, gather):
        assert list(answers.items()) == [item for of_rank, _ in mine for item in of_rank.items()]
        assert tokens == sum(count for _, count in mine)


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_groups_take_the_batches_of_one_group_in_turns(dp, prepared, tmp_path, monkeypatch):
    """All yield equally often, so that their exchanges match."""
    monkeypatch.setattr(score, "score_batch", lambda *args: {one: (-1.0, True) for g in args[2] for one in g.requests})
    monkeypatch.setattr("eval.answers.generate.generate_texts", lambda *args: ["x"] * len(args[3]))
    base = prepared().variants[0]
    work = EvalWork("a", base, REQUESTS, tmp_path / "answers", 30)
    alone = list(answer_requests(None, work))
    mesh = replace(base.target.mesh, dp=dp)
    work = replace(work, variant=replace(base, target=replace(base.target, mesh=mesh)))
    groups = [list(answer_requests(None, work, dp_rank)) for dp_rank in range(dp)]
    assert len({len(batches) for batches in groups}) == 1
    in_order = [batch for same_round in zip(*groups, strict=True) for batch in same_round if batch[0]]
    assert in_order == alone and len(alone) > 5
    assert {request for answers, _ in alone for request, _ in answers} == set(REQUESTS)


def test_digest_is_that_of_one_group(prepared):
    one, two, ring = (prepared(word).variants[0].digest for word in ("mesh.dp=1", "mesh.dp=2", "mesh.ring=2"))
    assert one == two != ring


def test_answers_are_those_of_one_group(prepared, tmp_path):
    """Two groups of two ranks give the same bits as one: log-probabilities, texts, tokens, and the order on disk."""
    stored = {}
    for dp in (1, 2):
        variant = prepared(f"mesh.dp={dp}", "mesh.ring=2", "run.threads=1").variants[0]
        work = EvalWork("a", variant, REQUESTS, tmp_path / str(dp), max_batch_tokens=30)
        assert run_ranks(2 * dp, run_rank, work) == [False] * 2 * dp
        stored[dp] = [json.loads(line) for line in work.file.read_text().splitlines() if line]
    answers = {dp: [(line["key"], line["answer"]) for line in lines if "key" in line] for dp, lines in stored.items()}
    assert answers[1] == answers[2] and {one for one, _ in answers[1]} == {key(request) for request in REQUESTS}
    for name in ("tokens", "requests"):
        one, two = (sum(line.get(name, 0) for line in lines) for lines in stored.values())
        assert one == two > 0
