"""Documents of a source as tokens, in reading order or shuffled within windows; reading resumes after any document."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from random import Random
from typing import Any

import torch

from longctx.config import DataSettings, TextSource
from longctx.data.conversations import conversation_reader
from longctx.data.files import files, left_out_by_version_0_2
from longctx.data.hub import dataset
from longctx.data.pydoc import topics
from longctx.data.records import Position, Record, SourceFile, TokenizedConversation
from longctx.data.stage import StageWithStart, State
from longctx.data.tokenize import token_blocks
from longctx.shapes import Bool, Positions, Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """The tokens of a document (int32), or of one part of a long document.

    With ``data.end_token``, the last token of the document is the tokenizer's end token.  ``where`` is file and line,
    or dataset and row.  Parts come in order; all but the last have ``ends=False``.  ``learned`` is True for tokens that
    count in the loss, and False for tokens that are only context; None if all count.  ``source`` is the number of its
    source among several, which `longctx.data.mixing` sets.
    """

    tokens: Positions
    where: str
    ends: bool = True
    learned: Bool[Tensor, " s"] | None = None
    source: int | None = None


@dataclass(frozen=True)
class ResumePoint:
    """Resume point of a source: offset ``at`` in file ``part`` of ``epoch``; files and epochs count from 0.

    A window of documents begins at this offset, and ``given`` of its documents have been yielded.  Before the window,
    in all epochs, there were ``documents`` documents, ``empty`` records without text and ``skipped`` faulty ones.  The
    field names are keys of saved checkpoints.
    """

    epoch: int = 0
    part: int = 0
    at: Position = None
    given: int = 0
    documents: int = 0
    empty: int = 0
    skipped: int = 0


def documents(
    source: TextSource, tokenizer: Any, data: DataSettings, ends: tuple[int, ...] = ()
) -> StageWithStart[Document]:
    """Return the documents of ``source``, ``data.epochs`` times (None: without end), tokenized by ``tokenizer``.

    With ``data.end_token``, the tokenizer's end token closes each document.  Documents without text are left out and
    counted.  With ``data.shuffle`` = n, the source is read in windows of n documents, and each window is shuffled.  The
    order depends on ``data.seed`` and on the number of documents before the window, so every epoch has another order.
    Windows do not cross epochs.  The resume state has the beginning of a window; a resumed run reads the window again,
    and yields its remaining documents.  With ``data.conversations``, a document is a conversation, whose answers end
    with one of the tokens ``ends`` (see `conversation_reader`).

    Raises ValueError as `files`, `dataset` and `conversation_reader` do, and if the tokenizer lacks the end token.  A
    call of the stage raises ValueError for a state of other files or another order.  The iteration raises it for a
    source without documents, and for a faulty record unless ``data.on_error`` is skip.
    """
    if data.end_token and tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no end token to close documents with: set data.end_token=false")
    source_files = _source_files(source, tokenizer, data, ends)
    identity = _identity(source_files, source, data)

    def state_at(point: ResumePoint) -> State:
        return {**asdict(point), "name": source_files[point.part].name, **identity}

    def run(state: State | None) -> Iterator[tuple[Document, State]]:
        point = _resume_point(state, source_files, source, data)  # may raise: before the iteration
        return parts_of(_shuffled_records(source_files, point, source, data))

    def parts_of(records: Iterator[tuple[Record, ResumePoint]]) -> Iterator[tuple[Document, State]]:
        for record, resume in records:
            state = state_at(resume)
            for part in _parts(record, tokenizer, data.end_token):
                yield part, state if part.ends else {}

    return StageWithStart(run, state_at(ResumePoint()))


def _source_files(
    source: TextSource, tokenizer: Any, data: DataSettings, ends: tuple[int, ...]
) -> tuple[SourceFile, ...]:
    if data.conversations:
        if not source.path:
            raise ValueError(f"{source} has no lines of conversations: give the path of .jsonl files")
        return files(source, conversation_reader(tokenizer, ends, data))
    if source.name:
        return (dataset(source),)
    return (topics(source.pydoc),) if source.pydoc else files(source)


def _parts(record: Record, tokenizer: Any, end_token: bool) -> Iterator[Document]:
    """Yield a record's document, tokenized: in one part, or in several if the text is long.

    With ``end_token``, the tokenizer's end token ends the last part.
    """
    if record.conversation:
        yield _document_of(record.conversation, record.where)
        return
    with record.open() as text:
        blocks = token_blocks(text.read, tokenizer)
        tokens = next(blocks)
        for block in blocks:
            yield Document(tokens, record.where, ends=False)
            tokens = block
    if end_token and tokens[-1:].tolist() != [tokenizer.eos_token_id]:
        tokens = torch.cat([tokens, tokens.new_tensor([tokenizer.eos_token_id])])
    yield Document(tokens, record.where)


def _document_of(conversation: TokenizedConversation, where: str) -> Document:
    learned = torch.zeros(len(conversation.tokens), dtype=torch.bool)
    for begin, end in conversation.answers:
        learned[begin:end] = True
    return Document(torch.tensor(conversation.tokens, dtype=torch.int32), where, learned=learned)


def _shuffled_records(
    source_files: tuple[SourceFile, ...], point: ResumePoint, source: TextSource, data: DataSettings
) -> Iterator[tuple[Record, ResumePoint]]:
    """Yield the records that have text from ``point`` on, shuffled within windows, with the resume point after each."""
    given = point.given
    for window, begin, after in _windows(source_files, replace(point, given=0), source, data):
        order = list(range(len(window)))
        if data.shuffle:
            Random(f"{data.seed} {begin.documents}").shuffle(order)  # noqa: S311 (no secret)
        for i in range(given, len(window)):
            yield window[order[i]], after if i + 1 == len(window) else replace(begin, given=i + 1)
        given = 0


def _windows(
    source_files: tuple[SourceFile, ...], point: ResumePoint, source: TextSource, data: DataSettings
) -> Iterator[tuple[list[Record], ResumePoint, ResumePoint]]:
    """Yield windows of records, each with the resume points at its begin and end.

    Without shuffling, a window is one record.
    """
    begin, window = point, []
    for record, after in _records_with_text(source_files, point, source, data):
        if record:
            window.append(record)
        if window and (record is None or len(window) == max(data.shuffle, 1)):
            yield window, begin, after
            window = []
        if not window:
            begin = after


def _records_with_text(
    source_files: tuple[SourceFile, ...], point: ResumePoint, source: TextSource, data: DataSettings
) -> Iterator[tuple[Record | None, ResumePoint]]:
    """Yield every record that has text, with the resume point after it.

    At the end of an epoch, yield None with the resume point at the beginning of the next epoch.
    """
    while data.epochs is None or point.epoch < data.epochs:
        first, at = point.part, point.at
        for i, file in enumerate(source_files[first:], first):
            for record, next_position in file.read(at if i == first else None):
                point = replace(point, part=i, at=next_position)
                if record.fault:
                    point = replace(point, skipped=point.skipped + 1)
                    _refuse_or_log(record, point, data.on_error)
                elif record.is_empty:
                    point = replace(point, empty=point.empty + 1)
                else:
                    point = replace(point, documents=point.documents + 1)
                    yield record, point
        if not point.documents:
            raise ValueError(
                f"{source} has no documents: {point.empty} records are empty, {point.skipped} could not be read "
                "(data.on_error=skip); give text, or check text_key"
            )
        point = replace(point, epoch=point.epoch + 1, part=0, at=None)
        yield None, point


def _refuse_or_log(record: Record, point: ResumePoint, on_error: str) -> None:
    message = f"{record.where} {record.fault}"
    if on_error == "stop":
        raise ValueError(f"{message}; repair it, or set data.on_error=skip")
    log.warning("%s; skipped, %d of this source so far", message, point.skipped)


def _digest(source_files: tuple[SourceFile, ...]) -> str:
    """Return a digest of the names of ``source_files``, which include the sizes of the files.

    A resumed run compares it, to find out whether the files have changed.
    """
    return hashlib.sha256(repr([file.name for file in source_files]).encode()).hexdigest()[:12]


def _identity(source_files: tuple[SourceFile, ...], source: TextSource, data: DataSettings) -> State:
    """Return what a resumed run compares: the files, their order, and what else decides which records are documents.

    This is the key of the text, where records have keys, and the longest conversation, if windows depend on it.
    """
    has_keys = source.name or any(kind in file.name.lower() for kind in (".jsonl", ".parquet") for file in source_files)
    key = {"text_key": source.text_key} if has_keys and not data.conversations else {}
    fits = {"fits": [data.length, data.on_error]} if _leaves_out_long(data) else {}
    return {"files": _digest(source_files), "order": _order(data), **fits, **key}


def _order(data: DataSettings) -> list[int]:
    return [data.shuffle, data.seed] if data.shuffle else [0, 0]


def _leaves_out_long(data: DataSettings) -> bool:
    """Return True if data.length decides which conversations are in a shuffle window."""
    return bool(data.shuffle) and data.conversations == "whole"


def _resume_point(
    state: State | None, source_files: tuple[SourceFile, ...], source: TextSource, data: DataSettings
) -> ResumePoint:
    """Return the resume point in ``state`` (None: the beginning).

    Raises ValueError if the files, their order or ``text_key`` have changed, and if another ``data.length`` changes the
    conversations in a shuffle window.
    """
    if state is None:
        return ResumePoint()
    point = ResumePoint(**{field.name: state[field.name] for field in fields(ResumePoint)})
    if point.part >= len(source_files) or state["name"] != source_files[point.part].name:
        raise ValueError(
            f"the run stopped in {state['name']}, which {source} no longer has at that place: "
            f"restore the files, or start a new run{left_out_by_version_0_2(source)}"
        )
    if state["files"] != _digest(source_files):
        raise ValueError(
            f"the files of {source} have changed in name or size since the run stopped: "
            f"restore them, or start a new run{left_out_by_version_0_2(source)}"
        )
    if state["order"] != _order(data):
        shuffle, seed = state["order"]
        raise ValueError(
            f"the state to resume from needs data.shuffle={shuffle} data.seed={seed}: use these, or start a new run"
        )
    text_key = state.get("text_key", source.text_key)  # version 0.2 did not save it
    if text_key != source.text_key:
        raise ValueError(f"the state to resume from needs text_key={text_key} for {source}: use it, or start a new run")
    length, on_error = state.get("fits", (data.length, "stop"))  # absent in checkpoints of older runs
    # With on_error=stop, no conversation was left out, and a larger length leaves none out either.
    if _leaves_out_long(data) and (data.length < length or (data.length > length and on_error == "skip")):
        raise ValueError(
            f"the state to resume from needs data.length={length}: with data.shuffle={data.shuffle}, another length "
            "would repeat some conversations and leave others out; use this length, or start a new run"
        )
    return point
