"""recipes.bench crossover: each row judges an empirical rule fitted to the others; files say what was measured."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from longctx.config import Context, Mesh, ModelSource, Run
from longctx.cost.choice import fit_empirical
from longctx.cost.hardware import Hardware, Link
from longctx.hf.config import shape_of
from recipes.bench import crossover
from recipes.common.target import Target

TOTAL = 2003
ON = Hardware(1e10, 1e9, 1e-4, Link(1e-3, 1e7), Link(1e-3, 1e7), 0.5, empirical=(9.0, 9.0, 9.0))


def times(new, kv, q):
    """Times whose medians are ``kv`` and ``q``, and whose means are not."""
    return crossover.MissRateTimes(new, TOTAL - new, {"pass_kv": [kv, kv, 7 * kv], "pass_q": [q / 9, q, q]})


@pytest.fixture
def job(tiny):
    """``job(hosts=3, ...)``: a job on three ranks with these settings."""

    def make(**settings):
        given = {"total": TOTAL, "miss_rates": (1.0,), "rounds": 3, "rate": "70mbit", **settings}
        model = ModelSource("tiny", source=str(tiny))
        target = Target(model, tiny, shape_of(tiny), Mesh(ring=3), Context(), Run(threads=1))
        return crossover.CrossoverJob(crossover.CrossoverSettings(**given), target, (), None)

    return make


# Pass-KV is the faster between 419 and 1,013 new tokens, and pass-Q again at 2,003, which no rule expects.
SURPRISE = [
    times(23, 5.0, 1.0),
    times(211, 5.0, 2.0),
    times(419, 5.0, 7.0),
    times(1013, 5.0, 10.0),
    times(2003, 12.0, 3.0),
]


def test_the_empirical_rule_of_a_row_is_fitted_to_the_other_rows(job):
    fitted_to_all = crossover.judge_row(SURPRISE[-1], job(), replace(ON, empirical=crossover.fit_rule(SURPRISE)))
    assert fitted_to_all.rules["empirical"] == crossover.RuleVerdict("pass_q", 0)
    rows = crossover.judge_rules(SURPRISE, job(), ON)
    assert [row.rules["empirical"].takes for row in rows[:2]] == ["pass_q", "pass_q"]
    assert rows[-1].rules["empirical"] == crossover.RuleVerdict("pass_kv", 12.0 / 3.0 - 1), "the row itself is left out"


def test_a_row_has_no_empirical_verdict_if_the_other_rows_have_no_crossover(job, capsys, monkeypatch):
    rows = crossover.judge_rules([times(23, 5.0, 1.0), times(419, 5.0, 7.0), times(1013, 5.0, 10.0)], job(), ON)
    assert [set(row.rules) ^ {"auto", "alg1", "alg5"} for row in rows] == [set(), {"empirical"}, {"empirical"}]
    assert rows[1].rules["empirical"].loses == 0
    monkeypatch.setattr(crossover, "console", Console(width=150))
    crossover.show(rows)
    head, first, second, _ = capsys.readouterr().out.splitlines()
    assert "empirical" in head, "although the first row has none"
    assert (first.count("%"), second.count("%")) == (5, 6)


@pytest.mark.parametrize("measured", [[times(23, 5.0, 1.0)], [times(23, 5.0, 1.0), times(2003, 5.0, 3.0)]], ids=len)
def test_without_a_crossover_the_rule_is_absent_and_the_file_keeps_its_constants(job, measured, tmp_path, capsys):
    out = tmp_path / "crossover.json"
    crossover.report(job(out=str(out)), ON, measured)
    says, result = capsys.readouterr().err, json.loads(out.read_text())
    assert says.startswith("no empirical rule is fitted, since one strategy is at least as fast in every row")
    assert all("empirical" not in row["rules"] for row in result["rows"])
    assert result["hardware"]["empirical"] == [9.0, 9.0, 9.0]


@pytest.mark.parametrize(("hosts", "rate"), [(0, None), (3, "70mbit")])
def test_files_state_the_links_and_the_constants_fitted_to_all_rows(job, tmp_path, hosts, rate):
    names = {name: str(tmp_path / name) for name in ("out", "fitted", "picture.svg")}
    names["picture"] = names.pop("picture.svg")
    crossover.report(job(hosts=hosts, **names), ON, SURPRISE[1:3])
    result, file = json.loads(Path(names["out"]).read_text()), yaml.safe_load(Path(names["fitted"]).read_text())
    fitted = fit_empirical([(each.new, each.cached, *each.medians.values()) for each in SURPRISE[1:3]])
    assert [list(row) for row in result["rows"]] == [
        ["new", "cached", "seconds", "pass_kv", "pass_q", "miss_rate", "rules"]
    ] * 2
    assert result["rows"][0]["pass_kv"] == 5.0 and result["rows"][0]["rules"]["auto"].keys() == {"takes", "loses"}
    for about, on in ((result, result["hardware"]), (file["measured"], file)):
        assert (about["hosts"], about["rate"], about["mesh"]) == (hosts, rate, "ring=3")
        assert tuple(on["empirical"]) == fitted
    assert (file["measured"]["threads"], file["measured"]["dtype"]) == (1, "float32")
    assert ("70mbit links" in Path(names["picture"]).read_text()) == bool(hosts)


def test_miss_rates_in_any_order_have_the_same_crossings(job, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(crossover, "draw_lines", lambda *_, marked, **__: drawn.append(marked))
    for order in (SURPRISE, [SURPRISE[i] for i in (3, 0, 4, 2, 1)]):
        crossover.report(job(picture=str(tmp_path / "x.svg")), ON, order)
    assert len(drawn[0]) == 2 and drawn[1] == drawn[0]


def test_fitted_file_keeps_what_is_known_of_the_machine(job, tmp_path):
    """Only the constants of the empirical rule are measured here; the others, and their errors, are the file's."""
    given = {"measured": {"threads": 1, "rate": "10mbit"}, **asdict(ON), "errors": {"prefill": {"share": 0.1}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
    place = str(tmp_path / "mine.yaml")
    crossover.report(job(hardware=place, fitted=place), ON, SURPRISE[1:3])
    file = yaml.safe_load(Path(place).read_text())
    changed = {name for name in file if file[name] != given[name]}
    assert changed == {"measured", "empirical"} and file["measured"]["rate"] == "10mbit"
    assert file["measured"]["empirical"]["mesh"] == "ring=3"
    before = Path(place).read_text()
    known = replace(ON, empirical=tuple(file["empirical"]))
    crossover.report(job(hardware=place, fitted=place), known, [times(23, 5.0, 1.0)])  # nothing to fit or to note
    assert yaml.safe_load(Path(place).read_text()) == yaml.safe_load(before)


def test_a_model_with_windows_is_refused(refused, tiny, tmp_path):
    """Conversations choose a strategy for the layers of each window separately."""
    folder = shutil.copytree(tiny, tmp_path / "windows")
    config = json.loads((folder / "config.json").read_text())
    windowed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 31}
    (folder / "config.json").write_text(json.dumps(config | windowed))
    says = refused(crossover, crossover.task, f"model={folder}", "total=61")
    assert "model=windows has layers with a window of 31 keys" in says and "use a model whose layers see all" in says
