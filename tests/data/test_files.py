"""Local files: their texts, and faulty records, which are named by line or row or skipped."""

import errno
import gzip
import os

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from longctx.config import TextSource
from longctx.data.files import left_out_by_version_0_2, paths_of
from tests.data.texts import assert_resumes, given_texts, pages, read_documents, take, write_source


@pytest.mark.parametrize("form", ["txt", "txt.gz", "rst"])
def test_other_text_file_is_one_document(form, byte_tokenizer, tmp_path):
    text = "\n\n".join(pages(7))
    pack = gzip.compress if form.endswith("gz") else bytes
    (tmp_path / f"book.{form}").write_bytes(pack(text.encode()))
    items = take(read_documents(TextSource(path=str(tmp_path / f"book.{form}")), byte_tokenizer))
    assert given_texts(items, byte_tokenizer) == [text]


def test_pattern_reads_its_matches_in_the_order_of_their_names(byte_tokenizer, tmp_path):
    for name in ("b.md", "a.md", "c.txt", "sub"):
        (tmp_path / name).mkdir() if name == "sub" else (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "d.md").write_text("d.md")
    items = take(read_documents(TextSource(path=str(tmp_path / "**" / "*.md")), byte_tokenizer))
    assert given_texts(items, byte_tokenizer) == ["a.md", "b.md", "d.md"]


def test_linked_folders_are_read_once(tmp_path):
    """Links to a folder outside, to the folder itself (a loop), to a folder inside, and to a folder that is gone."""
    data, far = tmp_path / "data", tmp_path / "far" / "deep"
    for file in (data / "z" / "own.txt", far / "far.txt", data / ".git" / "hidden.txt"):
        file.parent.mkdir(parents=True)
        file.write_text(file.name)
    for name, place in {"linked": far.parent, "loop": data, "a": data / "z", "gone": tmp_path / "gone"}.items():
        (data / name).symlink_to(place)
    assert paths_of(str(data)) == [data / "linked" / "deep" / "far.txt", data / "z" / "own.txt"]


def test_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """Its files would be missing from the text.  Hidden folders are not read, and a pattern leaves it out."""
    for name in ("a", "closed", ".closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("x")
    scan = os.scandir

    def scandir(folder):  # permissions do not restrict root
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=rf"{tmp_path}/closed cannot be read \(Permission denied\): .* give a pattern"):
        paths_of(str(tmp_path))
    assert paths_of(f"{tmp_path}/**/*.txt") == [tmp_path / "a" / "x.txt"]


def test_files_that_version_0_2_left_out_are_named_with_the_fix(tmp_path):
    data, far = tmp_path / "data", tmp_path / "far"
    for file in (data / "a.txt", far / "deep" / "b.txt"):
        file.parent.mkdir(parents=True)
        file.write_text("x")
    (data / ".hidden").symlink_to(far)
    source = TextSource(path=str(data))
    assert left_out_by_version_0_2(source) == "", "hidden folders are never read"
    (data / "far").symlink_to(far)
    assert f"left out {data}/far/deep/b.txt: " in left_out_by_version_0_2(source)
    assert f"move the link {data}/far away" in left_out_by_version_0_2(source)
    (data / "far").unlink()
    (data / "A.TXT").write_text("x")
    assert f"left out {data}/A.TXT: to leave it out, give a pattern such as '{data}/**/*.txt'" in (
        left_out_by_version_0_2(source)
    )
    for other in (TextSource(path=f"{data}/*"), TextSource(pydoc="test")):
        assert left_out_by_version_0_2(other) == ""


@pytest.mark.parametrize("pattern", ["*.txt", "**/*.txt", "[ab].txt"])
def test_brackets_in_the_folder_of_a_pattern_are_literal(tmp_path, monkeypatch, pattern):
    folder = tmp_path / "br[v1]"
    folder.mkdir()
    (folder / "a.txt").touch()
    assert paths_of(f"{folder}/{pattern}") == [folder / "a.txt"]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in paths_of(f"br[v1]/{pattern}")] == ["br[v1]/a.txt"]
    monkeypatch.chdir(folder)
    assert [str(path) for path in paths_of(pattern)] == ["a.txt"]


