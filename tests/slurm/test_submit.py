"""slurm.submit without a cluster: the script that it would queue, and what it refuses before it asks anybody."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.common.provenance import ROOT, commit_of, diff_of
from slurm import cluster, submit
from slurm.settings import seconds_of
from tests.tiny import tiny_model, tiny_tokenizer

TINY = ("recipe=pretrain", "experiment=pretrain/tiny", "data.length=61", "data.batch=2", "steps=3", "run.threads=1")


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """The one line that a command line is refused with; no trace is left of it."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        before = sorted(tmp_path.rglob("run*"))
        with pytest.raises(SystemExit) as leaving:
            submit.main(words)
        out, err = capsys.readouterr()
        assert leaving.value.code == 2 and not out
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert sorted(tmp_path.rglob("run*")) == before
        return err

    return run


@pytest.fixture
def script(capsys, tmp_path, monkeypatch):
    """The script of a command line, whose syntax bash finds good."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        submit.main([*words, "dry_run=true"])
        shown = capsys.readouterr().out
        subprocess.run(["bash", "-n"], input=shown, text=True, check=True)
        assert not (tmp_path / "run").exists(), "a dry run leaves nothing behind"
        return shown

    return run


def test_the_script_says_what_runs_where(script, tmp_path):
    shown = script(*TINY, "mesh.ring=4", "nodes=2", "time=1-02:00:00", "run=run", "after=12", "name=mine")
    told = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", shown, re.MULTILINE))
    assert told == {
        "job-name": "mine", "nodes": "2", "ntasks-per-node": "2", "time": "1-02:00:00", "signal": "B:USR1@120",
        "open-mode": "append", "output": f"{tmp_path}/run/job.log", "dependency": "afterok:12",
        "kill-on-invalid-dep": "yes",
    }  # fmt: skip
    assert "#SBATCH --requeue\n" in shown
    assert f"\n  out={tmp_path}/run\n" in shown and "\n  mesh.ring=4\n" in shown
    assert "--nodes=2 --ntasks-per-node=2 --distribution=block" in shown and "-m recipes.pretrain" in shown


def test_the_stable_command_prints_a_script(tmp_path):
    """As it is typed, where there is no Slurm."""
    words = "recipe=generate model=smollm2_135m nodes=2 ranks_per_node=2 mesh.ring=4 time=00:10:00 dry_run=true"
    command = [sys.executable, "-m", "slurm.submit", *words.split()]
    environment = {"PATH": "/usr/bin", "HOME": str(Path.home())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=generate\n")


def test_benchmarks_are_a_recipe_too_and_measure_nothing_before_they_start(script, refused, tmp_path, monkeypatch):
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc" / "arc_easy.jsonl").write_text('{"query": "Why?", "choices": ["so", "no"], "gold": 1}\n')
    tiny = tiny_model(tmp_path / "tiny", max_positions=397)
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(tiny)
    monkeypatch.setenv("LONGCTX_DATA", str(tmp_path))
    dropped = "variants=[{name:dropped,spd:{drop:ranked,budget:1.0}}]"
    words = ("recipe=eval", f"model={tiny}", "spd=none", dropped, "run=run")
    shown = script(*words, "mesh.tp=3")
    assert "#SBATCH --ntasks-per-node=3\n" in shown and " -m eval.run " in shown
    assert f"  out={tmp_path}/run\n" in shown and f"  eval.data={tmp_path}\n" in shown
    assert "case $code in 0 | 75 | 3)" in shown
    assert "use mesh.tp=2 or more" in refused(*words)
    other = "variants=[{name:ring,mesh:{ring:2}}]"
    assert "the job starts 3 ranks, variant ring has 6" in refused(*words, "mesh.tp=3", other)


def test_a_pipeline_s_steps_come_after_one_another(script, tmp_path):
    steps = [f"- {' '.join(TINY)} run=run", "- recipe=export checkpoint=run to=hf run=out after=7"]
    (tmp_path / "steps.yaml").write_text("\n".join(steps))
    first, second = script("pipeline=steps.yaml", "launcher.partition=night").split("#!/bin/bash\n")[1:]
    assert "dependency" not in first and "#SBATCH --dependency=afterok:7:JOB\n" in second
    assert first.count("--partition=night") == second.count("--partition=night") == 1


def test_of_a_pipeline_whose_last_step_is_refused_no_folder_is_left(refused, tmp_path):
    (tmp_path / "kept").mkdir()
    words = f"{' '.join(TINY)} launcher=local"
    steps = [f"- {words} run=run", f"- {words} run=kept", "- recipe=pretend run=run2"]
    (tmp_path / "steps.yaml").write_text("\n".join(steps))
    assert "recipe=pretend cannot be submitted" in refused("pipeline=steps.yaml")
    assert (tmp_path / "kept").is_dir(), "it was there before"


def test_of_jobs_that_are_cancelled_no_folder_is_left(tmp_path, monkeypatch):
    """The third is refused when the second waits already; the first ran here."""
    monkeypatch.chdir(tmp_path)
    words = f"{' '.join(TINY)} evaluate.every=0"
    launchers = {"a": "local", "b": "slurm", "c": "slurm", "d": "slurm"}
    steps = [f"- {words} run={name} launcher={how}" for name, how in launchers.items()]
    (tmp_path / "steps.yaml").write_text("\n".join(steps))
    for name in ("refuse_no_slurm", "refuse_unfit_cluster", "refuse_refused"):
        monkeypatch.setattr(cluster, name, lambda *_: None)
    monkeypatch.setattr(submit, "_run_here", lambda *_: None)
    cancelled, jobs = [], iter([7])
    monkeypatch.setattr(cluster, "cancel", cancelled.extend)

    def queued(script):
        if script.parent.name == "c":
            raise ValueError("Slurm refuses: no")
        return next(jobs)

    monkeypatch.setattr(cluster, "queued", queued)
    plans = submit.plans_of(["pipeline=steps.yaml"])
    assert [(tmp_path / name).is_dir() for name in launchers] == [True] * 4
    with pytest.raises(ValueError, match="Slurm refuses: no"):
        submit.submit(plans)
    assert cancelled == [7]
    assert [(tmp_path / name).is_dir() for name in launchers] == [True, False, False, False]


def test_free_text_reaches_the_recipe_as_it_is(script):
    """What bash makes of the script's words is what was typed."""
    text = """it's "a" (long), $HOME; `x` \\ text = 1"""
    shown = script("recipe=generate", "model=smollm2_135m", f"prompt.text={text}", "run=run, (1) 'a'")
    (words,) = re.findall(r"^words=\(.*?^\)$", shown, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", words + '\nprintf "%s\\n" "${words[@]}"'], capture_output=True, text=True, check=True
    )
    assert f"prompt.text={text}" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].endswith("/run, (1) 'a'/result.json")


