"""Sequences that share the passes of a server get the tokens that each gets alone, on threads as ranks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Mesh, Sampling
from longctx.parallel.threads import ThreadWorld
from longctx.serve.prefix_cache import NewPage
from longctx.serve.ranks import share_plan
from longctx.serve.schedule import NewSequence, StepPlan
from longctx.serve.service import Failure, Service, Token
from tests.serve.on_threads import PAGES, TOKENIZER, on_ranks

SEQUENCES = [
    NewSequence(i, tuple((7 * i + 3 * j) % 256 for j in range(length)), most, sampling)
    for i, (length, most, sampling) in enumerate([
        (31, 5, Sampling()),
        (3, 9, Sampling(1.1, top_k=50, seed=7)),
        (1, 1, Sampling(0.7, logprobs=2)),
        (17, 13, Sampling(1.3, presence_penalty=1.0, frequency_penalty=0.5, logprobs=0)),
        (23, 4, Sampling(1.0, repetition_penalty=1.2, seed=9)),
        (2, 60, Sampling(1.0, seed=3)),
    ])
]  # fmt: skip


def alone(service: Service) -> dict[int, list[int]]:
    """Answer one sequence after the other."""
    tokens = {}
    for one in SEQUENCES:
        service.session.add(one.number, len(one.prompt), one.max_new_tokens, one.sampling)
        turn = service.session.turn({one.number: list(one.prompt)}, {one.number: one.max_new_tokens})
        tokens[one.number] = turn.tokens[one.number]
        service.session.drop(one.number)
    return tokens


def together(service: Service) -> list[Token | Failure]:
    """Answer all sequences at once, which arrive between the steps, while one client goes away."""
    events: list[Token | Failure] = []
    arriving, left_early = iter(SEQUENCES), False
    service.submit(next(arriving), events.append)
    while service.busy:
        service.step()
        if (new := next(arriving, None)) is not None:
            service.submit(new, events.append)
        if not left_early and sum(event.number == 5 for event in events) == 3:
            service.cancel(5)
            left_early = True
    return [*events, len(service.session.sequences)]


def test_answers_equal_those_of_each_sequence_alone(folder, tmp_path):
    [expected] = on_ranks(folder, tmp_path, Mesh(), alone)
    for mesh in (Mesh(), Mesh(ring=2)):
        (*events, left), *others = on_ranks(folder, tmp_path, mesh, together)
        assert left == 0 and all(other == ([], 0) for other in others), "a sequence is still cached"
        for one in SEQUENCES:
            mine = [event for event in events if event.number == one.number]
            tokens, whole = [event.token for event in mine], expected[one.number]
            assert tokens == (whole if one.number != 5 else whole[: len(tokens)])
            assert [event.finish for event in mine[:-1]] == [None] * (len(mine) - 1)
            assert len(mine) < 7 if one.number == 5 else mine[-1].finish == "length"
            assert "".join(event.piece for event in mine) == TOKENIZER.decode(tokens) or one.number == 5
            asked = one.sampling.logprobs
            assert all(event.logprob is None if asked is None else event.logprob.token == event.token for event in mine)


def test_log_probabilities_of_prompts_equal_transformers(folder, tmp_path):
    """The prompt of 31 tokens takes three passes; the one of a single token has nothing to predict."""
    asked = [replace(one, score_prompt=one.number != 1) for one in SEQUENCES]

    def speak(service: Service) -> list[Token | Failure]:
        events: list[Token | Failure] = []
        for one in asked:
            service.submit(one, events.append)
        while service.busy:
            service.step()
        return events

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for mesh in (Mesh(ring=2), Mesh(ulysses=3)):
        events = on_ranks(folder, tmp_path, mesh, speak)[0]
        for one in asked:
            first, *later = [event for event in events if event.number == one.number]
            assert not any(event.prompt for event in later)
            assert [scored.token for scored in first.prompt] == list(one.prompt[1:]) * one.score_prompt
            if not first.prompt:
                continue
            with torch.inference_mode():
                expected = model(torch.tensor([one.prompt])).logits[0].log_softmax(-1)
            for at, scored in enumerate(first.prompt):
                assert scored.logprob == pytest.approx(float(expected[at, scored.token]), abs=2e-5)
                values, tokens = expected[at].topk(one.sampling.logprobs or 0)
                assert [token for token, _ in scored.top] == tokens.tolist()
                assert [value for _, value in scored.top] == pytest.approx(values.tolist(), abs=2e-5)


def test_answer_ends_at_its_stop_text_and_the_client_sees_no_more(folder, tmp_path):
    def speak(service: Service) -> list[Token]:
        events: list[Token] = []
        prompt = SEQUENCES[0].prompt
        service.submit(NewSequence(0, prompt, 20, Sampling(1.0)), events.append)
        while service.busy:
            service.step()
        text = "".join(event.piece for event in events)
        stop = text[5:7]
        service.submit(NewSequence(1, prompt, 20, Sampling(1.0, stop=(stop,))), events.append)
        while service.busy:
            service.step()
        ended = [event for event in events if event.number == 1]
        assert "".join(event.piece for event in ended) == text[: text.index(stop)]
        assert ended[-1].finish == "stop" and len(ended) < 20
        return events

    on_ranks(folder, tmp_path, Mesh(), speak)


@contextmanager
def filled_with_nan(weight: torch.Tensor) -> Iterator[None]:
    """Fill ``weight`` with NaN during the block."""
    before = weight.clone()
    weight.fill_(float("nan"))
    yield
    weight.copy_(before)


def test_logits_that_are_not_finite_fail_the_sequences_of_the_pass_only(folder, tmp_path):
    def speak(service: Service) -> list[Token | Failure]:
        events: list[Token | Failure] = []
        with filled_with_nan(service.session.engine.model.output_layer.weight.data):
            service.submit(SEQUENCES[2], events.append)
            service.step()
        service.submit(SEQUENCES[0], events.append)
        while service.busy:
            service.step()
        return events

    first, *others = on_ranks(folder, tmp_path, Mesh(), speak)[0]
    assert isinstance(first, Failure) and "NaN or infinite" in first.message
    assert [event.number for event in others] == [0] * 5


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ring=2)], ids=str)
def test_rows_of_a_scored_prompt_that_are_not_finite_fail_their_pass_and_not_the_server(folder, tmp_path, mesh):
    """The pass ends before the prompt does, so it chooses no token; every rank notices all the same."""
    scored = replace(SEQUENCES[2], score_prompt=True, sampling=replace(SEQUENCES[2].sampling, logprobs=2))

    def speak(service: Service) -> list[Token | Failure]:
        events: list[Token | Failure] = []
        weight = service.session.engine.model.output_layer.weight.data
        with filled_with_nan(weight):
            service.submit(scored, events.append)
            service.step()
        service.submit(SEQUENCES[0], events.append)
        while service.busy:
            service.step()
        return events

    first, *others = on_ranks(folder, tmp_path, mesh, speak)[0]
    assert isinstance(first, Failure) and "NaN or infinite" in first.message
    assert [event.number for event in others] == [0] * 5


def test_a_pass_that_fails_ends_its_prompts_and_its_open_answers(folder, tmp_path):
    """The first rank's output layer is NaN while one sequence is decoded and another one's prompt ends."""

    def speak(service: Service) -> list[Token | Failure]:
        events: list[Token | Failure] = []
        service.submit(SEQUENCES[5], events.append)
        while len(events) < 3:
            service.step()
        with filled_with_nan(service.session.engine.model.output_layer.weight.data):
            service.submit(SEQUENCES[1], events.append)
            service.step()
        service.submit(SEQUENCES[2], events.append)
        while service.busy:
            service.step()
        return events

    *events, last = on_ranks(folder, tmp_path, Mesh(ring=2), speak)[0]
    assert {event.number for event in events[3:]} == {1, 5} and len(events) == 5
    assert all("NaN or infinite" in event.message for event in events[3:])
    assert isinstance(last, Token) and last.number == 2


def test_pages_of_a_failed_pass_are_not_reused(folder, tmp_path):
    """The first chunk of the prompt fills pages before the last one shows that the rows are NaN."""

    def speak(service: Service) -> list[Token | Failure]:
        events: list[Token | Failure] = []
        with filled_with_nan(service.session.engine.model.embedding.word_embeddings.weight.data):
            service.submit(SEQUENCES[0], events.append)
            while not events:
                service.step()
        assert service.prefixes.evicted == 4 and not any(service.prefixes.rows)
        service.submit(SEQUENCES[0], events.append)
        while service.busy:
            service.step()
        return events

    [expected] = on_ranks(folder, tmp_path, Mesh(), alone)
    failure, *tokens = on_ranks(folder, tmp_path, Mesh(), speak, pages=PAGES)[0]
    assert isinstance(failure, Failure) and "NaN or infinite" in failure.message
    assert [event.token for event in tokens] == expected[0]


def test_failure_of_the_server_reaches_every_client(folder, tmp_path):
    def speak(service: Service) -> list[Token | Failure]:
        events: list[Token | Failure] = []
        service.submit(SEQUENCES[0], events.append)
        service.step()
        service.submit(SEQUENCES[1], events.append)
        service.fail("lost rank 1")
        while service.busy:
            service.step()
        return events

    [events] = on_ranks(folder, tmp_path, Mesh(), speak)
    assert events == [Failure(0, "lost rank 1"), Failure(1, "lost rank 1")]


def test_plans_reach_every_rank():
    world, plan, found = (
        ThreadWorld(3),
        StepPlan((8,), (NewPage(9, 5, 0, 3),), (5,), (SEQUENCES[3],), {}, {2: 7}, (1, 4)),
        {},
    )

    def receive(rank: int) -> None:
        import torch

        found[rank] = share_plan(world.group(rank), plan if rank == 0 else None, torch.device("cpu"))

    threads = [threading.Thread(target=receive, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), plan)
