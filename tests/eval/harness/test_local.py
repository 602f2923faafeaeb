"""Files of tasks: which fields a record must have, and how a file that cannot be read is refused."""

import gzip
import json
from pathlib import Path

import pytest

from eval.harness.local import LOCAL, read_rows
from eval.harness.tasks import load_tasks
from tests.eval.harness.records import FOUR, ROWS, write_file


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("piqa", {"query": "Question: a\n", "choices": ["b", "c"], "gold": "1"}),
        ("boolq", {"query": "Passage: a\nQuestion: b?", "gold": -1}),
        ("hellaswag", {"query": "a", "choices": ["b", "c", "d", "e"], "gold": 7}),
        ("arc_easy", {"query": "a", "choices": ["b", "c"], "gold": -1}),
        ("copa", {"query": "a because", "choices": ["b", "c"], "gold": True}),
        ("mmlu", {"subject": "a", "question": "b", "choices": ["c", "d", "e", "f"], "answer": "B"}),
    ],
)
def test_right_answer_must_be_the_number_of_a_choice(name, record, tmp_path):
    with pytest.raises(ValueError, match=r"record 1, is not as .* is .*, and not the number of one of \d choices"):
        read_rows(LOCAL[name], write_file(tmp_path, name, [record]))


GSM8K = {"context": "a", "chain_of_thought": "b", "answer": "3"}


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("lambada_openai", {"context": "I said it to", "continuation": None}, "field continuation is None, not a text"),
        (
            "truthfulqa_mc1",
            {"question": "a", "best": "b", "incorrect": "nope"},
            "field incorrect is 'nope', not a list",
        ),
        (
            "truthfulqa_mc1",
            {"question": "a", "best": "b", "incorrect": []},
            r"field incorrect is \[\], not a list of one",
        ),
        ("winogrande", ROWS["winogrande"][0] | {"continuation": None}, "field continuation is None"),
        (
            "winogrande",
            ROWS["winogrande"][0] | {"context_options": ["a", 1]},
            "field context_options is .*, not a list",
        ),
        ("gsm8k", GSM8K | {"answer": None}, "field answer is None, not a text or a number"),
        ("gsm8k", GSM8K | {"answer": ["3"]}, "field answer is .*, not a text or a number"),
        ("gsm8k", GSM8K | {"chain_of_thought": 3}, "field chain_of_thought is 3, not a text"),
        ("arc_easy", {"query": None, "choices": FOUR, "gold": 2}, "field query is None"),
        ("arc_easy", {"query": "a", "choices": "ab", "gold": 1}, "field choices is 'ab', not a list"),
        ("arc_easy", {"query": "a", "choices": ["\ud83d", "b"], "gold": 1}, "surrogates not allowed"),
        ("mmlu", ROWS["mmlu"][0] | {"subject": 5}, "field subject is 5"),
        ("mmlu", ROWS["mmlu"][0] | {"choices": [*FOUR, "a sea"], "answer": 4}, "field choices has 5 entries, not 4"),
        ("blimp", {"good": None, "bad": "a"}, "field good is None"),
    ],
)
def test_field_of_another_kind_is_refused(name, record, words, tmp_path):
    with pytest.raises(ValueError, match=rf"record 2, is not as eval/README.md describes it .*{words}"):
        read_rows(LOCAL[name], write_file(tmp_path, name, [ROWS[name][0] if name in ROWS else record_of(name), record]))


def test_fields_that_a_task_does_not_read_may_be_of_any_type(tmp_path):
    record = ROWS["arc_easy"][0] | {"context": None, "subject": 5, "best": []}
    assert read_rows(LOCAL["arc_easy"], write_file(tmp_path, "arc_easy", [record]))


def record_of(name: str) -> dict:
    """A valid record of a task that `ROWS` lacks."""
    return GSM8K if name == "gsm8k" else {"question": "a", "best": "b", "incorrect": ["c"]}


MMLU = gzip.compress(json.dumps(ROWS["mmlu"][0]).encode())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("mmlu", MMLU[:-9], "cannot be read .EOFError: "),
        ("mmlu", MMLU[:20] + b"\xff\xff\xff" + MMLU[23:], "cannot be read "),
        ("mmlu", b"not gzip", "cannot be read .BadGzipFile: "),
        ("arc_easy", b'{"query": "\xff"}', "cannot be read .UnicodeDecodeError: "),
        ("wikitext", b" = A = \n\xff", "cannot be read .UnicodeDecodeError: "),
        ("longbench2", b"[\xff]", "cannot be read .UnicodeDecodeError: "),
        ("arc_easy", b"{}x", "is not JSON that can be read .Extra data"),
        ("arc_easy", b"[" * 99999, "is not JSON that can be read "),
    ],
)
def test_file_that_cannot_be_read_is_named(name, content, words, tmp_path):
    path = write_file(tmp_path, "boolq", []).with_name(Path(LOCAL[name].file).name)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} {words}.*: give the file that eval/README.md describes"):
        read_rows(LOCAL[name], path)


def test_byte_order_mark_is_not_part_of_the_first_record(tmp_path):
    path = write_file(tmp_path, "arc_easy", [ROWS["arc_easy"][0]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_rows(LOCAL["arc_easy"], path)) == 1


@pytest.mark.parametrize("line", ["[1, 2]", '"x"', "3", "null"])
def test_line_that_is_no_object_is_refused(line, tmp_path):
    path = write_file(tmp_path, "piqa", [])
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"record 1, is not as eval/README.md describes it"):
        read_rows(LOCAL["piqa"], path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "which does not exist"),
        ("", "arc_easy has no examples"),
        ('{"query": "What?", "gold": 0}\n', "record 1, is not as eval/README.md describes it (KeyError: 'choices')"),
        ("one\n", "arc_easy.jsonl is not JSON that can be read (Expecting value"),
    ],
)
def test_missing_or_malformed_file_is_refused(text, words, tmp_path):
    if text is not None:
        write_file(tmp_path, "arc_easy", []).write_text(text)
    with pytest.raises(ValueError, match=r"\w") as refused:
        load_tasks(["arc_easy"], tmp_path, None, None)
    assert words in str(refused.value)
