"""A long text comes in parts, with the tokens of the whole text, and little of it is in memory."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longctx.config import DataSettings, TextSource
from longctx.data import files, tokenize
from longctx.data.batches import training_batches
from longctx.data.documents import Document
from longctx.data.mixing import interleave
from longctx.data.packing import pack
from longctx.data.stage import Stage, State
from tests.data.test_tokenize import legacy_bpe, texts
from tests.data.texts import END, assert_resumes, pages, plain, read_documents, stage_of, take

NO_CHECK = [HealthCheck.function_scoped_fixture]
DOCUMENTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=23), min_size=1, max_size=7)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    """Use windows and blocks so small that they cut short texts, and characters of several bytes."""
    monkeypatch.setattr(tokenize, "WINDOW", 131)
    monkeypatch.setattr(tokenize, "_OVERLAP", 32)
    monkeypatch.setattr(files, "_BLOCK", 7)


def whole_text(raw: bytes) -> str:
    """The text of a file, read at once."""
    return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def in_parts(stage: Stage[Document], length: int) -> Stage[Document]:
    """The same documents in parts of ``length`` tokens."""

    def run(state: State | None) -> Iterator[tuple[Document, State]]:
        for document, after in stage(state):
            parts = document.tokens.split(length)
            yield from ((Document(part, document.where, ends=False), {}) for part in parts[:-1])
            yield Document(parts[-1], document.where), after

    return run


@pytest.fixture(scope="module")
def adds_first():
    """A tokenizer that merges letters and adds a first token."""
    return legacy_bpe()


@settings(deadline=None, max_examples=41, suppress_health_check=NO_CHECK)
@given(text=texts, mark=st.booleans(), ends=st.sampled_from(["\n", "\r\n", "\r"]))
@pytest.mark.parametrize("merges", [False, True])
def test_parts_of_a_file_join_to_the_tokens_of_its_text(merges, text, mark, ends, byte_tokenizer, adds_first, tmp_path):
    tokenizer = adds_first if merges else byte_tokenizer
    raw = b"\xef\xbb\xbf" * mark + text.replace("\n", ends).encode()
    (tmp_path / "a.txt").write_bytes(raw)
    if not (text := whole_text(raw)).strip():
        return
    ids = tokenizer(text, verbose=False)["input_ids"]
    ids += [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)
    parts = [document for document, _ in take(read_documents(TextSource(path=str(tmp_path / "a.txt")), tokenizer))]
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert torch.cat([part.tokens for part in parts]).tolist() == ids


@settings(deadline=None)
@given(documents=DOCUMENTS, part=st.integers(1, 9), length=st.integers(1, 31), last=st.sampled_from(["drop", "pad"]))
def test_packed_sequences_and_states_do_not_depend_on_parts(documents, part, length, last):
    expected = take(pack(stage_of(*documents), length, last))
    sequences = take(pack(in_parts(stage_of(*documents), part), length, last))
    assert [(plain(item), state) for item, state in sequences] == [(plain(item), state) for item, state in expected]


@settings(deadline=None, max_examples=31)
@given(sources=st.lists(st.tuples(DOCUMENTS, st.floats(0.1, 9)), min_size=2, max_size=3), part=st.integers(1, 9))
def test_mixing_does_not_depend_on_parts(sources, part):
    weights = [weight for _, weight in sources]
    stages = [stage_of(*documents) for documents, _ in sources]
    expected = take(pack(interleave(stages, weights), 5, "pad"))
    sequences = take(pack(interleave([in_parts(stage, part) for stage in stages], weights), 5, "pad"))
    assert [(plain(item), state) for item, state in sequences] == [(plain(item), state) for item, state in expected]


def test_run_resumes_inside_a_long_text(byte_tokenizer, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(pages(7)))
    (tmp_path / "short.txt").write_text("one\ntwo")
    sources = (TextSource(path=str(tmp_path / "long.txt"), weight=3), TextSource(path=str(tmp_path / "short.txt")))
    data = DataSettings(sources, length=331, batch=2, epochs=2, shuffle=2)
    assert_resumes(training_batches(data, byte_tokenizer))


def test_no_more_of_a_long_text_is_read_than_a_batch_needs(byte_tokenizer, tmp_path, monkeypatch):
    """Batches take the memory of a few windows, however long the text is."""
    (tmp_path / "a.txt").write_text("some words and more\n" * 50_000)
    read, open_text = [], files._open_text

    def counting(path):
        file = open_text(path)
        monkeypatch.setattr(file, "read", lambda size, read_text=file.read: read.append(size) or read_text(size))
        return file

    monkeypatch.setattr(files, "_open_text", counting)
    stage = read_documents(TextSource(path=str(tmp_path / "a.txt")), byte_tokenizer)
    parts = [document for document, _ in take(stage, 9)]
    assert len(torch.cat([part.tokens for part in parts])) <= sum(read) < 9 * 3 * 131
    assert max(len(part.tokens) for part in parts) <= 2 * 131


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"one\ntwo\nth\xe9 vert and more\n", r"line 3 is not UTF-8 text \(byte 10 of the file\)"),
        ("ü".encode() * 9 + b"\n\xff", r"line 2 is not UTF-8 text \(byte 19 of the file\)"),
        (b"\xef\xbb\xbfab\n" + "日本".encode()[:-1], r"line 2 is not UTF-8 text \(byte 9 of the file\)"),
        (b"\xef\xbb\xbf \n \t\r\n " + "\u3000".encode() * 9, "has no documents: 1 records are empty"),
    ],
)
def test_fault_beyond_the_first_block_is_found_before_the_text_is_used(byte_tokenizer, tmp_path, raw, words):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=words):
        take(read_documents(TextSource(path=str(tmp_path)), byte_tokenizer), 1)


def test_long_text_of_the_tokenizer_s_end_token_has_one_end(byte_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 99 + "<end>")
    parts = [document for document, _ in take(read_documents(TextSource(path=str(tmp_path)), byte_tokenizer))]
    assert len(parts) > 1 and parts[-1].tokens.tolist().count(END) == 1
