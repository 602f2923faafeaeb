"""Read a dataset of the Hugging Face hub, downloaded or streamed, row by row; reading resumes at a row."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

from longctx.config import TextSource
from longctx.data.records import Position, Record, SourceFile, error_line, text_of


def dataset(source: TextSource) -> SourceFile:
    """Return the dataset that ``source`` names, with a document for each row.

    Unless ``source.streaming`` is set, it is downloaded here if needed.  Raises ValueError if neither the hub nor the
    local cache of earlier downloads has it, and if it has no column ``text_key``.  The columns of a stream may be
    unknown; its rows without ``text_key`` then become faulty records.  Reading raises ValueError if a row cannot be
    read.
    """
    import datasets

    selection = {"name": source.subset, "revision": source.revision, "split": source.split}
    try:
        rows: Any = datasets.load_dataset(source.name, streaming=source.streaming, **selection)
    except Exception as error:  # any library below may fail, down to HTTP
        raise ValueError(
            f"the dataset {source} cannot be loaded ({error_line(error)}): "
            "give a hub name that can be reached, or a path"
        ) from error
    columns = rows.column_names
    if columns and source.text_key not in columns:
        raise ValueError(f'{source} has no column "{source.text_key}": set text_key to one of {", ".join(columns)}')
    return SourceFile(f"{source} {source.revision or ''}".strip(), partial(_read_rows, rows, source))


def _read_rows(rows: Any, source: TextSource, at: Position) -> Iterator[tuple[Record, Position]]:
    """Yield the dataset's rows from position ``at`` on (None: the first), each with the position after it.

    A position is [row, state]; state is the ``datasets`` state of a stream, or None.
    """
    row, stream_state = at or (0, None)
    if source.streaming:
        rows = deepcopy(rows)  # a stream object keeps its own position
        if stream_state:
            rows.load_state_dict(stream_state)
    else:
        rows = rows.select(range(row, len(rows)))
    remaining = iter(rows)
    if source.streaming and not stream_state:
        for _ in range(row):  # read by a run that did not stream; `skip` would give another kind of state
            next(remaining, None)
    while True:
        where = f"dataset {source}, row {row}"
        try:
            values = next(remaining, None)
        except Exception as error:
            raise ValueError(
                f"{where} cannot be read ({error_line(error)}): if it is streamed, check that the hub is reachable; "
                "else download it again"
            ) from error
        if values is None:
            return
        row += 1
        yield text_of(values, source.text_key, where), [row, rows.state_dict() if source.streaming else None]
