"""Sequences that share the passes of a server get the tokens that each gets alone, on threads as ranks."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Context, Mesh, Sampling
from longctx.infer.engine import Engine
from longctx.infer.page_files import PageFiles
from longctx.infer.sample import TokenLogprob
from longctx.infer.session import Session
from longctx.parallel.threads import ThreadWorld
from longctx.serve.one_rank import ALL_RANKS, OneRank
from longctx.serve.prefix_cache import NewPage
from longctx.serve.ranks import follow, share_plan
from longctx.serve.schedule import Limits, NewSequence, StepPlan
from longctx.serve.service import Failure, Service, Token
from tests.infer.thread_ranks import run_engines, single_rank
from tests.megatron.kinds import random_model
from tests.tiny import tiny_model, tiny_tokenizer

LIMITS = Limits(prefill_tokens=11, sequences=3, cached_tokens=97)
PAGE, PAGES = 5, 13  # tokens of a page, and how many of them all ranks have room for, if each page is shared evenly
TOKENIZER = tiny_tokenizer()
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("service") / "tiny", max_positions=97)


def on_ranks(
    folder: Path,
    tmp_path: Path,
    mesh: Mesh,
    speak: Callable[[Service], object],
    pages: int = 0,
    saved: Path | None = None,
    one_rank: OneRank = ALL_RANKS,
) -> list[object]:
    """Run ``speak(service)`` on the first rank of ``mesh``, while the others follow; return the ranks' results.

    The result of the others is the sequences left, and the bytes of pages.  ``saved`` is a folder for pages.
    """

    def rank_main(engine: Engine) -> object:
        session = Session(engine, Context(), Sampling())
        files = PageFiles(saved / f"rank{engine.rank}", pytest.fail) if saved else None
        if engine.context.rank:
            store = follow(session, engine.context, files, one_rank)
            return sorted(session.sequences), store.bytes
        page_bytes = pages * PAGE * engine.row_bytes // mesh.ring
        chunk = 23 if pages else LIMITS.prefill_tokens
        limits = replace(LIMITS, prefill_tokens=chunk, page_bytes=page_bytes, page_tokens=PAGE)
        service = Service(session, engine.context, TOKENIZER, limits, files, one_rank)
        found = speak(service)
        service.stop()
        return found

    with single_rank(tmp_path) as runtime:
        return run_engines(runtime, folder, mesh, rank_main)


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


FIRST = tuple((5 * i + i // 3) % 199 for i in range(37))
SHARING = [
    NewSequence(i, prompt, most, replace(sampling, logprobs=0))
    for i, (prompt, most, sampling) in enumerate([
        (FIRST, 7, Sampling()),
        (FIRST, 7, Sampling(1.0, seed=5)),  # in flight at the same time
        (FIRST[:10], 4, Sampling()),  # its whole prompt is two pages
        ((*FIRST[:23], *range(60, 90)), 3, Sampling(1.1, seed=2)),
        (FIRST, 20, Sampling(1.0, seed=3)),  # its client goes away during prefill
        (tuple(range(100, 171)), 3, Sampling(0.9, repetition_penalty=1.3)),  # pages of others make room
        ((*FIRST[:31], 3), 5, Sampling(1.2)),
        (tuple(range(100, 160)), 2, Sampling()),
    ])
]  # fmt: skip


Answers = list[list[TokenLogprob]]


def alone_in_order(service: Service) -> Answers:
    """Answer the sequences of `SHARING` one after the other, and then one that continues the first answer."""
    answers: Answers = []
    for number in range(len(SHARING) + 1):
        one = following(answers[0]) if number == len(SHARING) else SHARING[number]
        service.session.add(one.number, len(one.prompt), one.max_new_tokens, one.sampling)
        service.session.turn({one.number: list(one.prompt)}, {one.number: one.max_new_tokens})
        answers.append(service.session.sequences[one.number].logprobs)
        service.session.drop(one.number)
    return answers


def following(answer: list[TokenLogprob]) -> NewSequence:
    """Return the next turn of the first conversation."""
    prompt = (*FIRST, *(one.token for one in answer), 11, 12, 13)
    return NewSequence(len(SHARING), prompt, 5, Sampling(logprobs=0))


def share_prefixes(service: Service) -> tuple[Answers, int, int, list[int], int]:
    """Answer `SHARING`, two more in every third step, then the next turn; return the answers and figures of pages."""
    answers: Answers = [[] for _ in range(len(SHARING) + 1)]

    def answer(arriving: list[NewSequence]) -> None:
        steps = 0
        while service.busy or arriving:
            for one in arriving[:2] if steps % 3 == 0 else ():
                service.submit(one, lambda event: answers[event.number].append(event.logprob))
                arriving.remove(one)
            service.step()
            steps += 1
            if steps == 7:
                service.cancel(4)
            assert max(service.page_bytes) <= PAGES * PAGE * service.session.engine.row_bytes / len(service.page_bytes)

    answer(list(SHARING))
    answer([following(answers[0])])
    assert service.page_bytes[0] == service.pages.bytes
    prefixes = service.prefixes
    return answers, prefixes.reused, prefixes.evicted, service.page_bytes, len(service.session.sequences)


def check_sharing(
    folder: Path, tmp_path: Path, meshes: list[Mesh], one_rank: OneRank = ALL_RANKS, least_reused: int = 60
) -> None:
    [expected] = on_ranks(folder, tmp_path, Mesh(), alone_in_order)
    for mesh in meshes:
        (answers, reused, evicted, page_bytes, left), *others = on_ranks(
            folder, tmp_path, mesh, share_prefixes, PAGES, one_rank=one_rank
        )
        assert len(answers[4]) < 9, "its client went away"
        for answer, whole in zip(answers, [*expected[:4], expected[4][: len(answers[4])], *expected[5:]], strict=True):
            assert [one.token for one in answer] == [one.token for one in whole], mesh
            logprobs = [one.logprob for one in whole]
            assert [one.logprob for one in answer] == pytest.approx(logprobs, abs=2e-4), mesh
        assert reused >= least_reused and evicted >= 3 and left == 0, (reused, evicted)
        for rank, (sequences, stored) in enumerate(others, 1):
            assert not sequences and stored == page_bytes[rank // mesh.ulysses], "bytes that the first rank misses"


def test_answers_with_shared_prefixes_equal_those_without(folder, tmp_path):
    check_sharing(folder, tmp_path, [Mesh(ulysses=3), Mesh(ring=2), Mesh(ring=3)])


def test_answers_of_short_prompts_on_one_rank_equal_those_without(folder, tmp_path):
    """Four of the prompts have up to 37 tokens; the others, and those with pages on several ranks, use all ranks.

    All rows of a short prompt's pages are on one rank, which therefore evicts pages sooner.
    """
    meshes = [Mesh(ring=2), Mesh(ring=3), Mesh(ulysses=3, ring=2)]
    check_sharing(folder, tmp_path, meshes, OneRank(37), least_reused=40)


def test_short_prompts_send_no_keys_over_the_ring_and_fill_the_ranks_evenly(folder, tmp_path):
    def speak(service: Service) -> tuple[int, list[int]]:
        for number in range(6):
            service.submit(NewSequence(number, tuple(range(number, number + 21)), 1, Sampling()), lambda _: None)
            while service.busy:
                service.step()
        return service.session.engine.ring.traffic.total, service.pages.rows_per_rank

    for tokens, is_sent, rows in ((21, False, [60, 60]), (20, True, None)):
        sent, found = on_ranks(folder, tmp_path, Mesh(ring=2), speak, 40, one_rank=OneRank(tokens))[0]
        assert (sent > 0) == is_sent and found == (rows or found)


def test_answers_with_shared_prefixes_under_a_window_equal_those_without(tmp_path):
    """Layers see 37 positions or all."""
    folder = random_model("gemma3", tmp_path / "gemma3")
    check_sharing(folder, tmp_path, [Mesh(ring=2)])


def answer_saved(service: Service) -> tuple[list[list[int]], int, int, int]:
    """Answer the first prompts of `SHARING`, one after another; return their tokens and what came from disk."""
    answers: list[list[int]] = [[] for _ in range(4)]
    for number, one in enumerate(SHARING[:4]):
        service.submit(one, lambda event: answers[event.number].append(event.token))
        while number in service.scheduler.running or service.busy:
            service.step()
    return answers, service.prefixes.reused_restored, len(service.restored.pages), service.restored.lost


@pytest.mark.parametrize("mesh", [Mesh(ring=3), Mesh(ulysses=3)], ids=str)
def test_next_server_answers_from_saved_pages_and_recomputes_damaged_ones(folder, tmp_path, mesh):
    saved = tmp_path / "saved"
    run = lambda pages=40: on_ranks(folder, tmp_path, mesh, answer_saved, pages, saved)[0]  # noqa: E731
    files = lambda rank: sorted((saved / f"rank{rank}").iterdir())  # noqa: E731
    # 1. The first server saves its pages; the second finds all of them.
    expected, reused, *found = run()
    count = len(files(0))
    assert (reused, found) == (0, [0, 0]) and count == len({one.name.partition(".")[0] for one in files(2)}) > 12
    answers, reused, *found = run()
    assert answers == expected and found == [count, 0] and reused >= 3 * 35
    # 2. A page is flipped on one rank, another is missing on another rank, and a file was not complete.
    flipped, gone = files(1)[0], files(2)[-1]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    gone.unlink()
    (saved / "rank0" / "x.coming").write_bytes(b"x")
    answers, _, restored, lost = run()
    assert answers == expected and restored + lost == count and lost >= 2
    # 3. They were saved again.  A server with less room evicts what does not fit, on disk too.
    assert [len(files(rank)) for rank in range(3)] == [count] * 3
    answers, _, restored, lost = run(9)
    assert answers == expected and (restored, lost) == (count, 0)
    assert len(files(0)) == len(files(1)) <= 9 + 3


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


def test_logits_that_are_not_finite_fail_the_sequences_of_the_pass_only(folder, tmp_path):
    def speak(service: Service) -> list[Token | Failure]:
        events: list[Token | Failure] = []
        weight = service.session.engine.model.output_layer.weight.data
        before = weight.clone()
        weight.fill_(float("nan"))
        service.submit(SEQUENCES[2], events.append)
        service.step()
        weight.copy_(before)
        service.submit(SEQUENCES[0], events.append)
        while service.busy:
            service.step()
        return events

    first, *others = on_ranks(folder, tmp_path, Mesh(), speak)[0]
    assert isinstance(first, Failure) and "NaN or infinite" in first.message
    assert [event.number for event in others] == [0] * 5


def test_pages_of_a_failed_pass_are_not_reused(folder, tmp_path):
    """The first chunk of the prompt fills pages before the last one shows that the rows are NaN."""

    def speak(service: Service) -> list[Token | Failure]:
        events: list[Token | Failure] = []
        weight = service.session.engine.model.embedding.word_embeddings.weight.data
        before = weight.clone()
        weight.fill_(float("nan"))
        service.submit(SEQUENCES[0], events.append)
        while not events:
            service.step()
        weight.copy_(before)
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
