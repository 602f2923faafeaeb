"""recipes.bench times: measured and predicted seconds of single runs, and refused runs."""

import json
from statistics import median

import pytest
import yaml

from recipes.bench import times
from recipes.bench.times import TimedRun, errors

RUNS = "runs=[{work:prefill},{work:prefill,cached:70},{work:decode,cached:70,strategy:gather_merge},{work:train}]"
LINK = {"latency_s": 1e-4, "bytes_per_s": 1e9}
LAYER = {"gemm_flops": 1e10, "weight_bytes_per_s": 1e9, "layer_s": 1e-3, "gather": LINK}
VALUES = {"flops": 1e10, "kv_bytes_per_s": 1e9, "block_s": 1e-5, "hop": LINK, "exchange": LINK, "overlap": 0.5}


def test_each_run_has_measured_and_predicted_seconds(cli, tmp_path):
    file, hardware = tmp_path / "times.json", tmp_path / "laptop.yaml"
    hardware.write_text(yaml.safe_dump({**VALUES, "layer": LAYER}))
    settings = (f"hardware={hardware}", "rounds=2", f"json={file}", f"out={tmp_path / 'run'}")
    code, _, err = cli(times, times.task, "model=tiny", "data.length=61", RUNS, *settings)
    assert code == 0, err
    assert "mean absolute error" in err and "decode after 70, one rank" in err
    runs = json.loads(file.read_text())["runs"]
    assert [run["run"].split(",")[0] for run in runs] == ["prefill", "prefill after 70", "decode after 70", "train"]
    for run, error in zip(runs, errors(runs), strict=True):
        assert len(run["measured"]) == 2 and min(run["measured"]) > 0
        assert error == pytest.approx(sum(run["predicted"].values()) / median(run["measured"]) - 1)
    first, later = (sum(run["predicted"].values()) for run in runs[:2])
    assert first < later, "cached keys take time"


@pytest.mark.parametrize(
    "run",
    [
        {"work": "prefill", "strategy": "sharded"},
        {"work": "prefill", "dp": 2},
        {"work": "decode"},
        {"work": "train", "cached": 5},
    ],
)
def test_impossible_runs_are_refused(run):
    with pytest.raises(ValueError, match="work="):
        TimedRun(**run)
