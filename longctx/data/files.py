"""Read local text, JSON lines and parquet files as streams of records; reading resumes at a byte or a row."""

import codecs
import glob
import gzip
import json
import os
import zlib
from bisect import bisect
from collections.abc import Iterator
from functools import partial
from io import BufferedReader, TextIOBase, TextIOWrapper
from itertools import accumulate
from pathlib import Path
from typing import Any

from longctx.config import TextSource
from longctx.data.records import Position, ReadRow, Record, SourceFile, error_line, text_of

READABLE = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
REFUSED = (".json", ".csv", ".tsv", ".arrow", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst")
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)
END = -1  # position after the last document, and after a fault that ends the file
_BLOCK = 1 << 20  # bytes of a text file that are checked at once


def files(source: TextSource, read_row: ReadRow | None = None) -> tuple[SourceFile, ...]:
    """Return the files of ``source.path``, in the order of their paths.

    If ``read_row`` is given, it reads the lines of .jsonl files in place of ``source.text_key``, and other files are
    refused.  Raises ValueError if there are no files, and for a kind of file that is not supported.
    """
    return tuple(_source_file(path, source, read_row) for path in paths_of(str(source.path)))


def paths_of(given: str) -> list[Path]:
    """Return the files that ``given`` names, sorted: one file, the files of a folder, or a pattern's matches.

    A folder gives the files, also of its subfolders, whose names end as in `READABLE`, in small letters or capitals.
    Links to folders are followed; hidden files and folders inside it are left out.  In a pattern, the longest beginning
    that is a folder is literal, even with brackets.  Raises ValueError if there are no files, and for a folder that
    cannot be read.
    """
    root = Path(given).expanduser()
    if root.is_dir():
        paths = [path for path in _visible_files(root) if path.name.lower().endswith(READABLE)]
        if not paths:
            raise ValueError(
                f"{given} has no file that ends in {', '.join(READABLE)}: name its text files with a pattern, "
                f"like '{given}/*'"
            )
        return sorted(paths)
    paths = [path for path in ([root] if root.is_file() else _matches(root)) if path.is_file()]
    if not paths:
        raise ValueError(f"{given} is not a file, a folder, or a pattern that matches a file: check the path")
    return sorted(paths)


def left_out_by_version_0_2(source: TextSource) -> str:
    """Return a hint for a resumed run if version 0.2 left out a file of the folder ``source.path``; else nothing.

    It left out files below links to folders, and those with names in capitals (.TXT).
    """
    root = Path(source.path or "").expanduser()
    for path in paths_of(str(root)) if source.path and root.is_dir() else ():
        links = [root / part for part in path.relative_to(root).parents if (root / part).is_symlink() and part.name]
        if links:
            return f" (version 0.2 left out {path}: to go on with a run of that version, move the link {links[0]} away)"
        if not path.name.endswith(READABLE):
            return f" (version 0.2 left out {path}: to leave it out, give a pattern such as '{root}/**/*.txt')"
    return ""


def _visible_files(root: Path) -> Iterator[Path]:
    """Yield the files of ``root`` that are not hidden, of its subfolders, and of folders that links in them lead to.

    A folder is read only once, even if links form a loop.  Links are followed last: a file without links in its path
    has that path.
    """
    seen, waiting = set[tuple[int, int]](), [root]
    while waiting:
        for place, subfolders, names in os.walk(waiting.pop(0), onerror=_refuse_unreadable):
            folder = Path(place)
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            subfolders[:] = [name for name in sorted(subfolders) if name[0] != "."]
            waiting += [folder / name for name in subfolders if (folder / name).is_symlink()]
            yield from (folder / name for name in names if name[0] != "." and (folder / name).is_file())


def _refuse_unreadable(error: OSError) -> None:
    """Raise ValueError for a folder that cannot be listed, whose files would be missing from the text."""
    raise ValueError(
        f"{error.filename} cannot be read ({error.strerror}): get permission to read it, or give a pattern, such as "
        "'FOLDER/**/*.txt', which leaves out folders that cannot be read"
    ) from error


def _matches(pattern: Path) -> list[Path]:
    folder = next((parent for parent in pattern.parents if parent.is_dir()), pattern.parent)
    names = glob.glob(str(pattern.relative_to(folder)), root_dir=folder, recursive=True)  # noqa: PTH207
    return [folder / name for name in names]


