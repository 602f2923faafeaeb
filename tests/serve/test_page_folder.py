"""A folder of pages takes only a server like the one that made it."""

import json
from dataclasses import replace

import pytest

from longctx.serve.page_folder import INDEX, LOCK, PageOrigin, refuse_other_pages, write_origin

ORIGIN = PageOrigin("a" * 16 + "-" + "b" * 16, "float32", "ring=2", 64)


def test_other_servers_are_refused_with_what_differs(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    for name in (
        LOCK,
        f"{INDEX}.partial",
        f"{INDEX}.coming",
    ):  # a server that was killed at its first start leaves them
        (folder / name).touch()
    refuse_other_pages(folder, ORIGIN, "cache.save=x")
    write_origin(folder, ORIGIN)
    refuse_other_pages(folder, ORIGIN, "cache.save=x")
    changes = {"model": "c" * 16 + "-" + "b" * 16, "dtype": "bfloat16", "mesh": "one rank", "page": 32, "version": 2}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"cache.save=x has pages of {name} .* {name} is {value}: use another"):
            refuse_other_pages(folder, replace(ORIGIN, **{name: value}), "cache.save=x")


def test_folders_with_other_files_and_damaged_indices_are_refused(tmp_path):
    (tmp_path / "letter").touch()
    for place in (tmp_path, tmp_path / "letter"):
        with pytest.raises(
            ValueError, match="has other files than the saved pages of a server: use an empty or new folder"
        ):
            refuse_other_pages(place, ORIGIN, "cache.save=x")
    write_origin(tmp_path, ORIGIN)
    content = (tmp_path / INDEX).read_text()
    for damaged in (content.replace("64", "65"), content[:-3], "[]", json.dumps({"page": 64})):
        (tmp_path / INDEX).write_text(damaged)
        with pytest.raises(ValueError, match="delete the folder"):
            refuse_other_pages(tmp_path, ORIGIN, "cache.save=x")
