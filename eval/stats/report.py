"""The report of an evaluation as a value: every variant compared with the baseline, by task and on average."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from eval.stats.compare import (
    Comparison,
    MarginChange,
    Perplexity,
    Verdict,
    Z,
    compare,
    compare_margins,
    compare_perplexity,
    is_near_chance,
    verdicts_without,
)
from eval.stats.depths import DepthScores, score_depths
from eval.stats.lengths import LengthScores, score_lengths
from eval.stats.outcomes import Outcomes
from eval.variants import BASELINE

AVERAGE = "average"


@dataclass(frozen=True)
class ScoredVariant:
    """A variant and its outcomes by task.

    ``blocks`` are those that drop their first reduction; ``dropped`` is their share of all blocks.  ``repaired``: their
    weights were adapted to this.  ``reduce`` is the dtype of the messages of reductions.  The speeds are None if no
    scored request was timed.
    """

    name: str
    model: str
    mesh: str
    dropped: float
    blocks: tuple[int, ...]
    repaired: bool
    outcomes: Mapping[str, Outcomes]
    tokens_per_s: float | None
    requests_per_s: float | None
    reduce: str = "float32"


@dataclass(frozen=True)
class GateRules:
    """Rules of the verdicts and of the gate.

    A variant in ``gate`` fails if its average is worse and, with ``strict``, if it is undecided.  ``z`` is the normal
    quantile of the intervals: `Z`, or `sequential.Z_SEQUENTIAL` if examples are added until the verdicts are reached.
    """

    allowed_drop: float
    resamples: int
    seed: int
    gate: tuple[str, ...]
    strict: bool
    z: float = Z


class Figures(TypedDict, total=False):
    """Figures of a variant on a task, or on average, as report.json has them.

    A baseline has None for all comparisons.  A variant's ``baseline`` is the accuracy of the baseline on the variant's
    ``n`` examples; the baseline may have answered more.  Tasks of perplexity have accuracy None and ``perplexity``, per
    word; their difference is relative: 0.01 is one per cent more.  ``needed`` are examples by task (see `Comparison`).
    ``rests_on``: for an average that is decided, the tasks without which its verdict would differ, with that verdict.
    ``margin``: `MarginChange` as a dictionary, None without log-probabilities of answers.
    ``metrics``: totals of all of lm-eval's metrics, only for a task, not for an average.
    """

    n: int
    accuracy: float | None
    baseline: float
    perplexity: float
    difference: float | None
    low: float | None
    high: float | None
    lost: int | None
    won: int | None
    p_mcnemar: float | None
    verdict: Verdict | None
    needed: Mapping[str, int] | None
    margin: Mapping[str, float | None] | None
    rests_on: Mapping[str, Verdict]
    metrics: Mapping[str, float]


_NO_VERDICT = Figures(p_mcnemar=None, verdict=None)


@dataclass(frozen=True)
class GateResult:
    """The variants that the gate judges (``eval.gate``), and those that ``failed``."""

    variants: tuple[str, ...]
    strict: bool
    failed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if no variant failed."""
        return not self.failed


@dataclass(frozen=True)
class Report:
    """All figures of an evaluation, by task and variant; the first variant is the baseline.

    ``averaged`` are the tasks in the average; in those of ``near_chance`` the baseline is no better than guessing.
    ``sequential``: examples were added until the verdicts were reached.
    ``lengths`` are scores by length, of generated tasks at several lengths.  ``depths`` are scores by depth and length,
    of tasks that ask for one fact.
    ``origin``: title, command, commit, machine and versions.
    """

    tasks: Mapping[str, Mapping[str, Figures]]
    average: Mapping[str, Figures]
    averaged: tuple[str, ...]
    near_chance: tuple[str, ...]
    variants: Mapping[str, ScoredVariant]
    gate: GateResult
    allowed_drop: float
    sequential: bool
    origin: Mapping[str, str]
    lengths: Mapping[str, LengthScores] = field(default_factory=dict)
    depths: Mapping[str, DepthScores] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()

    def average_accuracy(self, name: str) -> float:
        """Return the average accuracy of variant ``name``, as if the baseline had on its examples what it has on all.

        A variant may have answered fewer examples than the baseline, and easier ones.
        """
        figures = self.average[name]
        accuracy, of_baseline = figures["accuracy"], next(iter(self.average.values()))["accuracy"]
        assert accuracy is not None and of_baseline is not None
        return accuracy + (of_baseline - figures.get("baseline", of_baseline))

    def as_dict(self) -> dict[str, object]:
        """Return the content of report.json."""
        about_variants = {
            name: {key: value for key, value in vars(variant).items() if key not in ("name", "outcomes")}
            for name, variant in self.variants.items()
        }
        values = {name: value for name, value in vars(self).items() if name not in ("origin", "pictures")}
        values |= {"variants": about_variants, "gate": {**vars(self.gate), "passed": self.gate.passed}}
        for name in ("lengths", "depths"):
            values[name] = {variant: vars(scores) for variant, scores in getattr(self, name).items()}
        return {**values, **self.origin, "pictures": self.pictures}


