"""Sources are mixed in proportion to their weights, to within a document, without random draws."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import DataSettings
from longctx.data.documents import documents
from longctx.data.mixing import interleave
from tests.data.texts import assert_resumes, pages, stage_of, take, write_source

DOCUMENTS = st.lists(st.integers(1, 31).map(lambda n: [7] * n), min_size=40, max_size=40)


@settings(deadline=None)
@given(st.lists(st.tuples(DOCUMENTS, st.floats(0.01, 100)), min_size=2, max_size=5))
def test_source_is_ahead_of_its_share_by_at_most_its_last_document(sources):
    weights = [weight for _, weight in sources]
    mixed = interleave([stage_of(*texts) for texts, _ in sources], weights)
    before = [0] * len(sources)
    for document, state in mixed(None):
        tokens = state["tokens"]
        (turn,) = [i for i, (a, b) in enumerate(zip(before, tokens, strict=True)) if a != b]
        assert tokens[turn] - before[turn] == len(document.tokens)
        share = weights[turn] / sum(weights) * sum(tokens)
        assert tokens[turn] - share <= len(document.tokens) + 1e-6
        before = tokens
        if any(source == {"n": 40} for source in state["sources"]):
            return  # one has ended
    pytest.fail("no source has ended")


def test_real_pages_follow_the_weights(byte_tokenizer, tmp_path):
    """Documents of very different lengths, from endless sources.

    A source is ahead of its share by one document at most, so it is behind by one document of each of the others.
    """
    texts = pages(41)
    groups, weights = [texts[:5], texts[5:18], texts[18:]], [5, 2, 1]
    sources = [write_source("jsonl", group, tmp_path / f"{i}") for i, group in enumerate(groups)]
    data = DataSettings(tuple(sources), length=1, batch=1)
    mixed = interleave([documents(source, byte_tokenizer, data) for source in sources], weights)
    longest = [max(len(text.encode()) + 1 for text in group) for group in groups]
    for _, state in take(mixed, 199)[10:]:
        tokens = state["tokens"]
        for i, weight in enumerate(weights):
            others = sum(longest) - longest[i]
            assert -others <= tokens[i] - weight / 8 * sum(tokens) <= longest[i], state
    assert min(tokens) > 10 * max(longest)
    assert_resumes(mixed, 23)


def test_other_sources_keep_their_weights_when_one_ends():
    mixed = interleave([stage_of([1]), stage_of(*[[2]] * 60), stage_of(*[[3]] * 20)], [10, 3, 1])
    given = [int(document.tokens) for document, _ in take(mixed)]
    assert sorted(given) == [1] + [2] * 60 + [3] * 20, "every document once"
    for k in range(1, 81):
        assert abs(given[:k].count(2) - 3 * given[:k].count(3)) <= 3
    assert_resumes(mixed)


def test_state_of_another_number_of_sources_is_refused():
    _, state = take(interleave([stage_of([1]), stage_of([2])], [1, 1]), 1)[0]
    with pytest.raises(ValueError, match=r"has 2 sources, but data\.sources has 1"):
        take(interleave([stage_of([1])], [1]), state=state)


def test_changed_weights_count_from_the_change_on():
    """Tokens of 1,000 documents at 1:1, then 1:9: no source catches up on its share of the documents before."""
    ones, twos = [[1, 1, 1]] * 5000, [[2, 2, 2]] * 5000
    _, state = take(interleave([stage_of(*ones), stage_of(*twos)], [1, 1]), 1000)[-1]
    assert state["tokens"] == [1500, 1500] and state["weights"] == [1, 1]
    resumed = take(interleave([stage_of(*ones), stage_of(*twos)], [1, 9]), 201, state=state)
    given = [int(document.tokens[0]) for document, _ in resumed]
    assert given[0] == 1, "the document that the first run would have read"
    for k in range(10, 200):
        assert abs(given[1 : 1 + k].count(2) - 0.9 * k) <= 1
    assert resumed[-1][1]["tokens"] == [60, 540] and resumed[-1][1]["weights"] == [1, 9]


def test_state_without_weights_continues_with_its_counts():
    sources = [stage_of(*[[1]] * 40), stage_of(*[[2]] * 40)]
    whole = take(interleave(sources, [2, 1]), 30)
    state = {key: value for key, value in whole[9][1].items() if key != "weights"}
    resumed = take(interleave(sources, [2, 1]), 20, state=state)
    assert [int(document.tokens) for document, _ in resumed] == [int(document.tokens) for document, _ in whole[10:]]
