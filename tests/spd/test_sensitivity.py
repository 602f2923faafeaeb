"""Algorithm 1 of arXiv 2502.20727, and the half of it that is enough."""

from collections.abc import Sequence

import pytest

from longctx.spd.sensitivity import kind_of, perplexities, scores, sensitivity, suffix_sums

HARM = (7.0, 0.25, 3.0, 0.5, 0.125)  # what each block does to a state where it drops


def test_a_block_s_score_is_what_it_adds_where_all_later_ones_drop() -> None:
    asked: list[tuple[int, ...]] = []

    def perplexity(dropped: tuple[int, ...]) -> float:
        asked.append(dropped)
        return 20 + sum(HARM[block] for block in dropped)

    assert sensitivity(5, perplexity) == list(HARM)
    assert asked == [(0, 1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4), (3, 4), (4,), ()]


def test_keeping_what_enters_a_block_asks_half_as_often_for_the_same_sums() -> None:
    runs: list[tuple[int, bool]] = []

    def run(block: int, state: Sequence[int], dropped: bool) -> Sequence[int]:
        runs.append((block, dropped))
        return [*state, block + 10 * dropped]  # the state tells its whole story

    def loss(state: Sequence[int]) -> float:
        return sum((i + 1) * value for i, value in enumerate(state))

    kept = suffix_sums([3], 5, run, loss)
    plain = []
    for first in range(6):
        state: Sequence[int] = [3]
        for block in range(5):
            state = [*state, block + 10 * (block >= first)]
        plain.append(loss(state))
    assert kept == plain
    assert len(runs) == 5 + 15, "a plain loop over perplexities runs 30"


def test_perplexities_are_of_all_tokens() -> None:
    assert perplexities([0.0, 14.0], 7) == pytest.approx([1.0, 7.38905609893065])
    assert scores([30.0, 25.0, 24.0]) == [5.0, 1.0]


def test_classes_end_at_their_thresholds() -> None:
    of = [kind_of(score, tau1=0.05, tau2=10) for score in (-1.0, 0.05, 0.0501, 10, 10.1)]
    assert of == ["ISB", "ISB", "SB", "SB", "ESB"]
