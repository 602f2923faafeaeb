"""Sampled answers of a session are those of each sequence alone, on any mesh, with exact log-probabilities."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx.config import Context, Mesh, Sampling
from longctx.infer.engine import Engine
from longctx.infer.sample import choose_token
from longctx.infer.session import Session
from tests.infer.thread_ranks import run_engines, single_rank
from tests.tiny import tiny_model

SAMPLING = Sampling(0.9, top_p=0.95, top_k=53, min_p=0.01, repetition_penalty=1.3, presence_penalty=0.4,
                    frequency_penalty=0.7, logprobs=3, seed=2**32 - 1)  # fmt: skip
GREEDY = Sampling(repetition_penalty=1.1, logprobs=0)
PROMPTS = {0: [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], 4: [2, 7], 1: [1, 8, 2, 8, 1, 8, 2]}
AGAIN = {4: [1, 6, 1], 0: [8]}
STEPS = 7


def talk(engine: Engine) -> list[object]:
    """Hold two turns of three sequences, one of which has its own settings; return tokens and log-probabilities."""
    session = Session(engine, Context(chunk=5), SAMPLING)
    session.add(1, 7, STEPS, GREEDY)
    found: list[object] = []
    for prompts in (PROMPTS, AGAIN):
        turn = session.turn(prompts, dict.fromkeys(prompts, STEPS))
        found.append({i: (turn.tokens[i], session.sequences[i].logprobs) for i in prompts})
    session.turn({1: [5]}, {1: STEPS}, stopped=lambda _, tokens: len(tokens) == 2)
    return [*found, session.sequences[1].tokens[-3:]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[object]]]:
    """The model, and what `talk` returns on each rank of several meshes."""
    folder = tiny_model(tmp_path_factory.mktemp("sampled") / "tiny", max_positions=97)
    with single_rank(tmp_path_factory.mktemp("store")) as runtime:
        meshes = (Mesh(), Mesh(ring=2), Mesh(ulysses=3))
        return folder, [found for mesh in meshes for found in run_engines(runtime, folder, mesh, talk)]


def test_tokens_do_not_depend_on_the_mesh(runs):
    _, (first, *others) = runs
    tokens = [{i: tokens for i, (tokens, _) in turn.items()} for turn in first[:2]]
    for other in others:
        assert [{i: tokens for i, (tokens, _) in turn.items()} for turn in other[:2]] == tokens
        assert other[2] == first[2]


@torch.inference_mode()
def test_tokens_and_logprobs_are_those_of_transformers_logits(runs):
    from transformers import AutoModelForCausalLM

    folder, (_, found, *_) = runs
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    so_far: dict[int, list[int]] = {i: [] for i in PROMPTS}
    for prompts, turn in zip((PROMPTS, AGAIN), found, strict=False):
        for i, prompt in prompts.items():
            before, (tokens, logprobs) = so_far[i] + prompt, turn[i]
            so_far[i] = before + tokens
            logits = reference(torch.tensor([so_far[i]])).logits[0]
            settings = GREEDY if i == 1 else SAMPLING.for_answer(i)
            assert settings.seed == (0 if i == 1 else (2**32 - 1 + i) % 2**32)
            assert len(tokens) == len(logprobs) == STEPS
            for step, (token, one) in enumerate(zip(tokens, logprobs, strict=True)):
                position = len(before) + step - 1
                assert token == choose_token(logits[position], settings, position, before, tokens[:step])
                expected = logits[position].double().log_softmax(-1)
                assert one.token == token and one.logprob == pytest.approx(float(expected[token]), abs=1e-5)
                top = expected.topk(settings.logprobs or 0)
                assert [likely for likely, _ in one.top] == top.indices.tolist()
                assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def fail(*_: object) -> None:
    raise ArithmeticError("a fault")


def answer_nothing(engine: Engine) -> None:
    """A prompt without an answer, and a turn that fails: neither leaves log-probabilities."""
    session = Session(engine, Context(), SAMPLING)
    session.turn(PROMPTS, {0: STEPS, 4: 0, 1: 1})
    before = {i: replace(sequence, tokens=list(sequence.tokens)) for i, sequence in session.sequences.items()}
    assert {i: len(one.logprobs) for i, one in before.items()} == {0: STEPS, 4: 0, 1: 1}
    with pytest.raises(ArithmeticError):
        session.turn({0: [5, 7], 3: [2]}, {0: 2, 3: 2}, token_done=fail)
    assert session.sequences == before


def test_only_tokens_of_an_answer_have_logprobs(tmp_path):
    folder = tiny_model(tmp_path / "tiny", max_positions=97)
    with single_rank(tmp_path) as runtime:
        run_engines(runtime, folder, Mesh(), answer_nothing)


def test_turn_ends_a_sequence_that_is_stopped(runs):
    for found in runs[1]:
        assert found[2][0] == 5, "two tokens follow the prompt"
