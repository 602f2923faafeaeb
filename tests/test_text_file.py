"""A text file is written whole or not at all, and errors of writing name the file."""

import errno
import os
from pathlib import Path

import pytest

from longctx.text_file import name_in_errors, write_text
from tests.disk import full_disk

ROOT = Path(__file__).parents[1]


def test_text_replaces_a_file_in_a_folder_that_is_made(tmp_path):
    folder = tmp_path / "new" / "folder"
    for text in ("one\n", "zwölf\n"):
        write_text(folder / "a.json", text)
        assert [(file.name, file.read_text(encoding="utf-8")) for file in folder.iterdir()] == [("a.json", text)]


def test_full_disk_is_named_and_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with full_disk(100), pytest.raises(OSError, match="File too large") as caught:
        write_text(file, "x" * 101)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.json", "old")]


def test_link_stays_and_so_do_permissions(tmp_path):
    file, link = tmp_path / "a.yaml", tmp_path / "link.yaml"
    file.touch(mode=0o600)
    link.symlink_to(file)
    write_text(link, "new")
    assert link.is_symlink() and file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o600


def test_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        write_text(pipe, "text")
        assert os.read(end, 9) == b"text" and pipe.is_fifo()
    finally:
        os.close(end)


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError) as caught:
        write_text(tmp_path / "file" / "a.json", "x")
    assert caught.value.filename == str(tmp_path / "file")


def test_other_errors_are_unchanged(tmp_path):
    with pytest.raises(ValueError, match=r"^other$"), name_in_errors(tmp_path):
        raise ValueError("other")


def test_no_other_module_writes_text():
    sources = [file for room in ("longctx", "recipes", "eval", "slurm") for file in (ROOT / room).rglob("*.py")]
    assert [file.name for file in sources if ".write_text(" in file.read_text()] == ["text_file.py"]
