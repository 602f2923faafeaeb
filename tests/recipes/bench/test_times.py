"""recipes.bench times: measured and predicted seconds of single runs, and refused runs."""

import json
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import yaml

from longctx.config import DataSettings, Mesh, ModelSource, TextSource
from longctx.cost.forward import Numbers
from longctx.cost.machine import Accuracy
from longctx.cost.machine_file import machine_of
from longctx.cost.step import StepWork, step_cost
from longctx.hf.config import shape_of
from recipes.bench import times
from recipes.bench.timed_run import TimedRun, first_batch
from recipes.bench.times import accuracies
from recipes.bench.times_report import choices, coverage, errors, expected_error, merge, page_of
from recipes.common.hardware_file import read_machine, record_errors

RUNS = (
    "runs=[{work:prefill},{work:prefill,cached:70},{work:prefill,new:31},{work:prefill,new:43},"
    "{work:decode,cached:70,strategy:gather_merge},{work:train}]"
)
LINK = {"latency_s": 1e-4, "bytes_per_s": 1e9}
LAYER = {"gemm_flops": 1e10, "weight_bytes_per_s": 1e9, "layer_s": 1e-3, "gather": LINK}
VALUES = {"flops": 1e10, "kv_bytes_per_s": 1e9, "block_s": 1e-5, "hop": LINK, "exchange": LINK, "overlap": 0.5}


def test_each_run_has_measured_and_predicted_seconds(cli, tmp_path):
    file, hardware = tmp_path / "times.json", tmp_path / "laptop.yaml"
    hardware.write_text(yaml.safe_dump({**VALUES, "layer": LAYER}))
    files = (f"json={file}", f"markdown={tmp_path / 'pages' / 'times.md'}", f"picture={tmp_path / 'times.svg'}")
    settings = (f"hardware={hardware}", "rounds=2", "record=true", *files, f"out={tmp_path / 'run'}")
    code, _, err = cli(times, times.task, "model=tiny", "data.length=61", RUNS, *settings)
    assert code == 0, err
    assert "mean absolute error" in err and "decode after 70, one rank" in err
    runs = json.loads(file.read_text())["runs"]
    names = [run["run"].split(",")[0] for run in runs]
    assert names[:2] == ["prefill", "prefill after 70"] and names[4:] == ["decode after 70", "train"]
    for run, error in zip(runs, errors(runs), strict=True):
        assert len(run["measured"]) == 2 and min(run["measured"]) > 0
        assert error == pytest.approx(sum(run["predicted"].values()) / median(run["measured"]) - 1)
    first, later = (sum(run["predicted"].values()) for run in runs[:2])
    assert first < later, "cached keys take time"
    largest = max(map(abs, errors(runs[:4])))
    assert read_machine(str(hardware)).errors == {"prefill": Accuracy(largest, (), 1, 4)}
    assert f"prediction errors for recipes.plan, written to {hardware}: prefill {largest:.0%}" in " ".join(err.split())
    page = (tmp_path / "pages" / "times.md").read_text()
    assert "| runs | 6 |" in page and "| prefill of 61 after 70, one rank |" not in page
    assert "prefill after 70, one rank" in page and "measured" in (tmp_path / "times.svg").read_text()