def test_a_sweep_is_an_array_with_an_out_for_each(script, tmp_path):
    shown = script(*TINY, "optim.lr=1e-3,3e-4", "seed=0,1", "run=run", "parallel=2")
    assert "#SBATCH --array=0-3%2\n" in shown and f"#SBATCH --output={tmp_path}/run/%a/job.log\n" in shown
    assert f"  2) words+=(optim.lr=0.0003 seed=0 out={tmp_path}/run/2) ;;\n" in shown
    assert "optim.lr" not in shown.partition("case")[0].partition("words=")[2]
    # By hand it wants to know which.
    (tmp_path / "job.sbatch").write_text(shown)
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_ARRAY_TASK_ID"}
    command = ["bash", str(tmp_path / "job.sbatch")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "say which run of the sweep" in done.stderr


def test_a_cluster_s_own_lines_are_in_the_script(script):
    shown = script(*TINY, "launcher=example_cluster", "run=run", "launcher.container=apptainer exec image.sif",
                   "launcher.srun=['--container-image=a b']")  # fmt: skip
    for line in ("partition=h100", "account=long-context", "qos=normal", "mem=512G", "gpus-per-node=1", "exclusive"):
        assert f"#SBATCH --{line}\n" in shown
    assert "\nmodule load cuda/12.4\n" in shown and "--cpus-per-task=12 " in shown
    assert f"  apptainer exec image.sif {sys.executable} -m recipes.pretrain " in shown
    assert "'--container-image=a b'" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mesh.ring=4", "nodes=3"], r"nodes=3 with an even share .* do not make the mesh's 4 ranks \(ring=4\)"),
        (["mesh.ring=4", "nodes=2", "ranks_per_node=4"], r"nodes=2 with ranks_per_node=4 .*a mesh of 8"),
        (["mesh.tp=2", "nodes=2"], r"mesh\.tp=2 does not fit a node of 1 ranks"),
        (["mesh.tp=4"], r"mesh\.tp=4 does not divide"),  # the recipe's own
        (["mesh.rong=4"], r"mesh\.rong"),
        (["nods=2"], r"nods"),
        (["launcher.partitoin=x"], r"partitoin"),
        (["launcher=nowhere"], r"nowhere"),
        (["time=soon"], r"time=soon: use minutes"),
        (["time=1", "warning=60"], r"warning=60 is not before the end"),
        (["data=text", "data.sources=[{path:/nowhere}]"], "/nowhere is no file"),
        (["run=/proc/nobody"], "cannot be written"),
        (["restarts=-1"], "restarts=-1"),
        (["mesh.ring=1,2", "ranks_per_node=1"], "the same number of ranks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_refused_before_anybody_is_asked(refused, words, says):
    assert re.search(says, refused(*TINY, "run=run", *words))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recipe=pretend"], "recipe=pretend cannot be submitted: use chat, eval, export, extend, generate, pretrain"),
        (["nodes=2"], "say what to run: recipe="),
        (["recipe=export", "checkpoint=none", "to=there"], "checkpoint=none is no checkpoint"),
        (["pipeline=none.yaml"], "pipeline=none.yaml cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_nothing_to_run_is_refused(refused, words, says):
    assert says in refused(*words)


def test_without_sbatch_it_says_what_to_do(refused, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "there is no sbatch here: submit from a login node" in refused(*TINY, "run=run")


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """``squeue(code, out, err)``: from now on that is what squeue does."""

    def becomes(code: int, out: str, err: str) -> None:
        program = tmp_path / "bin" / "squeue"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nprintf '%s' '{out}'\nprintf '%s' '{err}' >&2\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return becomes


@pytest.mark.parametrize(
    ("answer", "active"),
    [
        ((0, " 12 main train root R 0:07 1 n1", ""), True),
        ((0, "", ""), False),
        ((1, "", "slurm_load_jobs error: Invalid job id specified"), False),
    ],
    ids=str,
)
def test_a_job_that_squeue_does_not_list_or_know_has_ended(squeue, answer, active):
    squeue(*answer)
    assert cluster.is_active(12) is active


def test_where_squeue_fails_a_run_that_has_a_job_keeps_its_code(squeue, refused, tmp_path):
    squeue(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    (tmp_path / "run" / "code").mkdir(parents=True)
    (tmp_path / "run" / "job.id").write_text("12\n")
    says = refused(*TINY, "launcher=local", "run=run")
    assert "whether job 12 waits or runs (Unable to contact slurm controller (connect failure)): submit again" in says
    assert (tmp_path / "run" / "code").is_dir()


def test_what_an_earlier_job_makes_may_be_missing(script, capsys):
    assert "--dependency=afterok:12:13" in script("recipe=export", "checkpoint=none", "to=there", "after=[12,13]")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("7", 420), ("7:05", 425), ("01:02:03", 3723), ("2-3", 183600), ("2-03:04", 183840), ("1-0:0:1", 86401), ("x", 0)],
)
def test_times_are_slurm_s(time, seconds):
    assert seconds_of(time) == seconds


def test_here_and_now_it_is_the_same_script(tmp_path, monkeypatch, capfd):
    """launcher=local: a sweep of two, of the code as it was frozen."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    marked = "launcher.setup=['echo \"print(123456789)\" >> $source/recipes/__init__.py']"
    words = ("launcher=local", "steps=1,2", "run=run", "evaluate.every=0", "launcher.container=env MARK=1", marked)
    submit.main([*TINY, *words])
    out = capfd.readouterr().out
    assert out.startswith(f"run {tmp_path}/run\n") and "123456789" in out, "another source was run"
    for number, steps in enumerate((1, 2)):
        lines = (tmp_path / "run" / str(number) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    code = tmp_path / "run" / "code"
    assert (code / "recipes" / "pretrain.py").is_file()
    assert (code / "COMMIT").read_text().strip() == commit_of(ROOT)
    assert (code / "dirty.diff").read_text() == diff_of(ROOT)
