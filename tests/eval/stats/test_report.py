"""What the report says of outcomes: the average is of tasks that carry signal, and every figure is where it belongs."""

import json
from dataclasses import replace

import pytest

from eval.stats.outcomes import Outcomes
from eval.stats.report import GateRules, ScoredVariant, draw, markdown, report_of, track, write
from longctx.config import Track
from longctx.train.track import start_tracking
from tests.tracking import history, of_kind, records

ABOUT = dict.fromkeys(("command", "commit", "processor", "cores", "python", "torch"), "x") | {"title": "tiny on tasks"}
JUDGED = GateRules(allowed_drop=0.01, resamples=500, seed=0, gate=("all",), strict=False)


def outcomes(right: int, n: int = 200, chance: float = 0.25) -> Outcomes:
    return Outcomes("t", (1.0,) * right + (0.0,) * (n - right), chance, others={"acc_norm": 0.5})


def scored(
    name: str, dropped: float, good: int, near: int, nats: float = -3.0, repaired: bool = False
) -> ScoredVariant:
    of = {
        "good": outcomes(good),
        "near": outcomes(near),
        "text": Outcomes("text", (nats * 100, nats * 50), words=(100.0, 50.0)),
    }
    blocks = tuple(range(int(6 * dropped)))
    return ScoredVariant(name, "tiny", "tp=3", dropped, blocks, repaired, of, 100.0 / (1 + dropped), 9.0)


ALL = (
    scored("baseline", 0.0, 120, 51),
    scored("half", 0.5, 120, 60),
    scored("all", 1.0, 40, 20, -4.0),
    scored("all repaired", 1.0, 110, 50, repaired=True),
)


@pytest.fixture(scope="module")
def report():
    return report_of(ALL, JUDGED, ABOUT) | {"pictures": []}


def test_tasks_near_chance_are_named_and_left_out_of_the_average(report):
    assert report["near_chance"] == ["near"] and report["averaged"] == ["good"]
    assert report["average"]["all"]["difference"] == report["tasks"]["good"]["all"]["difference"] == pytest.approx(-0.4)
    assert "Near chance, and left out of the average: near." in markdown(report)


def test_where_all_are_near_chance_all_are_averaged():
    few = [replace(one, outcomes={"near": one.outcomes["near"]}) for one in ALL]
    made = report_of(few, JUDGED, ABOUT) | {"pictures": []}
    assert made["averaged"] == ["near"] and "Near chance: near. There" in markdown(made)


def test_a_task_that_cannot_be_guessed_is_near_chance_where_nothing_is_right():
    of = {"none": outcomes(0, chance=0.0), "one": outcomes(1, chance=0.0), "good": outcomes(120)}
    made = report_of([replace(ALL[0], outcomes=of)], JUDGED, ABOUT)
    assert made["near_chance"] == ["none"] and made["averaged"] == ["one", "good"]


def test_where_there_is_nothing_to_lose_nothing_is_decided():
    of = {"none": outcomes(0, n=1000, chance=0.0)}
    both = [replace(one, outcomes=of) for one in ALL[:3:2]]
    made = report_of(both, replace(JUDGED, strict=True), ABOUT)
    assert made["average"]["all"]["verdict"] == "undecided" and made["gate"]["failed"] == ["all"]
    assert made["tasks"]["none"]["all"]["verdict"] == "no worse", "of these answers, which are the same"


def test_figures_are_those_of_the_variant(report):
    told = report["tasks"]["good"]["all"]
    assert (told["n"], told["accuracy"], told["lost"], told["won"], told["verdict"]) == (200, 0.2, 80, 0, "worse")
    assert told["metrics"] == {"acc_norm": 0.5} and told["p_mcnemar"] == pytest.approx(2 * 0.5**80)
    assert report["tasks"]["good"]["baseline"]["accuracy"] == 0.6
    assert report["tasks"]["good"]["baseline"]["verdict"] is None
    text = report["tasks"]["text"]
    assert text["baseline"]["perplexity"] == pytest.approx(20.0855, abs=1e-3)
    assert text["all"]["difference"] == pytest.approx(1.71828, abs=1e-4) and text["half"]["difference"] == 0


@pytest.mark.parametrize(
    ("gate", "strict", "failed"),
    [
        (("all",), False, ["all"]),
        (("half",), False, []),
        (("half", "all"), True, ["half", "all"]),
        ((), True, []),
    ],
)
def test_the_gate(gate, strict, failed):
    made = report_of(ALL, replace(JUDGED, gate=gate, strict=strict), ABOUT)["gate"]
    assert (made["failed"], made["passed"]) == (failed, not failed)


def test_files(tmp_path):
    made = write(report_of(ALL, JUDGED, ABOUT), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(made))
    page = (tmp_path / "report.md").read_text()
    assert "**Gate** (all): FAILED by all." in page and "![accuracy](accuracy.svg)" in page
    rows = [line for line in page.splitlines() if line.startswith("| all |")]
    said, _, blocks = page[: page.index("## By task")].partition("## Blocks")
    assert "| half | 0, 1, 2 |" in blocks and "Repaired models drop blocks in their own order" in blocks
    assert rows[0].startswith("| all | 100% | tp=3 | 0.200 | -0.400 [-0.4")
    assert len({line.count("|") for line in said.splitlines() if line.startswith("| all")}) == 1


def test_a_picture_wants_shares_to_draw_over(report, tmp_path):
    few = report | {"variants": {name: one | {"dropped": 0.0} for name, one in report["variants"].items()}}
    assert draw(few, tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("wandb_at_home")
def test_it_is_tracked(tmp_path):
    made = write(report_of(ALL, JUDGED, ABOUT), tmp_path)
    tracker, _ = start_tracking(Track("wandb").of("eval"), tmp_path, {}, first=True, say=print)
    track(made, tmp_path, tracker)
    read = records(next((tmp_path / "wandb").glob("offline-run-*")))
    assert of_kind("run", read)[0]["job_type"] == "eval"
    names = {name.removesuffix("._type") for row in history(read) for name in row if name.endswith("._type")}
    assert names == {"eval/comparisons", "eval/accuracy"}
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["eval/all"] == 0.2 and line["eval/baseline"] == 0.6
    (table,) = (json.loads(line) for line in (tmp_path / "tables.jsonl").read_text().splitlines())
    assert len(table["rows"]) == 4 * (3 + 1) and len(table["rows"][0]) == len(table["columns"])
