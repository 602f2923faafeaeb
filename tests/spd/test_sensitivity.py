"""Algorithm 1 of arXiv 2502.20727, and the same sums in half as many block runs."""

import math
from collections.abc import Sequence

import pytest

from longctx.spd.sensitivity import kind_of, measure_sensitivity, perplexities, scores, suffix_sums

HARM = (7.0, 0.25, 3.0, 0.5, 0.125)  # perplexity that each dropped block adds


def test_score_is_the_perplexity_added_when_all_later_blocks_drop() -> None:
    calls: list[tuple[int, ...]] = []

    def perplexity(dropped: tuple[int, ...]) -> float:
        calls.append(dropped)
        return 20 + sum(HARM[block] for block in dropped)

    assert measure_sensitivity(5, perplexity) == list(HARM)
    assert calls == [(0, 1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4), (3, 4), (4,), ()]


def test_suffix_sums_equal_the_plain_loop_with_half_the_runs() -> None:
    runs: list[tuple[int, bool]] = []

    def run(block: int, state: Sequence[int], dropped: bool) -> Sequence[int]:
        runs.append((block, dropped))
        return [*state, block + 10 * dropped]  # the state records every block it passed

    def loss(state: Sequence[int]) -> float:
        return sum((i + 1) * value for i, value in enumerate(state))

    sums = suffix_sums([3], 5, run, loss)
    plain = []
    for first in range(6):
        state: Sequence[int] = [3]
        for block in range(5):
            state = [*state, block + 10 * (block >= first)]
        plain.append(loss(state))
    assert sums == plain
    assert len(runs) == 5 + 15, "the plain loop makes 30 runs"


def test_perplexity_divides_the_sum_by_all_tokens() -> None:
    assert perplexities([0.0, 14.0], 7) == pytest.approx([1.0, 7.38905609893065])
    assert scores([30.0, 25.0, 24.0]) == [5.0, 1.0]


def test_class_includes_its_upper_threshold() -> None:
    kinds = [kind_of(score, tau1=0.05, tau2=10) for score in (-1.0, 0.05, 0.0501, 10, 10.1)]
    assert kinds == ["ISB", "ISB", "SB", "SB", "ESB"]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((800.0, 2.0, 1.0), "with blocks 0 to 1 dropped, the loss is 800 nats"),
        ((3.0, math.nan, 1.0), "with blocks 1 to 1 dropped, the loss is nan nats"),
        ((math.inf, math.inf, math.inf), "with nothing dropped, the loss is inf nats"),
    ],
)
def test_losses_without_a_perplexity_are_refused(losses, words):
    """A score of NaN would be a class like any other."""
    with pytest.raises(ValueError, match=words):
        perplexities([7 * loss for loss in losses], 7)
