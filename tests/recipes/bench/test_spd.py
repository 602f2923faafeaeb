"""The benchmarks of dropped reductions, on a tiny model: what they count, and what they refuse."""

import json
from dataclasses import replace
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from longctx.config import Mesh, ModelSource
from longctx.hf.checkpoint import fingerprint
from longctx.hf.config import shape_of
from longctx.spd.folder import assemble, write_block
from longctx.spd.plan import SavedPlan, SPDPlan
from recipes import spd_sensitivity
from recipes.bench import spd_latency, spd_quality, spd_sweep
from recipes.common.spd_text import Target


def test_latency_counts_the_reductions_that_are_left(cli, tiny, tmp_path):
    words = [f"model={tiny}", "tokens=23", "new_tokens=2", "rounds=1", "shares=[0,0.5,1]"]
    files = [f"out={tmp_path / 'latency.json'}", f"picture={tmp_path / 'latency.svg'}"]
    code, _, err = cli(spd_latency, spd_latency.task, *words, *files)
    assert code == 0, err
    told = json.loads((tmp_path / "latency.json").read_text())
    rows = told["rows"]
    # Of two layers, and one of the embedding; 23 rows of 36 floats in the prefill, one in the decode.
    assert [(row["phase"], row["calls"], row["bytes"]) for row in rows] == [
        (phase, calls, calls * of * 36 * 4) for phase, of in (("prefill", 23), ("decode", 1)) for calls in (5, 4, 3)
    ]
    assert [row["predicted_reducing_saved"] for row in rows[:3]] == [0, 0.25, 0.5]
    assert rows[0]["saved"] == 0 and told["hop_s"] > 0 and "<svg" in (tmp_path / "latency.svg").read_text()


def with_norms_of_each_rank(source: Path, to: Path) -> Path:
    """The same model, with norms of each of three ranks' own that are all the same."""
    of_layers = {name: one for name, one in load_file(source / "model.safetensors").items() if ".layers." in name}
    each = {name: one.repeat(3) if "layernorm" in name else one for name, one in of_layers.items()}
    write_block(to / "blocks", each, {})
    plan = SPDPlan(2, 3, (0, 1), own_norms=True)
    assemble(source, [to / "blocks"], SavedPlan(plan, (0, 1), (0, 1), fingerprint(source)), to)
    return to


def test_quality_and_sweep_agree_with_the_sensitivity(cli, tiny, tmp_path):
    text = ("data.length=31", "data.end_token=false")
    code, _, err = cli(
        spd_sensitivity, spd_sensitivity.task, f"model={tiny}", "mesh.tp=3", f"out={tmp_path}", *text, "sequences=2"
    )
    assert code == 0, err
    told = json.loads((tmp_path / "sensitivity.json").read_text())
    code, _, err = cli(spd_sweep, spd_sweep.task, f"model={tiny}", f"out={tmp_path}", *text)
    assert code == 0, err
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert sweep["largest_difference"] < 1e-6 and sweep["kept_s"] > 0
    same = with_norms_of_each_rank(tiny, tmp_path / "same")
    compared = (f"sensitivity={tmp_path}/sensitivity.json", f"models=[{{label:own norms,folder:{same}}}]")
    on = ("shares=[0,0.5,1]", "length=31", "sequences=2", "texts=[{label:same,pydoc:train}]", "placement=[0]")
    words = (f"model={tiny}", *compared, *on, f"out={tmp_path}")
    code, _, err = cli(spd_quality, spd_quality.task, *words)
    assert code == 0, err
    quality = json.loads((tmp_path / "quality.json").read_text())["texts"]["same"]
    ranked, in_order, own = quality["variants"].values()
    assert own == pytest.approx(in_order), "the same weights, in the same order"
    assert exp(ranked[0]) == pytest.approx(told["perplexity"]) and ranked[0] == in_order[0]
    assert exp(ranked[2]) == pytest.approx(told["blocks"][0]["perplexity"]) and ranked[2] == in_order[2]
    # The first to drop, alone.
    alone = in_order[1] if told["order"][0] == 0 else log(told["blocks"][1]["perplexity"])
    assert ranked[1] == pytest.approx(alone)
    ways = quality["placement"]["0"]
    assert ways["as it should"] == pytest.approx(in_order[1], rel=1e-6), "block 0 alone"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["hosts=2"], "hosts=2, tp=3: each host has one rank, use hosts=3"),
        (["shares=[0.5,1]"], "the first is what others are compared with, use 0"),
        (["mesh.tp=1"], "one rank reduces nothing, use mesh.tp=2 or more"),
        (["mesh.ring=2"], "has no use for mesh.ring=2"),
        (["tokens=90", "new_tokens=8"], "tokens=90 and new_tokens=8: the model's context is 97; use at most that"),
    ],
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(spd_latency, spd_latency.task, f"model={tiny}", *settings)


def test_a_prompt_longer_than_the_text_is_refused(tiny):
    settings = spd_latency.LatencySettings((0, 1), 10**6, 8, 1, 0, "100mbit", 0, None, None)
    shape = replace(shape_of(tiny), max_positions=10**9)
    with pytest.raises(ValueError, match=r"tokens=1000000: the text has [0-9,]+ tokens; use at most that"):
        spd_latency.prompt_of(settings, tiny, shape)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"path": "x"}, r"texts\.0\.label=.*: field required"),
        ({"label": "x", "folder": "x"}, r"there is no setting texts\.0\.folder"),
        ({"label": "x"}, "a source of data has one of path"),
    ],
    ids=str,
)
def test_a_text_that_is_not_named_or_not_known_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        spd_quality.texts_of(OmegaConf.create({"texts": [text]}), None)


def test_a_repaired_model_that_is_not_named_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(spd_quality, "order_from", lambda *_: (1, 0))
    subject = Target(ModelSource("tiny", "tiny"), tmp_path, "", SimpleNamespace(layers=2), Mesh(tp=3), None, 30)
    config = OmegaConf.create({"sensitivity": "order.json", "models": [{"folder": "adapted"}]})
    with pytest.raises(ValueError, match=r"models\.0\.label=.*: field required"):
        spd_quality.variants_of(config, subject)
