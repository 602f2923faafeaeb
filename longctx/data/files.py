"""Local files as parts of a source: text, JSON lines and parquet, read as a stream; resumed at a byte or a row."""

import glob
import gzip
import json
import zlib
from bisect import bisect
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import Any

from longctx.config import TextSource
from longctx.data.records import Position, Record, SourceFile, in_a_line, text_of

READ = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
REFUSED = (".json", ".csv", ".tsv", ".arrow", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst")
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)
END = -1  # behind all of a file; nobody resumes from where one broke off, since no document follows in it


def files(source: TextSource) -> tuple[SourceFile, ...]:
    """The files of ``source.path``, in the order of their paths.

    Raises ValueError if there are none, and for a kind of file that is not read.
    """
    return tuple(_part(path, source) for path in paths_of(str(source.path)))


def paths_of(given: str) -> list[Path]:
    """The files that ``given`` is: one, those of a folder, or of a pattern.  ValueError if there are none."""
    root = Path(given).expanduser()
    if root.is_dir():
        paths = [path for path in root.rglob("*") if path.is_file() and path.name.endswith(READ)]
        paths = [path for path in paths if not any(name[0] == "." for name in path.relative_to(root).parts)]
        if not paths:
            raise ValueError(f"{given} has no {', '.join(READ)} in it: name the files with a pattern, like '{given}/*'")
        return sorted(paths)
    paths = [root] if root.is_file() else [Path(name) for name in glob.glob(str(root), recursive=True)]  # noqa: PTH207
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(f"{given} is no file, no folder, and no pattern that any file matches")
    return sorted(paths)


def _part(path: Path, source: TextSource) -> SourceFile:
    name = path.name.lower()
    title = f"{path.name} ({path.stat().st_size} bytes)"  # a state does not fit a file that has changed
    if name.endswith(REFUSED):
        raise ValueError(f"{path} is of a kind that is not read: use a text file, or one of {', '.join(READ)}")
    if name.endswith(".parquet"):
        return SourceFile(title, partial(_table, path, source.text_key))
    if name.endswith((".jsonl", ".jsonl.gz")):
        return SourceFile(title, partial(_lines, path, source.text_key))
    return SourceFile(title, partial(_whole, path))


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    try:
        return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _whole(path: Path, at: Position) -> Iterator[tuple[Record, Position]]:
    """A text file, which is one document; line ends as Python reads them."""
    if at is not None:
        return
    with _opened(path) as file:
        try:
            raw = file.read()
        except BROKEN as error:
            yield Record(str(path), wrong=f"is broken ({in_a_line(error)})"), END
            return
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        yield Record(str(path), text), END
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Record(f"{path}, line {line}", wrong=f"is not UTF-8 text (byte {error.start} of the file)"), END


def _lines(path: Path, key: str, at: Position) -> Iterator[tuple[Record, Position]]:
    """A JSONL file, a document a line, blank ones left out.  Positions are [line, byte], both counted from 0.

    Lines of our own, not the JSON reader of ``datasets``: that parses blocks, and cannot say which line is broken.
    """
    line, byte = at or (0, 0)
    with _opened(path) as file:
        try:
            file.seek(byte)
            while raw := file.readline():
                line, byte = line + 1, byte + len(raw)
                if raw.strip():
                    yield _parsed(raw, key, f"{path}, line {line}"), [line, byte]
        except BROKEN as error:
            yield Record(f"{path}, line {line + 1}", wrong=f"is where the file breaks off ({in_a_line(error)})"), END


def _parsed(raw: bytes, key: str, where: str) -> Record:
    try:
        row: Any = json.loads(raw.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        return Record(where, wrong=f"is not UTF-8 text (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return Record(where, wrong=f"is not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # numbers too long for Python, brackets too deep
        return Record(where, wrong=f"is not JSON that can be read ({in_a_line(error)})")
    if not isinstance(row, dict):
        return Record(where, wrong=f'is no JSON object of the form {{"{key}": "..."}}')
    return text_of(row, key, where)


def _table(path: Path, key: str, at: Position) -> Iterator[tuple[Record, Position]]:
    """A parquet file, a document a row.  Positions are rows, counted from 0; a few at a time are in memory."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    row = at or 0
    try:
        with ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                has = ", ".join(file.schema_arrow.names)
                yield Record(str(path), wrong=f'has no column "{key}", it has {has}: set text_key'), END
                return
            groups = range(file.num_row_groups)
            begins = list(accumulate((file.metadata.row_group(group).num_rows for group in groups), initial=0))
            first = bisect(begins, row) - 1
            ahead = row - begins[first]
            for batch in file.iter_batches(64, groups[first:], [key]):
                for value in batch.column(0)[ahead:]:
                    row += 1
                    yield text_of({key: value.as_py()}, key, f"{path}, row {row - 1}"), row
                ahead = max(ahead - len(batch), 0)
    except (pa.ArrowException, OSError) as error:
        yield Record(f"{path}, row {row}", wrong=f"is where the file breaks off ({in_a_line(error)})"), END
