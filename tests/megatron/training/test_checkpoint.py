"""A checkpoint of any mesh resumes exactly on any other mesh; corrupt and later checkpoints are ignored."""

import errno
import queue
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from longctx import checkpoint_index
from longctx.config import Mesh, Optim
from longctx.megatron.training import checkpoint
from longctx.megatron.training.checkpoint import _ResultFile
from longctx.parallel.launch import run_ranks
from tests.tiny import tiny_model
from tests.train.ranks import Run, Step, refusal, train

LENGTHS = ((13, 0, 22, 2), (37,), (5, 11, 20, 1), (1, 1, 1, 34))
ZERO1 = Optim(zero1=True)
SAVED = Path(__file__).parents[2] / "saved" / "v0_1" / "train_ring" / "checkpoints"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tiny_model(tmp_path_factory.mktemp("train") / "tiny", max_positions=97, heads=8, kv_heads=4, ffn=52)
    return Run(Mesh(), folder, LENGTHS, steps=4)


def save_and_resume(run: Run, to: Mesh, folder: Path, **changed: object) -> list[Step]:
    """Train two steps on ``run``'s mesh, resume on the mesh ``to``, and return steps three and four.

    The resumed part has the optimizer settings ``changed``.
    """
    first = replace(run, steps=2, optim=replace(run.optim, decay_steps=4, warmup=3), checkpoints=folder, save_at=2)
    run_ranks(run.mesh.ranks, train, first)
    optim = replace(first.optim, **changed)
    return run_ranks(to.ranks, train, replace(first, mesh=to, begin=2, steps=4, optim=optim, save_at=0))[0]


@pytest.mark.parametrize(
    ("mesh", "to", "optim"),
    [
        (Mesh(), Mesh(ulysses=2, ring=2), Optim()),
        (Mesh(tp=2, pp=2), Mesh(ring=2), Optim()),
        (Mesh(dp=2, ring=2), Mesh(tp=2, pp=2), Optim()),
        (Mesh(dp=2), Mesh(tp=2, dp=2), ZERO1),
        (Mesh(tp=2, ring=2), Mesh(dp=2, pp=2), ZERO1),
        (Mesh(pp=2), Mesh(), ZERO1),
    ],
    ids=str,
)
def test_run_resumes_on_another_mesh(run, mesh, to, optim, tmp_path):
    optim = replace(optim, decay_steps=4, warmup=3)
    expected = run_ranks(1, train, replace(run, optim=optim))[0][2:]
    for step, reference in zip(
        save_and_resume(replace(run, mesh=mesh, optim=optim), to, tmp_path), expected, strict=True
    ):
        assert step.loss == pytest.approx(reference.loss, rel=1e-6)
        assert step.norm == pytest.approx(reference.norm, rel=2e-6)
        assert step.rate == reference.rate
    assert not [*tmp_path.rglob(".result*"), *tmp_path.glob("*.partial*")]


def test_writer_reports_through_a_file_that_is_made_late_and_removed(tmp_path):
    """A rank without tensors to write makes no file, which nothing would remove."""
    file = tmp_path / ".result-0"
    results = _ResultFile(file)
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put({0: ["written"]})
    assert results.get_nowait() == {0: ["written"]} and not any(tmp_path.iterdir())


@pytest.mark.parametrize("zero1", [False, True])
def test_bfloat16_run_resumes_from_float32_master_weights(run, zero1, tmp_path):
    """The resumed steps are bit-equal on the same mesh; from weights rounded to bfloat16 they would differ."""
    run = replace(run, dtype="bfloat16", mesh=Mesh(dp=2), optim=Optim(zero1=zero1, decay_steps=4, warmup=3))
    expected = run_ranks(2, train, run)[0][2:]
    assert save_and_resume(run, run.mesh, tmp_path / "same") == expected
    for step, reference in zip(save_and_resume(run, Mesh(tp=2), tmp_path / "other"), expected, strict=True):
        assert step.loss == pytest.approx(reference.loss, rel=2e-3)


@pytest.mark.parametrize("zero1", [False, True])
def test_resumed_run_uses_its_own_optimizer_settings(run, zero1, tmp_path):
    run = replace(run, optim=replace(run.optim, zero1=zero1))
    same = save_and_resume(run, Mesh(), tmp_path / "same")
    slower = save_and_resume(run, Mesh(), tmp_path / "slower", lr=1e-4, min_lr=1e-5)
    assert [step.rate for step in slower] == pytest.approx([step.rate / 10 for step in same])


