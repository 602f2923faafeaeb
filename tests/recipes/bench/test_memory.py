"""recipes.bench memory: predicted and measured bytes of single runs."""

import json

import pytest

from recipes.bench import memory
from recipes.bench.memory import errors

RUNS = "runs=[{work:prefill},{work:decode},{work:train},{work:train,recompute:full,mlp_rows:64}]"


def test_prediction_is_close_to_the_measured_bytes(cli, tmp_path):
    file = tmp_path / "memory.json"
    command = ("model=tiny", "data.length=512", "loss_rows=64", RUNS, f"json={file}", f"out={tmp_path / 'run'}")
    code, _, err = cli(memory, memory.task, *command)
    assert code == 0, err
    for run in json.loads(file.read_text())["runs"]:
        of_sum, of_part = errors(run)
        assert abs(of_sum) <= 0.05 and abs(of_part) <= 0.1, run


def test_an_unpredicted_part_counts_as_an_error():
    assert errors({"measured": {"weights": 100}, "predicted": {"weights": 90}}) == pytest.approx((-0.1, -0.1))
    assert errors({"measured": {"weights": 1000, "logits": 1}, "predicted": {"weights": 1000}})[1] == 0
