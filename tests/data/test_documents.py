"""Documents: every text of a source, once an epoch, as the tokenizer has it; resumed behind any of them."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from longctx.data.documents import documents
from longctx.pretrained import tokenizer_of
from longctx.schema import DataSettings, TextSource
from tests.data.texts import FORMS, assert_resumes, first, pages, written
from tests.tiny import tiny_tokenizer

END = 256


def stage(source, tokenizer, **settings):
    return documents(source, tokenizer, DataSettings(sources=(source,), length=1, **{"epochs": 1, **settings}))


def given_texts(items, tokenizer):
    """The texts of documents, each of which ended."""
    assert all(document.tokens[-1] == END for document, _ in items)
    return [tokenizer.decode(document.tokens[:-1]) for document, _ in items]


@pytest.mark.parametrize("form", FORMS)
def test_a_source_gives_its_texts_in_order(form, byte_tokenizer, tmp_path):
    texts = pages(23)
    assert sum(map(len, texts)) > 10_000
    items = first(stage(written(form, texts, tmp_path / "source"), byte_tokenizer))
    assert given_texts(items, byte_tokenizer) == texts
    places = [document.where for document, _ in items]
    assert len(set(places)) == 23, "where a document stands, for whoever looks for it"


@pytest.mark.parametrize("shuffle", [0, 5])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_resumes_behind_every_document(form, shuffle, byte_tokenizer, tmp_path):
    texts = [*pages(7), "", "  \n"]
    source = written(form, texts, tmp_path / "source")
    assert_resumes(stage(source, byte_tokenizer, shuffle=shuffle, epochs=2))
    endless = stage(source, byte_tokenizer, shuffle=shuffle, epochs=None)
    assert_resumes(endless, 17)
    _, state = first(endless, 17)[-1]
    assert (state["epoch"], state["empty"], state["documents"] + state["given"]) == (2, 4, 17)


@pytest.mark.parametrize("form", ["txt", "txt.gz", "rst"])
def test_a_file_of_another_kind_is_one_document(form, byte_tokenizer, tmp_path):
    text = "\n\n".join(pages(7))
    pack = gzip.compress if form.endswith("gz") else bytes
    (tmp_path / f"book.{form}").write_bytes(pack(text.encode()))
    items = first(stage(TextSource(path=str(tmp_path / f"book.{form}")), byte_tokenizer))
    assert given_texts(items, byte_tokenizer) == [text]


def test_a_pattern_is_the_files_that_it_matches_in_the_order_of_their_names(byte_tokenizer, tmp_path):
    for name in ("b.md", "a.md", "c.txt", "sub"):
        (tmp_path / name).mkdir() if name == "sub" else (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "d.md").write_text("d.md")
    items = first(stage(TextSource(path=str(tmp_path / "**" / "*.md")), byte_tokenizer))
    assert given_texts(items, byte_tokenizer) == ["a.md", "b.md", "d.md"]


def test_what_editors_leave_in_files_is_no_text(byte_tokenizer, tmp_path):
    """A byte order mark, line ends of another system, blank lines between records."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "four"}\r\n\r\n{"text": "f\xc3\xbcnf"}')
    items = first(stage(TextSource(path=str(tmp_path)), byte_tokenizer))
    assert given_texts(items, byte_tokenizer) == ["one\ntwo\nthree\n", "four", "fünf"]
    assert items[-1][0].where.endswith("b.jsonl, line 3")


def test_tokens_are_those_of_the_tokenizer_on_all_documents(smollm2, tmp_path):
    tokenizer = tokenizer_of(smollm2[1])
    texts = pages(37)
    items = first(stage(written("jsonl", texts, tmp_path / "source"), tokenizer))
    whole = tokenizer(tokenizer.eos_token.join([*texts, ""]), verbose=False)["input_ids"]
    assert [token for document, _ in items for token in document.tokens.tolist()] == list(whole)
    without = first(stage(written("jsonl", texts, tmp_path / "source"), tokenizer, end_token=False))
    assert [token for document, _ in without for token in document.tokens.tolist()] == [
        token for token in whole if token != tokenizer.eos_token_id
    ]