def _source_file(path: Path, source: TextSource, read_row: ReadRow | None) -> SourceFile:
    name = path.name.lower()
    title = f"{path.name} ({path.stat().st_size} bytes)"  # the size, so that a resume state rejects a changed file
    if name.endswith(REFUSED) or (name.endswith(".gz") and name.removesuffix(".gz").endswith((*REFUSED, ".parquet"))):
        raise ValueError(f"{path} is not a supported kind of file: use a text file, or one of {', '.join(READABLE)}")
    if name.endswith((".jsonl", ".jsonl.gz")):
        read_text = partial(_read_text_row, source.text_key)
        return SourceFile(title, partial(_read_lines, path, read_row or read_text))
    if read_row:
        raise ValueError(
            f"{path} is not a .jsonl file, and data.conversations reads only such files: give .jsonl files"
        )
    if name.endswith(".parquet"):
        return SourceFile(title, partial(_read_table, path, source.text_key))
    return SourceFile(title, partial(_read_text, path))


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    try:
        return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give files that can be read") from error


def _read_text(path: Path, at: Position) -> Iterator[tuple[Record, Position]]:
    """Yield a text file as one document, with line ends converted to newlines, unless ``at`` is its end.

    The file is read once to check it, and again when the record is opened.  It is never in memory as a whole.
    """
    if at is None:
        with _open(path) as file:
            yield _checked_record(path, file), END


def _checked_record(path: Path, file: gzip.GzipFile | BufferedReader) -> Record:
    """Check the text ``file`` at ``path``; return its record, which can be opened, is empty, or has the first fault."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_blank, start, lines = True, 0, 0  # ``start``: offset of the block's first byte
    while True:
        unfinished = decoder.getstate()[0]  # first bytes of a character that the previous block cut
        try:
            block = file.read(_BLOCK)
            text = decoder.decode(block, final=not block)
        except BROKEN as error:
            return Record(str(path), fault=f"is broken ({error_line(error)})")
        except UnicodeDecodeError as error:
            byte = start - len(unfinished) + error.start
            line = lines + block.count(b"\n", 0, max(byte - start, 0)) + 1
            return Record(f"{path}, line {line}", fault=f"is not UTF-8 text (byte {byte} of the file)")
        is_blank = is_blank and not (text if start else text.removeprefix("\ufeff")).strip()
        if not block:
            return Record(str(path)) if is_blank else Record(str(path), open_file=partial(_open_text, path))
        start, lines = start + len(block), lines + block.count(b"\n")


def _open_text(path: Path) -> TextIOBase:
    """Open a text file without its byte-order mark, with line ends converted to newlines."""
    return TextIOWrapper(_open(path), encoding="utf-8-sig", newline=None)


def _read_text_row(key: str, row: Any, where: str) -> Record:
    return text_of(row, key, where)


def _read_lines(path: Path, read_row: ReadRow, at: Position) -> Iterator[tuple[Record, Position]]:
    """Yield a document for each line of a JSONL file that is not blank, with the position after it.

    Positions are [line, byte], from 0; ``at`` is the first (None: the beginning).  ``read_row`` makes the record of a
    line.  The JSON reader of ``datasets`` parses blocks and could not name a faulty line.
    """
    line, byte = at or (0, 0)
    with _open(path) as file:
        try:
            file.seek(byte)
            while raw := file.readline():
                line, byte = line + 1, byte + len(raw)
                if raw.removeprefix(codecs.BOM_UTF8).strip():
                    yield _parse_line(raw, read_row, f"{path}, line {line}"), [line, byte]
        except BROKEN as error:
            yield Record(f"{path}, line {line + 1}", fault=f"is where the file breaks off ({error_line(error)})"), END


def _parse_line(raw: bytes, read_row: ReadRow, where: str) -> Record:
    try:
        row: Any = json.loads(raw.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        return Record(where, fault=f"is not UTF-8 text (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return Record(where, fault=f"is not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # numbers too long for Python, brackets too deep
        return Record(where, fault=f"is not JSON that can be read ({error_line(error)})")
    return read_row(row, where)


def _read_table(path: Path, key: str, at: Position) -> Iterator[tuple[Record, Position]]:
    """Yield a document for each row of a parquet file, with the position after it; begin at ``at`` (None: first row).

    A document is the text in column ``key``.  A position is a row's number, from 0.  64 rows are in memory at a time.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    row = at or 0
    try:
        with ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                yield Record(str(path), fault=f'has no column "{key}", it has {columns}: set text_key'), END
                return
            # Start at the row group that holds the row, and skip the group's earlier rows.
            groups = range(file.num_row_groups)
            begins = list(accumulate((file.metadata.row_group(group).num_rows for group in groups), initial=0))
            first = bisect(begins, row) - 1
            skip = row - begins[first]
            for batch in file.iter_batches(64, groups[first:], [key]):
                for value in batch.column(0)[skip:]:
                    row += 1
                    yield text_of({key: value.as_py()}, key, f"{path}, row {row - 1}"), row
                skip = max(skip - len(batch), 0)
    except (pa.ArrowException, OSError) as error:
        yield Record(f"{path}, row {row}", fault=f"is where the file breaks off ({error_line(error)})"), END
