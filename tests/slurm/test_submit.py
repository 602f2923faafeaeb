"""slurm.submit without a cluster: the job script, refusals before anything is queued, and launcher=local."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.common.provenance import ROOT, commit_of, diff_of
from slurm import cluster, submit
from slurm.plan import Recipe
from tests.slurm.conftest import TINY
from tests.tiny import tiny_model, tiny_tokenizer

DATE = r"\d+-\d+-\d+ \d+:\d+:\d+"


def test_script_has_the_resources_and_the_command(script, tmp_path):
    shown = script(*TINY, "mesh.ring=4", "nodes=2", "time=1-02:00:00", "folder=run", "after=12", "name=mine")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", shown, re.MULTILINE))
    assert options == {
        "job-name": "mine", "nodes": "2", "ntasks-per-node": "2", "time": "1-02:00:00", "signal": "B:USR1@120",
        "open-mode": "append", "output": f"{tmp_path}/run/job.log", "dependency": "afterok:12",
        "kill-on-invalid-dep": "yes",
    }  # fmt: skip
    assert "#SBATCH --requeue\n" in shown
    assert f"\n  out={tmp_path}/run\n" in shown and "\n  mesh.ring=4\n" in shown
    assert "--nodes=2 --ntasks-per-node=2 --distribution=block" in shown and "-m recipes.pretrain" in shown


def test_dry_run_prints_a_script_without_slurm(tmp_path):
    """The command is run as a user types it."""
    words = "recipe=generate model=smollm2_135m nodes=2 ranks_per_node=2 mesh.ring=4 time=00:10:00 dry_run=true"
    command = [sys.executable, "-m", "slurm.submit", *words.split(), f"folder={tmp_path}/run"]
    environment = {"PATH": "/usr/bin", "HOME": str(Path.home())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=generate\n")


def test_recipe_eval_is_submitted_and_checked(script, refused, tmp_path, monkeypatch):
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc" / "arc_easy.jsonl").write_text('{"query": "Why?", "choices": ["so", "no"], "gold": 1}\n')
    tiny = tiny_model(tmp_path / "tiny", max_positions=397)
    tiny_tokenizer(eos_token="~").save_pretrained(tiny)
    monkeypatch.setenv("LONGCTX_DATA", str(tmp_path))
    dropped = "variants=[{name:dropped,spd:{drop:ranked,budget:1.0}}]"
    words = ("recipe=eval", f"model={tiny}", "spd=none", dropped, "folder=run")
    shown = script(*words, "mesh.tp=3")
    assert "#SBATCH --ntasks-per-node=3\n" in shown and " -m eval.run " in shown
    assert f"  out={tmp_path}/run\n" in shown and f"  eval.data={tmp_path}\n" in shown
    assert "case $code in 0 | 75 | 3)" in shown
    assert "use mesh.tp=2 or more" in refused(*words)
    other = "variants=[{name:ring,mesh:{ring:2}}]"
    assert "the job starts 3 ranks, but variant ring has 6" in refused(*words, "mesh.tp=3", other)


def test_chat_needs_turns_that_a_job_can_take_once(refused, tmp_path):
    (tmp_path / "turns.jsonl").write_text('{"text": "a"}\n')
    words = ("recipe=chat", "model=smollm2_135m", "folder=run")
    assert "a job has no terminal to type turns at: give turns=FILE.jsonl" in refused(*words)
    both = ("turns=turns.jsonl", "session.load=talk", "session.save=talk")
    assert "it would take its turns again" in refused(*words, *both)


def test_setting_that_a_recipe_pins_may_come_from_an_earlier_job(script):
    words = ("recipe=eval", "model=smollm2_135m", "eval.data=NOTYET", "folder=run", "after=5")
    assert "eval.data=NOTYET" in script(*words)
    other = "variants=[{name:a,mesh:{ring:1}}]"
    with pytest.raises(ValueError, match="the job starts 2 ranks, but variant a has 1"):
        submit.make_plans([*words, "mesh.ring=2", other])


def test_runs_of_a_sweep_have_the_same_gpus(refused, script):
    words = (*TINY, "context.kernel=reference", "folder=run")
    sweep = (*words, "run.device=cpu,cuda")
    assert "run.device=cpu and cuda, and all of its runs get the same GPUs: submit" in refused(*sweep)
    assert "--gpus-per-node=1\n" in script(*sweep, "launcher.gpus_per_rank=1")
    assert "--gpus-per-node=1\n" in script(*words, "run.device=cuda")


def test_variants_share_nodes_and_gpus(refused, script, tmp_path):
    """A variant of eval on as many ranks has a mesh of its own; one-rank runs start the ranks of variants."""
    model = tiny_model(tmp_path / "tiny", 1999)
    eval_words = (
        "recipe=eval",
        "eval.tasks=[needle]",
        "eval.lengths=[709]",
        "eval.prefix_token=0",
        "eval.limit=1",
        "folder=run",
        f"model={model}",
    )
    before = "variants=[{name: a, mesh: {ring: 1, tp: 3}}]"
    assert "mesh.tp=3 does not divide the 1 rank(s) of a node" in refused(*eval_words, "mesh.ring=3", "nodes=3", before)
    alone = (*eval_words, "run.device=cuda", "context.kernel=reference", "variants=[{name: a, mesh: {ring: 2}}]")
    assert "--gpus-per-node=2\n" in script(*alone)


@pytest.mark.parametrize("name", ["code", "config.yaml", "job.sbatch"])
def test_folder_with_other_files_is_not_replaced(refused, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert f"run has {name}, which no job wrote and a job would replace" in refused(*TINY, "folder=run")


def test_home_and_additions_are_read_as_the_recipe_reads_them(script, refused, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    (home / "text.txt").write_text("It was the best of times. " * 99)
    assert script(*TINY, "data=text", "data.sources=[{path: '~/text.txt'}]", "folder=run")
    assert "there is no setting evaluation.every" in refused(*TINY, "++evaluation.every=5", "folder=run")
    shown = script(*TINY, "++model.config.num_hidden_layers=2,3", "folder=run")
    assert "0) words+=(++model.config.num_hidden_layers=2 " in shown


def test_every_run_of_a_sweep_has_its_own_pinned_settings(script, monkeypatch):
    """eval.data=auto names no folder next to the job's copy of the code."""
    pinned = Recipe("recipes.pretrain", "pretrain", lambda _: None, lambda config: (f"seed={config.steps * 100}",))
    monkeypatch.setattr("slurm.plan.recipe_of", lambda _: pinned)
    shown = script(*TINY, "steps=1,2", "folder=run")
    assert [re.search(rf"^  {run}\).* (seed=\d+)\)", shown, re.MULTILINE)[1] for run in (0, 1)] == [
        "seed=100",
        "seed=200",
    ]


