"""Tasks of long texts: the requested length, the answers in the text, and no point for guessing."""

import re

import pytest
from tokenizers import processors

from eval.harness.generated import make_generated_tasks
from eval.harness.long import LONG, make_examples, read_text, score_answer
from longctx.hf.scratch import bytes_tokenizer
from tests.tiny import tiny_tokenizer

LENGTH, ANSWER = 1999, 48
tokenizer = bytes_tokenizer()


@pytest.fixture(scope="module")
def text():
    return read_text("pydoc", tokenizer)


@pytest.mark.parametrize("name", LONG)
def test_example_contains_its_answers_and_has_the_requested_length(name, text):
    examples = make_examples(LONG[name], text, tokenizer, LENGTH, ANSWER, 5, seed=3)
    for row in examples:
        tokens = len(tokenizer(row["prompt"])["input_ids"])
        assert 0.6 * LENGTH < tokens <= LENGTH - ANSWER
        document, _, _ = row["prompt"].rpartition("\n\n")
        assert all(answer in document for answer in row["answers"])
        assert score_answer(row, [f" {', '.join(row['answers'])}."]) == {"exact_match": 1.0}
        assert score_answer(row, [f" {', '.join(row['answers'][1:])}."]) == {"exact_match": 0.0}
        assert score_answer(row, ["x".join(["", *row["answers"], ""])]) == {"exact_match": 0.0}, (
            "only whole words count"
        )
    assert len({row["prompt"] for row in examples}) == 5
    assert examples == make_examples(LONG[name], text, tokenizer, LENGTH, ANSWER, 5, seed=3)
    assert examples != make_examples(LONG[name], text, tokenizer, LENGTH, ANSWER, 5, seed=4)


def test_chain_leads_from_the_number_to_every_variable(text):
    (row,) = make_examples(LONG["tracking"], text, tokenizer, LENGTH, ANSWER, 1, 0)
    document, _, question = row["prompt"].rpartition("\n\n")
    number = next(word for word in question.replace(",", "").split() if word.isdigit())
    values, at = {number}, -1
    for name in row["answers"]:
        place = max(document.find(f"VAR {name} = {value}.") for value in values)
        assert place > at, "each follows the one that it depends on"
        values, at = {f"VAR {name}"}, place


def test_any_of_several_keys_is_asked(text):
    """Repeating the first number of the text is correct in a quarter of all cases only."""
    examples = make_examples(LONG["multikey"], text, tokenizer, LENGTH, ANSWER, 20, 0)
    places = [re.findall(r"special number of \w+ is (\d+)", row["prompt"]).index(*row["answers"]) for row in examples]
    assert set(places) == {0, 1, 2, 3}


def test_common_words_are_the_most_common(text):
    (row,) = make_examples(LONG["common_words"], text, tokenizer, LENGTH, ANSWER, 1, 0)
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
def test_impossible_example_is_refused(length, source, words):
    with pytest.raises(ValueError, match=words):
        make_generated_tasks({"needle": 2}, [length], source, tokenizer, 4096, None, 0)


@pytest.mark.parametrize(
    ("name", "words", "needs"), [("needle", [], 1), ("tracking", ["delta"], 4), ("common_words", list("abcd"), 7)]
)
def test_text_without_enough_words_is_refused(name, words, needs, tmp_path):
    """The words are of one script; a list needs so many rare words that none is as frequent as the common ones."""
    book = tmp_path / "book.txt"
    words = [word * 6 for word in words] if name == "common_words" else words
    book.write_text(f"{' '.join(words)}. " + "\u6211\u5011\u770b\u5230. " * 900)
    message = f"eval.text has {len(words)} different words of 5 to 9 letters, and this task needs {needs}"
    with pytest.raises(ValueError, match=message):
        make_generated_tasks({name: 2}, [709], str(book), tokenizer, 4096, None, 0)


def test_too_short_text_is_refused(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The men rowed past all of the boats. " * 20)
    with pytest.raises(ValueError, match=r"eval.text has 7\d\d tokens, too few for eval.lengths"):
        make_generated_tasks({"long_qa": 2}, [1999], str(book), tokenizer, 4096, None, 0)


def test_tasks_are_named_by_length():
    tasks = make_generated_tasks({"needle": 2, "tracking": 3}, [1009, 1511], "pydoc", tokenizer, 4096, None, 0)
    assert list(tasks) == ["needle_1009", "needle_1511", "tracking_1009", "tracking_1511"]
    assert [len(task.eval_docs) for task in tasks.values()] == [2, 2, 3, 3]


def test_text_of_a_file_is_read_with_a_tokenizer_that_adds_a_first_token(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\ufeff\nCall me Ishmael. Some years ago, never mind how long.\n\nI thought I would sail about.")
    with_bos = tiny_tokenizer(bos_token="~")
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing("~ $A", special_tokens=[("~", 256)])
    assert len(with_bos("a")["input_ids"]) == 2
    assert read_text(str(file), with_bos).sentences[0] == "Call me Ishmael."


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "is empty"), (b"abc\xe9", r"not UTF-8 text \(byte 3\)"), (None, "cannot be read")]
)
def test_file_without_text_is_refused(content, says, tmp_path):
    file = tmp_path / "book.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"eval.text={file}.*{says}"):
        read_text(str(file), tiny_tokenizer())
