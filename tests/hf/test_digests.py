"""The fingerprint of a model changes with any byte of its weights, and each file is read once."""

import errno
import json
import os
import shutil

import pytest

from longctx.hf import digests
from longctx.hf.checkpoint import fingerprint, same_model
from longctx.hf.digests import sha256_of_files
from tests.recipes.conftest import SAVED

MODEL = SAVED / "model"
FIRST_VERSION = "8c6b64e14beaea55"  # version 0.1's fingerprint of this model, in the files that it wrote


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read whole."""
    names, read = [], digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path: names.append(path.name) or read(path))
    return names


def make_old(file, seconds=60):
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns - seconds * 10**9))


def test_every_byte_of_the_weights_counts(model):
    """The byte that changes is in the middle of a tensor, where version 0.1 did not look."""
    before, file = fingerprint(model), model / "model.safetensors"
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    first, end = max((x["data_offsets"] for x in header.values() if "dtype" in x), key=lambda x: x[1] - x[0])
    at = 8 + int.from_bytes(content[:8], "little") + first + (end - first) // 3
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    after = fingerprint(model)
    assert after != before and after[:16] == before[:16], "the samples of version 0.1 miss this byte"
    assert not same_model(before, after)


def test_config_counts(model):
    before = fingerprint(model)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert fingerprint(model) != before and not same_model(FIRST_VERSION, fingerprint(model))


@pytest.mark.parametrize("text", ["{}", "weights {}", "{}, spd [1] at tp=2"])
def test_fingerprint_of_the_first_version_is_accepted(text):
    now = text.format(fingerprint(MODEL))
    assert same_model(text.format(FIRST_VERSION), now) and same_model(now, text.format(FIRST_VERSION))
    assert same_model(now, now) and not same_model(text.format("0" * 16), now)
    assert not same_model(text.format(FIRST_VERSION + "-" + "0" * 16), now), "a digest of all bytes must be the same"


def test_a_file_is_read_once_until_it_changes(model, tmp_path, reads):
    file, cache = model / "model.safetensors", tmp_path / "cache"
    make_old(file)
    first = fingerprint(model, str(cache))
    assert (
        fingerprint(model, str(cache)) == first == fingerprint(model) and reads == [file.name] * 2
    )  # one without cache
    content = file.read_bytes()
    with file.open("r+b") as stream:  # the same size and inode
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\x11" * 4)
    make_old(file, 7)
    assert fingerprint(model, str(cache)) != first
    other = model / "other"
    other.write_bytes(content)  # the same size and time, another inode
    shutil.copystat(file, other)
    other.replace(file)
    assert fingerprint(model, str(cache)) == first and len(reads) == 4


def test_times_are_not_trusted_right_after_a_change(model, tmp_path, reads):
    """A file that was just written may be written again without a new time."""
    (model / "model.safetensors").touch()
    for _ in range(2):
        fingerprint(model, str(tmp_path / "cache"))
    assert reads == ["model.safetensors"] * 2


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_cache_is_replaced(model, tmp_path, content, reads):
    make_old(model / "model.safetensors")
    (tmp_path / "digests.json").write_text(content)
    first = sha256_of_files([model / "model.safetensors"], tmp_path)
    assert first == sha256_of_files([model / "model.safetensors"], tmp_path) and len(reads) == 1


def test_a_full_disk_and_a_foreign_lock_are_no_fault(model, tmp_path, monkeypatch, reads):
    make_old(model / "model.safetensors")
    (tmp_path / "cache" / "digests.lock").mkdir(parents=True)  # stands for a lock that this user must not open

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(digests, "write_text", fail)
        first = fingerprint(model, str(tmp_path / "cache"))
    for _ in range(2):
        assert fingerprint(model, str(tmp_path / "cache")) == first
    assert reads == ["model.safetensors"] * 2, "the second run remembers the digest"


def test_other_files_are_not_waited_for(tmp_path, monkeypatch):
    """While one process reads a file, a second one reads another; both digests are remembered."""
    files, read, cache = [tmp_path / "a", tmp_path / "b"], digests._sha256, tmp_path / "cache"
    for file in files:
        file.touch()
        make_old(file)

    def read_both(path):
        if path == files[0]:
            sha256_of_files(files[1:], cache)
        return read(path)

    monkeypatch.setattr(digests, "_sha256", read_both)
    monkeypatch.setattr(digests, "_LOCKS", 2**64)  # two of 64 may be the same
    sha256_of_files(files[:1], cache)
    assert set(json.loads((cache / "digests.json").read_text())) == {str(file) for file in files}


def test_locks_of_many_models_are_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_LOCKS", 3)
    for number in range(13):
        (tmp_path / f"{number}").touch()
        sha256_of_files([tmp_path / f"{number}"], tmp_path / "cache")
    assert 1 < len([*(tmp_path / "cache").glob("digests-*.lock")]) <= 3


def test_a_cache_that_cannot_be_made_is_not_needed(model, tmp_path):
    (tmp_path / "file").touch()
    assert fingerprint(model, str(tmp_path / "file" / "cache")) == fingerprint(model)