def test_help_lists_settings_and_launchers(capsys):
    submit.main(["--help"])
    shown = capsys.readouterr().out
    assert "folder: null # the job's folder" in shown and re.search(r"\* launcher=slurm +sbatch, and srun", shown)


def test_launcher_settings_are_in_the_script(script):
    shown = script(*TINY, "launcher=example_cluster", "folder=run", "launcher.container=apptainer exec image.sif",
                   "launcher.srun=['--container-image=a b']")  # fmt: skip
    for line in ("partition=h100", "account=long-context", "qos=normal", "mem=512G", "gpus-per-node=1", "exclusive"):
        assert f"#SBATCH --{line}\n" in shown
    assert "\nmodule load cuda/12.4\n" in shown and "--cpus-per-task=12 " in shown
    assert f"  apptainer exec image.sif {sys.executable} -m recipes.pretrain " in shown
    assert "'--container-image=a b'" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mesh.ring=4", "nodes=3"], r"nodes=3 does not divide the mesh's 4 ranks \(ring=4\): .*a mesh of 3"),
        (["mesh.ring=4", "nodes=2", "ranks_per_node=4"], r"nodes=2 x ranks_per_node=4 is not .*a mesh of 8"),
        (["mesh.tp=2", "nodes=2"], r"mesh\.tp=2 does not divide the 1 rank\(s\) of a node: .*use nodes=1"),
        (["mesh.tp=4"], r"mesh\.tp=4 does not divide"),  # refused by the recipe
        (["mesh.rong=4"], r"mesh\.rong"),
        (["nods=2"], r"nods"),
        (["launcher.partitoin=x"], r"partitoin"),
        (["launcher=nowhere"], r"nowhere"),
        (["time=soon"], r"time=soon is not a time: use minutes"),
        (["time=1", "warning=60"], r"warning=60 is not before the end"),
        (["data=text", "data.sources=[{path:/nowhere}]"], "/nowhere is not a file"),
        (["folder=/proc/nobody"], "folder=/proc/nobody cannot be written"),
        (["restarts=-1"], "restarts=-1"),
        (["parallel=2"], "parallel=2 is for sweeps, but no setting lists several values"),
        (["out="], "out= is empty: give out=PATH"),
        (["mesh.ring=1,2", "ranks_per_node=1"], r"runs have 1 and 2 ranks, .*submit .* separately"),
        (["out=a,b", "seed=0,1"], r"out=\S*/a, which 2 runs would write to: give a single out=DIR"),
        (["out=a,a"], r"out=\S*/a, which 2 runs would write to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_job_is_refused_before_slurm_is_asked(refused, words, message):
    assert re.search(message, refused(*TINY, "folder=run", *words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=pretend"], "recipe=pretend cannot be submitted: use chat, eval, export, extend, finetune, generate"),
        (["nodes=2"], "exactly one of recipe and pipeline must be set"),
        (["recipe=export", "checkpoint=none", "to=there"], "checkpoint=none is neither a checkpoint"),
        (["pipeline=none.yaml"], "pipeline=none.yaml cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_missing_recipe_or_input_is_refused(refused, words, message):
    assert message in refused(*words)


def test_refusal_without_sbatch_names_the_alternatives(refused, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "there is no sbatch here: submit from a login node" in refused(*TINY, "folder=run")


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """``squeue(code, out, err)`` puts a squeue on PATH that prints ``out`` and ``err`` and exits with ``code``."""

    def install(code: int, out: str, err: str) -> None:
        program = tmp_path / "bin" / "squeue"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nprintf '%s' '{out}'\nprintf '%s' '{err}' >&2\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(
    ("answer", "active"),
    [
        ((0, " 12 main train root R 0:07 1 n1", ""), True),
        ((0, "", ""), False),
        ((1, "", "slurm_load_jobs error: Invalid job id specified"), False),
    ],
    ids=str,
)
def test_job_that_squeue_does_not_list_or_know_has_ended(squeue, answer, active):
    squeue(*answer)
    assert cluster.is_active(12) is active


def test_failing_squeue_refuses_a_folder_with_a_job_and_keeps_its_code(squeue, refused, tmp_path):
    squeue(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    (tmp_path / "run" / "code").mkdir(parents=True)
    (tmp_path / "run" / "code" / "COMMIT").touch()
    (tmp_path / "run" / "job.id").write_text("12\n")
    message = refused(*TINY, "launcher=local", "folder=run")
    assert (
        "whether job 12 waits or runs (Unable to contact slurm controller (connect failure)): submit again" in message
    )
    assert (tmp_path / "run" / "code").is_dir()


def test_damaged_number_of_a_job_is_named(squeue, refused, tmp_path):
    squeue(0, "", "")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.id").touch()
    message = refused(*TINY, "launcher=local", "folder=run")
    assert "run/job.id is damaged" in message and "then remove the file" in message


def test_input_that_an_earlier_job_makes_may_be_missing(script):
    assert "--dependency=afterok:12:13" in script("recipe=export", "checkpoint=none", "to=there", "after=[12,13]")


def test_launcher_local_runs_the_same_script(tmp_path, monkeypatch, capfd):
    """A sweep of two runs uses the frozen copy of the source, which a line of setup marks."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    marked = "launcher.setup=['echo \"print(123456789)\" >> $source/recipes/__init__.py']"
    words = ("launcher=local", "steps=1,2", "folder=run", "evaluate.every=0", "launcher.container=env MARK=1", marked)
    submit.main([*TINY, *words])
    out = capfd.readouterr().out
    assert out.startswith(f"run {tmp_path}/run\n") and "123456789" in out, "it ran another copy of the source"
    assert len(re.findall(rf"^{DATE} starts on \S+: 1 node\(s\) with 1 rank\(s\) each$", out, re.MULTILINE)) == 2
    assert len(re.findall(rf"^{DATE} ends with exit code 0$", out, re.MULTILINE)) == 2
    for number, steps in enumerate((1, 2)):
        lines = (tmp_path / "run" / str(number) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    code = tmp_path / "run" / "code"
    assert (code / "recipes" / "pretrain.py").is_file()
    assert (code / "COMMIT").read_text().strip() == commit_of(ROOT)
    assert (code / "dirty.diff").read_text() == diff_of(ROOT)


def test_task_of_an_array_is_requeued_alone(squeue, script, tmp_path, monkeypatch):
    """The last task's SLURM_JOB_ID is the number of the whole array."""
    squeue(0, "RUNNING", "")
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    text = script(*TINY, "seed=0,1", "launcher=local", "folder=run", "launcher.container=false")
    subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False)
    assert asked.read_text().split() == ["requeue", "12_1"]


@pytest.mark.parametrize(("restarts", "requeued"), [(None, False), ("1", True)])
def test_refused_settings_are_final_at_the_first_start_only(squeue, script, tmp_path, monkeypatch, restarts, requeued):
    """A later exit code of 2 comes from a machine or a network that fails."""
    squeue(0, "RUNNING", "")
    for name, line in {"scontrol": f"touch {tmp_path}/asked", "refuses": "exit 2"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    text = script(*TINY, "launcher=local", "folder=run", f"launcher.container={tmp_path}/bin/refuses")
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False)
    assert (tmp_path / "asked").exists() == requeued
    assert ("the recipe refused its settings: not requeued" in done.stdout) != requeued
    assert done.returncode == (0 if requeued else 2) and "bad substitution" not in done.stderr


def test_failing_run_here_ends_with_its_own_code_and_requeues_nothing(squeue, tmp_path, monkeypatch):
    """Here may be a job of Slurm's, which is not this run."""
    squeue(0, "RUNNING", "")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "48", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as leaving:
        submit.main([*TINY, "launcher=local", "folder=run", "launcher.container=false"])
    assert leaving.value.code == 1 and not (tmp_path / "asked").exists()
    assert (tmp_path / "run" / "failures").read_text() == "1\n"


def test_job_that_cannot_count_its_failures_is_not_started_again(squeue, script, tmp_path, monkeypatch):
    squeue(0, "RUNNING", "")
    asked, scontrol = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\ntouch {asked}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    (tmp_path / "run" / "failures").mkdir(parents=True)  # cannot be written, as on a full disk
    text = script(*TINY, "launcher=local", "folder=run", "launcher.container=false")
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not asked.exists()


@pytest.mark.parametrize(
    ("state", "restarts"),
    [*((state, True) for state in ("RUNNING", "", "SIGNALING")), ("COMPLETING", False), ("TIMEOUT", False)],
)
def test_job_whose_ranks_end_before_its_own_sigterm_arrives_is_not_requeued(
    squeue, script, tmp_path, monkeypatch, state, restarts
):
    """scancel ends the ranks first: to the script this looks like a failure, but the job's state has changed before."""
    squeue(0, state, "")
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    text = script(*TINY, "launcher=local", "folder=run", "launcher.container=false")
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False)
    assert asked.exists() == restarts, done.stdout
    assert re.fullmatch(rf"{DATE} ends with exit code {0 if restarts else 1}", done.stdout.splitlines()[-1])
    assert ("cancelled, or out of time" in done.stdout) != restarts, done.stdout
    assert (tmp_path / "run" / "failure.txt").exists() == restarts
