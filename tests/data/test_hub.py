"""Datasets of the hub: a row or a file that is broken is named, and so is a dataset that cannot be had."""

import subprocess
import sys

import pytest

from longctx.config import TextSource
from tests.data.texts import first, given_texts, reading


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_a_dataset_is_named(streaming, byte_tokenizer, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    source = TextSource(name=str(tmp_path / "source"), streaming=streaming)
    with pytest.raises(ValueError, match=r'dataset .*source:train, row 1 has a "text" of type NoneType'):
        first(reading(source, byte_tokenizer))
    items = first(reading(source, byte_tokenizer, on_error="skip"))
    assert given_texts(items, byte_tokenizer) == ["one", "three"] and items[-1][1]["skipped"] == 1
    with pytest.raises(ValueError, match='no column "body": set text_key to one of text'):
        reading(TextSource(name=str(tmp_path / "source"), streaming=streaming, text_key="body"), byte_tokenizer)


def test_a_stream_that_fails_later_is_named_by_its_row(byte_tokenizer, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "source" / "b.jsonl").write_text('{"text": "two"}\n')
    run = reading(TextSource(name=str(tmp_path / "source"), streaming=True), byte_tokenizer, on_error="skip")
    (tmp_path / "source" / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"dataset .*, row 1 cannot be read \(FileNotFoundError"):
        first(run)


def test_a_hub_name_without_a_network_is_one_clear_line(tmp_path):
    """In a process of its own, since the hub's library reads once where the hub is, or that there is none."""
    code = (
        "from longctx.data.hub import dataset; from longctx.config import TextSource\n"
        "try: dataset(TextSource(name='nosuch/thing', subset='en', streaming=True))\n"
        "except ValueError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("the dataset nosuch/thing:en:train cannot be had (ConnectionError: ")
    assert line.endswith("give a hub name that can be reached, or a path") and len(line) < 250
