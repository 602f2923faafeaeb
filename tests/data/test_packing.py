"""Packed sequences: every token is an input once, in order, and a target once unless it begins a document."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.layout import documents as sharded
from longctx.attention.layout import zigzag
from longctx.config import DataSettings
from longctx.data.documents import documents
from longctx.data.packing import pack
from tests.data.texts import assert_resumes, pages, plain, stage_of, take, write_source

TEXTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=23), min_size=1, max_size=13)


def expected(texts, length):
    """Oracle, one token at a time: fields of each pack sequence; 0 and False where no target exists."""
    rows = [
        (token, text[i + 1] if i + 1 < len(text) else 0, i + 1 < len(text), n)
        for n, text in enumerate(texts)
        for i, token in enumerate(text)
    ]
    for at in range(0, len(rows), length):
        chunk = rows[at : at + length]
        lengths = [sum(row[3] == n for row in chunk) for n in dict.fromkeys(row[3] for row in chunk)]
        missing = length - len(chunk)
        chunk += [(0, 0, False, -1)] * missing
        tokens, targets, mask, _ = (list(column) for column in zip(*chunk, strict=True))
        lengths += [missing] if missing else []
        yield {"tokens": tokens, "targets": targets, "mask": mask, "lengths": tuple(lengths), "padding": missing}


@settings(deadline=None)
@given(TEXTS, st.integers(1, 31))
def test_sequences_hold_the_tokens_in_order(texts, length):
    want = list(expected(texts, length))
    assert [plain(item) for item, _ in take(pack(stage_of(*texts), length, "pad"))] == want
    dropped = take(pack(stage_of(*texts), length))
    assert [plain(item) for item, _ in dropped] == [row for row in want if not row["padding"]]


@settings(deadline=None, max_examples=31)
@given(TEXTS, st.integers(3, 31), st.sampled_from(["drop", "pad"]))
def test_run_resumes_after_every_sequence(texts, length, last):
    stage = pack(stage_of([1] * 2 * length, *texts), length, last)
    assert_resumes(stage)


def test_cut_document_continues_and_predicts_across_the_cut():
    stage = pack(stage_of([11, 12, 13, 14, 15, 16, 17], [21, 22]), 3)
    (a, b, c) = [plain(item) for item, _ in take(stage)]
    assert (a["tokens"], a["targets"], a["lengths"]) == ([11, 12, 13], [12, 13, 14], (3,))
    assert (b["tokens"], b["targets"], b["mask"]) == ([14, 15, 16], [15, 16, 17], [True] * 3)
    assert (c["tokens"], c["targets"], c["mask"]) == ([17, 21, 22], [0, 22, 0], [False, True, False])
    assert c["lengths"] == (1, 2)


def test_dropped_tokens_are_logged(caplog):
    assert len(take(pack(stage_of([1] * 5, [2] * 6), 4))) == 2
    assert "the last 3 tokens do not fill a sequence of 4: dropped" in caplog.text
    caplog.clear()
    assert len(take(pack(stage_of([1] * 5, [2] * 3), 4))) == 2
    assert not caplog.records


def test_state_of_a_document_that_became_shorter_is_refused():
    _, state = take(pack(stage_of([1] * 7), 5), 1)[0]
    with pytest.raises(ValueError, match="document 0 is shorter than"):
        take(pack(stage_of([1] * 4), 5), state=state)


def test_document_whose_end_token_alone_is_left_may_lose_it():
    _, state = take(pack(stage_of([1] * 5 + [9], [2, 3, 4]), 5), 1)[0]
    assert state["used"] == 5
    ((following, _),) = take(pack(stage_of([1] * 5, [2, 3, 4]), 3), state=state)
    assert following.tokens.tolist() == [2, 3, 4]
    assert_resumes(pack(stage_of([1] * 5, [2, 3, 4], [5, 6]), 2))


def test_document_that_no_epoch_has_any_more_is_not_left_out_in_silence():
    _, state = take(pack(stage_of([1, 2], [3, 4, 5]), 4), 1)[0]
    assert state["used"] == 2
    with pytest.raises(ValueError, match=r"inside a document that data\.epochs now leaves out: use as many epochs"):
        take(pack(stage_of([1, 2]), 4), state=state)


def test_real_pages_shard_by_document(byte_tokenizer, tmp_path):
    """Ranks hold a sequence's rows by document, with positions that restart at 0 in each document."""
    source = write_source("jsonl", pages(17), tmp_path / "source")
    data = DataSettings((source,), length=1009, batch=1, epochs=1)
    stage = pack(documents(source, byte_tokenizer, data), data.length)
    sequences = [item for item, _ in take(stage)]
    assert len(sequences) > 5 and max(len(item.lengths) for item in sequences) > 2
    for item in sequences:
        layout = sharded(item.lengths, 3, zigzag)
        shards = [layout.shard(item.tokens, rank) for rank in range(3)]
        assert torch.equal(layout.unshard(shards), item.tokens)
        whole = layout.on_one_rank().positions(0)
        begins = (whole == 0).nonzero().flatten().tolist()
        assert begins == [sum(item.lengths[:n]) for n in range(len(item.lengths))]
        ends = [n for n, token in enumerate(item.tokens.tolist()) if token == byte_tokenizer.eos_token_id]
        assert ends == (~item.mask).nonzero().flatten().tolist(), "only end tokens have no target"
    assert_resumes(stage)
