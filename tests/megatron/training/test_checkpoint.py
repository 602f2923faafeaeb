"""A checkpoint of any mesh goes on on any other, exactly; what is torn, or lies ahead, is in nobody's way."""

from dataclasses import replace
from pathlib import Path

import pytest

from longctx import checkpoint_index
from longctx.config import Mesh, Optim
from longctx.parallel.launch import run_ranks
from tests.tiny import tiny_model
from tests.train.ranks import Run, Step, train

LENGTHS = ((13, 0, 22, 2), (37,), (5, 11, 20, 1), (1, 1, 1, 34))
ZERO1 = Optim(zero1=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tiny_model(tmp_path_factory.mktemp("train") / "tiny", positions=97, heads=8, kv_heads=4, ffn=52)
    return Run(Mesh(), folder, LENGTHS, steps=4)


@pytest.fixture(scope="module")
def whole(run: Run) -> list[Step]:
    return run_ranks(1, train, run)[0]


def resumed(run: Run, to: Mesh, folder: Path, **changed: object) -> list[Step]:
    """The last two of four steps, on the mesh ``to``, of what ``run`` did the first two of."""
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
def test_a_run_goes_on_on_another_mesh(run, mesh, to, optim, tmp_path):
    optim = replace(optim, decay_steps=4, warmup=3)
    right = run_ranks(1, train, replace(run, optim=optim))[0][2:]
    for step, other in zip(resumed(replace(run, mesh=mesh, optim=optim), to, tmp_path), right, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=1e-6)
        assert step.norm == pytest.approx(other.norm, rel=2e-6)
        assert step.rate == other.rate


@pytest.mark.parametrize("zero1", [False, True])
def test_bfloat16_goes_on_with_its_float32_masters(run, zero1, tmp_path):
    """To the last bit on the same mesh: from rounded weights it would not."""
    run = replace(run, dtype="bfloat16", mesh=Mesh(dp=2), optim=Optim(zero1=zero1, decay_steps=4, warmup=3))
    right = run_ranks(2, train, run)[0][2:]
    assert resumed(run, run.mesh, tmp_path / "same") == right
    for step, other in zip(resumed(run, Mesh(tp=2), tmp_path / "other"), right, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=2e-3)


@pytest.mark.parametrize("zero1", [False, True])
def test_a_run_follows_its_present_settings(run, zero1, tmp_path):
    run = replace(run, optim=replace(run.optim, zero1=zero1))
    same = resumed(run, Mesh(), tmp_path / "same")
    slower = resumed(run, Mesh(), tmp_path / "slower", lr=1e-4, min_lr=1e-5)
    assert [step.rate for step in slower] == pytest.approx([step.rate / 10 for step in same])


def test_what_is_torn_or_lies_ahead_does_not_push_out_what_is_written(run, tmp_path):
    for name in ("step-00000001", "step-00000004"):
        (tmp_path / name).mkdir()  # without a run.json
    (tmp_path / "step-00000003.partial-1234abc7").mkdir()
    run_ranks(1, train, replace(run, steps=2, checkpoints=tmp_path, save_at=2))
    assert [place.name for place in tmp_path.iterdir()] == ["step-00000002"]
    place, passed = checkpoint_index.latest_whole(tmp_path)
    assert (place, passed) == (tmp_path / "step-00000002", [])
    assert checkpoint_index.read_metadata(place)["note"] == "something"


def test_a_checkpoint_that_was_being_written_is_named_once(tmp_path):
    for hexadecimal in ("deadbeef", "1234abc7"):
        partial = tmp_path / f"step-00000003.partial-{hexadecimal}"
        partial.mkdir()
        (partial / "run.json").write_text('{"step": 3, "files": {}}')  # killed between this and the renaming
    place, passed = checkpoint_index.latest_whole(tmp_path)
    assert place is None
    assert sorted(passed) == [
        f"step-00000003.partial-{hexadecimal} was being written when the run ended"
        for hexadecimal in ("1234abc7", "deadbeef")
    ]
