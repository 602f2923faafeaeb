"""recipes.pretrain: a run that is killed resumes with the same losses; wrong settings are refused."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from longctx import checkpoint_index
from longctx.config import Mesh
from longctx.hf.config import shape_of
from recipes import pretrain
from recipes.common import divergence
from recipes.common.cli import compose_config
from recipes.common.overrides import CONFIGS
from recipes.common.train_report import RunResult, show
from recipes.common.train_resume import checkpoint_bytes

ROOT = Path(__file__).parents[2]
QUICK = ("data.length=61", "data.batch=2", "run.threads=1", "evaluate.every=5", "evaluate.batches=1")
STEPS = 13


def lines(out: Path) -> list[dict]:
    """Return the figures of each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[tuple[int, float, float, int]]:
    """Return step, loss, norm of the gradient and number of tokens of each step."""
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines(out)]


def start(out: Path, *settings: str) -> subprocess.Popen:
    """Start a run in a process group that can be killed as a whole."""
    command = [sys.executable, "-m", "recipes.pretrain", "experiment=pretrain/tiny", f"out={out}", *QUICK, *settings]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def run_to_end(out: Path, *settings: str) -> str:
    """Run to the end in another process and return standard error."""
    run = start(out, *settings)
    err = run.communicate(timeout=120)[1]
    assert run.returncode == 0, err
    return err


def run_here(cli, out: Path, *settings: str, resume_after: int = 0) -> str:
    """Run to the end in this process with warm ranks, which is faster than `run_to_end`; return standard error.

    What ranks print is not in it.  The steps to ``resume_after`` must not run again: their lines, which have their
    seconds, stay as they were.
    """
    before = lines(out)[:resume_after] if resume_after else []
    code, _, err = cli(pretrain, pretrain.task, "experiment=pretrain/tiny", f"out={out}", *QUICK, *settings)
    assert code == 0, err
    assert len(before) == resume_after and lines(out)[:resume_after] == before
    return err


def kill_when(run: subprocess.Popen, condition) -> None:
    """Kill the recipe, its ranks and the writers of its checkpoints at once, as soon as ``condition()`` holds."""
    deadline = time.monotonic() + 120
    while not condition():
        assert run.poll() is None, f"the run ended: {run.stderr.read()}"
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture
def whole(cli, folder) -> Path:
    """Folder of a run that was not interrupted, made once for all tests."""
    if not (folder / "whole").exists():
        run_here(cli, folder / "whole", f"steps={STEPS}")
    return folder / "whole"


def test_run_learns_and_records_every_step(whole):
    steps = lines(whole)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    assert all(line["tokens_per_s"] > 0 and line["mem/peak_bytes"] > 0 and line["mfu"] is None for line in steps)
    assert [line["step"] for line in steps if "eval/perplexity" in line] == [5, 10, STEPS]
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == [f"step-{STEPS:08}"]


def test_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(cli, whole, tmp_path):
    """It is killed after random steps, and twice while a checkpoint is being written."""
    out, draw = tmp_path / "run", random.Random(11)
    settings = (f"steps={STEPS}", "checkpoint.every=2", "mesh.ring=2")

    def steps_done() -> int:
        return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0

    def is_saving() -> bool:
        return any((out / "checkpoints").glob("*.partial*"))

    for moment in ("step", "save", "step", "save"):
        run, step = start(out, *settings), min(steps_done() + draw.randint(2, 4), STEPS - 1)
        kill_when(run, is_saving if moment == "save" else lambda step=step: steps_done() >= step)
    run_here(cli, out, *settings, resume_after=2)
    for (step, loss, norm, tokens), expected in zip(curve(out), curve(whole), strict=True):
        assert (step, tokens) == (expected[0], expected[3])
        assert (loss, norm) == pytest.approx(expected[1:3], rel=2e-6)  # rounding on another mesh


def test_run_that_is_asked_to_stop_saves_and_resumes_after_the_same_step(cli, tmp_path):
    settings = ("steps=99", "mesh.ring=2", "checkpoint.every=1000", "evaluate.every=0")
    run = start(tmp_path, *settings)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len(lines(tmp_path)) < 2:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGUSR1)
    err = run.communicate(timeout=60)[1]
    done = len(lines(tmp_path))
    assert run.returncode == 75 and done < 99
    assert f"stopped after step {done}, as asked" in err
    run_here(cli, tmp_path, f"steps={done + 2}", *settings[1:], resume_after=done)
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, done + 3)]