def choose_averaged(base: Mapping[str, Outcomes]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tasks to average, and the tasks on which the baseline is near chance.

    The tasks to average are the accuracy tasks that are not near chance, or all accuracy tasks if all are near chance.
    """
    of_accuracy = [name for name, task in base.items() if not task.words]
    chance = tuple(name for name in of_accuracy if is_near_chance(base[name].values, base[name].chance))
    return tuple(name for name in of_accuracy if name not in chance) or tuple(of_accuracy), chance


def make_report(scored: Sequence[ScoredVariant], rules: GateRules, origin: Mapping[str, str]) -> Report:
    """Compare every variant with the first of ``scored``, the baseline, task by task and on average.

    A variant may have answered fewer examples than the baseline; only those that it answered are compared.  Scores by
    length and depth are of the examples that all variants answered.  If the baseline is near chance on every task, each
    variant's average is "undecided".
    """
    base = scored[0].outcomes
    least = {task: min(len(one.outcomes[task].values) for one in scored) for task in base}
    common = {one.name: {task: one.outcomes[task].first(n) for task, n in least.items()} for one in scored}
    averaged, chance = choose_averaged(base)
    tasks = {name: {one.name: _compare_task(base, one, name, rules) for one in scored} for name in base}
    average = {}
    for one in scored if averaged else ():
        figures = _compare_tasks(base, one, averaged, rules)
        average[one.name] = figures | Figures(rests_on=_rest_on(base, one, averaged, rules, figures["verdict"]))
        if averaged[0] in chance and one.name != BASELINE:  # guessing loses nothing, whatever the interval says
            average[one.name] |= Figures(verdict="undecided", needed=None, rests_on={})
    return Report(
        tasks=tasks,
        average=average,
        averaged=averaged,
        near_chance=chance,
        variants={one.name: one for one in scored},
        gate=_judge(rules, average),
        allowed_drop=rules.allowed_drop,
        sequential=rules.z != Z,
        origin=origin,
        lengths={name: lengths for name, outcomes in common.items() if (lengths := score_lengths(outcomes))},
        depths={name: depths for name, outcomes in common.items() if (depths := score_depths(outcomes))},
    )


def _compare_task(base: Mapping[str, Outcomes], variant: ScoredVariant, name: str, rules: GateRules) -> Figures:
    """Return the figures of ``variant`` on the task ``name``, with lm-eval's further metrics."""
    return {**_compare_tasks(base, variant, [name], rules), "metrics": dict(variant.outcomes[name].others)}


def _compare_tasks(
    base: Mapping[str, Outcomes], variant: ScoredVariant, names: Sequence[str], rules: GateRules
) -> Figures:
    """Return the figures of ``variant``, averaged over the tasks ``names``: one task, or several accuracy tasks."""
    pairs = _pairs_of(base, variant, names)
    if words := pairs[0][0].words:
        values = pairs[0][0].values, pairs[0][1].values
        return _perplexity_figures(compare_perplexity(*values, words, z=rules.z), variant)
    accuracy = compare(
        [(one.values, other.values) for one, other in pairs],
        allowed_drop=rules.allowed_drop,
        available=[other.available for _, other in pairs],
        z=rules.z,
        resamples=rules.resamples,
        seed=rules.seed,
    )
    margins = [(one.margins, other.margins) for one, other in pairs if one.margins]
    return _accuracy_figures(accuracy, compare_margins(margins, z=rules.z) if margins else None, variant, names)


def _pairs_of(
    base: Mapping[str, Outcomes], variant: ScoredVariant, names: Sequence[str]
) -> list[tuple[Outcomes, Outcomes]]:
    """Return the outcomes of the baseline and of ``variant`` on the same examples, for each of the tasks ``names``."""
    others = [variant.outcomes[name] for name in names]
    return [(base[name].first(len(other.values)), other) for name, other in zip(names, others, strict=True)]


def _rest_on(
    base: Mapping[str, Outcomes],
    variant: ScoredVariant,
    names: Sequence[str],
    rules: GateRules,
    verdict: Verdict | None,
) -> dict[str, Verdict]:
    """Return the tasks among ``names`` without which a deciding ``verdict`` would differ, with the other verdict."""
    if verdict in (None, "undecided") or len(names) < 2:
        return {}
    pairs = [(one.values, other.values) for one, other in _pairs_of(base, variant, names)]
    without = zip(names, verdicts_without(pairs, allowed_drop=rules.allowed_drop, z=rules.z), strict=True)
    return {name: other for name, other in without if other != verdict}


def _accuracy_figures(
    compared: Comparison, margin: MarginChange | None, variant: ScoredVariant, names: Sequence[str]
) -> Figures:
    """Return the comparison ``compared`` of accuracies over the tasks ``names`` as figures of ``variant``.

    For the baseline, its accuracy is the only figure besides the number of examples: it has no differences.
    """
    if variant.name == BASELINE:
        no_difference = Figures(difference=None, low=None, high=None, lost=None, won=None)
        no_figures = Figures(**no_difference, **_NO_VERDICT, needed=None, margin=None)
        return {"n": compared.n, "accuracy": compared.accuracy, **no_figures}
    return {
        "n": compared.n,
        "accuracy": compared.accuracy,
        "baseline": compared.baseline,
        "difference": compared.difference,
        "low": compared.low,
        "high": compared.high,
        "lost": compared.lost,
        "won": compared.won,
        "p_mcnemar": compared.p_mcnemar,
        "verdict": compared.verdict,
        "needed": dict(zip(names, compared.needed, strict=True)) if compared.needed else None,
        "margin": vars(margin) if margin else None,
    }


def _perplexity_figures(compared: Perplexity, variant: ScoredVariant) -> Figures:
    figures = Figures(n=compared.n, accuracy=None, perplexity=compared.perplexity)
    if variant.name == BASELINE:
        return {**figures, "difference": None, "low": None, "high": None, **_NO_VERDICT}
    low, high = (None if end is None else end - 1 for end in (compared.low, compared.high))
    return {**figures, "difference": compared.ratio - 1, "low": low, "high": high, **_NO_VERDICT}


def _judge(rules: GateRules, average: Mapping[str, Figures]) -> GateResult:
    refused = ("worse", "undecided") if rules.strict else ("worse",)
    failed = tuple(name for name in rules.gate if name in average and average[name]["verdict"] in refused)
    return GateResult(rules.gate, rules.strict, failed)
