"""Answers on disk, one JSON line each, appended as they come: a killed run loses no answer that was written."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from eval.answers.requests import Answer
from longctx.checksum import KEY, has_valid_checksum, with_checksum
from longctx.text_file import name_in_errors


class Entry(TypedDict, total=False):
    """A line of the file: one ``answer`` with its request's ``key``, or what the answers above it cost.

    The cost is ``tokens`` and ``seconds`` of a number of ``requests``, with the settings ``speed`` that change the
    speed and not the answers.  A written line also has ``crc32``, the checksum of its other keys.
    """

    key: str
    answer: Answer
    requests: int
    tokens: int
    seconds: float
    commit: str
    speed: str
    crc32: int


@dataclass
class StoredAnswers:
    """The content of a file of answers.

    ``answers`` maps a request's key to its answer.  ``commits`` are those of the source code that computed the answers.
    ``corrupt`` names the lines that are cut off or have a wrong checksum; ``answers`` lacks their answers.
    ``requests``, ``tokens`` and ``seconds`` are totals over scored requests; generated texts are left out.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    commits: set[str] = field(default_factory=set)
    corrupt: list[str] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0


def read(path: Path, speed: str | None = None) -> StoredAnswers:
    """Return the answers in ``path``; none if it does not exist.  Corrupt lines are listed in ``corrupt``.

    Only costs of the settings ``speed`` count in the totals (None: all).  Lines of versions that did not write them
    count with any.
    """
    stored = StoredAnswers()
    if not path.exists():
        return stored
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        entry = _parse_line(line)
        if entry is None:
            stored.corrupt.append(f"{path}, line {number}")
        elif "key" in entry:
            answer = entry["answer"]
            stored.answers[entry["key"]] = answer if isinstance(answer, str) else (answer[0], answer[1])
        else:
            stored.commits.add(entry.get("commit", "unknown"))
            if speed not in (None, entry.get("speed", speed)):
                continue
            stored.requests += entry["requests"]
            stored.tokens += entry["tokens"]
            stored.seconds += entry["seconds"]
    return stored


def append(
    path: Path, answers: Mapping[str, Answer], tokens: int, seconds: float, commit: str, speed: str = ""
) -> None:
    """Add ``answers`` by key, and the ``tokens`` and ``seconds`` that they cost, in one write.

    ``speed`` has the settings that change the speed and not the answers.  With ``tokens`` 0 (generated texts), the
    answers do not count among the timed requests.
    """
    cost: Entry = {
        "requests": len(answers) if tokens else 0,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "commit": commit,
        "speed": speed,
    }
    entries: list[Entry] = [{"key": key, "answer": answer} for key, answer in answers.items()]
    # A killed run may have left half a line at the end: the leading newline keeps it apart from what follows.
    lines = b"\n" + b"".join(_format_line(entry) for entry in [*entries, cost])
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    with name_in_errors(path):
        try:
            while lines:
                lines = lines[os.write(file, lines) :]
        finally:
            os.close(file)


def remove_corrupt_lines(path: Path) -> None:
    """Rewrite ``path`` without corrupt lines; the file is replaced at once, so that a kill leaves it unchanged."""
    partial = path.with_suffix(".partial")
    lines = [line for line in path.read_bytes().split(b"\n") if line and _parse_line(line) is not None]
    with name_in_errors(path):
        partial.write_bytes(b"".join(line + b"\n" for line in lines))
        partial.replace(path)


def _format_line(entry: Entry) -> bytes:
    """Return ``entry`` as a JSON line with its checksum."""
    return json.dumps(with_checksum(entry)).encode() + b"\n"


def _parse_line(line: bytes) -> Entry | None:
    """Return the entry of a line, or None if the line is not an entry or its checksum does not match."""
    try:
        entry: Any = json.loads(line)
        if not has_valid_checksum(entry):
            return None
        del entry[KEY]
        return entry if _is_entry(entry) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_entry(entry: dict[str, Any]) -> bool:
    """Return True if ``entry`` has the keys and types of an `Entry`."""
    if "key" in entry:
        match entry["answer"]:
            case str() | [int() | float(), bool()]:
                return isinstance(entry["key"], str)
        return False
    counts = all(isinstance(entry[name], int) for name in ("requests", "tokens"))
    return (
        counts
        and isinstance(entry["seconds"], int | float)
        and all(isinstance(entry.get(name, ""), str) for name in ("commit", "speed"))
    )
