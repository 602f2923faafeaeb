"""Prompts that share prefixes in pages, in memory and saved, get the answers that they get without sharing."""

from dataclasses import replace
from pathlib import Path

import pytest

from longctx.config import Mesh, Sampling
from longctx.infer.sample import TokenLogprob
from longctx.serve.one_rank import ALL_RANKS, OneRank
from longctx.serve.schedule import NewSequence
from longctx.serve.service import Service
from tests.megatron.kinds import random_model
from tests.serve.on_threads import PAGE, PAGES, on_ranks

Answers = list[list[TokenLogprob]]

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
    # 3. They were saved again.  A server with less room loads only what fits, and deletes the rest on disk, too.
    assert [len(files(rank)) for rank in range(3)] == [count] * 3
    answers, _, restored, lost = run(9)
    assert answers == expected and 0 < restored <= 9 and lost == 0
    assert len(files(0)) == len(files(1)) <= 9 + 3
