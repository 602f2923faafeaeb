"""What was found, for people and for programs: report.json, report.md, pictures, tables and images of W&B."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.stats.compare import Comparison, Perplexity, compare, compare_perplexity, near_chance
from eval.stats.outcomes import Outcomes
from longctx.train.track import Tracker
from recipes.common.plots import draw_shares

AVERAGE = "average"
_PICTURE = "accuracy"


@dataclass(frozen=True)
class ScoredVariant:
    """A variant in words: the share of ``blocks`` that ``dropped`` a reduction, its outcomes by task, its speed."""

    name: str
    model: str
    mesh: str
    dropped: float
    blocks: tuple[int, ...]
    repaired: bool
    outcomes: Mapping[str, Outcomes]
    tokens_per_s: float | None
    requests_per_s: float | None


@dataclass(frozen=True)
class GateRules:
    """How variants are judged: ``gate`` are those that must not be worse; nor undecided, if it is ``strict``."""

    allowed_drop: float
    resamples: int
    seed: int
    gate: tuple[str, ...]
    strict: bool


def report_of(scored: Sequence[ScoredVariant], judged: GateRules, about: Mapping[str, Any]) -> dict[str, Any]:
    """All figures, by task and variant; the first of ``scored`` is the baseline."""
    base = scored[0].outcomes
    right = [name for name, one in base.items() if not one.words]
    chance = [name for name in right if near_chance(base[name].values, base[name].chance)]
    carrying = [name for name in right if name not in chance]
    averaged = carrying or right
    tasks: dict[str, dict[str, Any]] = {name: {} for name in base}
    average = {}
    how = {"resamples": judged.resamples, "seed": judged.seed}
    for one in scored:
        for name, ours in base.items():
            theirs = one.outcomes[name]
            assert len(ours.values) == len(theirs.values), "the same examples"
            if ours.words:
                found = compare_perplexity(ours.values, theirs.values, ours.words, **how)
                tasks[name][one.name] = _of_perplexity(found, one)
            else:
                pair = [(ours.values, theirs.values)]
                compared = compare(pair, allowed_drop=judged.allowed_drop, **how)
                tasks[name][one.name] = _of_accuracy(compared, one, {"metrics": dict(theirs.others)})
        if averaged:
            pairs = [(base[name].values, one.outcomes[name].values) for name in averaged]
            told = compare(pairs, allowed_drop=judged.allowed_drop, **how)
            if not carrying:  # there is nothing to lose, whatever the interval says
                told = replace(told, verdict="undecided", needed=None)
            average[one.name] = _of_accuracy(told, one, {})
    variants = {one.name: {k: v for k, v in vars(one).items() if k not in ("name", "outcomes")} for one in scored}
    return {
        "tasks": tasks,
        AVERAGE: average,
        "averaged": averaged,
        "near_chance": chance,
        "variants": variants,
        "gate": _gate(judged, average),
        "allowed_drop": judged.allowed_drop,
        **about,
    }


def _of_accuracy(found: Comparison, one: ScoredVariant, more: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in asdict(found).items() if name != "baseline"}
    if one.name == "baseline":
        nothing = ("difference", "low", "high", "lost", "won", "p_mcnemar", "verdict", "needed")
        told |= dict.fromkeys(nothing)
    return {**told, **more}


def _of_perplexity(found: Perplexity, one: ScoredVariant) -> dict[str, Any]:
    """Its difference is relative to the baseline's: 0.01 is a hundredth more."""
    ends: dict[str, Any] = dict.fromkeys(("difference", "low", "high"))
    if one.name != "baseline":
        ends["difference"] = found.ratio - 1
        ends |= {name: end - 1 for name, end in (("low", found.low), ("high", found.high)) if end is not None}
    return {"n": found.n, "accuracy": None, "perplexity": found.perplexity, **ends, "p_mcnemar": None, "verdict": None}


