"""The report: which tasks are averaged, every figure in its place, the gate, the files."""

import json
from dataclasses import replace

import pytest

from eval.stats.outcomes import Outcomes
from eval.stats.page import markdown, summary
from eval.stats.publish import draw, track, write
from eval.stats.report import GateRules, ScoredVariant, make_report
from longctx.config import Track
from longctx.train.track import start_tracking
from tests.tracking import history, of_kind, records

ORIGIN = dict.fromkeys(("command", "commit", "processor", "cores", "python", "torch"), "x") | {"title": "tiny on tasks"}
RULES = GateRules(allowed_drop=0.01, resamples=500, seed=0, gate=("all",), strict=False)


def outcomes(correct: int, n: int = 200, chance: float = 0.25, available: int | None = 2376) -> Outcomes:
    values = (1.0,) * correct + (0.0,) * (n - correct)
    margins = tuple(value - 0.3 for value in values)
    return Outcomes("t", values, chance, others={"acc_norm": 0.5}, margins=margins, available=available)


def generated(task: str, length: int, correct: int, n: int = 100, available: int | None = None) -> dict[str, Outcomes]:
    """Return the outcomes of ``task`` at ``length``, by name."""
    return {f"{task}_{length}": replace(outcomes(correct, n, 0.0, available), length=length)}


def scored(
    name: str, dropped: float, good: int, near: int, nats: float = -3.0, repaired: bool = False
) -> ScoredVariant:
    by_task = {
        "good": outcomes(good),
        "near": outcomes(near),
        "text": Outcomes("text", (nats * 100, nats * 50), words=(100.0, 50.0)),
    }
    blocks = tuple(range(int(6 * dropped)))
    return ScoredVariant(name, "tiny", "tp=3", dropped, blocks, repaired, by_task, 100.0 / (1 + dropped), 9.0)


VARIANTS = (
    scored("baseline", 0.0, 120, 51),
    scored("half", 0.5, 120, 60),
    scored("all", 1.0, 40, 20, -4.0),
    scored("all repaired", 1.0, 110, 50, repaired=True),
)


@pytest.fixture(scope="module")
def report():
    return make_report(VARIANTS, RULES, ORIGIN)


def test_tasks_near_chance_are_named_and_left_out_of_the_average(report):
    assert report.near_chance == ("near",) and report.averaged == ("good",)
    assert report.average["all"]["difference"] == report.tasks["good"]["all"]["difference"] == pytest.approx(-0.4)
    assert "Near chance, and left out of the average: near." in markdown(report)


def test_all_tasks_are_averaged_if_all_are_near_chance():
    few = [replace(one, outcomes={"near": one.outcomes["near"]}) for one in VARIANTS]
    report = make_report(few, RULES, ORIGIN)
    assert report.averaged == ("near",) and "Near chance: near. There" in markdown(report)


def test_task_without_chance_is_near_chance_if_nothing_is_correct():
    by_task = {"none": outcomes(0, chance=0.0), "one": outcomes(1, chance=0.0), "good": outcomes(120)}
    report = make_report([replace(VARIANTS[0], outcomes=by_task)], RULES, ORIGIN)
    assert report.near_chance == ("none",) and report.averaged == ("one", "good")


def test_average_of_tasks_near_chance_is_undecided():
    by_task = {"none": outcomes(0, n=1000, chance=0.0)}
    both = [replace(one, outcomes=by_task) for one in VARIANTS[:3:2]]
    report = make_report(both, replace(RULES, strict=True), ORIGIN)
    assert report.average["all"]["verdict"] == "undecided" and report.gate.failed == ("all",)
    assert report.tasks["none"]["all"]["verdict"] == "no worse", "the answers are the same"
    page = markdown(report)
    assert "The baseline guesses on every task: use other tasks" in page and "ask more examples" not in page
    assert "## Examples to decide" not in page


def test_figures_are_those_of_the_variant(report):
    figures = report.tasks["good"]["all"]
    assert (figures["n"], figures["accuracy"], figures["verdict"]) == (200, 0.2, "worse")
    assert (figures["lost"], figures["won"]) == (80, 0)
    assert figures["metrics"] == {"acc_norm": 0.5} and figures["p_mcnemar"] == pytest.approx(2 * 0.5**80)
    assert report.tasks["good"]["baseline"]["accuracy"] == 0.6
    assert report.tasks["good"]["baseline"]["verdict"] is None
    text = report.tasks["text"]
    assert text["baseline"]["perplexity"] == pytest.approx(20.0855, abs=1e-3)
    assert text["all"]["difference"] == pytest.approx(1.71828, abs=1e-4) and text["half"]["difference"] == 0


