"""Tasks of long texts: as long as asked for, the answers in the text, and nothing by luck."""

import re

import pytest

from eval.harness.long import LONG, found_all, long_tasks, read_text, rows
from longctx.hf.scratch import bytes_tokenizer

LENGTH, ANSWER = 1999, 48
tokenizer = bytes_tokenizer()


@pytest.fixture(scope="module")
def text():
    return read_text("pydoc", tokenizer)


@pytest.mark.parametrize("name", LONG)
def test_an_example_holds_its_answer_and_is_as_long_as_asked(name, text):
    made = rows(LONG[name], text, tokenizer, LENGTH, ANSWER, 5, seed=3)
    for row in made:
        tokens = len(tokenizer(row["prompt"])["input_ids"])
        assert 0.6 * LENGTH < tokens <= LENGTH - ANSWER
        document, _, _ = row["prompt"].rpartition("\n\n")
        assert all(answer in document for answer in row["answers"])
        assert found_all(row, [f" {', '.join(row['answers'])}."]) == {"exact_match": 1.0}
        assert found_all(row, [f" {', '.join(row['answers'][1:])}."]) == {"exact_match": 0.0}
        assert found_all(row, ["x".join(["", *row["answers"], ""])]) == {"exact_match": 0.0}, "as a word of its own"
    assert len({row["prompt"] for row in made}) == 5
    assert made == rows(LONG[name], text, tokenizer, LENGTH, ANSWER, 5, seed=3)
    assert made != rows(LONG[name], text, tokenizer, LENGTH, ANSWER, 5, seed=4)


def test_a_chain_leads_from_the_number_to_every_variable(text):
    (row,) = rows(LONG["tracking"], text, tokenizer, LENGTH, ANSWER, 1, 0)
    document, _, question = row["prompt"].rpartition("\n\n")
    number = next(word for word in question.replace(",", "").split() if word.isdigit())
    values, at = {number}, -1
    for name in row["answers"]:
        place = max(document.find(f"VAR {name} = {value}.") for value in values)
        assert place > at, "each is told after the one that it depends on"
        values, at = {f"VAR {name}"}, place


def test_of_several_keys_any_may_be_asked(text):
    """Who repeats the first number that comes is right in a quarter of all cases, no more."""
    made = rows(LONG["multikey"], text, tokenizer, LENGTH, ANSWER, 20, 0)
    places = [re.findall(r"special number of \w+ is (\d+)", row["prompt"]).index(*row["answers"]) for row in made]
    assert set(places) == {0, 1, 2, 3}


def test_common_words_are_the_most_common(text):
    (row,) = rows(LONG["common_words"], text, tokenizer, LENGTH, ANSWER, 1, 0)
    listed = row["prompt"].partition("\n")[2].partition("\n\n")[0].split()[1::2]
    counts = sorted(((listed.count(word), word) for word in set(listed)), reverse=True)
    assert {word for _, word in counts[:3]} == set(row["answers"]) and counts[2][0] > 3 * counts[3][0]


@pytest.mark.parametrize(
    ("length", "source", "words"),
    [
        (4097, "pydoc", "the model's context is 4,096"),
        (61, "pydoc", "too short for this task"),
        (1999, "/no/such/book", "/no/such/book cannot be read"),
    ],
)
def test_what_cannot_be_made_is_refused(length, source, words):
    with pytest.raises(ValueError, match=words):
        long_tasks({"needle": 2}, [length], source, tokenizer, 4096, 0)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The men rowed past all of the boats. " * 20)
    with pytest.raises(ValueError, match=r"eval.text has 7\d\d tokens: ask for shorter"):
        long_tasks({"long_qa": 2}, [1999], str(book), tokenizer, 4096, 0)


def test_they_are_tasks_like_any_other():
    tasks = long_tasks({"needle": 2, "tracking": 3}, [1009, 1511], "pydoc", tokenizer, 4096, 0)
    assert list(tasks) == ["needle_1009", "needle_1511", "tracking_1009", "tracking_1511"]
    assert [len(task.eval_docs) for task in tasks.values()] == [2, 2, 3, 3]