def test_training_step_is_predicted_for_the_documents_of_its_batch(tiny):
    """The text has several documents; one document as long as the sequence would take more attention."""
    text = DataSettings((TextSource(pydoc="train"),), 16381, 1, end_token=False)
    target = SimpleNamespace(
        folder=tiny, shape=shape_of(tiny), mesh=Mesh(), model=ModelSource("tiny", "folder"), plan=None,
        run=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    settings = SimpleNamespace(recompute="none", loss_rows=512, mlp_rows=None, offload=None)
    job = SimpleNamespace(target=target, data=text, settings=settings, optim=SimpleNamespace(zero1=False))
    (lengths,) = first_batch(job).documents
    assert len(lengths) > 1 and sum(lengths) == 16381
    machine = machine_of({**VALUES, "layer": LAYER}, "laptop")
    parts = times.predict(machine, job, TimedRun("train"))
    work = StepWork(16381, 1, loss_rows=512, operations="cpu")
    one, packed = (
        step_cost(target.shape, Mesh(), machine, replace(work, documents=documents), "pass_kv", Numbers(4, 4)).parts
        for documents in (((16381,),), (lengths,))
    )
    assert parts == packed and parts["attention"] < 0.9 * one["attention"]


@pytest.mark.parametrize(
    "run",
    [
        {"work": "prefill", "strategy": "sharded"},
        {"work": "prefill", "dp": 2},
        {"work": "decode"},
        {"work": "train", "cached": 5},
        {"work": "train", "new": 5},
        {"work": "decode", "cached": 5, "tp": 3, "drop": 0.5},
        {"work": "prefill", "reduce": "int8"},
    ],
)
def test_impossible_runs_are_refused(run):
    with pytest.raises(ValueError, match="work="):
        TimedRun(**run)


def row(group, measured, predicted, strategy="pass_kv", cached=0):
    return {
        "run": f"prefill, ring=2, {strategy}", "group": group, "strategy": strategy, "new": 9, "cached": cached,
        "measured": [measured], "predicted": {"all": predicted},
    }  # fmt: skip


def test_a_choice_costs_what_the_fastest_by_prediction_takes_longer():
    rows = [row("a", 1.0, 1.2), row("a", 1.1, 1.1, "pass_q"), row("a", 2.0, 2.0, cached=5), row("b", 1.0, 1.0)]
    ((chosen, best, cost),) = choices(rows)
    assert (chosen["strategy"], best["strategy"], cost) == ("pass_q", "pass_kv", pytest.approx(0.1))
    assert "0 of 1, worst 10%" in "\n".join(page_of(rows))


def test_expected_errors_come_from_other_groups():
    rows = [*(row("a", 1.0, 1 + i / 100) for i in range(10)), row("b", 1.0, 1.05), row("b", 1.0, 0.5)]
    assert expected_error(rows, "b") == pytest.approx(0.08)
    assert expected_error(rows, "a") == pytest.approx(0.5)
    assert coverage(rows) == pytest.approx(11 / 12)
    assert coverage(rows[:10]) is None


def test_groups_that_did_not_run_stay_in_the_file(tmp_path):
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"groups": {"a": 1, "b": 2}, "runs": [row("a", 1.0, 1.0), row("b", 1.0, 1.0)]}))
    rows, groups = merge(str(file), [row("b", 3.0, 1.0)], {"b": 3})
    assert [one["measured"] for one in rows] == [[1.0], [3.0]] and groups == {"a": 1, "b": 3}
    file.write_text(json.dumps({"runs": [{"run": "prefill"}]}))
    with pytest.raises(ValueError, match="of an older version: give another file"):
        merge(str(file), [row("b", 3.0, 1.0)], {"b": 3})
    file.write_text("")
    with pytest.raises(ValueError, match=r"json=.*times\.json is damaged .*: remove it, or give another file"):
        merge(str(file), [row("b", 3.0, 1.0)], {"b": 3})


def test_errors_are_recorded_for_each_kind_of_work_with_enough_runs():
    plain = [TimedRun("decode", ring=ring, cached=9, strategy="gather_merge") for ring in (1, 2, 2, 3, 1)]
    runs = (*plain, replace(plain[0], rate="1gbit"), TimedRun("train"))
    job = SimpleNamespace(
        runs=runs, jobs=[SimpleNamespace(target=SimpleNamespace(model=ModelSource("tiny", "folder")))]
    )
    rows = [row("a", 1.0, 1 + i / 100) for i in range(5)] + [row("b", 1.0, 9.0), row("b", 1.0, 9.0)]
    assert accuracies(job, rows) == {"decode": Accuracy(errors(rows)[4], ("ring",), 3, 4, ("gather_merge",))}


