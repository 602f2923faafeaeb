"""A flipped bit in a saved file is refused in a line, or changes nothing that is read from the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import SafetensorError, safe_open

from eval.answers import responses
from longctx import checkpoint_index
from longctx.checksum import crc32_of_files
from longctx.hf.checkpoint import tensor_files
from longctx.hf.config import shape_of
from longctx.infer import session_index
from longctx.spd.folder import read_block, write_block
from longctx.spd.plan import refuse_changed_weights, saved_plan
from tests.recipes.conftest import SAVED

FLIPS = 300  # in each kind of folder


def read_checkpoint(folder: Path) -> object:
    if fault := checkpoint_index.content_fault_of(folder):
        raise ValueError(fault)
    return checkpoint_index.read_metadata(folder)


def save_checkpoint(folder: Path) -> Callable[[], object]:
    """A copy of version 0.1's checkpoint with the checksums of today."""
    shutil.copytree(SAVED / "train_ring" / "checkpoints" / "step-00000004", folder)
    metadata = checkpoint_index.read_metadata(folder)
    del metadata["files"]
    files = [file for file in sorted(folder.iterdir()) if file.name != "run.json"]
    crcs = dict(zip((file.name for file in files), crc32_of_files(files), strict=True))
    checkpoint_index.write_index(folder, metadata, crcs)
    return lambda: read_checkpoint(folder)


def save_session(folder: Path) -> Callable[[], object]:
    """A copy of version 0.1's session with the checksum of today."""
    shutil.copytree(SAVED / "chat" / "session", folder)
    shape, index = shape_of(SAVED / "model"), json.loads((folder / "session.json").read_text())
    session_index.write_index(folder, index)
    return lambda: session_index.read_index(folder, index["model"], index["dtype"], shape)


def save_adapted_model(folder: Path) -> Callable[[], object]:
    """The plan and the weights of an adapted model, and a repaired block."""
    folder.mkdir()
    shutil.copy(SAVED / "spd_adapted" / "spd.safetensors", folder)
    saved_plan(SAVED / "spd_adapted").write(folder)
    block, names = read_block(SAVED / "spd_adapted" / "blocks" / "001.safetensors")
    write_block(folder / "001.safetensors", block, names)

    def read() -> object:
        plan = saved_plan(folder)
        refuse_changed_weights(folder)
        tensors, metadata = read_block(folder / "001.safetensors")
        # A flip in the name of the checksum leaves everything else as it was, as if version 0.1 had written it.
        return (
            plan,
            {name: tensor.tolist() for name, tensor in tensors.items()},
            {name: metadata[name] for name in names},
        )

    return read


def save_answers(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    file = folder / "answers.jsonl"
    responses.append(file, {"a": (-1.5, True), "b": "text, é", "c": "\n", "d": (0.25, False)}, 31, 0.5, "one")
    responses.append(file, {"e": "more"}, 0, 0.0, "two")
    whole = responses.read(file)

    def read() -> object:
        stored = responses.read(file)
        if stored.corrupt:
            assert stored.answers.items() <= whole.answers.items(), "what is left is unchanged"
            raise ValueError("corrupt lines")
        return stored

    return read


@pytest.mark.parametrize("save", [save_checkpoint, save_session, save_adapted_model, save_answers])
def test_flipped_bit_is_refused_or_changes_nothing(save, tmp_path):
    draw, messages = Random(save.__name__), list[str]()
    folder = tmp_path / "saved"
    read = save(folder)
    expected = read()
    files = sorted(folder.iterdir())
    for i in range(FLIPS):
        file = files[i % len(files)]
        content = file.read_bytes()
        bit = draw.randrange(8 * len(content))
        file.write_bytes(flip(content, bit))
        try:
            assert read() == expected, f"bit {bit} of {file.name}"
        except ValueError as error:
            messages.append(str(error))
        file.write_bytes(content)
    assert read() == expected and len(messages) > 0.9 * FLIPS
    assert all(messages) and not any("\n" in message for message in messages)


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_flipped_bit_in_the_header_of_a_models_weights_is_refused_or_changes_nothing(tmp_path):
    """A Hugging Face folder has no checksums, so that values of weights are not checked; names and places are."""
    folder, draw = tmp_path / "model", Random(1)
    shutil.copytree(SAVED / "model", folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    expected = read_tensors(folder)
    for _ in range(FLIPS):
        bit = draw.randrange(8 * end)
        file.write_bytes(flip(content, bit))
        try:
            tensors = read_tensors(folder)
        except (ValueError, SafetensorError):
            continue
        if tensors.keys() != expected.keys():
            continue  # loading refuses a missing tensor, and one that no part of the model takes
        for name, tensor in tensors.items():
            same = tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
            assert not same or torch.equal(tensor, expected[name]), f"bit {bit}, {name}"


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name, file in tensor_files(folder).items():
        with safe_open(file, "pt") as tensors:
            found[name] = tensors.get_tensor(name)
    return found
