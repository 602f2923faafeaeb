"""Documents to train on: pages of the manual that every CPython carries, in each form that a source may have."""

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
END = 256  # of a document, to byte_tokenizer


def pages(count: int) -> list[str]:
    """The ``count`` shortest pages of the language reference, in the order of their names."""
    from pydoc_data.topics import topics

    names = sorted(sorted(topics, key=lambda name: len(topics[name]))[:count])
    return [topics[name] for name in names]


def written(form: str, texts: list[str], folder: Path) -> TextSource:
    """A source that has ``texts``."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()
    if form == "folder":
        for n, text in enumerate(texts):
            (folder / f"{n:03}.txt").write_text(text)
        (folder / "notes.md").write_text("no document of ours")
        return TextSource(path=str(folder))
    path = folder / f"texts.{form}"
    if form == "jsonl":
        path.write_bytes(lines)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "parquet":
        write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=5)
    else:  # a folder that is laid out like a dataset is to `datasets` like one of the hub
        (folder / "a.jsonl").write_bytes(lines)
        return TextSource(name=str(folder), streaming="streamed" in form)
    return TextSource(path=str(path))


def reading(source: TextSource, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Stage[Document]:
    """The documents of ``source``, once unless ``settings`` say otherwise."""
    return documents(source, tokenizer, DataSettings(sources=(source,), length=1, **{"epochs": 1, **settings}))


def first(stage: Stage[Any], count: int | None = None, state: State | None = None) -> list[tuple[Any, State]]:
    """The first items of ``stage`` behind ``state``, which goes through JSON as it would through a checkpoint."""
    return list(islice(stage(json.loads(json.dumps(state))), count))


def given_texts(items: list[tuple[Document, State]], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of documents, each of which ended."""
    assert all(document.tokens[-1] == END for document, _ in items)
    return [tokenizer.decode(document.tokens[:-1]) for document, _ in items]


def plain(item: Any) -> Any:
    """What an item is made of, to be compared: tensors as lists."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(item).items()}


def assert_resumes(stage: Stage[Any], count: int | None = None) -> None:
    """From the state of every item, a run that begins there gives what follows in this one: items and states."""
    whole = [(plain(item), state) for item, state in first(stage, count)]
    assert len(whole) > 1, "nothing would be resumed"
    for k, (_, state) in enumerate(whole, 1):
        rest = first(stage, None if count is None else count - k, state)
        assert [(plain(item), behind) for item, behind in rest] == whole[k:], f"behind item {k}"


def made(*documents: list[int]) -> Stage[Document]:
    """Documents of given tokens, once; a state is how many came before."""

    def run(state: State | None) -> Iterator[tuple[Document, State]]:
        begin = state["n"] if state else 0
        for n, tokens in enumerate(documents[begin:], begin):
            yield Document(torch.tensor(tokens, dtype=torch.long), f"document {n}"), {"n": n + 1}

    return run
