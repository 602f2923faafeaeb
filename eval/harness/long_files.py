"""Convert published records of LongBench v2 (arXiv 2412.15204) and InfiniteBench (arXiv 2402.13718) to lm-eval's rows.

A record with a missing, an unknown or another kind of field is refused: a variant of the data may need other prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LETTERS = "ABCD"
_LONGBENCH2: Mapping[str, type] = dict.fromkeys(
    ("_id", "domain", "sub_domain", "difficulty", "length", "question", "answer", "context"), str
) | {f"choice_{letter}": str for letter in _LETTERS}
_INFINITEBENCH: Mapping[str, type] = {"id": int, "context": str, "input": str, "answer": list, "options": list}


def longbench2_row(record: Mapping[str, object]) -> Mapping[str, object]:
    """Return a record of LongBench v2's data.json in the form of lm-eval's task.

    Raises ValueError, with the name of the field, for a record of another form.
    """
    _check_fields(record, _LONGBENCH2)
    if record["answer"] not in tuple(_LETTERS):
        raise ValueError(f"field answer is {record['answer']!r}, not one of A, B, C, D")
    return {
        "context": record["context"],
        "question": record["question"],
        "choices": [record[f"choice_{letter}"] for letter in _LETTERS],
        "answer": record["answer"],
    }


def infinitebench_row(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record of one of InfiniteBench's files in the form of lm-eval's task; numbers in answers become text.

    Raises ValueError, with the name of the field, for a record of another form.
    """
    _check_fields(record, _INFINITEBENCH)
    answers, options = record["answer"], record["options"]
    if not answers or not all(isinstance(one, str | int | float) for one in answers):
        raise ValueError(f"field answer is {answers!r}, not a list of one or more texts or numbers")
    if not all(isinstance(one, str) for one in options):
        raise ValueError(f"field options is {options!r}, not a list of texts")
    return {
        "id": record["id"],
        "context": record["context"],
        "input": record["input"],
        "answer": [str(one) for one in answers],
        "options": options,
    }


def infinitebench_choice_row(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a record of InfiniteBench's questions with four options; the first answer must be one of the options.

    Raises ValueError as `infinitebench_row` does.
    """
    row = infinitebench_row(record)
    answer, options = row["answer"][0], row["options"]
    if len(options) != len(_LETTERS):
        raise ValueError(f"field options has {len(options)} entries, not 4")
    if answer.strip() not in [one.strip() for one in options]:
        raise ValueError(f"field answer begins with {answer!r}, which is not one of the options")
    return row


def _check_fields(record: Mapping[str, object], kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"field {name} is missing")
        if type(record[name]) is not kind:
            raise ValueError(f"field {name} is of type {type(record[name]).__name__}, not {kind.__name__}")
    if unknown := sorted(set(record) - set(kinds)):
        raise ValueError(f"field {unknown[0]} is not one of {', '.join(kinds)}")
