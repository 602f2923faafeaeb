"""Jobs on a real Slurm: refusals that queue nothing, sweeps, dependencies, pipelines, cancelling."""

import json
import re
import time

import pytest

from slurm import submit
from tests.slurm.cluster import wait_until

# The time limit is far above what the tests need, because other work may occupy the cores.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
TINY = ("experiment=pretrain/tiny", "data.length=61", "data.batch=2", "run.threads=1", "evaluate.every=0", "time=30")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher.partition=night"], r"launcher\.partition=night: .*use one of main, urgent"),
        (["nodes=5", "mesh.ring=5"], r"partition main is too small for nodes=5: it has 3 nodes"),
        (
            ["mesh.ring=13"],
            r"too small for 13 ranks of a node with 1 core\(s\) each: its nodes have 8 core\(s\), use more nodes",
        ),
        (
            ["launcher.gpus_per_rank=1"],
            r"1 ranks of a node with 1 GPU\(s\) each: its nodes have 0 GPU\(s\), use another launcher\.partition",
        ),
        (["launcher.sbatch=['--constraint=moon']"], r"Slurm refuses: .*feature"),
        (["launcher.memory=1000G"], r"Slurm refuses: .*configuration is not available"),
        (["folder=/proc/nobody"], r"folder=/proc/nobody cannot be written"),
        (["mesh.rong=2"], r"mesh\.rong"),
        (["nodes=2"], r"nodes=2 does not divide the mesh's 1 ranks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_job_is_refused_and_nothing_is_queued(all_jobs, tmp_path, capsys, words, message):
    before = all_jobs()
    with pytest.raises(SystemExit) as leaving:
        submit.main(["recipe=pretrain", *TINY, "steps=3", f"folder={tmp_path / 'run'}", *words])
    out, err = capsys.readouterr()
    assert leaving.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err), err
    assert all_jobs() == before and not (tmp_path / "run").exists()


def test_sweep_is_an_array_of_runs(submit_job, tmp_path):
    job = submit_job("recipe=pretrain", *TINY, "steps=1,2", f"folder={tmp_path / 'sweep'}", "parallel=1")
    job.wait_for_end()
    for number, steps in enumerate((1, 2)):
        folder = job.folder / str(number)
        steps_done = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps_done == list(range(1, steps + 1))
        assert f"steps: {steps}\n" in (folder / "config.yaml").read_text()


ADAPT = "sequences=1 data.length=61 repair.sequences=8 repair.length=61 repair.epochs=1 repair.calibration_sequences=2"
EVAL = "eval.tasks=[arc_easy] eval.resamples=100 eval.sensitivity=1 eval.strict=true"


def test_pipeline_trains_adapts_and_evaluates_until_a_gate_fails(cluster, tmp_path, capsys):
    """The inputs of later steps do not exist yet when they are queued.

    So few examples leave the gate undecided, which fails with eval.strict, and the last job never starts.
    """
    base, hf, adapted, judged = (tmp_path / name for name in ("base", "hf", "adapted", "judged"))
    rows = [{"query": f"What is {i}?", "choices": ["a stone", "a boat"], "gold": i % 2} for i in range(5)]
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc" / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared = "variants=[{name:dropped,spd:{drop:ranked,budget:1.0}}] 'eval.gate=[dropped repaired]'"
    judge = f"adapted={adapted} mesh.tp=2 spd=none {compared} {EVAL} eval.data={tmp_path}"
    (tmp_path / "pipeline.yaml").write_text(
        f"- recipe=pretrain {' '.join(TINY)} steps=2 folder={base}\n"
        f"- recipe=export checkpoint={base} to={hf} folder={tmp_path}/export\n"
        f"- recipe=spd_adapt model={hf} mesh.tp=2 spd.budget=1.0 {ADAPT} folder={adapted}\n"
        f"- recipe=eval model={hf} {judge} folder={judged}\n"
        f"- recipe=export checkpoint={base} to={tmp_path}/never folder={tmp_path}/last\n"
    )
    submit.main([f"pipeline={tmp_path / 'pipeline.yaml'}", "time=30"])
    jobs = re.findall(r"^job (\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(jobs) == 5

    def states():
        return [cluster.output("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip() for job in jobs]

    until = time.monotonic() + 900
    while set(states()) & {"PENDING", "RUNNING", "COMPLETING"} and time.monotonic() < until:
        time.sleep(0.2)
    logs = "\n".join(file.read_text() for file in sorted(tmp_path.glob("*/**/*.log")))
    assert states() == ["COMPLETED", "COMPLETED", "COMPLETED", "FAILED", "CANCELLED"], logs
    report = json.loads((judged / "report.json").read_text())
    assert list(report["variants"]) == ["baseline", "dropped", "dropped repaired"]
    assert report["gate"] == {
        "variants": ["dropped repaired"], "strict": True, "failed": ["dropped repaired"], "passed": False
    }  # fmt: skip
    assert "the gate or a guard failed" in (judged / "job.log").read_text() and not (judged / "failure.txt").exists()
    assert not (tmp_path / "never").exists()


def test_pipeline_is_cancelled_if_slurm_rejects_its_last_job(cluster, tmp_path, capsys):
    """The first job is in the queue already when the second is rejected."""
    (tmp_path / "pipeline.yaml").write_text(
        f"- recipe=pretrain {' '.join(TINY)} steps=1 folder={tmp_path}/base\n"
        f"- recipe=pretrain {' '.join(TINY)} steps=1 folder={tmp_path}/next \"launcher.sbatch=['--constraint=moon']\"\n"
    )
    before = cluster.output("squeue", "-h", "-o", "%A")
    with pytest.raises(SystemExit) as leaving:
        submit.main([f"pipeline={tmp_path / 'pipeline.yaml'}"])
    assert leaving.value.code == 2 and "Slurm refuses" in capsys.readouterr().err
    wait_until(lambda: cluster.output("squeue", "-h", "-o", "%A") == before, 60, lambda: "the first is cancelled")
    assert not (tmp_path / "next").exists()


def test_run_that_is_refused_when_it_starts_is_not_requeued(submit_job, tmp_path):
    """It waits for a job that does not make the checkpoint it needs."""
    first = submit_job("recipe=pretrain", *TINY, "steps=1", f"folder={tmp_path / 'base'}")
    job = submit_job("recipe=export", f"checkpoint={tmp_path}/other", f"to={tmp_path}/hf", f"after={first.number}",
                     "restarts=5", f"folder={tmp_path / 'export'}")  # fmt: skip
    job.wait_for_end("FAILED")
    log = (job.folder / "job.log").read_text()
    assert "rank 0 on n1 exited with 2" in log and "is neither a checkpoint" in log
    assert "the recipe refused its settings: not requeued" in log


def test_folder_of_an_active_job_is_refused(submit_job, tmp_path, capsys):
    words = ("recipe=pretrain", *TINY, "steps=99999", f"folder={tmp_path / 'run'}")
    job = submit_job(*words)
    with pytest.raises(SystemExit):
        submit.main(words)
    assert f"belongs to job {job.number}, which waits or runs: scancel {job.number}" in capsys.readouterr().err
    job.wait_for_start()
    job.cluster.output("scancel", str(job.number))
    job.wait_for_end("CANCELLED")
