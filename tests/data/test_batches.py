"""Batches contain the same sequences in the same order for any number of data-parallel ranks."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from longctx.config import DataSettings, TextSource
from longctx.data import packing
from longctx.data.batches import batches, left_out, refuse_state, training_batches
from longctx.data.packing import pack
from tests.data.texts import assert_resumes, pages, stage_of, take, write_source

TEXTS = [[n] * (n % 11 + 1) for n in range(1, 98)]


def rows_of(dp_size, stage, count=None, state=None):
    """For each batch: its rows in order, collected from all ranks, its count, and its state, equal on all ranks."""
    per_rank = [take(stage(rank, dp_size), count, state) for rank in range(dp_size)]
    out = []
    for shares in zip(*per_rank, strict=True):
        assert all(after == shares[0][1] for _, after in shares)
        assert len({batch.counted for batch, _ in shares}) == 1
        rows = [None] * dp_size * len(shares[0][0].lengths)
        for rank, (batch, _) in enumerate(shares):
            whole = zip(batch.tokens.tolist(), batch.targets.tolist(), batch.mask.tolist(), batch.lengths, strict=True)
            rows[rank::dp_size] = list(whole)
        out.append((rows, shares[0][0].counted, shares[0][1]))
    return out


@pytest.mark.parametrize("last", ["drop", "pad"])
@pytest.mark.parametrize("dp_size", [2, 3])
def test_batches_are_the_same_for_any_number_of_ranks(dp_size, last):
    def stage(dp_rank, dp_size):
        return batches(pack(stage_of(*TEXTS), 7, last), 6, dp_rank, dp_size, last)

    whole = rows_of(1, stage)
    assert len(whole) == 13 + (last == "pad")
    assert rows_of(dp_size, stage) == whole
    for k in (1, 5, 12):
        assert rows_of(dp_size, stage, state=whole[k - 1][2]) == whole[k:], "resumed with another number of ranks"


def test_counted_is_the_number_of_targets_on_all_ranks():
    stages = [batches(pack(stage_of(*TEXTS), 7, "pad"), 6, rank, 3, "pad") for rank in range(3)]
    counted = 0
    for shares in zip(*(take(stage) for stage in stages), strict=True):
        assert sum(int(batch.mask.sum()) for batch, _ in shares) == shares[0][0].counted
        counted += shares[0][0].counted
    assert counted == sum(len(text) - 1 for text in TEXTS), "every token but the first of each document"


def test_last_batch_is_padded_or_dropped(caplog):
    texts = stage_of([1] * 7, [2] * 7, [3] * 5)
    ((padded, _),) = take(batches(pack(texts, 7, "pad"), 5, last="pad"))
    assert padded.tokens[:, 0].tolist() == [1, 2, 3, 0, 0]
    assert padded.lengths == ((7,), (7,), (5, 2), (7,), (7,))
    assert padded.mask.sum(1).tolist() == [6, 6, 4, 0, 0] and padded.counted == 16
    assert take(batches(pack(texts, 7), 5)) == []
    assert "the last 2 sequences do not fill a batch of 5: dropped" in caplog.text


def test_last_batch_without_targets_is_left_out(byte_tokenizer, tmp_path):
    """One token is left over, and nothing follows it."""
    file = tmp_path / "a.txt"
    file.write_text("ninechars")
    data = DataSettings((TextSource(path=str(file)),), 4, 1, epochs=1, last="pad", end_token=False)
    counted = [batch.counted for batch, _ in take(training_batches(data, byte_tokenizer))]
    assert counted == [4, 4], "and no batch without a target"


def test_padding_is_no_document():
    stage = batches(pack(stage_of([1] * 5, [2] * 4), 7, "pad"), 3, last="pad")
    ((batch, _),) = take(stage)
    assert batch.lengths == ((5, 2), (2, 5), (7,)) and batch.documents == ((5, 2), (2,), ())
    shares = [take(batches(pack(stage_of([1] * 5, [2] * 4), 7, "pad"), 2, rank, 2, "pad"))[0][0] for rank in (0, 1)]
    assert [share.lengths for share in shares] == [((5, 2),), ((2, 5),)]
    assert {share.documents for share in shares} == {((5, 2), (2,))}, "the same on every rank"


def test_batch_that_ranks_cannot_share_evenly_is_refused():
    with pytest.raises(ValueError, match=r"data\.batch=7 .* 3 data-parallel ranks: use data\.batch=9, or another mesh"):
        batches(pack(stage_of(*TEXTS), 7), 7, 0, 3)


@pytest.mark.parametrize("shuffle", [0, 5])
def test_run_on_real_pages_resumes_after_every_batch(shuffle, byte_tokenizer, tmp_path):
    """Three endless sources of different kinds, one with a broken line and one with an empty text."""
    texts = pages(19)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:7]) + '{"text": \n')
    sources = (
        TextSource(path=str(tmp_path / "a.jsonl"), weight=3),
        write_source("parquet", [*texts[7:12], ""], tmp_path / "b"),
        write_source("hub, streamed", texts[12:], tmp_path / "c"),
    )
    data = DataSettings(sources, length=997, batch=2, shuffle=shuffle, on_error="skip")
    stage = training_batches(data, byte_tokenizer)
    assert_resumes(stage, 7)
    items = take(stage, 31)
    assert all(batch.tokens.shape == (2, 997) for batch, _ in items)
    (skipped, empty) = (left_out(items[-1][1])[name] for name in ("skipped", "empty"))
    assert skipped == items[-1][1]["documents"]["sources"][0]["epoch"] > 2
    assert empty == items[-1][1]["documents"]["sources"][1]["epoch"] > 0
    for rank in range(2):
        for (mine, _), (whole, _) in zip(take(training_batches(data, byte_tokenizer, rank, 2), 5), items, strict=False):
            assert torch.equal(mine.tokens, whole.tokens[rank::2])


def test_every_page_is_read_once_an_epoch(byte_tokenizer, tmp_path):
    texts = pages(19)
    sources = (write_source("folder", texts[:9], tmp_path / "a"), write_source("jsonl.gz", texts[9:], tmp_path / "b"))
    data = DataSettings(sources, length=499, batch=3, epochs=1, last="pad")
    pieces: list[int] = []
    for batch, _ in take(training_batches(data, byte_tokenizer)):
        for row, lengths in zip(batch.tokens.tolist(), batch.lengths, strict=True):
            assert sum(lengths) == len(row) == 499
            pieces += row
    end = byte_tokenizer.eos_token_id
    while pieces[-1] == 0:
        pieces.pop()
    given = byte_tokenizer.decode(pieces).split(byte_tokenizer.decode([end]))
    assert given.pop() == ""
    assert sorted(given) == sorted(texts)
    assert [text for text in given if text in texts[:9]] == texts[:9], "each source keeps its order"
    assert [text for text in given if text in texts[9:]] == texts[9:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": ()}, r"data\.sources is empty: give at least one source"),
        ({"length": 0}, r"data\.length=0: use 1 or more"),
        ({"batch": 0}, r"data\.batch=0: use 1"),
        ({"epochs": 0}, r"data\.epochs=0: use 1"),
        ({"shuffle": -1}, r"data\.shuffle=-1: use 0"),
        ({"seed": -1}, r"data\.seed=-1: use 0"),
    ],
)
def test_invalid_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DataSettings(**{"sources": (TextSource(path="a.txt"),), "length": 1, **change})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, r"one of path .*, name .*, pydoc"),
        ({"path": "a.txt", "name": "a"}, "one of path"),
        ({"path": "a.txt", "weight": 0}, "a.txt: weight=0; use a finite number above 0"),
        ({"name": "a", "weight": float("nan")}, "a:train: weight=nan"),
        ({"name": "a", "weight": float("inf")}, "weight=inf"),
    ],
)
def test_invalid_sources_are_refused(source, words):
    with pytest.raises(ValueError, match=words):
        TextSource(**source)


def test_state_of_every_source_is_checked_without_reading_its_text(byte_tokenizer, tmp_path):
    """The second source's turn comes after several batches."""
    (tmp_path / "a.txt").write_text("a" * 400)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b" * 400, "other": "c" * 400}) + "\n")
    first, second = (TextSource(path=str(tmp_path / name)) for name in ("a.txt", "b.jsonl"))
    data = DataSettings((first, second), 16, 1)
    ((_, state),) = take(training_batches(data, byte_tokenizer), 1)
    refuse_state(state, data, byte_tokenizer)
    for changed in (data.sources[:1], (first, replace(second, text_key="other"))):
        with pytest.raises(ValueError, match=r"the state to resume from (has 2 sources|needs text_key=text)"):
            refuse_state(state, replace(data, sources=changed), byte_tokenizer)
    with pytest.raises(ValueError, match=r"needs data\.shuffle=0 data\.seed=0"):
        refuse_state(state, replace(data, shuffle=2), byte_tokenizer)


