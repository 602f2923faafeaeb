"""Documents: the records of a source, in reading order or drawn from a window, as the tokenizer's tokens."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from random import Random
from typing import Any

import torch

from longctx.config import DataSettings, TextSource
from longctx.data.files import files
from longctx.data.hub import dataset
from longctx.data.pydoc import topics
from longctx.data.records import Position, Record, SourceFile
from longctx.data.stage import Stage, State
from longctx.shapes import Positions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """The tokens of a document, its end token among them, and ``where`` it stands."""

    tokens: Positions
    where: str


@dataclass(frozen=True)
class Place:
    """Where a source stands, which is its state: at the position ``at`` of a part, of an epoch.

    There a window of documents begins, of which ``given`` have been given.  ``documents`` are those before it,
    ``empty`` and ``skipped`` what was left out.
    """

    epoch: int = 0
    part: int = 0
    at: Position = None
    given: int = 0
    documents: int = 0
    empty: int = 0
    skipped: int = 0


def documents(source: TextSource, tokenizer: Any, data: DataSettings) -> Stage[Document]:
    """The documents of ``source``, ``data.epochs`` times, each as ``tokenizer`` has it and closed by its end token.

    Empty ones are left out and counted.  With ``data.shuffle`` the source is read in windows of so many documents,
    each given in an order drawn from the seed and from what came before, so that every epoch has its own; a window
    ends with its epoch.  A state is where a window begins: to resume is to read it again.

    Raises ValueError for what `files` and `dataset` refuse, for an end token that the tokenizer lacks, for a state
    of other files or another order; while it runs, for a record that is no text (unless ``data.on_error`` is skip)
    and for a source without documents.
    """
    if data.end_token and tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no end token to close documents with: set data.end_token=false")
    parts = (dataset(source),) if source.name else (topics(source.pydoc),) if source.pydoc else files(source)

    about = {"files": _digest(parts), "order": _order(data)}

    def run(state: State | None) -> Iterator[tuple[Document, State]]:
        place = _place(state, parts, source, data)
        given = place.given
        for window, begin, after in _windows(parts, replace(place, given=0), source, data):
            order = list(range(len(window)))
            if data.shuffle:
                Random(f"{data.seed} {begin.documents}").shuffle(order)  # noqa: S311 (no secret)
            for i in range(given, len(window)):
                record = window[order[i]]
                stands = after if i + 1 == len(window) else replace(begin, given=i + 1)
                tokens = _tokens(record.text, tokenizer, data.end_token)
                yield Document(tokens, record.where), {**asdict(stands), "name": parts[stands.part].name, **about}
            given = 0

    return run


def _tokens(text: str, tokenizer: Any, end_token: bool) -> Positions:
    ids = list(tokenizer(text, verbose=False)["input_ids"])  # verbose: that a document is longer than a context
    if end_token and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.long)


def _windows(
    parts: tuple[SourceFile, ...], place: Place, source: TextSource, data: DataSettings
) -> Iterator[tuple[list[Record], Place, Place]]:
    """Windows of records, each with the places where it begins and ends; a record each without a shuffle."""
    begin, window = place, []
    for record, after in _good(parts, place, source, data):
        if record:
            window.append(record)
        if window and (record is None or len(window) == max(data.shuffle, 1)):
            yield window, begin, after
            window = []
        if not window:
            begin = after


def _good(
    parts: tuple[SourceFile, ...], place: Place, source: TextSource, data: DataSettings
) -> Iterator[tuple[Record | None, Place]]:
    """Every record that has text, with the place behind it; None at the end of an epoch, with the next one's place."""
    while data.epochs is None or place.epoch < data.epochs:
        first, at = place.part, place.at
        for i, part in enumerate(parts[first:], first):
            for record, behind in part.read(at if i == first else None):
                place = replace(place, part=i, at=behind)
                if record.wrong:
                    place = replace(place, skipped=place.skipped + 1)
                    _refuse_or_log(record, place, data.on_error)
                elif not record.text.strip():
                    place = replace(place, empty=place.empty + 1)
                else:
                    place = replace(place, documents=place.documents + 1)
                    yield record, place
        if not place.documents:
            raise ValueError(f"{source} has no documents: {place.empty} are empty, {place.skipped} were skipped")
        place = replace(place, epoch=place.epoch + 1, part=0, at=None)
        yield None, place


def _refuse_or_log(record: Record, place: Place, on_error: str) -> None:
    says = f"{record.where} {record.wrong}"
    if on_error == "stop":
        raise ValueError(f"{says}; mend it, or set data.on_error=skip")
    log.warning("%s; skipped, as %d of its source by now", says, place.skipped)


def _digest(parts: tuple[SourceFile, ...]) -> str:
    """Of the parts' names, which have their sizes."""
    return hashlib.sha256(repr([part.name for part in parts]).encode()).hexdigest()[:12]


def _order(data: DataSettings) -> list[int]:
    return [data.shuffle, data.seed] if data.shuffle else [0, 0]


def _place(state: State | None, parts: tuple[SourceFile, ...], source: TextSource, data: DataSettings) -> Place:
    if state is None:
        return Place()
    place = Place(**{field.name: state[field.name] for field in fields(Place)})
    if place.part >= len(parts) or state["name"] != parts[place.part].name:
        raise ValueError(
            f"the state to resume from stands in {state['name']}, which {source} does not have at that place any more: "
            "bring the files back, or begin anew"
        )
    if state["files"] != _digest(parts):
        raise ValueError(
            f"the state to resume from is of {source} with other files than are there now, by name or by size: "
            "bring them back, or begin anew"
        )
    if state["order"] != _order(data):
        shuffle, seed = state["order"]
        raise ValueError(f"the state to resume from needs data.shuffle={shuffle} data.seed={seed}, or begin anew")
    return place