def test_errors_keep_those_of_other_kinds_of_work(tmp_path):
    file = tmp_path / "laptop.yaml"
    before = {"train": {"share": 0.3, "axes": [], "ranks": 1}}
    file.write_text(yaml.safe_dump({**VALUES, "layer": LAYER, "errors": before}))
    decode = Accuracy(0.2, ("ring",), 2, 4, ("pass_q",))
    record_errors(str(file), {"decode": decode})
    machine = read_machine(str(file))
    assert machine.errors == {"train": Accuracy(0.3, (), 1), "decode": decode}
    assert machine.expected_error("decode", Mesh(ring=2), "pass_q", 4) == 0.2
    assert machine.expected_error("decode", Mesh(ring=2), "sharded", 4) is None, "another strategy"
    assert machine.expected_error("decode", Mesh(), "sharded", 4) == 0.2, "on one rank, all strategies are the same"
    assert machine.expected_error("decode", Mesh(ring=3), "pass_q", 4) is None, "more ranks than were measured"
    assert machine.expected_error("decode", Mesh(tp=2), "pass_q", 4) is None, "another axis"
    assert machine.expected_error("decode", Mesh(ring=2), "pass_q", 2) is None, "another dtype"
    file.write_text(yaml.safe_dump({**VALUES, "layer": LAYER, "errors": {"train": {"share": 0.3}}}))
    with pytest.raises(ValueError, match=r"its section errors cannot be read \('axes'\): delete the section"):
        read_machine(str(file))


def test_errors_are_not_recorded_in_the_files_of_configs(refused):
    assert "h200 is a name of configs/machine: use hardware=FILE" in refused(
        times, times.task, "model=tiny", "hardware=h200", "record=true"
    )


def test_settings_that_each_run_has_are_refused(refused, tmp_path):
    (tmp_path / "laptop.yaml").write_text(yaml.safe_dump({**VALUES, "layer": LAYER}))
    words = ("model=tiny", f"hardware={tmp_path}/laptop.yaml", "only=[prefill]")
    assert "has no use for mesh.tp=3" in refused(times, times.task, *words, "mesh.tp=3")
    assert "data.batch is not used" in refused(times, times.task, *words, "data.batch=2")
    assert "context.decode is not used" in refused(times, times.task, *words, "context.decode=pass_q")
    assert "use offload=null" in refused(times, times.task, *words, f"offload={tmp_path}")


def test_file_of_an_older_version_is_refused_before_anything_is_measured(refused, tmp_path):
    (tmp_path / "laptop.yaml").write_text(yaml.safe_dump({**VALUES, "layer": LAYER}))
    (tmp_path / "old.json").write_text(json.dumps({"runs": [{"run": "prefill"}]}))
    words = ("model=tiny", f"hardware={tmp_path}/laptop.yaml", "only=[prefill]", f"json={tmp_path}/old.json")
    assert "of an older version: give another file" in refused(times, times.task, *words)


def test_other_ranks_of_a_launcher_measure_without_a_result(monkeypatch, under_torchrun):
    under_torchrun(1, 2)
    run = TimedRun("prefill", ring=2)
    one = SimpleNamespace(target=SimpleNamespace(run=SimpleNamespace(threads=1)))
    job = SimpleNamespace(settings=SimpleNamespace(hardware="x", rounds=1), runs=[run], jobs=[one])
    monkeypatch.setattr(times, "prepare", lambda _: job)
    monkeypatch.setattr(times, "on_ranks", lambda *_: None)
    monkeypatch.setattr(times, "report", lambda *_: pytest.fail("there is nothing to report"))
    for name in ("warm_up_ranks", "refuse_other_threads"):
        monkeypatch.setattr(times, name, lambda *_: None)
    times.task({})


def test_groups_are_chosen_by_name(refused, tmp_path):
    (tmp_path / "laptop.yaml").write_text(yaml.safe_dump({**VALUES, "layer": LAYER}))
    words = ("model=tiny", f"hardware={tmp_path}/laptop.yaml", "only=[prefil]")
    assert "there is no group prefil; use decode, four_ranks" in refused(times, times.task, *words)


def test_without_root_the_groups_without_networks_are_named(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (tmp_path / "laptop.yaml").write_text(yaml.safe_dump({**VALUES, "layer": LAYER}))
    message = refused(times, times.task, "model=tiny", f"hardware={tmp_path}/laptop.yaml")
    assert "group points needs emulated hosts; use only=[prefill,decode,train,four_ranks]" in message
    message = refused(times, times.task, "model=tiny", f"hardware={tmp_path}/laptop.yaml", "only=[networks]")
    assert "group networks needs emulated hosts; use only=[prefill,decode,train,four_ranks]" in message