def test_cut_document_continues_with_another_number_of_epochs(byte_tokenizer, tmp_path):
    """The first source has ended in one epoch, and would come first again in the second."""
    (tmp_path / "a.txt").write_text("a" * 40)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("b", "c" * 100)))
    sources = tuple(TextSource(path=str(tmp_path / name)) for name in ("a.txt", "b.jsonl"))
    once = DataSettings(sources, 16, 1, epochs=1)
    whole = take(training_batches(once, byte_tokenizer))
    for epochs in (1, 2, None):
        for (_, state), (following, _) in pairwise(whole):
            stage = training_batches(replace(once, epochs=epochs), byte_tokenizer)
            ((resumed, _),) = take(stage, 1, state=state)
            is_cut = state["used"] > 0
            assert not is_cut or torch.equal(resumed.tokens, following.tokens), (epochs, state)
    assert any(state["used"] and state["documents"]["first"] == 1 for _, state in whole)
    state = take(training_batches(replace(once, epochs=2), byte_tokenizer))[-2][1]
    assert state["used"] and state["documents"]["sources"][1]["epoch"] == 1, "in the second epoch"
    with pytest.raises(ValueError, match=r"inside a document of source 2, which data.epochs now leaves out"):
        take(training_batches(once, byte_tokenizer), 1, state=state)


def test_endless_text_without_a_target_is_refused(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_FRUITLESS", 1000)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n' * 3)
    data = DataSettings((TextSource(path=str(file)),), 4, 1, last="pad", end_token=False)
    with pytest.raises(ValueError, match="a stretch of 1,000 sequences has nothing to learn from"):
        take(training_batches(data, byte_tokenizer), 1)