def test_byte_order_marks_line_ends_and_blank_lines_are_removed(byte_tokenizer, tmp_path):
    """Byte order marks, line ends of other systems, and blank lines between records."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "four"}\r\n\r\n{"text": "f\xc3\xbcnf"}')
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf\n{"text": "six"}')
    items = take(read_documents(TextSource(path=str(tmp_path)), byte_tokenizer))
    assert given_texts(items, byte_tokenizer) == ["one\ntwo\nthree\n", "four", "fünf", "six"]
    assert [item[0].where.rpartition("/")[2] for item in items[-2:]] == ["b.jsonl, line 3", "c.jsonl, line 2"]


BAD = {
    "broken JSON": (b'{"text": "tw', r"is not JSON \(Unterminated string starting at, column 10\)"),
    "no object": (b'["two"]', "is not a JSON object"),
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
def test_faulty_line_stops_the_run_by_name_or_is_skipped(bad, packing, byte_tokenizer, tmp_path, caplog):
    line, words = BAD[bad]
    path = tmp_path / f"a.{packing}"
    content = b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n'
    path.write_bytes(gzip.compress(content) if packing.endswith("gz") else content)
    source = TextSource(path=str(path))
    run = read_documents(source, byte_tokenizer)(None)
    next(run)
    with pytest.raises(ValueError, match=rf"{path.name}, line 2 {words}.*data\.on_error=skip"):
        next(run)
    assert not caplog.records
    skipping = read_documents(source, byte_tokenizer, on_error="skip", epochs=2)
    items = take(skipping)
    assert given_texts(items, byte_tokenizer) == ["one", "three"] * 2
    assert [state["skipped"] for _, state in items] == [0, 1, 1, 2]
    assert [record.message.partition(" ")[0] for record in caplog.records] == [f"{path},"] * 2
    assert "line 2" in caplog.text and "skipped, 2 of this source so far" in caplog.text
    assert_resumes(skipping)


def test_line_that_is_not_utf8_is_named(byte_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nth\xe9 vert\n")
    (tmp_path / "b.txt").write_bytes(b"good")
    with pytest.raises(ValueError, match=r"a\.txt, line 3 is not UTF-8 text \(byte 10 of the file\)"):
        take(read_documents(TextSource(path=str(tmp_path)), byte_tokenizer))
    ((document, state),) = take(read_documents(TextSource(path=str(tmp_path)), byte_tokenizer, on_error="skip"))
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
def test_truncated_file_is_one_faulty_record(name, damage, words, byte_tokenizer, tmp_path):
    texts = pages(11)
    if name.startswith("a.txt"):
        (tmp_path / name).write_bytes(gzip.compress(texts[0].encode()))
    else:
        write_source(name.removeprefix("a."), texts, tmp_path)
        (tmp_path / name.replace("a.", "texts.")).rename(tmp_path / name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    (tmp_path / "b.txt").write_text("good")
    source = TextSource(path=str(tmp_path))
    with pytest.raises(ValueError, match=words):
        take(read_documents(source, byte_tokenizer))
    skipping = read_documents(source, byte_tokenizer, on_error="skip", epochs=2)
    items = take(skipping)
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
def test_faulty_row_is_named(column, words, byte_tokenizer, tmp_path):
    write_table(pa.table(column), tmp_path / "a.parquet")
    source = TextSource(path=str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet.*" + words):
        take(read_documents(source, byte_tokenizer))
    skipping = read_documents(source, byte_tokenizer, on_error="skip")
    if "row 1" in words:
        assert given_texts(take(skipping), byte_tokenizer) == ["one", "three"]
    else:
        words = f"no documents: 0 records are empty, {len(column.get('text', [1]))} could not be read"
        with pytest.raises(ValueError, match=words):
            take(skipping)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nosuch.txt", None, "is not a file, a folder, or a pattern"),
        ("nosuch*.jsonl", None, "is not a file, a folder, or a pattern"),
        ("a.json", b"[]", "is not a supported kind of file.*use .*jsonl"),
        ("a.jsonl.zst", b"", "is not a supported kind of file"),
        ("a.json.gz", b"", "is not a supported kind of file"),
        ("a.TAR.GZ", b"", "is not a supported kind of file"),
        ("a.parquet.gz", b"", "is not a supported kind of file"),
        ("empty.txt", b"", "has no documents: 1 records are empty, 0 could not be read"),
        ("empty.jsonl", b"", "has no documents: 0 records are empty"),
        ("blank.jsonl", b'\n{"text": " \\n"}\n\n', "has no documents: 1 records are empty"),
        ("folder", "a.md", r"has no file that ends in \.txt.*: name its text files with a pattern"),
        ("folder", ".hidden.txt", r"has no file that ends in \.txt"),
    ],
)
def test_invalid_paths_are_refused(name, content, words, byte_tokenizer, tmp_path):
    if isinstance(content, str):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("text")
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        take(read_documents(TextSource(path=str(tmp_path / name)), byte_tokenizer, epochs=None))
    assert name in str(refused.value)


def test_parquet_file_resumes_inside_a_row_group(byte_tokenizer, tmp_path):
    texts = [f"{n}" for n in range(211)]
    write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=157)
    run = read_documents(TextSource(path=str(tmp_path / "a.parquet")), byte_tokenizer)
    items = take(run)
    assert given_texts(items, byte_tokenizer) == texts
    for k in range(1, 211, 13):
        assert given_texts(take(run, state=items[k - 1][1]), byte_tokenizer) == texts[k:], k


def test_empty_parquet_file_has_no_documents(byte_tokenizer, tmp_path):
    write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no documents"):
        take(read_documents(TextSource(path=str(tmp_path / "a.parquet")), byte_tokenizer))


def test_folder_has_files_whose_names_end_in_capitals(byte_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "B.TXT").write_text("two")
    assert given_texts(take(read_documents(TextSource(path=str(tmp_path)), byte_tokenizer)), byte_tokenizer) == [
        "two",
        "one",
    ]
