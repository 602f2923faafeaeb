"""The report of an evaluation as a value: every variant compared with the baseline, by task and on average."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from eval.stats.compare import Comparison, Perplexity, Verdict, compare, compare_perplexity, is_near_chance
from eval.stats.outcomes import Outcomes
from eval.variants import BASELINE

AVERAGE = "average"


@dataclass(frozen=True)
class ScoredVariant:
    """A variant and its outcomes by task.

    ``blocks`` drop their reduction, a share ``dropped`` of all; ``repaired``: their weights were adapted to it.
    The speeds are None if no scored request was timed.
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


@dataclass(frozen=True)
class GateRules:
    """Rules of the verdicts; the average of no variant in ``gate`` may be worse, nor undecided if ``strict``."""

    allowed_drop: float
    resamples: int
    seed: int
    gate: tuple[str, ...]
    strict: bool


class Figures(TypedDict, total=False):
    """Figures of a variant on a task, or on average, as report.json has them.

    None for what a baseline has nothing to compare with.  Tasks of perplexity have accuracy None and ``perplexity``;
    their difference is relative: 0.01 is one per cent more.
    """

    n: int
    accuracy: float | None
    perplexity: float
    difference: float | None
    low: float | None
    high: float | None
    lost: int | None
    won: int | None
    p_mcnemar: float | None
    verdict: Verdict | None
    needed: int | None
    metrics: Mapping[str, float]


_NO_VERDICT = Figures(p_mcnemar=None, verdict=None)


@dataclass(frozen=True)
class GateResult:
    """The variants that the gate is about, and those that ``failed``."""

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

    ``averaged`` are the tasks in the average; ``near_chance`` those where the baseline is not better than guessing.
    ``origin``: title, command, commit, machine and versions.
    """

    tasks: Mapping[str, Mapping[str, Figures]]
    average: Mapping[str, Figures]
    averaged: tuple[str, ...]
    near_chance: tuple[str, ...]
    variants: Mapping[str, ScoredVariant]
    gate: GateResult
    allowed_drop: float
    origin: Mapping[str, str]
    pictures: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return the content of report.json."""
        about_variants = {
            name: {key: value for key, value in vars(variant).items() if key not in ("name", "outcomes")}
            for name, variant in self.variants.items()
        }
        values = {name: value for name, value in vars(self).items() if name not in ("origin", "pictures")}
        values |= {"variants": about_variants, "gate": {**vars(self.gate), "passed": self.gate.passed}}
        return {**values, **self.origin, "pictures": self.pictures}


def make_report(scored: Sequence[ScoredVariant], rules: GateRules, origin: Mapping[str, str]) -> Report:
    """Compare every variant with the first of ``scored``, the baseline, task by task and on average."""
    # 1. Average the tasks of accuracy where the baseline is better than guessing; all of them if there is none.
    base = scored[0].outcomes
    of_accuracy = [name for name, task in base.items() if not task.words]
    chance = [name for name in of_accuracy if is_near_chance(base[name].values, base[name].chance)]
    informative = [name for name in of_accuracy if name not in chance]
    averaged = informative or of_accuracy
    # 2. Compare.
    tasks = {
        name: {one.name: _compare_task(outcomes, one.outcomes[name], rules, one) for one in scored}
        for name, outcomes in base.items()
    }
    average = {}
    for one in scored if averaged else ():
        pairs = [(base[name].values, one.outcomes[name].values) for name in averaged]
        compared = _compare_accuracy(pairs, rules)
        if not informative:  # guessing loses nothing, whatever the interval says
            compared = replace(compared, verdict="undecided", needed=None)
        average[one.name] = _accuracy_figures(compared, one)
    return Report(
        tasks=tasks,
        average=average,
        averaged=tuple(averaged),
        near_chance=tuple(chance),
        variants={one.name: one for one in scored},
        gate=_judge(rules, average),
        allowed_drop=rules.allowed_drop,
        origin=origin,
    )


def _compare_task(base: Outcomes, other: Outcomes, rules: GateRules, variant: ScoredVariant) -> Figures:
    assert len(base.values) == len(other.values), "the same examples"
    if base.words:
        seeded = {"resamples": rules.resamples, "seed": rules.seed}
        return _perplexity_figures(compare_perplexity(base.values, other.values, base.words, **seeded), variant)
    compared = _compare_accuracy([(base.values, other.values)], rules)
    return {**_accuracy_figures(compared, variant), "metrics": dict(other.others)}


def _compare_accuracy(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], rules: GateRules) -> Comparison:
    return compare(pairs, allowed_drop=rules.allowed_drop, resamples=rules.resamples, seed=rules.seed)


def _accuracy_figures(compared: Comparison, variant: ScoredVariant) -> Figures:
    if variant.name == BASELINE:
        no_difference = Figures(difference=None, low=None, high=None, lost=None, won=None)
        return {"n": compared.n, "accuracy": compared.accuracy, **no_difference, **_NO_VERDICT, "needed": None}
    return {
        "n": compared.n,
        "accuracy": compared.accuracy,
        "difference": compared.difference,
        "low": compared.low,
        "high": compared.high,
        "lost": compared.lost,
        "won": compared.won,
        "p_mcnemar": compared.p_mcnemar,
        "verdict": compared.verdict,
        "needed": compared.needed,
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
