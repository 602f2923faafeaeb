"""What is computed together: common beginnings once, and every request's places found again."""

import random

import pytest

from eval.answers.requests import Score
from eval.answers.score import _places, batches, prefix_groups


def runs_of(asked):
    return [(tree.prefix, tree.branches) for tree in prefix_groups(asked)]


def test_choices_share_their_question():
    asked = [Score((1, 2, 3, 4, 5), 3, "q"), Score((1, 2, 3, 6, 7), 3, "q")]
    assert runs_of(asked) == [((1, 2, 3), ((4,), (6,)))]


def test_choices_of_one_token_need_no_branch():
    asked = [Score((1, 2, 3, last), 3, "q") for last in range(5)]
    assert runs_of(asked) == [((1, 2, 3), ())]


def test_a_choice_inside_another_is_run_once():
    asked = [Score((1, 2, 3), 2, "q"), Score((1, 2, 3, 4, 5), 2, "q"), Score((1, 2, 3, 4, 6), 2, "q")]
    assert runs_of(asked) == [((1, 2), ((3, 4),))]


def test_other_questions_and_other_beginnings_are_apart():
    asked = [
        Score((1, 2, 3), 1, "q"),
        Score((9, 2, 3), 1, "q"),
        Score((1, 2, 3, 4), 1, "p"),
        Score((1, 2, 5), 1),
        Score((1, 2, 6), 1),
    ]
    assert sorted(runs_of(asked)) == [((1, 2), ()), ((1, 2), ()), ((1, 2), ()), ((1, 2, 3), ()), ((9, 2), ())]


def test_every_scored_token_is_predicted_behind_those_before_it():
    """Whatever the choices are: the tokens up to the place that is looked at are the request's own."""
    draw = random.Random(5)
    for _ in range(200):
        stem = [draw.randrange(3) for _ in range(draw.randint(1, 7))]
        asked = []
        for _ in range(draw.randint(1, 6)):
            tokens = (*stem, *(draw.randrange(3) for _ in range(draw.randint(1, 5))))
            asked.append(Score(tokens, draw.randint(1, len(tokens) - 1), "q"))
        (tree,) = prefix_groups(asked)
        branches = [(0, run) for run in tree.branches]
        for request in tree.requests:
            places = list(_places(0, tree, branches, request))
            assert len(places) == len(request.tokens) - request.begin
            for at, (turn, (document, row, target)) in enumerate(places, request.begin):
                run = tree.prefix[: row + 1] if turn == 0 else tree.prefix + tree.branches[document][: row + 1]
                assert (*run, target) == request.tokens[: at + 1]


@pytest.mark.parametrize("together", [1, 7, 10, 1000])
def test_batches_hold_so_many_tokens_or_one_question(together):
    forest = prefix_groups([Score(tuple(range(i, i + n)), 1, f"q{i}") for i, n in enumerate((3, 9, 5, 2, 7, 2))])
    made = list(batches(forest, together))
    assert [tree for batch in made for tree in batch] == forest
    assert [tree.tokens for tree in forest] == [8, 6, 4, 2, 1, 1]
    for batch in made:
        assert len(batch) == 1 or sum(tree.tokens for tree in batch) <= together
    assert len(made) == {1: 6, 7: 4, 10: 3, 1000: 1}[together]