def _gate(judged: GateRules, average: Mapping[str, Any]) -> dict[str, Any]:
    """Whether all variants that it is about are good enough, and which are not."""
    refused = ("worse", "undecided") if judged.strict else ("worse",)
    failed = [name for name in judged.gate if name in average and average[name]["verdict"] in refused]
    return {"variants": list(judged.gate), "strict": judged.strict, "failed": failed, "passed": not failed}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    rest = [name for name in report["variants"] if name != "baseline"]
    parts = [f"# {report['title']}", *_gate_said(report, rest), "## On average", _averages(report)]
    if report["pictures"]:
        parts.append("\n".join(f"![{Path(picture).stem}]({picture})" for picture in report["pictures"]))
    parts += _blocks(report)
    parts += ["## By task", _notes(report), _matrix(report)]
    if rest:
        parts += ["## Every comparison", _details(report, rest)]
    lines = [f"{name}: {report[name]}" for name in ("command", "commit", "processor", "cores", "python", "torch")]
    return "\n\n".join([*parts, "## How it was made", "```text\n" + "\n".join(lines) + "\n```"]) + "\n"


def _gate_said(report: Mapping[str, Any], rest: Sequence[str]) -> list[str]:
    if not rest:
        return []
    gate = report["gate"]
    drop = f"{100 * report['allowed_drop']:g} point(s)"
    said = [f"Differences are paired, with 95 % intervals; no worse means: not by more than {drop}."]
    if gate["variants"]:
        verdict = "passed" if gate["passed"] else f"FAILED by {', '.join(gate['failed'])}"
        undecided = [name for name in gate["variants"] if report[AVERAGE][name]["verdict"] == "undecided"]
        if undecided and gate["passed"]:
            verdict += f", with {', '.join(undecided)} undecided (eval.strict=true fails then; more examples decide)"
        said.append(f"**Gate** ({', '.join(gate['variants'])}): {verdict}.")
    return said


def _averages(report: Mapping[str, Any]) -> str:
    rows = []
    for name, variant in report["variants"].items():
        told = report[AVERAGE].get(name)
        cells = _cells(told) if told else [""] * 5
        speed = variant["tokens_per_s"]
        rows.append([name, f"{variant['dropped']:.0%}", variant["mesh"], *cells, f"{speed:,.0f}" if speed else ""])
    head = ["variant", "dropped", "mesh", "accuracy", "difference", "McNemar p", "verdict", "examples to decide"]
    tasks = ", ".join(report["averaged"]) or "no task of accuracy"
    return f"Of {tasks}, each weighing the same.\n\n" + _table([*head, "tokens/s"], rows)


def _blocks(report: Mapping[str, Any]) -> list[str]:
    """Which blocks drop their reduction: a repaired model has an order of its own, so that shares alike may differ."""
    rows = [[name, ", ".join(map(str, one["blocks"]))] for name, one in report["variants"].items() if one["blocks"]]
    if not rows:
        return []
    said = "Repaired models drop blocks in their own order: beside the same share as it is, other blocks may drop."
    return [
        "## Blocks",
        *([said] if any(one["repaired"] for one in report["variants"].values()) else []),
        _table(["variant", "blocks that drop"], rows),
    ]


def _cells(told: Mapping[str, Any]) -> list[str]:
    accuracy = f"{told['accuracy']:.3f}"
    if told["verdict"] is None:
        return [accuracy, "", "", "", ""]
    span = f"{told['difference']:+.3f} [{told['low']:+.3f}, {told['high']:+.3f}]"
    needed = f"{told['needed']:,}" if told["needed"] else ("beyond reach" if told["verdict"] == "undecided" else "")
    return [accuracy, span, f"{told['p_mcnemar']:.2g}", told["verdict"], needed]


def _notes(report: Mapping[str, Any]) -> str:
    if not report["near_chance"]:
        return "Accuracy; perplexity where it says so."
    near, out = ", ".join(report["near_chance"]), set(report["near_chance"]).isdisjoint(report["averaged"])
    return (
        f"Near chance{', and left out of the average' if out else ''}: {near}. There the baseline is not better "
        "than guessing (one-sided exact test, 95 %), so that a difference says nothing about the variant."
    )


def _matrix(report: Mapping[str, Any]) -> str:
    rows = []
    for task, by_variant in report["tasks"].items():
        cells = [
            f"{told['accuracy']:.3f}" if told["accuracy"] is not None else f"perplexity {told['perplexity']:.1f}"
            for told in by_variant.values()
        ]
        mark = " (near chance)" if task in report["near_chance"] else ""
        rows.append([task + mark, f"{next(iter(by_variant.values()))['n']:,}", *cells])
    return _table(["task", "examples", *report["variants"]], rows)


