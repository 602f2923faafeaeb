"""Answers on disk: a written answer is never lost, a torn or changed line is never used."""

import os
import signal
from pathlib import Path

import pytest

from eval.answers.requests import Continue, Score, key
from eval.answers.responses import append, read, remove_corrupt_lines
from longctx.parallel.launch import Rank, RankFailed, run_ranks

ANSWERS = {"a": (-1.5, True), "b": "some text\nwith two lines"}


def test_appended_answers_are_read(tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    assert read(file).answers == {}
    append(file, ANSWERS, tokens=31, seconds=0.5, commit="one")
    append(file, {"c": (-float("inf"), False)}, tokens=7, seconds=0.25, commit="two")
    stored = read(file)
    assert stored.answers == ANSWERS | {"c": (-float("inf"), False)}
    assert stored.commits == {"one", "two"}
    assert (stored.requests, stored.tokens, stored.seconds, stored.corrupt) == (3, 38, 0.75, [])


def test_times_count_for_the_settings_that_they_were_measured_with(tmp_path):
    file = tmp_path / "answers.jsonl"
    append(file, {"a": (-1.0, True)}, 31, 0.5, "one", "dp=1")
    append(file, {"b": (-1.0, True)}, 7, 0.25, "one", "dp=4")
    assert [(read(file, speed).tokens, len(read(file, speed).answers)) for speed in ("dp=1", "dp=4", None)] == [
        (31, 2), (7, 2), (38, 2)
    ]  # fmt: skip


def test_changed_line_is_named_and_not_used(tmp_path):
    file = tmp_path / "answers.jsonl"
    append(file, ANSWERS, 31, 0.5, "one")
    file.write_text(file.read_text().replace("-1.5", "-2.5"))
    stored = read(file)
    assert stored.answers == {"b": ANSWERS["b"]}
    assert stored.corrupt == [f"{file}, line 2"]
    remove_corrupt_lines(file)
    assert read(file).corrupt == [] and read(file).answers == {"b": ANSWERS["b"]}


def test_line_of_another_form_is_corrupt(tmp_path):
    file = tmp_path / "answers.jsonl"
    for line in ("[1]", "17", '{"key": "a", "answer": [0, true]}', '{"crc32": "x", "key": 3}', "\ufeff{}"):
        file.write_text(line + "\n")
        assert read(file).corrupt == [f"{file}, line 1"] and not read(file).answers


def test_torn_last_line_does_not_affect_later_lines(tmp_path):
    file = tmp_path / "answers.jsonl"
    append(file, ANSWERS, 31, 0.5, "one")
    file.write_bytes(file.read_bytes()[:-9])
    append(file, {"c": (-2.0, False)}, 3, 0.25, "two")
    stored = read(file)
    assert stored.answers == ANSWERS | {"c": (-2.0, False)}
    assert len(stored.corrupt) == 1


def append_until_killed(rank: Rank, file: Path) -> None:
    for i in range(10**6):
        append(file, {f"key {i}": (-float(i), True)}, 1, 0.0, "one")
        if i == 50:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_run_loses_no_written_answer(tmp_path):
    file = tmp_path / "answers.jsonl"
    with pytest.raises(RankFailed, match="SIGKILL"):
        run_ranks(1, append_until_killed, file)
    stored = read(file)
    assert len(stored.answers) == 51 and not stored.corrupt


def test_key_depends_on_every_field_but_the_question():
    one = Score((1, 2, 3), 1, "q")
    assert key(one) == key(Score((1, 2, 3), 1, "another"))
    others = [Score((1, 2, 3), 2), Score((1, 2, 4), 1), Continue((1, 2, 3), ("a",), 1), Continue((1, 2, 3), ("b",), 1)]
    others += [Continue((1, 2, 3), ("a",), 2), Continue((1, 2), ("a",), 1)]
    assert len({key(request) for request in (one, *others)}) == 1 + len(others)


def test_keys_are_those_of_the_first_release():
    """Stored answers are found by their key: it must not change (commit ef86d62)."""
    assert key(Score((1, 2, 3), 1, "q")) == "be84554e375c8926f3b882dbe0787c83"
    assert key(Continue((1, 2, 3), ("a", "b"), 5)) == "c73858f4a403d0e2f8571c2c8b2193d5"
