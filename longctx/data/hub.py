"""A dataset of the Hugging Face hub as a part of a source: fetched whole, or streamed; resumed at a row."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

from longctx.config import TextSource
from longctx.data.records import Position, Record, SourceFile, in_a_line, text_of


def dataset(source: TextSource) -> SourceFile:
    """The dataset that ``source`` names.

    Raises ValueError if it cannot be had, from the hub or from the cache of what came from there before, and if
    it has no column ``text_key``.
    """
    import datasets

    wanted = {"name": source.subset, "revision": source.revision, "split": source.split}
    try:
        rows: Any = datasets.load_dataset(source.name, streaming=source.streaming, **wanted)
    except Exception as error:  # of any library below, down to HTTP
        raise ValueError(
            f"the dataset {source} cannot be had ({in_a_line(error)}): give a hub name that can be reached, or a path"
        ) from error
    columns = rows.column_names
    if columns and source.text_key not in columns:
        raise ValueError(f'{source} has no column "{source.text_key}": set text_key to one of {", ".join(columns)}')
    return SourceFile(f"{source} {source.revision or ''}".strip(), partial(_rows, rows, source))


def _rows(rows: Any, source: TextSource, at: Position) -> Iterator[tuple[Record, Position]]:
    """Its rows.  Positions are [row, where ``datasets`` says that it stands], the latter of a stream."""
    row, stands = at or (0, None)
    if source.streaming:
        rows = deepcopy(rows)  # which remembers where it stands
        if stands:
            rows.load_state_dict(stands)
    else:
        rows = rows.select(range(row, len(rows)))
    each = iter(rows)
    while True:
        where = f"dataset {source}, row {row}"
        try:
            values = next(each, None)
        except Exception as error:
            raise ValueError(f"{where} cannot be read ({in_a_line(error)}): is the hub still reachable?") from error
        if values is None:
            return
        row += 1
        yield text_of(values, source.text_key, where), [row, rows.state_dict() if source.streaming else None]