@pytest.mark.parametrize(
    ("gate", "strict", "failed", "words"),
    [
        (("all",), False, ["all"], "FAILED by all (worse)."),
        (("half",), False, [], "passed, with half undecided, which eval.strict=false lets pass."),
        (("half",), True, ["half"], "FAILED by half (undecided). Undecided is not passed: ask more examples, or let"),
        (("half", "all"), True, ["half", "all"], "FAILED by half (undecided), all (worse). Undecided"),
        ((), True, [], None),
    ],
)
def test_gate(gate, strict, failed, words):
    report = make_report(VARIANTS, replace(RULES, gate=gate, strict=strict), ORIGIN)
    assert (list(report.gate.failed), report.gate.passed) == (failed, not failed)
    assert f"**Gate** ({', '.join(gate)}): {words}" in markdown(report) if words else "**Gate**" not in markdown(report)


def test_page_says_how_many_examples_of_each_task_decide():
    report = make_report(VARIANTS, RULES, ORIGIN)
    needed = report.average["half"]["needed"]
    assert list(needed) == ["good"] and 200 < needed["good"] < 2376
    page = markdown(report)
    assert f"| half | {needed['good']:,} |\n" in page and "| in the set | 2,376 |" in page
    assert f"| undecided | {needed['good']:,} a task |" in page
    few = [replace(one, outcomes={"good": replace(one.outcomes["good"], available=210)}) for one in VARIANTS]
    report = make_report(few, RULES, ORIGIN)
    assert report.average["half"]["needed"] is None and "| half | not with these sets |" in markdown(report)


def test_variant_is_compared_on_the_examples_that_it_answered():
    """The baseline may have answered more."""
    base = replace(VARIANTS[0], outcomes={"good": outcomes(120, n=500)})
    report = make_report([base, replace(VARIANTS[2], outcomes={"good": outcomes(40)})], RULES, ORIGIN)
    assert report.tasks["good"]["baseline"]["n"] == 500 and report.average["all"]["n"] == 200
    assert report.average["all"]["difference"] == pytest.approx(-0.4)
    assert report.average["all"]["baseline"] == 0.6, "on these examples; on all of its own, 0.24"
    page = markdown(report)
    assert "0.200 on 200 (baseline 0.600)" in page and "| good | 500 | 0.240 | 0.200 (200) |" in page


def test_verdict_that_rests_on_one_task_is_named(capsys):
    """A gain on one task hides the losses on two others."""
    base = {name: outcomes(600, n=1000) for name in ("a", "b", "facts")}
    other = {**base, "a": outcomes(570, n=1000), "b": outcomes(570, n=1000), "facts": outcomes(900, n=1000)}
    scored = [replace(VARIANTS[0], outcomes=base), replace(VARIANTS[1], outcomes=other)]
    report = make_report(scored, replace(RULES, gate=()), ORIGIN)
    assert report.average["half"]["verdict"] == "no worse"
    assert report.average["half"]["rests_on"] == {"facts": "worse"} and report.average["baseline"]["rests_on"] == {}
    assert "* The verdict on half would be another one without facts (worse)." in markdown(report)
    same = make_report([scored[0], replace(VARIANTS[1], outcomes=base)], replace(RULES, gate=()), ORIGIN)
    assert same.average["half"]["rests_on"] == {} and "another one" not in markdown(same)


def test_margin_is_a_second_measure(report):
    margin = report.average["all"]["margin"]
    assert (margin["n"], margin["difference"]) == (200, pytest.approx(-0.4))
    assert margin["low"] < -0.4 < margin["high"] and report.tasks["text"]["all"].get("margin") is None
    section = markdown(report).partition("## Margin of the right answer")[2]
    assert "| all | -0.400 [-0.468, -0.332] | -0.400 [" in section


def test_page_of_a_sequential_comparison_says_so():
    page = markdown(make_report(VARIANTS, replace(RULES, z=2.8), ORIGIN))
    assert "Examples were added until the verdicts were reached, in at most 20 looks." in page


