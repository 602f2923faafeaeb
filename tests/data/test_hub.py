"""Datasets of the hub: faulty rows, failing streams and datasets that cannot be loaded are named."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from longctx.config import TextSource
from tests.data.texts import given_texts, read_documents, take


@pytest.mark.parametrize("streaming", [False, True])
def test_faulty_row_of_a_dataset_is_named(streaming, byte_tokenizer, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    source = TextSource(name=str(tmp_path / "source"), streaming=streaming)
    with pytest.raises(ValueError, match=r'dataset .*source:train, row 1 has a "text" of type NoneType'):
        take(read_documents(source, byte_tokenizer))
    items = take(read_documents(source, byte_tokenizer, on_error="skip"))
    assert given_texts(items, byte_tokenizer) == ["one", "three"] and items[-1][1]["skipped"] == 1
    with pytest.raises(ValueError, match='no column "body": set text_key to one of text'):
        read_documents(TextSource(name=str(tmp_path / "source"), streaming=streaming, text_key="body"), byte_tokenizer)


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_run_resumes_at_its_row_streamed_or_not(before, after, byte_tokenizer, tmp_path):
    (tmp_path / "source").mkdir()
    rows = [json.dumps({"text": text}) for text in ("one", "two", "three", "four")]
    (tmp_path / "source" / "a.jsonl").write_text("\n".join(rows))
    source = TextSource(name=str(tmp_path / "source"), streaming=before)
    _, state = take(read_documents(source, byte_tokenizer), 2)[-1]
    resumed = take(
        read_documents(replace(source, streaming=after), byte_tokenizer), state=json.loads(json.dumps(state))
    )
    assert given_texts(resumed, byte_tokenizer) == ["three", "four"]
    again = take(read_documents(replace(source, streaming=after), byte_tokenizer), state=resumed[0][1])
    assert given_texts(again, byte_tokenizer) == ["four"]


def test_failing_stream_is_named_by_its_row(byte_tokenizer, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "source" / "b.jsonl").write_text('{"text": "two"}\n')
    run = read_documents(TextSource(name=str(tmp_path / "source"), streaming=True), byte_tokenizer, on_error="skip")
    (tmp_path / "source" / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"dataset .*, row 1 cannot be read \(FileNotFoundError"):
        take(run)


def test_hub_name_without_network_gives_one_line(tmp_path):
    """In a separate process, since the hub's library reads its environment once."""
    code = (
        "from longctx.data.hub import dataset; from longctx.config import TextSource\n"
        "try: dataset(TextSource(name='nosuch/thing', subset='en', streaming=True))\n"
        "except ValueError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = result.stdout.splitlines()
    assert line.startswith("the dataset nosuch/thing:en:train cannot be loaded (ConnectionError: ")
    assert line.endswith("give a hub name that can be reached, or a path") and len(line) < 250
