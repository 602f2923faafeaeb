"""recipes.plan on a machine that recipes.calibrate measured: its errors, its links, and the memory of its layers."""

import json

import pytest
import yaml

from longctx.config import Mesh
from recipes import plan, pretrain
from recipes.common.hardware_file import read_machine
from recipes.common.plan_question import Question, WorkSettings
from recipes.common.planning import plans_of
from recipes.common.train_memory import predict_memory
from tests.cost.predict import shape_named

LINK = {"latency_s": 1e-4, "bytes_per_s": 1e9}
ATTENTION = {"flops": 1e10, "kv_bytes_per_s": 1e9, "block_s": 1e-5, "hop": LINK, "exchange": LINK, "overlap": 0.5}
LAYER = {"gemm_flops": 1e10, "weight_bytes_per_s": 1e9, "layer_s": 1e-3, "gather": LINK}


@pytest.fixture
def write_file(tmp_path):
    """``write_file(**more)``: the path of a hardware file, with the fields ``more`` beside the constants."""

    def write(**more):
        file = tmp_path / "laptop.yaml"
        file.write_text(yaml.safe_dump({**ATTENTION, "layer": LAYER, **more}))
        return str(file)

    return write


def test_calibrated_machines_plan_too(tmp_path, write_file):
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(ATTENTION))
    with pytest.raises(ValueError, match="no field 'layer', which predictions need: measure again"):
        read_machine(str(tmp_path / "old.yaml"))
    machine, work = read_machine(write_file()), WorkSettings("prefill", 4096)
    best = plans_of(Question(shape_named("tiny"), machine, 2, work, dtype_bytes=4))[0]
    assert best.refused is None
    assert best.mesh == Mesh(tp=2) or best.mesh.context == 2
    assert best.mfu is None and best.error is None and best.question.memory_gb is None


@pytest.mark.parametrize(("measured", "threads"), [({}, ""), ({"threads": 3}, "run.threads=3 ")])
def test_command_that_measures_errors_has_the_threads_of_the_file(cli, tiny, write_file, measured, threads):
    file = write_file(measured=measured)
    _, _, err = cli(plan, plan.task, f"model={tiny}", f"hardware={file}", "gpus=2", "work.context=64")
    says = f"python -m recipes.bench times hardware={file} model.dtype=float32 {threads}record=true only=[prefill,"
    assert f"measure it there with {says}" in " ".join(err.split()) and "extrapolated" in err


def test_error_of_a_calibrated_machine_is_printed_where_it_was_measured(cli, tiny, write_file):
    accuracy = {"share": 0.27, "axes": ["ring", "ulysses", "tp"], "ranks": 2, "element_bytes": 4}
    file = write_file(errors={"prefill": {**accuracy, "strategies": ["pass_kv"]}})
    words = (f"model={tiny}", f"hardware={file}", "gpus=2", "work.context=64")
    _, _, err = cli(plan, plan.task, *words, "strategy=pass_kv")
    assert "27%" in err and "record=true" not in err and "extrapolated" not in err
    _, _, err = cli(plan, plan.task, *words)
    errors = {tuple(line.split()[:2]): "27%" in line for line in err.splitlines() if line.startswith(" ring=2")}
    assert errors == {("ring=2", "pass_kv"): True, ("ring=2", "pass_q"): False, ("ring=2", "all_gather_kv"): False}


@pytest.mark.parametrize(
    ("kind", "axes", "gpus", "says"),
    [
        ("prefill", ["ring", "tp"], 2, True),
        ("prefill", ["ulysses", "tp"], 2, False),  # all strategies of prefill are the same there
        ("prefill", ["ring", "tp"], 1, False),
        ("decode", ["ulysses"], 2, True),
    ],
)
def test_errors_recorded_without_strategies_are_measured_again(cli, tiny, write_file, kind, axes, gpus, says):
    """Up to 0.2.0, strategies were not recorded, so that no mesh on which they differ has an error."""
    file = write_file(errors={kind: {"share": 0.27, "axes": axes, "ranks": 2, "element_bytes": 4}})
    words = (f"model={tiny}", f"hardware={file}", f"gpus={gpus}", f"work={kind}", "work.context=64")
    err = " ".join(cli(plan, plan.task, *words)[2].split())
    command = f"measure it there with python -m recipes.bench times hardware={file}"
    assert (f"are off on {file} where strategies differ is not known: {command}" in err) == says


@pytest.mark.parametrize(("gpus", "beyond"), [(8, False), (12, True)])
def test_links_of_a_gpu_node_are_said_to_be_those_of_its_ranks(cli, tiny, write_file, gpus, beyond):
    file = write_file(measured={"threads": None, "mesh": "ulysses=2 ring=4"})
    said = cli(plan, plan.task, f"model={tiny}", f"hardware={file}", f"gpus={gpus}", "work.context=64")[2]
    assert (f"were measured on ulysses=2 ring=4: if {gpus} GPUs are on more" in " ".join(said.split())) == beyond


def test_memory_of_a_step_on_cpus_is_that_of_a_run(cli, config_of, tmp_path, write_file):
    """The layers of a CPU keep more for the backward than those of a GPU."""
    file, out = write_file(), tmp_path / "plans.json"
    (tmp_path / "text.txt").write_text("a b c d e f g " * 200)
    data = ("data=text", f"data.sources=[{{path:{tmp_path}/text.txt}}]", "data.length=64", "data.batch=2")
    words = ("model=tiny", f"hardware={file}")
    run = pretrain.prepare(config_of("pretrain", *words, *data, "evaluate.every=0", f"out={tmp_path}/run"))
    work = ("gpus=1", "work=train", "work.context=64", "work.batch=2", f"work.zero1={run.optim.zero1}")
    code, _, err = cli(plan, plan.task, *words, *work, f"out={out}")
    assert code == 0, err
    assert json.loads(out.read_text())[0]["memory_gb"] == pytest.approx(sum(predict_memory(run).values()) / 1e9)