def test_files_have_every_figure(tmp_path):
    report = write(make_report(VARIANTS, RULES, ORIGIN), tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.as_dict()))
    assert list(saved)[:7] == ["tasks", "average", "averaged", "near_chance", "variants", "gate", "allowed_drop"]
    assert {name: saved[name] for name in ORIGIN} == ORIGIN and saved["pictures"] == ["accuracy.svg"]
    assert saved["gate"] == {"variants": ["all"], "strict": False, "failed": ["all"], "passed": False}
    assert saved["variants"]["half"]["blocks"] == [0, 1, 2] and "outcomes" not in saved["variants"]["half"]
    page = (tmp_path / "report.md").read_text()
    assert "**Gate** (all): FAILED by all (worse)." in page and "![accuracy](accuracy.svg)" in page
    lines = [line for line in page.splitlines() if line.startswith("| all |")]
    averages, _, blocks = page[: page.index("## By task")].partition("## Blocks")
    assert "| half | 0, 1, 2 |" in blocks and "A repaired model drops blocks in its own order" in blocks
    assert lines[0].startswith("| all | 100% | tp=3 | 0.200 | -0.400 [-0.4")
    first_table = averages.partition("## Margin")[0].splitlines()
    assert len({line.count("|") for line in first_table if line.startswith("| all")}) == 1


def test_perplexity_beyond_a_float_is_text_in_the_file(tmp_path):
    """JSON has no infinity; many programs refuse the word, and others read another number."""
    report = write(make_report([scored("baseline", 0.0, 120, 51, -900.0)], replace(RULES, gate=()), ORIGIN), tmp_path)
    assert report.tasks["text"]["baseline"]["perplexity"] == float("inf")
    text = (tmp_path / "report.json").read_text()
    saved = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert saved["tasks"]["text"]["baseline"]["perplexity"] == "inf"


def test_variants_compared_on_perplexity_only_are_shown_and_tracked(tmp_path):
    """There are no averages, so the table of a terminal has the tasks, and no sentence speaks of verdicts."""
    text = {"text": Outcomes("text", (-300.0, -150.0), words=(100.0, 50.0), others={"bits_per_byte": 0.9})}
    worse = {"text": Outcomes("text", (-310.0, -155.0), words=(100.0, 50.0), others={"bits_per_byte": 1.1})}
    both = [replace(VARIANTS[0], outcomes=text), replace(VARIANTS[1], outcomes=worse)]
    report = write(make_report(both, replace(RULES, gate=()), ORIGIN), tmp_path)
    columns = {str(column.header): list(column.cells) for column in summary(report).columns}
    assert (columns["task"], columns["variant"]) == (["text"] * 2, ["baseline", "half"])
    assert columns["accuracy"] == ["perplexity 20.1", "perplexity 22.2"] and columns["difference"][1][:6] == "+10.5%"
    page = markdown(report)
    assert "Perplexities have no verdict." in page and "decide the verdicts" not in page
    assert "Accuracy, or perplexity per word" in page
    saved = json.loads((tmp_path / "report.json").read_text())["tasks"]["text"]
    assert saved["half"]["metrics"] == {"bits_per_byte": 1.1} and saved["baseline"]["metrics"] == {"bits_per_byte": 0.9}
    tracker, _ = start_tracking(Track(), tmp_path, {}, first=True, say=print)
    track(report, tmp_path, tracker)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["eval/half/text"] == pytest.approx(22.198, abs=1e-3)


def test_nothing_is_drawn_if_no_block_drops(report, tmp_path):
    none_dropped = {name: replace(one, dropped=0.0) for name, one in report.variants.items()}
    assert draw(replace(report, variants=none_dropped), tmp_path) == () and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("wandb_at_home")
def test_report_is_tracked(tmp_path):
    report = write(make_report(VARIANTS, RULES, ORIGIN), tmp_path)
    tracker, _ = start_tracking(Track("wandb").of("eval"), tmp_path, {}, first=True, say=print)
    track(report, tmp_path, tracker)
    run = records(next((tmp_path / "wandb").glob("offline-run-*")))
    assert of_kind("run", run)[0]["job_type"] == "eval"
    names = {name.removesuffix("._type") for row in history(run) for name in row if name.endswith("._type")}
    assert names == {"eval/comparisons", "eval/accuracy"}
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["eval/all"] == 0.2 and line["eval/baseline"] == 0.6
    (table,) = (json.loads(line) for line in (tmp_path / "tables.jsonl").read_text().splitlines())
    assert len(table["rows"]) == 4 * (3 + 1) and len(table["rows"][0]) == len(table["columns"])


