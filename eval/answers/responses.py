"""Answers on disk: a JSON line each, appended as they come, so that whoever is killed loses none that was given."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.answers.requests import Answer


@dataclass
class StoredAnswers:
    """What a file of answers holds, by the key of their request; and what the ``requests`` took whose time is told.

    ``commits`` are those of the source that gave them.  ``corrupt`` names the lines that are not as they were written:
    their answers are missing here.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    commits: set[str] = field(default_factory=set)
    corrupt: list[str] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0


def read(path: Path) -> StoredAnswers:
    """The answers in ``path``, none if it is not there."""
    kept = StoredAnswers()
    if not path.exists():
        return kept
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        entry = _sound(line)
        if entry is None:
            kept.corrupt.append(f"{path}, line {number}")
        elif "key" in entry:
            given = entry["answer"]
            kept.answers[entry["key"]] = given if isinstance(given, str) else (given[0], given[1])
        else:
            kept.commits.add(entry.get("commit", "unknown"))
            kept.requests += entry["requests"]
            kept.tokens += entry["tokens"]
            kept.seconds += entry["seconds"]
    return kept


def append(path: Path, answers: Mapping[str, Answer], tokens: int, seconds: float, commit: str) -> None:
    """Add ``answers``, for which so many ``tokens`` were run in so many ``seconds``: one write, whole or torn.

    Those of no tokens, texts that are generated, do not count among the requests that took that time.
    """
    cost = {"requests": len(answers) if tokens else 0, "tokens": tokens, "seconds": round(seconds, 4), "commit": commit}
    entries: Sequence[Mapping[str, Any]] = [*({"key": key, "answer": x} for key, x in answers.items()), cost]
    # The file may end in the middle of a line, torn by a kill: an empty line is nothing, a torn one stays by itself.
    lines = b"\n" + b"".join(_line(entry) for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        while lines:
            lines = lines[os.write(file, lines) :]
    finally:
        os.close(file)


def mend(path: Path) -> None:
    """Leave out the lines that are not as they were written; or leave all as it is, if we are killed."""
    partial = path.with_suffix(".partial")
    lines = [line for line in path.read_bytes().split(b"\n") if line and _sound(line) is not None]
    partial.write_bytes(b"".join(line + b"\n" for line in lines))
    partial.replace(path)


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry)
    return json.dumps({**entry, "crc32": zlib.crc32(text.encode())}).encode() + b"\n"


def _sound(line: bytes) -> dict[str, Any] | None:
    """The entry of a line that is as it was written; None of any other."""
    try:
        entry: dict[str, Any] = json.loads(line)
        checksum = entry.pop("crc32")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if zlib.crc32(json.dumps(entry).encode()) == checksum else None
