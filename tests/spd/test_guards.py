"""Guards: the figures of each model, and which changes are too large."""

import math

import pytest
import torch

from longctx.spd.guards import GuardFigures, compare_guards

SEQUENCES, TOKENS = 5, 67


def figures(scale: float = 1.0, copied: float = 0.9, changes: dict | None = None) -> GuardFigures:
    """Return figures whose losses are ``scale`` times random ones; ``changes`` sets losses by (sequence, token)."""
    generator = torch.Generator().manual_seed(3)
    losses = 2 + torch.rand(SEQUENCES, TOKENS, generator=generator, dtype=torch.float64)
    mask = torch.rand(SEQUENCES, TOKENS, generator=generator) > 0.1
    norms = 100 + torch.arange(SEQUENCES, dtype=torch.float64)
    losses *= scale
    for (row, column), value in (changes or {}).items():
        losses[row, column] = value
        mask[row, column] = True
    return GuardFigures(losses, mask, norms, copied)


def failed(*models: GuardFigures) -> list[str]:
    return [one.name for one in compare_guards(*models) if one.failed]


def test_same_model_fails_no_guard():
    same = figures()
    for one in compare_guards(same, same, same):
        assert one.original == one.dropped == one.repaired and one.change == pytest.approx(0) and not one.failed


def test_figures_are_those_of_the_counted_tokens():
    models = [figures(), figures(1.5), figures(1.01)]
    guards = {one.name: one for one in compare_guards(*models)}
    for n in (8, 64, TOKENS):
        guard = guards["perplexity of all tokens" if n == TOKENS else f"perplexity of the first {n} tokens"]
        for value, model in zip((guard.original, guard.dropped, guard.repaired), models, strict=True):
            counted = [float(model.losses[i, j]) for i in range(SEQUENCES) for j in range(n) if bool(model.mask[i, j])]
            assert value == pytest.approx(math.exp(sum(counted) / len(counted)))
        assert guard.change == pytest.approx(guard.repaired / guard.original - 1)


@pytest.mark.parametrize(
    ("columns", "rise", "names"),
    [
        (range(8), 0.3, []),
        (range(8), 0.5, ["perplexity of the first 8 tokens"]),
        (
            range(64),
            0.5,
            [f"perplexity of {words}" for words in ("the first 8 tokens", "the first 64 tokens", "all tokens")],
        ),
        (range(60, 64), 0.5, []),
    ],
)
def test_lost_beginnings_fail(columns, rise, names):
    """A rise of the loss by 0.5 nats is 65 % more perplexity; the limit is 50 %."""
    base = figures()
    changes = {(i, j): float(base.losses[i, j]) + rise for i in range(SEQUENCES) for j in columns}
    assert (
        failed(figures(changes={place: base.losses[place] for place in changes}), base, figures(changes=changes))
        == names
    )


def test_single_sequence_that_collapses_fails():
    base = figures()
    changes = {(3, j): float(base.losses[3, j]) + 0.8 for j in range(8, TOKENS)}
    guards = compare_guards(
        figures(changes={place: base.losses[place] for place in changes}), base, figures(changes=changes)
    )
    (guard,) = (one for one in guards if one.failed)
    assert guard.name == "perplexity of the worst sequence" and 1 < guard.change < math.exp(0.8)


def test_lost_copying_and_lost_norm_fail():
    base, repaired = figures(), figures(copied=0.6)
    repaired.first_norms[2] *= 0.4
    assert failed(base, base, repaired) == ["norm of the first token, worst sequence", "share of random tokens copied"]
    guards = {one.name: one for one in compare_guards(base, base, repaired)}
    assert guards["norm of the first token, worst sequence"].original == 102
    assert guards["share of random tokens copied"].change == pytest.approx(0.3)
    assert failed(base, base, figures(copied=0.7)) == []


def test_figure_that_is_not_a_number_fails():
    broken = figures(changes={(1, 2): math.nan})
    assert "perplexity of the first 8 tokens" in failed(figures(), figures(), broken)
    assert "perplexity of the worst sequence" in failed(figures(), figures(), broken)