def test_variants_are_shown_on_the_same_examples(tmp_path):
    """A variant that was decided early answered 50 of 200 examples as the baseline did; the others are harder."""
    base = generated("needle", 509, 100, 200) | generated("needle", 1024, 100, 200)
    early = {name: one.first(50) for name, one in base.items()}
    variant = replace(VARIANTS[1], outcomes=early)
    report = make_report([replace(VARIANTS[0], outcomes=base), variant], replace(RULES, gate=()), ORIGIN)
    assert report.average["baseline"]["accuracy"] == 0.5 and report.average["half"]["accuracy"] == 1
    assert report.average_accuracy("half") == report.average_accuracy("baseline") == 0.5
    assert report.lengths["half"].scores == report.lengths["baseline"].scores == {509: 1, 1024: 1}


def test_scores_by_length_and_the_effective_length(tmp_path):
    """A length is effective only if all shorter ones are; tasks that are not generated do not count.

    RULER's task of questions has a set that ends, and counts.
    """
    right, poor, others = {}, {}, {"good": outcomes(3), "other_64": outcomes(5, 100, 0.0, 100)}
    for length, needles, questions in ((1024, 96, 80), (509, 90, 90), (4096, 90, 70), (8192, 90, 90)):
        right |= generated("needle", length, needles) | generated("ruler_qa_squad", length, questions, available=250)
        poor |= generated("needle", length, 80) | generated("ruler_qa_squad", length, 80, available=250)
    base = replace(VARIANTS[0], outcomes=right | others)
    half, rules = replace(VARIANTS[1], outcomes=poor | others), replace(RULES, gate=())
    report = write(make_report([base, half], rules, ORIGIN), tmp_path)
    assert report.lengths["baseline"].scores == pytest.approx({509: 0.9, 1024: 0.88, 4096: 0.8, 8192: 0.9})
    assert [report.lengths[name].effective for name in ("baseline", "half")] == [1024, None]
    page = (tmp_path / "report.md").read_text()
    assert "| variant | 509 | 1,024 | 4,096 | 8,192 | effective length |" in page
    assert "| baseline | 0.900 | 0.880 | 0.800 | 0.900 | 1,024 |" in page and "| half | 0.800" in page
    assert "![lengths](lengths.svg)" in page and (tmp_path / "lengths.svg").is_file()
    assert json.loads((tmp_path / "report.json").read_text())["lengths"]["half"]["effective"] is None


@pytest.mark.parametrize(
    "tasks",
    [
        generated("needle", 509, 9),
        generated("needle", 509, 9) | generated("needle", 1024, 9) | generated("ruler_vt", 1024, 9),
        {"good": outcomes(9), "other_64": outcomes(9, available=None)},
    ],
    ids=["one length", "other tasks", "not generated"],
)
def test_scores_by_length_need_the_same_tasks_at_several_lengths(tasks):
    assert not make_report([replace(VARIANTS[0], outcomes=tasks)], replace(RULES, gate=()), ORIGIN).lengths


def test_lines_of_the_picture_join_like_variants(tmp_path, monkeypatch):
    """A variant on another mesh is on no line; rounded reductions have a line of their own."""
    lines = {}
    monkeypatch.setattr("eval.stats.publish.draw_shares", lambda _, left, right, **__: lines.update(left, **right))
    half = VARIANTS[1]
    variants = (
        VARIANTS[0],
        half,
        replace(VARIANTS[0], name="ring", mesh="tp=3 ring=2"),
        replace(VARIANTS[0], name="int8", reduce="int8"),
        replace(half, name="half int8", reduce="int8"),
    )
    draw(make_report(variants, RULES, ORIGIN), tmp_path)
    shares = {name: [point[0] for point in points] for name, points in lines.items()}
    assert shares == {"not repaired": [0.0, 0.5], "not repaired, int8": [0.0, 0.5], "time": [0.0, 0.5]}
