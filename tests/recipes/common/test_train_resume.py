"""A run that resumes reads the text that it began with, and knows the weights of its sources."""

import json
import shutil

import pytest
import transformers

from longctx import checkpoint_index
from longctx.checksum import crc32_of_file
from longctx.config import TextSource
from longctx.data.batches import training_batches
from longctx.data.identity import text_digests
from longctx.hf.config import tokenizer_of
from recipes import pretrain
from recipes.common import train_resume
from tests.recipes.conftest import SAVED
from tests.recipes.test_saved import TRAIN

SHARED = [word.replace("threads=", "run.threads=") for word in TRAIN]
WORDS = (*SHARED, "model.config.num_hidden_layers=2", "mesh.ring=2", "optim.zero1=false", "steps=6", "out=train_ring")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of version 0.1's run as the current folder, whose checkpoint has the digests of its text."""
    folder = tmp_path / "v0_1"
    shutil.copytree(SAVED, folder)
    monkeypatch.chdir(folder)
    place = folder / "train_ring" / "checkpoints" / "step-00000004"
    metadata = checkpoint_index.read_metadata(place)
    checksums = {name: crc32_of_file(place / name) for name in metadata.pop("files")}
    text = text_digests([TextSource(path="inputs/train.txt")])
    checkpoint_index.write_index(place, {**metadata, "text": text}, checksums)
    for config in folder.glob("train_*/model/config.json"):
        config.write_text(config.read_text().replace('"5.23.0"', f'"{transformers.__version__}"'))
    return folder


def test_other_text_of_the_same_name_and_size_is_refused(run, refused, config_of):
    assert pretrain.prepare(config_of("pretrain", *WORDS)).settings.steps == 6
    text = run / "inputs" / "train.txt"
    size = text.stat().st_size
    text.write_text(text.read_text().swapcase())
    assert text.stat().st_size == size
    line = refused(pretrain, pretrain.task, *WORDS)
    assert "the text of inputs/train.txt has changed since train_ring/checkpoints/step-00000004 was written" in line
    assert "restore it, or give another out=" in line


def test_linked_text_that_version_0_2_left_out_is_named_with_the_fix(run, refused, config_of):
    """Nothing has changed: restoring the text is no way out."""
    (run / "data").mkdir()
    (run / "far").mkdir()
    (run / "inputs" / "train.txt").rename(run / "data" / "train.txt")
    (run / "far" / "b.txt").write_text("more")
    (run / "data" / "linked").symlink_to(run / "far")
    words = (*WORDS, "data.sources=[{path:data}]")
    line = refused(pretrain, pretrain.task, *words)
    assert "version 0.2 left out data/linked/b.txt: " in line and "move the link data/linked away" in line
    (run / "data" / "linked").unlink()
    pretrain.prepare(config_of("pretrain", *words))


@pytest.mark.parametrize("content", ["", "\xff"])
def test_damaged_configuration_of_a_run_is_named_with_the_fix(run, refused, content):
    (run / "train_ring" / "model" / "config.json").write_bytes(content.encode("latin-1"))
    line = refused(pretrain, pretrain.task, *WORDS)
    assert "train_ring/model/config.json is damaged" in line
    assert "restore the model's file, or give another out=" in line


def test_moved_text_is_the_same(run, config_of):
    (run / "inputs" / "train.txt").rename(run / "train.txt")
    pretrain.prepare(config_of("pretrain", *WORDS, "data.sources=[{path:train.txt}]"))


def test_checkpoints_of_which_none_is_whole_are_refused_and_stay(run, refused):
    """A run that began again would replace them."""
    place = run / "train_ring" / "checkpoints" / "step-00000004"
    (place / "run.json").unlink()
    before = sorted((run / "train_ring").rglob("*"))
    line = refused(pretrain, pretrain.task, *WORDS)
    assert "none is whole (step-00000004 is corrupt: it has no whole run.json)" in line
    assert "restore one to resume; to begin again, delete them or give another out=" in line
    assert sorted((run / "train_ring").rglob("*")) == before


@pytest.mark.parametrize("settings", [("data.shuffle=3",), ("data.shuffle=3", "data.seed=1")])
def test_another_order_of_the_text_is_refused_before_any_rank_starts(run, refused, config_of, settings):
    place, manifest = run / "train_ring" / "checkpoints" / "step-00000004", run / "train_ring" / "manifest.json"
    metadata, before = checkpoint_index.read_metadata(place), manifest.read_bytes()
    checksums, job = metadata.pop("checksums"), pretrain.prepare(config_of("pretrain", *WORDS))
    state = next(training_batches(job.data, tokenizer_of(job.target.folder))(None))[1]  # version 0.1 saved no order
    checkpoint_index.write_index(place, {**metadata, "data": state}, checksums)
    line = refused(pretrain, pretrain.task, *WORDS, *settings)
    assert "the state to resume from needs data.shuffle=0 data.seed=0: use these, or start a new run" in line
    assert manifest.read_bytes() == before


def test_checkpoint_of_the_first_version_gets_its_weights_from_its_settings():
    sources = [{"path": "a", "weight": 3}, {"path": "b"}]
    documents = {"sources": [None, None], "tokens": [1, 2]}
    metadata = {"data": {"documents": documents, "used": 0}, "config": {"data": {"sources": sources}}}
    assert train_resume.text_state(json.loads(json.dumps(metadata)))["documents"] == {**documents, "weights": [3, 1.0]}
    metadata["data"]["documents"] = {**documents, "weights": [5, 5]}
    assert train_resume.text_state(metadata)["documents"]["weights"] == [5, 5]
    metadata["data"]["documents"] = None
    assert train_resume.text_state(metadata) == metadata["data"]


@pytest.mark.parametrize(
    ("dropped", "tp", "words"),
    [
        ([3, 0, 2], 3, "mesh.tp=3 spd.blocks=[0,2]"),
        ([2, 1], 1, "context.decode=sharded on 2 context ranks spd.blocks=[1]"),
    ],
)
def test_dropped_blocks_are_named_as_they_are_set(dropped, tp, words):
    assert train_resume._describe_dropped(dropped, tp) == words
