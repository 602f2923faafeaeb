"""Answers on disk: none that was written is lost, none that was torn or changed is believed."""

import os
import signal
from pathlib import Path

import pytest

from eval.answers.requests import Continue, Score, key
from eval.answers.responses import append, mend, read
from longctx.parallel.launch import Rank, RankFailed, run_ranks

GIVEN = {"a": (-1.5, True), "b": "some text\nwith two lines"}


def test_what_was_appended_is_read(tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    assert read(file).answers == {}
    append(file, GIVEN, tokens=31, seconds=0.5, commit="one")
    append(file, {"c": (-float("inf"), False)}, tokens=7, seconds=0.25, commit="two")
    kept = read(file)
    assert kept.answers == GIVEN | {"c": (-float("inf"), False)}
    assert kept.commits == {"one", "two"}
    assert (kept.requests, kept.tokens, kept.seconds, kept.corrupt) == (3, 38, 0.75, [])


def test_a_changed_line_is_named_and_not_believed(tmp_path):
    file = tmp_path / "answers.jsonl"
    append(file, GIVEN, 31, 0.5, "one")
    file.write_text(file.read_text().replace("-1.5", "-2.5"))
    kept = read(file)
    assert kept.answers == {"b": GIVEN["b"]}
    assert kept.corrupt == [f"{file}, line 2"]
    mend(file)
    assert read(file).corrupt == [] and read(file).answers == {"b": GIVEN["b"]}


def test_a_line_of_something_else_is_corrupt(tmp_path):
    file = tmp_path / "answers.jsonl"
    for line in ("[1]", "17", '{"key": "a", "answer": [0, true]}', '{"crc32": "x", "key": 3}', "\ufeff{}"):
        file.write_text(line + "\n")
        assert read(file).corrupt == [f"{file}, line 1"] and not read(file).answers


def test_a_torn_end_spoils_nothing_that_comes_after(tmp_path):
    file = tmp_path / "answers.jsonl"
    append(file, GIVEN, 31, 0.5, "one")
    file.write_bytes(file.read_bytes()[:-9])
    append(file, {"c": (-2.0, False)}, 3, 0.25, "two")
    kept = read(file)
    assert kept.answers == GIVEN | {"c": (-2.0, False)}
    assert len(kept.corrupt) == 1


def keeps_on(rank: Rank, file: Path) -> None:
    for i in range(10**6):
        append(file, {f"key {i}": (-float(i), True)}, 1, 0.0, "one")
        if i == 50:
            os.kill(os.getpid(), signal.SIGKILL)


def test_whoever_is_killed_loses_nothing_that_was_given(tmp_path):
    file = tmp_path / "answers.jsonl"
    with pytest.raises(RankFailed, match="SIGKILL"):
        run_ranks(1, keeps_on, file)
    kept = read(file)
    assert len(kept.answers) == 51 and not kept.corrupt


def test_a_key_is_of_all_that_is_asked_and_nothing_else():
    one = Score((1, 2, 3), 1, "q")
    assert key(one) == key(Score((1, 2, 3), 1, "another"))
    others = [Score((1, 2, 3), 2), Score((1, 2, 4), 1), Continue((1, 2, 3), ("a",), 1), Continue((1, 2, 3), ("b",), 1)]
    others += [Continue((1, 2, 3), ("a",), 2), Continue((1, 2), ("a",), 1)]
    assert len({key(request) for request in (one, *others)}) == 1 + len(others)
