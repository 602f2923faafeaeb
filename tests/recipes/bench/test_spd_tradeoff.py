"""recipes.bench spd_tradeoff: which reductions save most time on a link, within a limit of quality."""

import json
from math import log
from pathlib import Path

import pytest

from recipes.bench import spd_tradeoff
from recipes.bench.spd_quality import IN_ORDER, RANKED

# Perplexities, in % over the baseline, of a model that drops none, half and all of its reductions.
ADDED = {
    RANKED: [0, 20, 900],
    f"{RANKED}, int8": [0.3, 21, 950],
    IN_ORDER: [0, 500, 900],
    "repaired": [0, 1.5, 14],
    "repaired, int8": [0.3, 1.9, 15],
}
# Time of prefill saved, in %, with exact and with rounded reductions.
SAVED = {"slow": {"float32": [0, 22, 43], "int8": [34, 45, 55]}, "fast": {"float32": [0, 12, 18], "int8": [-3, 5, 9]}}
SHARES = [0, 0.5, 1]
OF = {"model": "tiny", "mesh": "tp=3"}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    losses = {name: [3 + log(1 + added / 100) for added in values] for name, values in ADDED.items()}
    variants = {}
    for name in ADDED:
        reduce = "int8" if name.endswith(", int8") else "float32"
        variants[name] = {"label": name.removesuffix(", int8"), "reduce": reduce}
    quality = {
        "model": "tiny",
        "tp": 3,
        "dropped": SHARES,
        "variants": variants,
        "texts": {"novel": {"variants": losses}},
    }
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    for link, by_reduce in SAVED.items():
        rows = [
            {"phase": phase, "reduce": reduce, "share": share, "saved": saved / 100 / divisor}
            for phase, divisor in (("prefill", 1), ("decode", 10))
            for reduce, values in by_reduce.items()
            for share, saved in zip(SHARES, values, strict=True)
        ]
        (tmp_path / f"{link}.json").write_text(json.dumps({**OF, "rate": link, "latency_us": 500.0, "rows": rows}))
    return [f"quality={tmp_path}/quality.json", f"latency=[{tmp_path}/slow.json,{tmp_path}/fast.json]"]


def test_the_fastest_within_each_limit_depends_on_the_link(cli, files, tmp_path):
    out, picture = tmp_path / "points.json", tmp_path / "tradeoff.svg"
    code, _, err = cli(spd_tradeoff, spd_tradeoff.task, *files, f"out={out}", f"picture={picture}")
    assert code == 0, err
    words = " ".join(err.split())
    assert "int8: saves 34.0 %, costs 0.30" in words, "slow, at most 1 %"
    assert "int8, 50% dropped, repaired: saves 45.0 %, costs 1.90" in words, "slow, at most 2 %"
    assert "float32, 50% dropped, repaired: saves 12.0 %, costs 1.50" in words, "fast, at most 2 %"
    points = json.loads(out.read_text())["points"]
    assert len(points) == 2 * 4 * 3, "two links, four variants, three shares; the first blocks are left out"
    assert "not repaired" in picture.read_text()


def test_rounded_reductions_without_a_time_are_left_out(cli, files, tmp_path):
    quality = json.loads((tmp_path / "quality.json").read_text())
    variants = quality["texts"]["novel"]["variants"]
    for label in (RANKED, "repaired"):
        variants[f"{label}, int6"] = variants[label]
        quality["variants"][f"{label}, int6"] = {"label": label, "reduce": "int6"}
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    out = tmp_path / "points.json"
    code, _, err = cli(spd_tradeoff, spd_tradeoff.task, *files, f"out={out}")
    assert code == 0
    for link in ("slow", "fast"):
        assert f"latency file of {link}, 500 us has no time for them: int6 with 0 %, 50 %, 100 % dropped" in err
    assert len(json.loads(out.read_text())["points"]) == 2 * 4 * 3


def test_shares_without_a_time_are_left_out_and_named(cli, files, tmp_path):
    """The latency files have no time for a quarter of the blocks; the one for the fast link lacks one half, too."""
    quality = json.loads((tmp_path / "quality.json").read_text())
    quality["dropped"][1] = 0.25
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    fast = json.loads((tmp_path / "fast.json").read_text())
    fast["rows"] = [row for row in fast["rows"] if (row["reduce"], row["share"]) != ("int8", 1)]
    (tmp_path / "fast.json").write_text(json.dumps(fast))
    code, _, err = cli(spd_tradeoff, spd_tradeoff.task, *files)
    words = " ".join(err.split())
    assert code == 0, err
    assert "of slow, 500 us has no time for them: float32 with 25 % dropped; int8 with 25 % dropped" in words
    assert "of fast, 500 us has no time for them: float32 with 25 % dropped; int8 with 25 %, 100 % dropped" in words


