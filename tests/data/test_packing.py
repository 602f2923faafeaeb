"""Packed sequences: every token is an input once, in order, and a target once unless it begins a document."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.layout import documents as sharded
from longctx.attention.layout import zigzag
from longctx.config import DataSettings
from longctx.data.documents import documents
from longctx.data.packing import packed
from tests.data.texts import assert_resumes, first, made, pages, plain, written

TEXTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=23), min_size=1, max_size=13)


def expected(texts, length):
    """Inputs, targets and pieces of each sequence, a token at a time; 0 and False where there is none."""
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
def test_sequences_are_the_tokens_in_order(texts, length):
    want = list(expected(texts, length))
    assert [plain(item) for item, _ in first(packed(made(*texts), length, "pad"))] == want
    dropped = first(packed(made(*texts), length))
    assert [plain(item) for item, _ in dropped] == [row for row in want if not row["padding"]]


@settings(deadline=None, max_examples=31)
@given(TEXTS, st.integers(3, 31), st.sampled_from(["drop", "pad"]))
def test_a_run_resumes_behind_every_sequence(texts, length, last):
    stage = packed(made([1] * 2 * length, *texts), length, last)
    assert_resumes(stage)


def test_a_long_document_goes_on_and_its_middle_is_predicted():
    stage = packed(made([11, 12, 13, 14, 15, 16, 17], [21, 22]), 3)
    (a, b, c) = [plain(item) for item, _ in first(stage)]
    assert (a["tokens"], a["targets"], a["lengths"]) == ([11, 12, 13], [12, 13, 14], (3,))
    assert (b["tokens"], b["targets"], b["mask"]) == ([14, 15, 16], [15, 16, 17], [True] * 3)
    assert (c["tokens"], c["targets"], c["mask"]) == ([17, 21, 22], [0, 22, 0], [False, True, False])
    assert c["lengths"] == (1, 2)


def test_what_is_dropped_is_logged(caplog):
    assert len(first(packed(made([1] * 5, [2] * 6), 4))) == 2
    assert "the last 3 tokens do not fill a sequence of 4: dropped" in caplog.text
    caplog.clear()
    assert len(first(packed(made([1] * 5, [2] * 3), 4))) == 2
    assert not caplog.records


def test_a_state_does_not_fit_a_shorter_document():
    _, state = first(packed(made([1] * 7), 5), 1)[0]
    with pytest.raises(ValueError, match="document 0 is shorter than"):
        first(packed(made([1] * 5), 5), state=state)


def test_real_pages_shard_by_their_lengths(byte_tokenizer, tmp_path):
    """What a rank gets of a sequence: its rows, with positions that begin anew in each document."""
    source = written("jsonl", pages(17), tmp_path / "source")
    data = DataSettings((source,), length=1009, batch=1, epochs=1)
    stage = packed(documents(source, byte_tokenizer, data), data.length)
    sequences = [item for item, _ in first(stage)]
    assert len(sequences) > 5 and max(len(item.lengths) for item in sequences) > 2
    for item in sequences:
        layout = sharded(item.lengths, 3, zigzag)
        parts = [layout.shard(item.tokens, rank) for rank in range(3)]
        assert torch.equal(layout.unshard(parts), item.tokens)
        whole = layout.on_one_rank().positions(0)
        begins = (whole == 0).nonzero().flatten().tolist()
        assert begins == [sum(item.lengths[:n]) for n in range(len(item.lengths))]
        ends = [n for n, token in enumerate(item.tokens.tolist()) if token == byte_tokenizer.eos_token_id]
        assert ends == (~item.mask).nonzero().flatten().tolist(), "only behind an end token nothing follows"
    assert_resumes(stage)