def test_an_end_that_the_tokenizer_sets_itself_is_not_doubled(byte_tokenizer, tmp_path):
    source = written("jsonl", ["one", "two<end>"], tmp_path / "source")
    assert [document.tokens.tolist()[-2:] for document, _ in first(stage(source, byte_tokenizer))] == [
        [byte_tokenizer.convert_tokens_to_ids("e"), END],
        [byte_tokenizer.convert_tokens_to_ids("o"), END],
    ]


def test_a_tokenizer_without_an_end_is_refused_unless_none_is_wanted(tmp_path):
    source = written("jsonl", ["one"], tmp_path / "source")
    with pytest.raises(ValueError, match=r"no end token.*data\.end_token=false"):
        stage(source, tiny_tokenizer())
    ((document, _),) = first(stage(source, tiny_tokenizer(), end_token=False))
    assert len(document.tokens) == 3


@settings(deadline=None, max_examples=31, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 19), window=st.integers(1, 23), seed=st.integers(0, 99))
def test_a_shuffle_gives_every_document_once_an_epoch_near_its_place(count, window, seed, byte_tokenizer, tmp_path):
    source = written("jsonl", [f"{n}" for n in range(count)], tmp_path / "source")
    run = stage(source, byte_tokenizer, shuffle=window, seed=seed, epochs=3)
    given = [int(text) for text in given_texts(first(run), byte_tokenizer)]
    assert len(given) == 3 * count
    for epoch in (given[:count], given[count : 2 * count], given[2 * count :]):
        assert sorted(epoch) == list(range(count))
        assert all(n // window == at // window for at, n in enumerate(epoch)), "a window's documents, then the next's"


def test_a_shuffle_is_that_of_its_seed_and_another_every_epoch_and_window(byte_tokenizer, tmp_path):
    source = written("jsonl", [f"{n}" for n in range(22)], tmp_path / "source")

    def order(seed):
        run = stage(source, byte_tokenizer, shuffle=11, seed=seed, epochs=2)
        return [int(text) % 11 for text in given_texts(first(run), byte_tokenizer)]

    seventh = order(7)
    windows = {tuple(seventh[i : i + 11]) for i in range(0, 44, 11)}
    assert len(windows) == 4
    assert order(7) == seventh != order(8)


BAD = {
    "broken JSON": (b'{"text": "tw', r"is not JSON \(Unterminated string starting at, column 10\)"),
    "no object": (b'["two"]', "is no JSON object"),
    "missing key": (b'{"body": "two", "id": 3}', 'has no "text", it has body, id: set text_key'),
    "number": (b'{"text": 2}', 'has a "text" of type int'),
    "null": (b'{"text": null}', 'has a "text" of type NoneType'),
    "not UTF-8": (b'{"text": "tw\xf6"}', r"is not UTF-8 text \(byte 12 of the line\)"),
    "half a character": (rb'{"text": "tw\ud83d"}', "has half a surrogate pair.*character 2"),
    "too deep": (b"[" * 100_000, r"is not JSON that can be read \(RecursionError"),
    "too long a number": (b'{"n": ' + b"7" * 4999 + b"}", r"is not JSON that can be read \(ValueError"),
}


@pytest.mark.parametrize("packing", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named_and_stops_the_run_or_is_left_out(bad, packing, byte_tokenizer, tmp_path, caplog):
    line, words = BAD[bad]
    path = tmp_path / f"a.{packing}"
    content = b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n'
    path.write_bytes(gzip.compress(content) if packing.endswith("gz") else content)
    source = TextSource(path=str(path))
    run = stage(source, byte_tokenizer)(None)
    next(run)
    with pytest.raises(ValueError, match=rf"{path.name}, line 2 {words}.*data\.on_error=skip"):
        next(run)
    assert not caplog.records
    skipping = stage(source, byte_tokenizer, on_error="skip", epochs=2)
    items = first(skipping)
    assert given_texts(items, byte_tokenizer) == ["one", "three"] * 2
    assert [state["skipped"] for _, state in items] == [0, 1, 1, 2]
    assert [record.message.partition(" ")[0] for record in caplog.records] == [f"{path},"] * 2
    assert "line 2" in caplog.text and "skipped, as 2 of its source by now" in caplog.text
    assert_resumes(skipping)


@settings(deadline=None, max_examples=31, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(["good", "empty", "bad"]), min_size=1, max_size=7), window=st.integers(0, 3))
def test_what_is_left_out_is_counted_and_does_not_shift_a_resumed_run(kinds, window, byte_tokenizer, tmp_path):
    lines = {"good": '{{"text": "{}"}}', "empty": '{{"text": ""}}', "bad": '{{"text": {}'}
    content = "\n".join(lines[kind].format(n) for n, kind in enumerate(kinds))
    (tmp_path / "a.jsonl").write_text(content)
    source = TextSource(path=str(tmp_path / "a.jsonl"))
    run = stage(source, byte_tokenizer, on_error="skip", shuffle=window, epochs=None)
    good = [str(n) for n, kind in enumerate(kinds) if kind == "good"]
    if not good:
        with pytest.raises(ValueError, match=f"{kinds.count('empty')} are empty, {kinds.count('bad')} were skipped"):
            first(run, 1)
        return
    items = first(run, 3 * len(good) + 1)
    assert sorted(given_texts(items[:-1], byte_tokenizer)) == sorted(good * 3)
    counts = {"empty": kinds.count("empty"), "skipped": kinds.count("bad")}
    assert all(3 * n <= items[-1][1][count] <= 4 * n for count, n in counts.items())
    assert_resumes(run, 2 * len(good) + 1)


def test_a_text_that_is_not_utf8_is_named_by_its_line(byte_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nth\xe9 vert\n")
    (tmp_path / "b.txt").write_bytes(b"good")
    with pytest.raises(ValueError, match=r"a\.txt, line 3 is not UTF-8 text \(byte 10 of the file\)"):
        first(stage(TextSource(path=str(tmp_path)), byte_tokenizer))
    ((document, state),) = first(stage(TextSource(path=str(tmp_path)), byte_tokenizer, on_error="skip"))
    assert document.where.endswith("b.txt") and state["skipped"] == 1


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("a.jsonl.gz", lambda whole: whole[:-31], r"a\.jsonl\.gz, line \d+ is where the file breaks off \(EOFError"),
        ("a.jsonl.gz", lambda whole: b"no gzip", r"a\.jsonl\.gz, line 1 is where the file breaks off \(BadGzipFile"),
        ("a.txt.gz", lambda whole: whole[:-31], r"a\.txt\.gz is broken \(EOFError"),
        (
            "a.parquet",
            lambda whole: b"PAR1 no parquet",
            r"a\.parquet, row 0 is where the file breaks off \(ArrowInvalid",
        ),
        (
            "a.parquet",
            lambda whole: whole[:4] + b"\0" * 999 + whole[1003:],
            r"a\.parquet, row 0 is where the file breaks",
        ),
    ],
)
def test_a_file_that_breaks_off_is_one_bad_record(name, damage, words, byte_tokenizer, tmp_path):
    texts = pages(11)
    if name.startswith("a.txt"):
        (tmp_path / name).write_bytes(gzip.compress(texts[0].encode()))
    else:
        written(name.removeprefix("a."), texts, tmp_path)
        (tmp_path / name.replace("a.", "texts.")).rename(tmp_path / name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    (tmp_path / "b.txt").write_text("good")
    source = TextSource(path=str(tmp_path))
    with pytest.raises(ValueError, match=words):
        first(stage(source, byte_tokenizer))
    skipping = stage(source, byte_tokenizer, on_error="skip", epochs=2)
    items = first(skipping)
    assert items[-1][0].where.endswith("b.txt") and items[-1][1]["skipped"] == 2
    assert_resumes(skipping)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"text": pa.array(["one", None, "three"])}, r'row 1 has a "text" of type NoneType'),
        ({"text": pa.array([b"one", b"two", b"\xff"])}, r'row 0 has a "text" of type bytes'),
        ({"body": pa.array(["one"])}, r'has no column "text", it has body: set text_key'),
    ],
)
def test_a_bad_row_is_named(column, words, byte_tokenizer, tmp_path):
    write_table(pa.table(column), tmp_path / "a.parquet")
    source = TextSource(path=str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet.*" + words):
        first(stage(source, byte_tokenizer))
    skipping = stage(source, byte_tokenizer, on_error="skip")
    if "row 1" in words:
        assert given_texts(first(skipping), byte_tokenizer) == ["one", "three"]
    else:
        with pytest.raises(ValueError, match=f"no documents: 0 are empty, {len(column.get('text', [1]))} were skipped"):
            first(skipping)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_a_dataset_is_named(streaming, byte_tokenizer, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    source = TextSource(name=str(tmp_path / "source"), streaming=streaming)
    with pytest.raises(ValueError, match=r'dataset .*source:train, row 1 has a "text" of type NoneType'):
        first(stage(source, byte_tokenizer))
    items = first(stage(source, byte_tokenizer, on_error="skip"))
    assert given_texts(items, byte_tokenizer) == ["one", "three"] and items[-1][1]["skipped"] == 1
    with pytest.raises(ValueError, match='no column "body": set text_key to one of text'):
        stage(TextSource(name=str(tmp_path / "source"), streaming=streaming, text_key="body"), byte_tokenizer)


def test_a_stream_that_fails_later_is_named_by_its_row(byte_tokenizer, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "source" / "b.jsonl").write_text('{"text": "two"}\n')
    run = stage(TextSource(name=str(tmp_path / "source"), streaming=True), byte_tokenizer, on_error="skip")
    (tmp_path / "source" / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"dataset .*, row 1 cannot be read \(FileNotFoundError"):
        first(run)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nosuch.txt", None, "is no file, no folder, and no pattern"),
        ("nosuch*.jsonl", None, "is no file, no folder, and no pattern"),
        ("a.json", b"[]", "of a kind that is not read.*jsonl"),
        ("a.jsonl.zst", b"", "of a kind that is not read"),
        ("empty.txt", b"", "has no documents: 1 are empty, 0 were skipped"),
        ("empty.jsonl", b"", "has no documents: 0 are empty"),
        ("blank.jsonl", b'\n{"text": " \\n"}\n\n', "has no documents: 1 are empty"),
        ("folder", "a.md", r"has no \.txt.* in it: name the files with a pattern"),
        ("folder", ".hidden.txt", r"has no \.txt"),
    ],
)
def test_refused_paths(name, content, words, byte_tokenizer, tmp_path):
    if isinstance(content, str):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("text")
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        first(stage(TextSource(path=str(tmp_path / name)), byte_tokenizer, epochs=None))
    assert name in str(refused.value)