def test_decode_has_its_own_times(cli, files):
    code, _, err = cli(spd_tradeoff, spd_tradeoff.task, *files, "phase=decode", "limits=[100]")
    assert code == 0 and "int8, 100% dropped, repaired: saves 5.5 %, costs 15.00" in " ".join(err.split())


def test_accuracies_come_from_a_report(cli, files, tmp_path):
    variants = {
        "baseline": {"dropped": 0, "repaired": False, "reduce": "float32", **OF},
        "half": {"dropped": 0.5, "repaired": True, "reduce": "int8", **OF},
        "copies": {"dropped": 1, "repaired": True, "reduce": "int8", "model": "tiny", "mesh": "tp=3 dp=2"},
        "ring": {"dropped": 0, "repaired": False, "reduce": "float32", "model": "tiny", "mesh": "tp=3 ring=2"},
    }
    average = {
        "baseline": {"difference": None},
        "half": {"difference": -0.004},
        "copies": {"difference": -0.03},
        "ring": {"difference": 0.9},
    }
    (tmp_path / "report.json").write_text(json.dumps({"variants": variants, "average": average}))
    shown, out = [], tmp_path / "points.json"
    for limit in (2, 5):
        words = (files[1], f"report={tmp_path}/report.json", f"limits=[{limit}]", f"out={out}")
        code, _, err = cli(spd_tradeoff, spd_tradeoff.task, *words)
        assert code == 0, err
        shown.append(" ".join(err.split()))
    assert "accuracy lost, points" in shown[0] and "int8, 50% dropped, repaired: saves 45.0 %, costs 0.40" in shown[0]
    assert "int8, 100% dropped, repaired: saves 55.0 %, costs 3.00" in shown[1], "copies of the model change no answer"
    losses = [str(point["loss"]) for point in json.loads(out.read_text())["points"] if not point["dropped"]]
    assert losses == ["0.0", "0.0"], "the baseline on two links, without a minus sign"
    words = shown[0]
    assert "left out, since the times are those of 3 tensor-parallel ranks: ring on tp=3 ring=2" in words


def test_results_of_older_versions_are_refused(refused, files, tmp_path):
    """They do not say how their reductions are rounded."""
    quality = json.loads((tmp_path / "quality.json").read_text())
    del quality["variants"]
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    assert "or of an older version: it has no variants" in refused(spd_tradeoff, spd_tradeoff.task, *files)
    report = {"variants": {"a": {"dropped": 0, "repaired": False, **OF}}, "average": {"a": {"difference": None}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    words = (files[1], f"report={tmp_path}/report.json")
    assert "run eval.run again, which reuses the stored answers" in refused(spd_tradeoff, spd_tradeoff.task, *words)


def test_files_that_do_not_fit_are_refused(refused, files, tmp_path):
    other, damaged = tmp_path / "other.json", tmp_path / "damaged.json"
    other.write_text("{}")
    damaged.touch()
    larger, dropping = tmp_path / "larger.json", tmp_path / "dropping.json"
    larger.write_text(json.dumps({**json.loads((tmp_path / "quality.json").read_text()), "tp": 8}))
    base = {"dropped": 0.5, "repaired": False, "reduce": "float32", **OF}
    dropping.write_text(json.dumps({"variants": {"a": base}, "average": {"a": {"difference": None}}}))
    for words, message in [
        ([files[1]], "set quality=quality.json, report=report.json, or both"),
        ([files[0], f"latency=[{other}]"], "is not a result of spd_latency"),
        ([files[0], f"latency=[{tmp_path}/slow.json,{tmp_path}/slow.json]"], "give one for each link"),
        ([*files, "text=poem"], "use one of novel"),
        ([files[1], f"report={dropping}", "text=novel"], "text=novel chooses a text of the quality file: set quality"),
        ([f"quality={other}", files[1]], "is not a result of spd_quality"),
        ([f"quality={damaged}", files[1]], f"quality={damaged} is damaged"),
        ([f"quality={larger}", files[1]], "is of tiny at mesh.tp=3, but quality="),
        ([files[1], f"report={dropping}"], "the report's baseline drops or rounds reductions"),
    ]:
        assert message in refused(spd_tradeoff, spd_tradeoff.task, *words)


def test_a_label_means_the_same_rounding_in_all_files(refused, files, tmp_path):
    for name, dtype in (("quality", "int6"), ("slow", "int8")):
        values = json.loads((tmp_path / f"{name}.json").read_text())
        values["rivals"] = {"int8": {"attention": dtype, "mlp": dtype, "group": 64}}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    message = refused(spd_tradeoff, spd_tradeoff.task, *files)
    assert "give different settings different labels" in message and "int6" in message
