"""Documents: every text of a source once an epoch, tokenized; runs resume after any document."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longctx.config import TextSource
from longctx.data.mixing import interleave
from longctx.data.packing import pack
from longctx.hf.config import tokenizer_of
from tests.data.texts import END, FORMS, assert_resumes, given_texts, pages, read_documents, take, write_source
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("form", FORMS)
def test_source_yields_its_texts_in_order(form, byte_tokenizer, tmp_path):
    texts = pages(23)
    assert sum(map(len, texts)) > 10_000
    items = take(read_documents(write_source(form, texts, tmp_path / "source"), byte_tokenizer))
    assert given_texts(items, byte_tokenizer) == texts
    locations = [document.where for document, _ in items]
    assert len(set(locations)) == 23, "every document has its own location"


@pytest.mark.parametrize("shuffle", [0, 5])
@pytest.mark.parametrize("form", FORMS)
def test_run_resumes_after_every_document(form, shuffle, byte_tokenizer, tmp_path):
    texts = [*pages(7), "", "  \n"]
    source = write_source(form, texts, tmp_path / "source")
    assert_resumes(read_documents(source, byte_tokenizer, shuffle=shuffle, epochs=2))
    endless = read_documents(source, byte_tokenizer, shuffle=shuffle, epochs=None)
    assert_resumes(endless, 17)
    _, state = take(endless, 17)[-1]
    assert (state["epoch"], state["empty"], state["documents"] + state["given"]) == (2, 4, 17)


def test_tokens_equal_those_of_the_tokenizer_on_the_joined_texts(smollm2, tmp_path):
    tokenizer = tokenizer_of(smollm2[1])
    texts = pages(37)
    items = take(read_documents(write_source("jsonl", texts, tmp_path / "source"), tokenizer))
    whole = tokenizer(tokenizer.eos_token.join([*texts, ""]), verbose=False)["input_ids"]
    assert [token for document, _ in items for token in document.tokens.tolist()] == list(whole)
    without = take(read_documents(write_source("jsonl", texts, tmp_path / "source"), tokenizer, end_token=False))
    assert [token for document, _ in without for token in document.tokens.tolist()] == [
        token for token in whole if token != tokenizer.eos_token_id
    ]


def test_end_token_is_not_doubled(byte_tokenizer, tmp_path):
    source = write_source("jsonl", ["one", "two<end>"], tmp_path / "source")
    assert [document.tokens.tolist()[-2:] for document, _ in take(read_documents(source, byte_tokenizer))] == [
        [byte_tokenizer.convert_tokens_to_ids("e"), END],
        [byte_tokenizer.convert_tokens_to_ids("o"), END],
    ]


def test_tokenizer_without_end_token_is_refused_unless_disabled(tmp_path):
    source = write_source("jsonl", ["one"], tmp_path / "source")
    with pytest.raises(ValueError, match=r"no end token.*data\.end_token=false"):
        read_documents(source, tiny_tokenizer())
    ((document, _),) = take(read_documents(source, tiny_tokenizer(), end_token=False))
    assert len(document.tokens) == 3


@settings(deadline=None, max_examples=31, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 19), window=st.integers(1, 23), seed=st.integers(0, 99))
def test_shuffle_permutes_the_documents_of_each_window(count, window, seed, byte_tokenizer, tmp_path):
    source = write_source("jsonl", [f"{n}" for n in range(count)], tmp_path / "source")
    run = read_documents(source, byte_tokenizer, shuffle=window, seed=seed, epochs=3)
    given = [int(text) for text in given_texts(take(run), byte_tokenizer)]
    assert len(given) == 3 * count
    for epoch in (given[:count], given[count : 2 * count], given[2 * count :]):
        assert sorted(epoch) == list(range(count))
        assert all(n // window == at // window for at, n in enumerate(epoch)), "window by window"


def test_shuffle_differs_by_seed_epoch_and_window(byte_tokenizer, tmp_path):
    source = write_source("jsonl", [f"{n}" for n in range(22)], tmp_path / "source")

    def order(seed):
        run = read_documents(source, byte_tokenizer, shuffle=11, seed=seed, epochs=2)
        return [int(text) % 11 for text in given_texts(take(run), byte_tokenizer)]

    seventh = order(7)
    windows = {tuple(seventh[i : i + 11]) for i in range(0, 44, 11)}
    assert len(windows) == 4
    assert order(7) == seventh != order(8)


@settings(deadline=None, max_examples=31, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(["good", "empty", "bad"]), min_size=1, max_size=7), window=st.integers(0, 3))
def test_left_out_records_are_counted_and_do_not_shift_a_resumed_run(kinds, window, byte_tokenizer, tmp_path):
    lines = {"good": '{{"text": "{}"}}', "empty": '{{"text": ""}}', "bad": '{{"text": {}'}
    content = "\n".join(lines[kind].format(n) for n, kind in enumerate(kinds))
    (tmp_path / "a.jsonl").write_text(content)
    source = TextSource(path=str(tmp_path / "a.jsonl"))
    run = read_documents(source, byte_tokenizer, on_error="skip", shuffle=window, epochs=None)
    good = [str(n) for n, kind in enumerate(kinds) if kind == "good"]
    if not good:
        words = f"{kinds.count('empty')} records are empty, {kinds.count('bad')} could not be read"
        with pytest.raises(ValueError, match=words):
            take(run, 1)
        return
    items = take(run, 3 * len(good) + 1)
    assert sorted(given_texts(items[:-1], byte_tokenizer)) == sorted(good * 3)
    counts = {"empty": kinds.count("empty"), "skipped": kinds.count("bad")}
    assert all(3 * n <= items[-1][1][count] <= 4 * n for count, n in counts.items())
    assert_resumes(run, 2 * len(good) + 1)


def test_state_of_other_files_or_another_order_is_refused(byte_tokenizer, tmp_path):
    source = write_source("folder", ["one", "two", "three"], tmp_path / "source")
    _, state = take(read_documents(source, byte_tokenizer), 2)[-1]
    with pytest.raises(ValueError, match=r"needs data\.shuffle=0 data\.seed=0"):
        take(read_documents(source, byte_tokenizer, shuffle=3), state=state)
    (tmp_path / "source" / "000.txt").write_text("write_source before")
    with pytest.raises(ValueError, match=r"files of .* have changed in name or size .*: restore them"):
        take(read_documents(source, byte_tokenizer), state=state)
    (tmp_path / "source" / "000.txt").write_text("one")
    assert take(read_documents(source, byte_tokenizer), state=state)
    (tmp_path / "source" / "003.txt").write_text("write_source after")
    with pytest.raises(ValueError, match=r"restore them, or start a new run"):
        take(read_documents(source, byte_tokenizer), state=state)
    (tmp_path / "source" / "001.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"stopped in 001\.txt \(3 bytes\), which .* no longer has at that place"):
        take(read_documents(source, byte_tokenizer), state=state)
    (tmp_path / "source" / "001.txt").unlink()
    (tmp_path / "source" / "002.txt").unlink()
    with pytest.raises(ValueError, match="restore the files"):
        take(read_documents(source, byte_tokenizer), state=state)


def test_state_stays_small_in_a_long_run(byte_tokenizer, tmp_path):
    for form in FORMS:
        source = write_source(form, pages(13), tmp_path / form)
        _, state = take(read_documents(source, byte_tokenizer, epochs=None, shuffle=5), 101)[-1]
        assert len(json.dumps(state)) < 700, form


def test_state_inside_the_first_document_knows_the_files_and_the_order(byte_tokenizer, tmp_path):
    """No document has ended yet, and its used tokens must be those of the same document."""
    source = write_source("jsonl", ["aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb", "cccccccccccc"], tmp_path / "source")

    def run(length=8, of=source, **settings):
        return pack(interleave([read_documents(of, byte_tokenizer, **settings)], [1.0]), length)

    ((first, state),) = take(run(), 1)
    ((following, _),) = take(run(), 1, state=state)
    assert len(set(torch.cat([first.tokens, following.tokens]).tolist())) == 1, "both are of the first document"
    with pytest.raises(ValueError, match=r"needs data\.shuffle=0 data\.seed=0"):
        take(run(shuffle=3, seed=4), 1, state=state)
    with pytest.raises(ValueError, match=r"needs text_key=text for .*: use it, or start a new run"):
        take(run(of=replace(source, text_key="other")), 1, state=state)
    (capitals,) = (file.rename(file.with_suffix(".JSONL")) for file in (tmp_path / "source").glob("*.jsonl"))
    ((_, state),) = take(run(of=TextSource(path=str(capitals))), 1)
    with pytest.raises(ValueError, match=r"needs text_key=text for .*: use it, or start a new run"):
        take(run(of=TextSource(path=str(capitals), text_key="other")), 1, state=state)
