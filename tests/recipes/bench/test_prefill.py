"""recipes.bench prefill: the efficiency is the product of its three factors."""

import json
import shlex

import pytest
import torch

from recipes.bench import prefill

TIMES = {"one": [7.0, 5.0, 6.0], "all at once": [9.0, 8.0, 7.0], "silent": [3.0, 3.5, 2.5], "ring": [4.0, 5.0, 3.0]}


def test_three_factors_multiply_to_the_efficiency():
    result = prefill.compute_efficiency("attention", 8209, 3, TIMES)
    assert result.efficiency == 5.0 / (3 * 3.0), "of the fastest rounds"
    assert result.machine == 5.0 / 7.0
    assert result.blocks == 7.0 / (3 * 2.5)
    assert result.communication == 2.5 / 3.0
    assert result.machine * result.blocks * result.communication == pytest.approx(result.efficiency)
    assert (result.part, result.tokens, result.ranks, result.rounds) == ("attention", 8209, 3, 3)


def test_variants_take_turns_and_the_first_round_is_left_out(monkeypatch):
    calls, clock = [], iter(range(3 * 4))

    def time_on_ranks(_, work, *, only_first):
        calls.append((work(), only_first))
        return next(clock)

    monkeypatch.setattr(prefill, "time_on_ranks", time_on_ranks)
    works = {name: lambda name=name: name for name in ("one", "ring", "silent")}
    times = prefill.time_variants(works, 2, None, lambda: None)
    assert times == {"one": [4, 8], "all at once": [5, 9], "silent": [6, 10], "ring": [7, 11]}
    assert calls == [("one", True), ("one", False), ("silent", False), ("ring", False)] * 3


def test_the_silent_ring_returns_tensors_of_the_expected_shapes_at_once():
    silent = prefill.NullComm(1, 3)
    mine = torch.ones(1, 5, 3, 7), torch.ones(1, 5, 2, 7, dtype=torch.bfloat16)
    k, v = silent.shift(*mine, shapes=[(1, 4, 3, 7), (1, 4, 2, 7)]).wait()
    assert (k.shape, v.shape) == ((1, 4, 3, 7), (1, 4, 2, 7))
    assert (k.dtype, v.dtype) == (torch.float32, torch.bfloat16)
    assert silent.traffic.total == 0


@pytest.mark.parametrize("layers", [(), ("layers=1",)], ids=["all layers", "one layer"])
def test_both_parts_are_measured_and_written(cli, tiny, tmp_path, layers):
    out = tmp_path / "efficiency.json"
    argv = (f"model={tiny}", "parts=[attention,model]", "lengths=[61]", "rounds=1", f"out={out}", *layers)
    code, _, err = cli(prefill, prefill.task, *argv)
    assert code == 0, err
    result = json.loads(out.read_text())
    assert result["layers"] == (1 if layers else 2)
    assert [(row["part"], row["tokens"], row["ranks"]) for row in result["measured"]] == [
        ("attention", 61, 2),
        ("model", 61, 2),
    ]
    for row in result["measured"]:
        product = row["machine"] * row["blocks"] * row["communication"]
        assert product == pytest.approx(row["efficiency"]) and row["efficiency"] > 0
        assert {name: len(seconds) for name, seconds in row["seconds"].items()} == dict.fromkeys(TIMES, 1)
    assert "efficiency" in err and str(out) in err
    assert result["command"] == shlex.join(["python", "-m", "recipes.bench", "prefill", *argv])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["parts=[attenion]"], "parts.0=attenion: give attention or model"),
        (["mesh.ring=1"], "mesh.ring=1 shards nothing: use mesh.ring=2 or more"),
        (["mesh.tp=3"], "recipes.bench prefill has no use for mesh.tp=3"),
        (["rounds=0"], "rounds=0"),
        (["lengths=[]"], "lengths="),
        (["lengths=[0]"], "lengths.0=0"),
        (["lengths=[9,1000000]"], "lengths=1000000: Python's documentation has"),
        (["layers=3"], "layers=3: the model has 2"),
        (["out=/dev/null/a.json"], "out=/dev/null/a.json cannot be written"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(prefill, prefill.task, *settings, f"model={tiny}")
