"""The benchmarks of dropped reductions on a tiny model: their counts, their losses and their refusals."""

import json
from dataclasses import replace
from math import exp, log
from pathlib import Path

import pytest
from safetensors.torch import load_file

from longctx.hf.checkpoint import fingerprint
from longctx.hf.config import shape_of
from longctx.spd.folder import assemble, write_block
from longctx.spd.plan import SavedPlan, SPDPlan
from recipes import spd_sensitivity
from recipes.bench import spd_latency, spd_quality, spd_sweep
from recipes.common import target
from recipes.common.cli import compose_config
from tests.megatron.kinds import random_model
from tests.tiny import tiny_tokenizer


def test_latency_counts_the_remaining_reductions(cli, tiny, tmp_path):
    rivals = "rivals=[{label:6 bits,attention:int6,mlp:int6,group:12}]"
    words = [f"model={tiny}", "tokens=23", "new_tokens=2", "rounds=1", "shares=[0,0.5,1]", rivals]
    files = [f"out={tmp_path / 'latency.json'}", f"picture={tmp_path / 'latency.svg'}"]
    code, _, err = cli(spd_latency, spd_latency.task, *words, *files)
    assert code == 0, err
    result = json.loads((tmp_path / "latency.json").read_text())
    rows = result["rows"]
    # Two per layer and one of the embedding; 23 rows of 36 floats in the prefill, one row in a decode step.
    # Three groups of 12 values in 6 bits, each with a scale of two bytes, if rounded; the embedding's sum is exact.
    assert [(row["phase"], row["reduce"], row["calls"], row["bytes"]) for row in rows] == [
        (phase, reduce, calls, tokens * (36 * 4 + (calls - 1) * row_bytes))
        for phase, tokens in (("prefill", 23), ("decode", 1))
        for reduce, row_bytes in (("float32", 36 * 4), ("6 bits", 3 * (2 + 9)))
        for calls in (5, 4, 3)
    ]
    assert [row["predicted_reducing_saved"] for row in rows[:3]] == [0, 0.25, 0.5]
    assert rows[3]["predicted_reducing_saved"] > 0 and rows[3]["predicted_saved"] != 0
    assert rows[0]["saved"] == 0 and result["hop_s"] > 0 and "<svg" in (tmp_path / "latency.svg").read_text()


def write_with_norms_per_rank(source: Path, to: Path) -> Path:
    """Write the model of ``source`` with separate norms on three ranks, all equal, to ``to``."""
    tensors = {name: x for name, x in load_file(source / "model.safetensors").items() if ".layers." in name}
    per_rank = {name: x.repeat(3) if "layernorm" in name else x for name, x in tensors.items()}
    write_block(to / "blocks", per_rank, {})
    plan = SPDPlan(2, 3, (0, 1), own_norms=True)
    assemble(source, [to / "blocks"], SavedPlan(plan, (0, 1), (0, 1), fingerprint(source)), to)
    return to