def test_corrupt_and_later_checkpoints_do_not_count_towards_keep(run, tmp_path):
    for name in ("step-00000001", "step-00000004"):
        (tmp_path / name).mkdir()  # corrupt: no run.json
    (tmp_path / "step-00000003.partial-1234abc7").mkdir()
    run_ranks(1, train, replace(run, steps=2, checkpoints=tmp_path, save_at=2))
    assert [place.name for place in tmp_path.iterdir()] == ["step-00000002"]
    place, skipped = checkpoint_index.latest_whole(tmp_path)
    assert (place, skipped) == (tmp_path / "step-00000002", [])
    assert checkpoint_index.read_metadata(place)["note"] == "something"
    # A flipped bit is found by the file's checksum.
    assert not checkpoint_index.content_fault_of(place) and not checkpoint_index.unchecked_line(place)
    file = max(place.glob("*.distcp"), key=lambda file: file.stat().st_size)
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    file.write_bytes(flipped)
    assert not checkpoint_index.fault_of(place), "sizes are the same"
    assert checkpoint_index.latest_whole(tmp_path, checkpoint_index.content_fault_of) == (
        None,
        [f"{place.name} is corrupt: {file.name} has changed since it was written"],
    )


def test_all_ranks_refuse_what_the_first_rank_sees(tmp_path):
    corrupt, empty = tmp_path / "corrupt", tmp_path / "empty"
    (corrupt / "step-00000002").mkdir(parents=True)
    assert run_ranks(2, refusal, (empty, corrupt)) == ["", ""]
    first, second = run_ranks(2, refusal, (corrupt, empty))
    assert first == second and "has checkpoints, but none is whole" in first


def test_partial_checkpoint_is_reported_once(tmp_path):
    for hexadecimal in ("deadbeef", "1234abc7"):
        partial = tmp_path / f"step-00000003.partial-{hexadecimal}"
        partial.mkdir()
        (partial / "run.json").write_text('{"step": 3, "files": {}}')  # killed before the rename
    place, skipped = checkpoint_index.latest_whole(tmp_path)
    assert place is None
    assert len(skipped) == 2
    for message, hexadecimal in zip(sorted(skipped), ("1234abc7", "deadbeef"), strict=True):
        assert message.count(f"step-00000003.partial-{hexadecimal}") == 1


def test_checkpoint_of_a_newer_megatron_core_is_refused(monkeypatch, tmp_path):
    """Its plain values are not in common.pt, where megatron-core 0.16 expects them."""
    monkeypatch.setattr(checkpoint, "_IS_0_19", False)
    place = tmp_path / "step-00000004"
    shutil.copytree(SAVED / place.name, place, ignore=shutil.ignore_patterns("common.pt"))
    with pytest.raises(ValueError, match=r"written with megatron-core 0\.19; use Python 3\.12 or newer"):
        checkpoint.read_state({}, place)


def test_corrupt_checkpoint_does_not_replace_the_one_that_a_run_resumed_from(tmp_path, monkeypatch):
    """Checkpoint 27 has a changed byte, which its size does not show; the run resumed after step 20."""
    for step in (20, 27, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
    monkeypatch.setattr(checkpoint, "fault_of", lambda _: "")
    saving = SimpleNamespace(_folder=tmp_path, _keep=2, _stale={tmp_path / "step-00000027"})
    checkpoint.Checkpoints._prune(saving, 30)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


@pytest.fixture
def archive(tmp_path):
    """Checkpoint 20, which the folder of a run's checkpoints only links to."""
    (tmp_path / "run").mkdir()
    (tmp_path / "archive" / "step-00000020").mkdir(parents=True)
    (tmp_path / "run" / "step-00000020").symlink_to(tmp_path / "archive" / "step-00000020")
    return tmp_path / "archive" / "step-00000020"


def test_link_to_an_old_checkpoint_is_removed_without_the_checkpoint(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "fault_of", lambda _: "")
    (tmp_path / "run" / "step-00000030").mkdir()
    checkpoint.Checkpoints._prune(SimpleNamespace(_folder=tmp_path / "run", _keep=1, _stale=()), 30)
    assert [place.name for place in (tmp_path / "run").iterdir()] == ["step-00000030"] and archive.is_dir()


def test_checkpoint_replaces_a_link(archive, tmp_path):
    partial, place = tmp_path / "run" / "step-00000020.partial-1234abc7", tmp_path / "run" / "step-00000020"
    for _ in range(2):  # over the link, and over a folder
        partial.mkdir()
        checkpoint.commit(partial, place, {"step": 20}, {})
        assert [file.name for file in place.iterdir()] == ["run.json"] and not place.is_symlink()
    assert archive.is_dir() and not [*archive.iterdir()]


def test_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    def refuse(place):
        raise PermissionError(errno.EACCES, "Permission denied", str(place / "x"))

    monkeypatch.setattr(checkpoint, "fault_of", lambda _: "")
    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    places = [tmp_path / f"step-{step:08d}" for step in (10, 20, 30)]
    for place in places:
        place.mkdir()
    lines = []
    checkpoint.Checkpoints._prune(SimpleNamespace(_folder=tmp_path, _keep=1, _stale=(), _say=lines.append), 30)
    for place, line in zip(places[:2], lines, strict=True):
        assert f"{place} (Permission denied): remove it by hand" in line