def _details(report: Mapping[str, Any], rest: Sequence[str]) -> str:
    rows = []
    for task, by_variant in report["tasks"].items():
        for name in rest:
            told = by_variant[name]
            if told["accuracy"] is None:
                ends = f"[{told['low']:+.1%}, {told['high']:+.1%}]" if told["low"] is not None else "(few texts)"
                said = f"{told['difference']:+.1%} {ends}"
                rows.append([task, name, f"perplexity {told['perplexity']:.1f}", said, "", "", ""])
            else:
                rows.append([task, name, *_cells(told)])
    return _table(["task", "variant", "accuracy", "difference", "McNemar p", "verdict", "examples to decide"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(report: Mapping[str, Any], out: Path) -> list[str]:
    """Accuracy and milliseconds a token over the share of dropped blocks, as files; none where nothing is dropped."""
    of = report["variants"]
    dropped = {name: one for name, one in of.items() if name in report[AVERAGE]}
    if len({one["dropped"] for one in dropped.values()}) < 2:
        return []
    accuracy: dict[str, list[tuple[float, float]]] = {}
    latency: dict[str, list[tuple[float, float]]] = {}
    for name, one in dropped.items():
        kinds = ["as it is", "repaired"] if not one["dropped"] else ["repaired" if one["repaired"] else "as it is"]
        for kind in kinds:
            accuracy.setdefault(kind, []).append((one["dropped"], report[AVERAGE][name]["accuracy"]))
        if one["tokens_per_s"] and not one["repaired"]:
            latency.setdefault("time", []).append((one["dropped"], 1000 / one["tokens_per_s"]))
    accuracy = {kind: points for kind, points in accuracy.items() if len(points) > 1}
    files = [f"{_PICTURE}.svg", f"{_PICTURE}.png"]
    for file in files:
        draw_shares(
            str(out / file),
            accuracy,
            latency,
            title=report["title"],
            x="blocks that drop their first reduction",
            y=("average accuracy", "milliseconds a token"),
        )
    return files[:1]


def write(report: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Pictures, report.json and report.md in ``out``; the report with the names of its pictures."""
    whole = {**report, "pictures": draw(report, out)}
    (out / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "report.md").write_text(markdown(whole))
    return whole


def summary(report: Mapping[str, Any]) -> Table:
    """The averages, or one model's scores, for a terminal."""
    if len(report["variants"]) == 1:
        table = Table("task", "examples", "accuracy", box=None)
        for task, by_variant in report["tasks"].items():
            (told,) = by_variant.values()
            value = told["accuracy"]
            table.add_row(
                task, f"{told['n']:,}", f"perplexity {told['perplexity']:.2f}" if value is None else f"{value:.3f}"
            )
        return table
    table = Table("variant", "accuracy", "difference", "McNemar p", "verdict", "examples to decide", box=None)
    for name, told in report[AVERAGE].items():
        table.add_row(name, *(cell.replace("[", "\\[") for cell in _cells(told)))
    return table


def track(report: Mapping[str, Any], out: Path, tracker: Tracker) -> None:
    """The same to W&B: a figure each, a table, the picture."""
    rows = []
    for task, by_variant in {**report["tasks"], AVERAGE: report[AVERAGE]}.items():
        for name, told in by_variant.items():
            cells = [told.get(column) for column in ("n", "accuracy", "perplexity", "difference", "low", "high")]
            rows.append([task, name, *cells, told["p_mcnemar"], told["verdict"] or ""])
    tracker.log({f"eval/{name}": told["accuracy"] for name, told in report[AVERAGE].items()}, 0)
    columns = ["task", "variant", "n", "accuracy", "perplexity", "difference", "low", "high", "p_mcnemar", "verdict"]
    tracker.table("eval/comparisons", columns, rows, 0)
    if report["pictures"]:
        tracker.image(f"eval/{_PICTURE}", out / f"{_PICTURE}.png", 0)
    tracker.finish()