def test_quality_and_sweep_agree_with_the_sensitivity(cli, tiny, tmp_path):
    text = ("data.length=31", "data.end_token=false")
    code, _, err = cli(
        spd_sensitivity, spd_sensitivity.task, f"model={tiny}", "mesh.tp=3", f"out={tmp_path}", *text, "sequences=2"
    )
    assert code == 0, err
    measured = json.loads((tmp_path / "sensitivity.json").read_text())
    code, _, err = cli(spd_sweep, spd_sweep.task, f"model={tiny}", f"out={tmp_path}/sweep", *text)
    assert code == 0, err
    sweep = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert sweep["largest_difference"] < 1e-6 and sweep["kept_s"] > 0
    same = write_with_norms_per_rank(tiny, tmp_path / "same")
    compared = (f"sensitivity={tmp_path}/sensitivity.json", f"models=[{{label:own norms,folder:{same}}}]")
    settings = ("shares=[0,0.5,1]", "length=31", "sequences=2", "texts=[{label:same,pydoc:train}]", "placement=[0]",
                "rivals=[{label:8 bits,attention:int8,mlp:int8,group:12}]")  # fmt: skip
    words = (f"model={tiny}", *compared, *settings, f"out={tmp_path}/quality")
    code, _, err = cli(spd_quality, spd_quality.task, *words)
    assert code == 0, err
    quality = json.loads((tmp_path / "quality" / "quality.json").read_text())["texts"]["same"]
    ranked, in_order, own, rounded, own_rounded = quality["variants"].values()
    added = [now - exact for now, exact in zip(rounded, ranked, strict=True)]
    assert all(0 < abs(loss) < 0.01 for loss in added), added
    low, high = quality["intervals"]["zero-shot, least sensitive first, 8 bits"][0]
    assert low < added[0] < high and quality["intervals"]["zero-shot, first to last"][0] == [0, 0]
    assert [*quality["recovered"]] == ["own norms", "own norms, 8 bits"], "nothing else is repaired"
    assert own == pytest.approx(in_order), "the same weights, in the same order"
    assert own_rounded == pytest.approx(own, abs=0.01) and own_rounded[0] == rounded[0]
    assert exp(ranked[0]) == pytest.approx(measured["perplexity"]) and ranked[0] == in_order[0]
    assert exp(ranked[2]) == pytest.approx(measured["blocks"][0]["perplexity"]) and ranked[2] == in_order[2]
    # The block that drops first, alone.
    alone = in_order[1] if measured["order"][0] == 0 else log(measured["blocks"][1]["perplexity"])
    assert ranked[1] == pytest.approx(alone)
    placements = quality["placement"]["0"]
    assert placements["as it should"] == pytest.approx(in_order[1], rel=1e-6), "block 0 alone"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["hosts=2"], "hosts=2 with mesh tp=3: each host runs one rank; use hosts=3"),
        (["shares=[0.5,1]"], "does not begin with the baseline: put 0 first"),
        (["mesh.tp=1"], "mesh.tp=1: one rank has no reduction to drop; use mesh.tp=2 or more"),
        (["mesh.ring=2"], "has no use for mesh.ring=2"),
        (["latency_us=500"], "rate=100mbit are for links between emulated hosts: set hosts=3"),
        (["tokens=90", "new_tokens=8"], "tokens=90 and new_tokens=8: tiny has 97 positions; use at most 97 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(spd_latency, spd_latency.task, f"model={tiny}", *settings)


def test_latency_of_a_model_with_output_norms_is_refused(refused, tmp_path, capsys):
    model = random_model("gemma3", tmp_path, vocab_size=307, eos_token_id=None)
    tiny_tokenizer().save_pretrained(model)
    capsys.readouterr()  # the progress bar of saving
    says = refused(spd_latency, spd_latency.task, f"model={model}", "mesh.tp=2")
    assert "a model that normalises the output of attention" in says


def test_a_prompt_longer_than_the_text_is_refused(tiny, monkeypatch):
    config = compose_config("bench/spd_latency", ["model=folder", f"model.source={tiny}", "model.name=tiny"])
    config.tokens = 10**6
    endless = replace(shape_of(tiny), max_positions=10**9)
    monkeypatch.setattr(target, "shape_of", lambda _: endless)
    with pytest.raises(
        ValueError, match=r"tokens=1000000: Python's documentation has [0-9,]+ tokens; use at most that"
    ):
        spd_latency.prepare(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["texts=[{path:x}]"], "texts.0.label is missing"),
        (["texts=[{label:x,folder:x}]"], "there is no setting texts.0.folder"),
        (["texts=[{label:x}]"], "a data source has exactly one of path"),
        (["models=[{folder:adapted}]"], "models.0.label is missing"),
        (["shares=[0.5,1]"], "shares=[0.5, 1.0] does not begin with the baseline: put 0 first"),
        (["placement=[0,2]"], "placement=[0, 2]: there is no block 2; use blocks 0 to 1"),
        (["mesh.dp=2"], "has no use for mesh.dp=2: use mesh.dp=1"),
        (["rivals=[{label:a,attention:int8},{label:a,mlp:int6}]"], "rivals have the labels ['a', 'a']: give each its"),
        (["rivals=[{label:a}]"], "rivals: a rounds nothing: set attention or mlp to bfloat16, int8 or int6"),
        (["rivals=[{label:a,mlp:int4}]"], "rivals.0.mlp=int4: give float32, bfloat16, int8 or int6"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_settings_of_quality_are_refused(refused, tiny, tmp_path, settings, words):
    says = refused(
        spd_quality, spd_quality.task, f"model={tiny}", "sensitivity=order.json", f"out={tmp_path}", *settings
    )
    assert words in says
    if words.endswith("label="):
        assert "field required" in says


def test_bad_settings_of_sweep_are_refused(refused, tiny, tmp_path):
    says = refused(spd_sweep, spd_sweep.task, f"model={tiny}", f"out={tmp_path}", "sequences=0")
    assert "sequences=0" in says
