"""The task without common words: nothing but knowledge leads from the question to the fact."""

import re
from dataclasses import replace
from pydoc_data.topics import topics

import pytest

from eval.harness.associations import _LANDMARKS, _TRADES, ASSOCIATIONS, NAMES
from eval.harness.ruler import SIZED, make_ruler_examples, score_answer
from eval.harness.ruler_fillers import RulerSource
from longctx.hf.scratch import bytes_tokenizer

LENGTH = 2999
SOURCE = RulerSource(" ".join(topics[name] for name in sorted(topics)).split(), None, bytes_tokenizer(), LENGTH)
PLACES = {place: one for one in ASSOCIATIONS for place in one.asked}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def facts_in(text: str) -> dict[str, str]:
    """The fact about each person that the text has."""
    found = {}
    for one in ASSOCIATIONS:
        if match := re.search(re.escape(one.fact).replace(r"\{\}", r"(\w+)"), text):
            found[match[1]] = one.fact
    return found


def test_question_and_facts_have_no_common_word():
    facts = set().union(*(words(one.fact) for one in ASSOCIATIONS))
    asked = set().union(*(words(f"{one.frame} {end}") for one in ASSOCIATIONS for end in one.asked))
    frame = words("Question: Which person? Answer: The person who is")
    assert facts & (asked | frame) == {"the"}
    assert len(PLACES) == 2 * len(_LANDMARKS) + len(_TRADES), "each answer follows from one fact only"
    assert not words(" ".join(NAMES)) & (facts | asked)


def test_examples():
    task = SIZED["association"]
    examples = make_ruler_examples("association", SOURCE, 12, seed=3)
    places = []
    for row in examples:
        prompt = f"{row['input']}{task.delimiter}{row['gen_prefix']}"
        tokens = len(SOURCE.tokenizer(prompt)["input_ids"])
        assert 0.97 * LENGTH < tokens + task.answer_tokens <= LENGTH
        text, _, question = row["input"].rpartition("\n\n")
        (name,) = row["outputs"]
        (asked,) = (end for end in PLACES if f" {end}?" in question)
        facts = facts_in(text)
        assert len(facts) == 4 and facts[name] == PLACES[asked].fact
        assert not words(asked) - {"the"} <= words(text)
        assert all(text.count(one) == 1 for one in facts)
        assert row["gen_prefix"].endswith(f" {asked} is")
        assert score_answer(row, [f" {name}."]) == {"recall": 1.0}
        assert all(score_answer(row, [f" {other}."]) == {"recall": 0.0} for other in facts if other != name)
        places.append(sorted(facts, key=text.index).index(name))
    assert set(places) == {0, 1, 2, 3}
    assert examples[:2] == make_ruler_examples("association", SOURCE, 2, seed=3)
    assert examples[0] != make_ruler_examples("association", SOURCE, 1, seed=4)[0]


def test_places_and_names_of_the_text_are_not_used():
    asked = sorted(set(PLACES) - {"Granada", "Rome", "farmer", "the Emirates", "London"})
    known = " and ".join([*asked, *NAMES[5:]]).split()
    source = replace(SOURCE, words=[*SOURCE.words, *known])
    for row in make_ruler_examples("association", source, 9, seed=0):
        assert re.search(r"(Granada|Rome|farmer|the Emirates|London)\?$", row["input"])
        assert row["outputs"][0] in NAMES[:5]
    with pytest.raises(ValueError, match=r"eval.text has too many of the names or places"):
        make_ruler_examples("association", replace(source, words=[*source.words, *NAMES[:2]]), 1, 0)
    with pytest.raises(ValueError, match=r"eval.text has too many of the names or places"):
        make_ruler_examples("association", replace(source, words=[*source.words, "London", "Rome"]), 1, 0)


@pytest.mark.parametrize(
    ("name", "length", "says"),
    [
        ("association", 199, "eval.lengths=199: too short for association"),
        ("association", 999_999, "eval.text has [0-9,]* words, too few for eval.lengths=999999"),
        ("coreference", 199, "eval.lengths=199: too short for coreference"),
    ],
)
def test_impossible_length_is_refused(name, length, says):
    with pytest.raises(ValueError, match=says):
        make_ruler_examples(name, replace(SOURCE, length=length), 2, 0)
