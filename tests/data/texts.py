"""Sources for the data tests: pages of CPython's manual in each supported form, and a check of exact resume."""

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow.parquet import write_table
from transformers import PreTrainedTokenizerFast

from longctx.config import DataSettings, TextSource
from longctx.data.documents import Document, documents
from longctx.data.stage import Stage, State

FORMS = ["folder", "jsonl", "jsonl.gz", "parquet", "hub", "hub, streamed"]
END = 256  # end token of byte_tokenizer


def pages(count: int) -> list[str]:
    """The ``count`` shortest pages of the language reference, in alphabetical order."""
    from pydoc_data.topics import topics

    names = sorted(sorted(topics, key=lambda name: len(topics[name]))[:count])
    return [topics[name] for name in names]


def write_source(form: str, texts: list[str], folder: Path) -> TextSource:
    """Write ``texts`` into ``folder`` in the given ``form`` (one of `FORMS`); return the source that reads them."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()
    if form == "folder":
        for n, text in enumerate(texts):
            (folder / f"{n:03}.txt").write_text(text)
        (folder / "notes.md").write_text("not a document of this source")
        return TextSource(path=str(folder))
    path = folder / f"texts.{form}"
    if form == "jsonl":
        path.write_bytes(lines)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "parquet":
        write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=5)
    else:  # `datasets` reads a folder with the layout of a dataset as if it came from the hub
        (folder / "a.jsonl").write_bytes(lines)
        return TextSource(name=str(folder), streaming="streamed" in form)
    return TextSource(path=str(path))


def read_documents(source: TextSource, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Stage[Document]:
    """The stage of the documents of ``source``, for one epoch unless ``settings`` change it."""
    return documents(source, tokenizer, DataSettings(sources=(source,), length=1, **{"epochs": 1, **settings}))


def take(stage: Stage[Any], count: int | None = None, state: State | None = None) -> list[tuple[Any, State]]:
    """The first ``count`` items (None: all) of ``stage`` after ``state``, passed through JSON as in a checkpoint."""
    return list(islice(stage(json.loads(json.dumps(state))), count))


def given_texts(items: list[tuple[Document, State]], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of documents, each of which has an end token."""
    assert all(document.tokens[-1] == END for document, _ in items)
    return [tokenizer.decode(document.tokens[:-1]) for document, _ in items]


def plain(item: Any) -> Any:
    """The fields of an item with tensors as lists, for comparison."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(item).items()}


def assert_resumes(stage: Stage[Any], count: int | None = None) -> None:
    """Assert that a run resumed from the state of any item yields the same remaining items and states."""
    whole = [(plain(item), state) for item, state in take(stage, count)]
    assert len(whole) > 1, "a resume needs at least two items"
    for k, (_, state) in enumerate(whole, 1):
        rest = take(stage, None if count is None else count - k, state)
        assert [(plain(item), later) for item, later in rest] == whole[k:], f"after item {k}"


def stage_of(*documents: list[int]) -> Stage[Document]:
    """A stage of documents with the given tokens, once; its state is the number of documents so far."""

    def run(state: State | None) -> Iterator[tuple[Document, State]]:
        begin = state["n"] if state else 0
        for n, tokens in enumerate(documents[begin:], begin):
            yield Document(torch.tensor(tokens, dtype=torch.long), f"document {n}"), {"n": n + 1}

    return run