def test_a_parquet_file_resumes_in_the_middle_of_its_row_groups(byte_tokenizer, tmp_path):
    texts = [f"{n}" for n in range(211)]
    write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=157)
    run = stage(TextSource(path=str(tmp_path / "a.parquet")), byte_tokenizer)
    items = first(run)
    assert given_texts(items, byte_tokenizer) == texts
    for k in range(1, 211, 13):
        assert given_texts(first(run, state=items[k - 1][1]), byte_tokenizer) == texts[k:], k


def test_an_empty_parquet_file_has_no_documents(byte_tokenizer, tmp_path):
    write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no documents"):
        first(stage(TextSource(path=str(tmp_path / "a.parquet")), byte_tokenizer))


def test_a_hub_name_without_a_network_is_one_clear_line(tmp_path):
    """In a process of its own, since the hub's library reads once where the hub is, or that there is none."""
    code = (
        "from longctx.data.hub import dataset; from longctx.schema import TextSource\n"
        "try: dataset(TextSource(name='nosuch/thing', subset='en', streaming=True))\n"
        "except ValueError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("the dataset nosuch/thing:en:train cannot be had (ConnectionError: ")
    assert line.endswith("give a hub name that can be reached, or a path") and len(line) < 250


def test_a_state_does_not_fit_other_files_or_another_order(byte_tokenizer, tmp_path):
    source = written("folder", ["one", "two", "three"], tmp_path / "source")
    _, state = first(stage(source, byte_tokenizer), 2)[-1]
    with pytest.raises(ValueError, match=r"needs data\.shuffle=0 data\.seed=0"):
        first(stage(source, byte_tokenizer, shuffle=3), state=state)
    (tmp_path / "source" / "001.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"stands in 001\.txt \(3 bytes\), which .* does not have at that place"):
        first(stage(source, byte_tokenizer), state=state)
    (tmp_path / "source" / "001.txt").unlink()
    (tmp_path / "source" / "002.txt").unlink()
    with pytest.raises(ValueError, match="bring the files back"):
        first(stage(source, byte_tokenizer), state=state)


def test_a_state_is_small_however_far_the_run(byte_tokenizer, tmp_path):
    for form in FORMS:
        source = written(form, pages(13), tmp_path / form)
        _, state = first(stage(source, byte_tokenizer, epochs=None, shuffle=5), 101)[-1]
        assert len(json.dumps(state)) < 700, form
