"""The index of a saved session is checked against its schema, the model and the rows in its files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longctx.hf.config import shape_of
from longctx.infer.session_index import INDEX, read_index, write_index
from tests.recipes.conftest import SAVED

MODEL, DTYPE = "8c6b64e14beaea55", "torch.float32"
FIRST, SECOND = "ring0-heads0.safetensors", "ring1-heads0.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A session of 63 cached tokens in two files, of a model of one KV head or more and 257 tokens."""
    shutil.copytree(SAVED / "chat" / "session", tmp_path / "session")
    return tmp_path / "session"


def read(folder: Path) -> Any:
    return read_index(folder, MODEL, DTYPE, shape_of(SAVED / "model"))


def test_session_without_a_checksum_of_its_index_is_read(folder):
    index = read(folder)
    assert "crc32" not in index and len(index["tokens"]["0"]) == index["cached"]["0"] + 1 == 64


def test_changed_digit_is_refused(folder):
    write_index(folder, json.loads((folder / INDEX).read_text()))
    assert read(folder)["crc32"]
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace("[39, 68,", "[39, 69,"))
    with pytest.raises(ValueError, match=r"session\.json has changed since it was saved"):
        read(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", {"0": [257] * 64}, "has the token 257, the model's vocabulary has 257"),
        ("tokens", {"0": [-1] * 64}, "has the token -1"),
        ("tokens", {"0": [1.0] * 64}, "has changed"),
        ("tokens", {"0": [True] * 64}, "has changed"),
        ("tokens", {"0": "text"}, "has changed"),
        ("tokens", [[1, 2]], "has changed"),
        ("tokens", {"1": [1] * 64}, "has changed"),
        ("tokens", {"0": [1] * 5}, "has 5 tokens of sequence 0, 63 of them cached"),
        ("cached", {"0": 61}, "do not have the positions 0 to 60 of sequence 0 once each"),
        ("cached", {"0": 64}, "do not have the positions 0 to 63 of sequence 0 once each"),
        ("cached", {"0": -1}, "-1 of them cached"),
        ("cached", {}, "has changed"),
        ("files", {}, "do not have all KV heads"),
        ("files", {"../ring0-heads0.safetensors": {"size": 1, "crc32": 1}}, "has changed"),
        ("files", {FIRST: {"size": 4704}}, "has changed"),
        ("files", [FIRST], "has changed"),
        ("model", 3, "has changed"),
        ("version", 1, "is of version 1"),
        ("more", 1, "has changed"),
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_unfit_index_is_refused(folder, key, value, message, signed):
    index = {**json.loads((folder / INDEX).read_text()), key: value}
    write_index(folder, index) if signed else (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"{" * 100_000, b'{"version": 2}'])
def test_damaged_index_is_refused(folder, content):
    (folder / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=r"session\.json (is corrupt|has changed)"):
        read(folder)


@pytest.mark.parametrize("left_out", [FIRST, SECOND])
def test_index_that_leaves_out_a_file_is_refused(folder, left_out):
    """Restoring from such an index would leave keys and values uninitialised."""
    index = json.loads((folder / INDEX).read_text())
    del index["files"][left_out]
    write_index(folder, index)
    with pytest.raises(ValueError, match="do not have the positions 0 to 62 of sequence 0"):
        read(folder)


def test_rows_that_two_files_have_are_refused(folder):
    index = json.loads((folder / INDEX).read_text())
    shutil.copy(folder / FIRST, folder / "ring7-heads0.safetensors")
    index["files"]["ring7-heads0.safetensors"] = index["files"][FIRST]
    write_index(folder, index)
    with pytest.raises(ValueError, match="once each"):
        read(folder)
