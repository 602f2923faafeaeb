"""Files of tensors have the permissions of any new file, and every writer uses the function that sees to it."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longctx.hf.tensor_file import save_file
from tests.disk import full_disk

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    file = tmp_path / "model.safetensors"
    before = os.umask(umask)
    try:
        for value in (1.0, 2.0):  # a new file, and one that is replaced
            save_file({"x": torch.full((3,), value)}, file, metadata={"format": "pt"})
            assert stat.S_IMODE(file.stat().st_mode) == mode
    finally:
        os.umask(before)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"} and opened.get_tensor("x").tolist() == [2.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_named_and_leaves_no_file(tmp_path):
    file = tmp_path / "model.safetensors"
    with full_disk(2**12), pytest.raises(OSError, match=r"File too large: .*model\.safetensors") as caught:
        save_file({"x": torch.zeros(2**12)}, file)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert not [*tmp_path.iterdir()]


def test_no_other_module_writes_safetensors():
    sources = [file for room in ("longctx", "recipes", "eval") for file in (ROOT / room).rglob("*.py")]
    writers = [file.name for file in sources if "safetensors.torch import save_file" in file.read_text()]
    assert writers == ["tensor_file.py"]
