"""Grouping by prefix: every prefix is run once, and every scored token has a row that predicts it."""

import random

import pytest

from eval.answers.requests import Score
from eval.answers.score import group_by_prefix, locate_predictions, make_batches


def runs(requests):
    """Prefix and branches of each group."""
    return [(group.prefix, group.branches) for group in group_by_prefix(requests)]


def test_choices_have_the_question_as_prefix():
    requests = [Score((1, 2, 3, 4, 5), 3, "q"), Score((1, 2, 3, 6, 7), 3, "q")]
    assert runs(requests) == [((1, 2, 3), ((4,), (6,)))]


def test_choices_of_one_token_need_no_branch():
    requests = [Score((1, 2, 3, last), 3, "q") for last in range(5)]
    assert runs(requests) == [((1, 2, 3), ())]


def test_choice_that_begins_another_is_run_once():
    requests = [Score((1, 2, 3), 2, "q"), Score((1, 2, 3, 4, 5), 2, "q"), Score((1, 2, 3, 4, 6), 2, "q")]
    assert runs(requests) == [((1, 2), ((3, 4),))]


def test_other_questions_and_first_tokens_form_other_groups():
    requests = [
        Score((1, 2, 3), 1, "q"),
        Score((9, 2, 3), 1, "q"),
        Score((1, 2, 3, 4), 1, "p"),
        Score((1, 2, 5), 1),
        Score((1, 2, 6), 1),
    ]
    assert sorted(runs(requests)) == [((1, 2), ()), ((1, 2), ()), ((1, 2), ()), ((1, 2, 3), ()), ((9, 2), ())]


def test_every_scored_token_is_predicted_after_the_tokens_before_it():
    """For random choices: the tokens run up to the predicting row are the request's own."""
    draw = random.Random(5)
    for _ in range(200):
        prefix = [draw.randrange(3) for _ in range(draw.randint(1, 7))]
        requests = []
        for _ in range(draw.randint(1, 6)):
            tokens = (*prefix, *(draw.randrange(3) for _ in range(draw.randint(1, 5))))
            requests.append(Score(tokens, draw.randint(1, len(tokens) - 1), "q"))
        (group,) = group_by_prefix(requests)
        branches = [(0, run) for run in group.branches]
        for request in group.requests:
            predictions = list(locate_predictions(0, group, branches, request))
            assert len(predictions) == len(request.tokens) - request.begin
            for at, (pass_number, (document, row, target)) in enumerate(predictions, request.begin):
                branch = group.branches[document][: row + 1] if pass_number else ()
                run = group.prefix + branch if pass_number else group.prefix[: row + 1]
                assert (*run, target) == request.tokens[: at + 1]


@pytest.mark.parametrize("max_tokens", [1, 7, 10, 1000])
def test_batches_hold_at_most_max_tokens_or_one_group(max_tokens):
    groups = group_by_prefix([Score(tuple(range(i, i + n)), 1, f"q{i}") for i, n in enumerate((3, 9, 5, 2, 7, 2))])
    batches = list(make_batches(groups, max_tokens))
    assert [group for batch in batches for group in batch] == groups
    assert [group.tokens for group in groups] == [8, 6, 4, 2, 1, 1]
    for batch in batches:
        assert len(batch) == 1 or sum(group.tokens for group in batch) <= max_tokens
    assert len(batches) == {1: 6, 7: 4, 10: 3, 1000: 1}[max_tokens]
