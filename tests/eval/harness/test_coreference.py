"""The task of similar turns: the asked answer is the i-th of its kind, and no other answer has its words."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from eval.harness.ruler import SIZED, make_ruler_examples, score_answer
from tests.eval.harness.test_associations import SOURCE

ORDINALS = ["first", "second", "third", "fourth"]


def test_examples():
    task = SIZED["coreference"]
    examples = make_ruler_examples("coreference", SOURCE, 20, seed=3)
    numbers = []
    for row in examples:
        prompt = f"{row['input']}{task.delimiter}{row['gen_prefix']}"
        tokens = len(SOURCE.tokenizer(prompt)["input_ids"])
        assert 0.95 * SOURCE.length < tokens + task.answer_tokens <= SOURCE.length
        turns = re.findall(r"^User: Give me five words for (.*)\.\nAssistant: (.*)\.$", row["input"], re.MULTILINE)
        number, asked = re.search(r"\nUser: Repeat your (\w+) answer for (.*)\.$", row["input"]).groups()
        same = [answer for kind, answer in turns if kind == asked]
        at = ORDINALS.index(number)
        numbers.append(at)
        assert len(same) == 4 and same[at].split(", ") == row["outputs"]
        counts = Counter(word for _, answer in turns for word in answer.split(", "))
        assert all(len(word) == 6 for word in counts) and {counts[word] for word in row["outputs"]} == {1}
        assert len({kind for kind, _ in turns}) > 8
        assert score_answer(row, [f" {same[at]}."]) == {"recall": 1.0}
        assert score_answer(row, [", ".join(row["outputs"][:2])]) == {"recall": 0.4}
        assert all(score_answer(row, [answer]) == {"recall": 0.0} for _, answer in turns if answer != same[at])
    assert set(numbers) == {0, 1, 2, 3}
    assert examples[:2] == make_ruler_examples("coreference", SOURCE, 2, seed=3)
    assert examples[0] != make_ruler_examples("coreference", SOURCE, 1, seed=4)[0]


def test_text_of_few_words_is_refused():
    with pytest.raises(
        ValueError, match=r"eval\.text has 1 different lower-case words of six letters, coreference needs 44"
    ):
        make_ruler_examples("coreference", replace(SOURCE, words=["rivers", "sea"] * 99), 1, 0)
