"""recipes.bench crossover: the empirical rule is judged by rows that it has not seen; files say what was measured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from longctx.config import Mesh, ModelSource
from longctx.cost.choice import fit_empirical
from longctx.cost.hardware import Hardware, Link
from longctx.hf.config import shape_of
from recipes.bench import crossover

TOTAL = 2003
ON = Hardware(1e10, 1e9, 1e-4, Link(1e-3, 1e7), Link(1e-3, 1e7), 0.5, empirical=(9.0, 9.0, 9.0))


def row(new, kv, q):
    """A row whose medians are ``kv`` and ``q``; their means are not."""
    return {"new": new, "cached": TOTAL - new, "seconds": {"pass_kv": [kv, kv, 7 * kv], "pass_q": [q / 9, q, q]}}


@pytest.fixture
def job(tiny):
    """``job(hosts=3, ...)``: a job with these settings, others as they are without a word."""

    def made(**given):
        files = {"hardware": None, "out": None, "picture": None, "fitted": None}
        numbers = {"total": TOTAL, "miss_rates": (1.0,), "rounds": 3, "hosts": 0, "rate": "70mbit"}
        settings = crossover.CrossoverSettings(**{**files, **numbers, **given})
        model = ModelSource("tiny", source=str(tiny))
        return crossover.CrossoverJob(settings, Mesh(ring=3), model, tiny, shape_of(tiny), (), None)

    return made


SURPRISE = [row(23, 5.0, 1.0), row(211, 5.0, 2.0), row(419, 5.0, 7.0), row(1013, 5.0, 10.0), row(2003, 12.0, 3.0)]


def test_a_row_is_judged_by_a_rule_that_was_fitted_to_the_others(job):
    seen = crossover.judged_row(SURPRISE[-1], job(), replace(ON, empirical=crossover.fitted(SURPRISE)))
    assert seen["rules"]["empirical"] == {"takes": "pass_q", "loses": 0}
    judged = crossover.judged(SURPRISE, job(), ON)
    assert [row["rules"]["empirical"]["takes"] for row in judged[:2]] == ["pass_q", "pass_q"]
    assert judged[-1]["rules"]["empirical"] == {"takes": "pass_kv", "loses": 12.0 / 3.0 - 1}, "not seen coming"


def test_where_the_other_rows_have_no_crossover_the_empirical_rule_says_nothing(job, capsys, monkeypatch):
    rows = [row(23, 5.0, 1.0), row(419, 5.0, 7.0), row(1013, 5.0, 10.0)]
    judged = crossover.judged(rows, job(), ON)
    assert [set(row["rules"]) ^ {"auto", "alg1", "alg5"} for row in judged] == [set(), {"empirical"}, {"empirical"}]
    assert judged[1]["rules"]["empirical"]["loses"] == 0
    monkeypatch.setattr(crossover, "console", Console(width=150))
    crossover.show(judged)
    head, first, second, _ = capsys.readouterr().out.splitlines()
    assert "empirical" in head, "although the first row has none"
    assert (first.count("%"), second.count("%")) == (5, 6)


@pytest.mark.parametrize("rows", [[row(23, 5.0, 1.0)], [row(23, 5.0, 1.0), row(2003, 5.0, 3.0)]], ids=len)
def test_without_a_crossover_the_rule_is_absent_and_the_file_s_constants_stay(job, rows, tmp_path, capsys):
    out = tmp_path / "crossover.json"
    crossover.report(job(out=str(out)), ON, rows)
    says, result = capsys.readouterr().err, json.loads(out.read_text())
    assert says.startswith("no empirical rule: one strategy won every row")
    assert all("empirical" not in row["rules"] for row in result["rows"])
    assert result["hardware"]["empirical"] == [9.0, 9.0, 9.0]


@pytest.mark.parametrize(("hosts", "rate"), [(0, None), (3, "70mbit")])
def test_the_files_say_the_links_and_constants_fitted_to_all_rows(job, tmp_path, hosts, rate):
    names = {name: str(tmp_path / name) for name in ("out", "fitted", "picture.svg")}
    names["picture"] = names.pop("picture.svg")
    crossover.report(job(hosts=hosts, **names), ON, SURPRISE[1:3])
    result, file = json.loads(Path(names["out"]).read_text()), yaml.safe_load(Path(names["fitted"]).read_text())
    seen = fit_empirical([(row["new"], row["cached"], *row_medians(row)) for row in SURPRISE[1:3]])
    for about, on in ((result, result["hardware"]), (file["measured"], file)):
        assert (about["hosts"], about["rate"], about["mesh"]) == (hosts, rate, "ring=3")
        assert tuple(on["empirical"]) == seen
    assert (file["measured"]["threads"], file["measured"]["dtype"]) == (1, "float32")
    assert ("70mbit links" in Path(names["picture"]).read_text()) == bool(hosts)


def row_medians(row):
    return row["seconds"]["pass_kv"][0], row["seconds"]["pass_q"][2]


def test_a_model_with_windows_is_refused(refused, tiny, tmp_path):
    """Conversations choose for the layers of each window."""
    folder = shutil.copytree(tiny, tmp_path / "windows")
    config = json.loads((folder / "config.json").read_text())
    windowed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 31}
    (folder / "config.json").write_text(json.dumps(config | windowed))
    says = refused(crossover, crossover.task, f"model={folder}", "total=61")
    assert "model=windows has layers that see 31 keys" in says and "use a model whose layers see all" in says
