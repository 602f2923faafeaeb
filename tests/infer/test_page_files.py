"""Pages on disk: read as they were written, and noticed if a byte of them has changed."""

import errno
import random
from pathlib import Path

import pytest
import torch

from longctx.attention.layout import zigzag
from longctx.infer.page_files import PageFiles, SavedPage, page_name
from longctx.infer.pages import Page

CPU = torch.device("cpu")


def make_page(rank: int, begin: int = 7, size: int = 5) -> Page:
    """Return a page of 5 positions on ``size`` ranks, of which the first has none."""
    layout = zigzag(53, size).between(begin, begin + 5)
    shape = (1, layout.rows(rank), 3, 11)
    return Page(layout, tuple((torch.randn(shape), torch.randn(shape)) for _ in range(2)))


def same(one: Page, other: Page) -> bool:
    pairs = zip(one.layers, other.layers, strict=True)
    return one.layout == other.layout and all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_pages_are_read_as_they_were_written(tmp_path, rank):
    files, first, second = PageFiles(tmp_path / "a" / "b", pytest.fail), make_page(rank, 0), make_page(rank, 5)
    name = files.write("", [3, 1, 2, 9, 70_000], first)
    following = files.write(name, [3, 1, 2, 9, 5], second)
    assert files.write("", [3, 1, 2, 9, 70_000], first) == name == page_name("", [3, 1, 2, 9, 70_000])
    reader = PageFiles(tmp_path / "a" / "b", pytest.fail)
    found = reader.read()
    assert found == {
        name: SavedPage("", (3, 1, 2, 9, 70_000), first.layout),
        following: SavedPage(name, (3, 1, 2, 9, 5), second.layout),
    }
    assert same(reader.load(name, CPU), first) and same(reader.load(following, CPU), second)
    files.delete([name, "unknown"])
    assert PageFiles(tmp_path / "a" / "b", pytest.fail).read().keys() == {following}
    assert not PageFiles(tmp_path / "nowhere", pytest.fail).read()


def test_pages_are_read_again_after_a_read_and_a_write(tmp_path):
    files = PageFiles(tmp_path, pytest.fail)
    names = {files.write("", [token] * 5, make_page(1)) for token in (3, 5)}
    for _ in range(2):
        assert files.read().keys() == names and len(list(tmp_path.iterdir())) == 2


def test_any_flipped_byte_and_any_cut_is_noticed(tmp_path):
    name = PageFiles(tmp_path, pytest.fail).write("", [1, 2, 3, 4, 5], make_page(1))
    (file,) = tmp_path.iterdir()
    content, draw = file.read_bytes(), random.Random(3)
    damaged = [content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
               for at in [*range(0, len(content), 37), len(content) - 1]]  # fmt: skip
    for one in [*damaged, content[:-1], content[:100], b""]:
        file.write_bytes(one)
        assert PageFiles(tmp_path, pytest.fail).read() == {name: None}
    # A whole page under another page's name.
    file.write_bytes(content)
    file.rename(tmp_path / file.name.replace(name, page_name("", [6])))
    assert PageFiles(tmp_path, pytest.fail).read() == {page_name("", [6]): None}


def test_incomplete_files_are_deleted(tmp_path):
    (tmp_path / "a.00000000.safetensors.coming").write_bytes(b"x")
    assert not PageFiles(tmp_path, pytest.fail).read() and not [*tmp_path.iterdir()]


def test_folder_that_cannot_be_written_is_reported_once(tmp_path):
    (tmp_path / "file").touch()
    lines: list[str] = []
    files = PageFiles(tmp_path / "file", lines.append)
    for token in range(3):
        files.write("", [token], make_page(1))
    assert len(lines) == 1 and "no more pages are saved" in lines[0]


def test_file_that_cannot_be_deleted_is_reported_once(tmp_path, monkeypatch):
    lines: list[str] = []
    files = PageFiles(tmp_path, lines.append)
    names = [files.write("", [token], make_page(1)) for token in range(3)]

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    files.delete(names)
    assert len(lines) == 1 and "cannot be deleted (Read-only file system): no more pages are saved" in lines[0]
    files.write("", [5], make_page(1))
    assert len([*tmp_path.iterdir()]) == 3