def test_more_steps_resume_on_another_mesh(cli, tmp_path):
    """The learning rate is constant, so that a longer run has the same schedule.

    The resumed run offloads activations.  One of the runs has ``hardware``: it counts the memory of a step, and shows
    it beside the prediction.
    """
    constant = ("optim.decay=constant", "checkpoint.keep=1", "optim.zero1=true")
    run_here(cli, tmp_path / "a", *constant, "mesh.tp=2", "mesh.dp=2", "steps=4")
    offload = f"offload={tmp_path / 'activations'}"
    err = run_here(cli, tmp_path / "a", *constant, "mesh.ulysses=2", "mesh.pp=2", "steps=7", offload, resume_after=4)
    assert float(re.search(r"offloaded +(\S+) MB of activations, to", err)[1]) > 0.1
    assert lines(tmp_path / "a")[-1]["offloaded_bytes"] > 100_000
    machine = tmp_path / "machine.yaml"  # not by its name, whose rates are those of 16-bit numbers
    machine.write_text((CONFIGS / "machine" / "h200.yaml").read_text() + "measured: {dtype: float32}\n")
    err = " ".join(run_here(cli, tmp_path / "b", *constant, "steps=7", f"hardware={machine}").split())
    assert re.search(r"time of a step \S+ s, predicted \S+ s \(-\d+%\)", err)
    measured, predicted = re.search(r"peak memory of a step (\S+) MB, predicted (\S+): optimizer", err).groups()
    assert float(predicted) == pytest.approx(float(measured), rel=0.05)
    for a, b in zip(curve(tmp_path / "a"), curve(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=2e-6)


def test_run_with_another_optimizer_model_or_seed_is_not_resumed(whole, refused):
    settings = ("experiment=pretrain/tiny", f"out={whole}", *QUICK, "steps=99")
    line = refused(pretrain, pretrain.task, *settings, "optim.zero1=true")
    assert "was made with optim.zero1=false: use that, or another out=" in line
    line = refused(pretrain, pretrain.task, *settings, "model.dtype=bfloat16")
    assert "was made with model.dtype=float32" in line
    line = refused(pretrain, pretrain.task, *settings, "seed=1")
    assert "began with seed=0, but this run with seed=1: give another out=" in line
    line = refused(pretrain, pretrain.task, *settings[:-1], "steps=3")
    assert f"steps=3, but {whole}/checkpoints/step-{STEPS:08} is after step {STEPS}" in line
    line = refused(pretrain, pretrain.task, *settings, "+model.config.rms_norm_eps=1e-3")
    assert "has a run of another model" in line


def test_run_under_torchrun(whole, tmp_path):
    """Both ranks check the command line and make the run's folder at the same time."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "recipes.pretrain"]
    settings = ["experiment=pretrain/tiny", "mesh.ring=2", f"out={tmp_path}", *QUICK, "steps=2"]
    run = subprocess.run([*launch, *settings], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("step-00000002") == 1, "only one rank prints"
    assert [line[0] for line in curve(tmp_path)] == [1, 2]


def test_resumed_run_continues_the_same_wandb_run(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_to_end(tmp_path, "track=wandb", "steps=2", "track.tags=[a,b]")
    run_here(cli, tmp_path, "track=wandb", "steps=3", resume_after=2)
    metadata = checkpoint_index.read_metadata(checkpoint_index.latest_whole(tmp_path / "checkpoints")[0])
    starts = sorted((tmp_path / "wandb").glob(f"offline-run-*-{metadata['run_id']}"))
    assert len(starts) == 2, "two starts of one run"
    assert metadata["config"]["track"]["backend"] == "wandb"
    assert {"commit", "command", "processor"} <= set(metadata["config"])
    samples = [json.loads(line) for line in (tmp_path / "tables.jsonl").read_text().splitlines()]
    assert [table["table"] for table in samples] == ["samples"], "samples are written once, at the first start"


def test_run_ends_with_a_checkpoint_when_its_text_ends(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A short text, of which there is no more. " * 11)
    err = run_to_end(
        tmp_path / "run",
        "data=text",
        f"data.sources=[{{path:{text}}}]",
        "data.epochs=1",
        "steps=99",
        "evaluate.every=0",
    )
    done = len(lines(tmp_path / "run"))
    assert done == 451 // (2 * 61)
    assert f"the text ended after step {done}: data.epochs=1" in err
    latest, _ = checkpoint_index.latest_whole(tmp_path / "run" / "checkpoints")
    assert checkpoint_index.read_metadata(latest)["step"] == done


@pytest.mark.parametrize("damage", ["a file cut short", "no run.json"])
def test_corrupt_checkpoint_is_passed_over_and_named(cli, tmp_path, damage):
    run_here(cli, tmp_path, "checkpoint.every=2", "steps=4")
    corrupt = tmp_path / "checkpoints" / "step-00000004"
    if damage == "no run.json":
        (corrupt / "run.json").unlink()
    else:
        largest = max(corrupt.glob("*.distcp"), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
    err = run_to_end(tmp_path, "checkpoint.every=2", "steps=5")
    assert err.count("checkpoint skipped: step-00000004 is corrupt") == 1
    assert "resuming after step 2" in err
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["mesh.tp=4"], r"mesh\.tp=4 does not divide .*use mesh\.tp=2"),
        (["mesh.ulysses=4"], r"mesh\.ulysses=4 .*use mesh\.ulysses="),
        (["mesh.pp=3"], r"mesh\.pp=3 does not divide 4 layers: use mesh\.pp=[24]"),
        (["mesh.dp=3"], r"data\.batch=2 sequences do not divide over 3 .*use data\.batch=3"),
        (["data.length=9000"], r"data\.length=9,000 is more than the model's context of 4,096: .*model\.max_positions"),
        (["data=text", "data.sources=[{path:/nowhere/at/all}]"], "/nowhere/at/all is not a file"),
        (["data=text", "data.sources=[{path:README.md,share:3}]"], r"there is no setting data\.sources\.0\.share"),
        (["out=/dev/null/here"], r"out=/dev/null/here cannot be written \(Not a directory\): give a writable folder"),
        (["out=/proc/here"], r"out=/proc/here cannot be written \(.*\): give a writable folder"),
        (["+model.config.attention_dropout=0.1"], r"attention_dropout=0\.1: longctx trains without dropout"),
        (["context.chunk=7"], r"context\.chunk=7 is for inference"),
        (["mesh.tp=2", "++reduce.attention=int8"], r"rounded reductions \(.*int8.*\) are for inference: leave out"),
        (["optim.warmup=5", "optim.decay_steps=5"], r"optim\.decay_steps=5 is not after optim\.warmup=5"),
        (["optim.clip=-1"], r"clip=-1"),
        (["data.epochs=1", "data.batch=9999"], "the text does not fill a batch"),
        (["context.strategy=auto"], r"context\.strategy=auto .* recipes\.pretrain takes one of pass_kv"),
        (["optim.min_lr=1"], r"optim\.min_lr=1\.0 and optim\.lr"),
        (
            ["data=text", "data.sources=[{path:BYTES}]", "data.end_token=false"],
            "the first batch has nothing to learn from",
        ),
        (
            ["run.device=cuda"],
            r"run\.device=cuda: .* here; use run\.device=cpu, .*run=gpu model\.dtype=bfloat16",
        ),
        (["recompute=some"], "recompute=some"),
        (["hardware=/nowhere.yaml"], "hardware=/nowhere.yaml is neither a machine of configs"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused_before_any_rank_starts(refused, tmp_path, settings, words):
    import re

    (tmp_path / "bytes.jsonl").write_text('{"text": "a"}\n' * 200)  # documents of one token
    settings = [setting.replace("BYTES", f"{tmp_path}/bytes.jsonl") for setting in settings]
    line = refused(pretrain, pretrain.task, "experiment=pretrain/tiny", f"out={tmp_path}", *QUICK, *settings)
    assert re.search(words, line), line


def test_step_without_targets_is_named(cli, tmp_path):
    """Two sequences of 61 tokens a step: text for the first, then documents of a token."""
    rows = ["x" * 122, *["a"] * 300]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    text = ("data=text", f"data.sources=[{{path:{tmp_path}/text.jsonl}}]", "data.end_token=false")
    quick = (*QUICK, "evaluate.every=0")
    code, _, err = cli(pretrain, pretrain.task, "experiment=pretrain/tiny", f"out={tmp_path}/run", *quick, *text)
    assert code == 1
    assert "the batch of step 2 has nothing to learn from" in err.splitlines()[-1]


def test_diverged_run_names_its_step_and_its_last_checkpoint(cli, tmp_path):
    """The figures of the last step are recorded, its weights are not saved."""
    more = ("steps=9", "optim.lr=1e25", "optim.warmup=0", "optim.clip=0", "checkpoint.every=1", "evaluate.every=1")
    words = ("experiment=pretrain/tiny", f"out={tmp_path}", *QUICK, *more)
    code, _, err = cli(pretrain, pretrain.task, *words)
    assert code == 1
    line = err.splitlines()[-1]
    assert "training has diverged" in line and "in step 2" in line and "use a lower optim.lr" in line
    assert "model.dtype=float32" not in line, "it is"
    assert f"the weights in {tmp_path}/checkpoints/step-00000001 have diverged: give another out=" in line
    assert (lines(tmp_path)[-1]["step"], lines(tmp_path)[-1]["grad_norm"]) == (2, "nan")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_size_of_a_checkpoint_is_predicted(whole, cli, tmp_path):
    more = ("model.dtype=bfloat16", "optim.zero1=true", "steps=1", "evaluate.every=0")
    cli(pretrain, pretrain.task, "experiment=pretrain/tiny", f"out={tmp_path}", *QUICK, *more)
    for run, dtype, zero1 in ((whole, "float32", False), (tmp_path, "bfloat16", True)):
        place = max((run / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in place.iterdir())
        predicted = checkpoint_bytes(shape_of(run / "model"), dtype, zero1=zero1, adapters=False)
        assert 0.94 < predicted / size < 1, (dtype, predicted, size)


def test_full_disk_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    line = refused(pretrain, pretrain.task, "experiment=pretrain/tiny", f"out={tmp_path}")
    assert "has 0.00 GB free, but the checkpoints still to be written take 0.02 GB at once: use another disk" in line
    partial = tmp_path / "checkpoints" / "step-00000004.partial-1"
    partial.mkdir(parents=True)
    with (partial / "x").open("wb") as left:  # by a killed run; it is removed at the start
        left.truncate(10**8)
    assert pretrain.prepare(compose_config("pretrain", ["experiment=pretrain/tiny", f"out={tmp_path}"]))


def test_number_of_weights_of_a_model(smollm2):
    from recipes.common.train_resume import weights_of

    assert weights_of(shape_of(smollm2[1])) == pytest.approx(134.5e6, rel=2e-3)


def test_run_that_had_finished_shows_no_loss(capsys):
    target = SimpleNamespace(mesh=Mesh())
    job = SimpleNamespace(
        settings=SimpleNamespace(steps=7), target=target, out=Path("run"), machine=None, config={"dropped": []}
    )
    show(job, RunResult(7, None, "run/checkpoints/step-7", stopped=False))
    shown = capsys.readouterr().err
    assert re.search(r"loss +no step was left to run", shown) and "nan" not in shown


def test_checkpoint_before_the_diverged_weights_is_the_one_to_resume_from(tmp_path, monkeypatch):
    for step in (4, 6):
        (tmp_path / f"step-{step:08d}").mkdir()
    monkeypatch.setattr(checkpoint_index, "fault_of", lambda _: "")
    monkeypatch.setattr(checkpoint_index, "read_metadata", lambda place: {"step": int(place.name[-1])})
    good, bad = tmp_path / "step-00000004", tmp_path / "step-00000006"
    resumes = f"the last good checkpoint is {good}, from which the same out= resumes"
    assert divergence._describe_resume(tmp_path, 7, True) == f"the weights in {bad} have diverged: remove it; {resumes}"
    held_out = resumes.replace(str(good), str(bad))
    assert divergence._describe_resume(tmp_path, 7, False) == held_out, "the step itself did it"
    assert divergence._describe_resume(tmp_path, 8, True) == resumes.replace(str(good), str(bad))
    assert divergence._describe_resume(tmp_path / "none", 8, True) == "no checkpoint exists"


@pytest.mark.parametrize("words", [["context.decode=pass_q"], ["context.decode=sharded", "mesh.ring=2"]])
def test_decoding_is_refused_in_training(refused, words, tmp_path):
    words = ("experiment=pretrain/tiny", f"out={tmp_path}", *words)
    assert "is for inference: leave it out" in refused(pretrain, pretrain.task, *words)
