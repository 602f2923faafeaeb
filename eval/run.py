"""Score a model on benchmarks, on any mesh; compare variants of it, with statistics and a verdict.

    python -m eval.run model=smollm2_135m eval.tasks=[arc_easy] eval.limit=50 mesh.ring=2 out=outputs/scores
    python -m eval.run experiment=evaluate/spd_regression eval.limit=200 out=outputs/spd

Exit code 3: a variant in ``eval.gate`` is worse, or undecided (unless ``eval.strict=false``).  recipes/README.md lists
the other codes.  The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from eval.answers import responses
from eval.answers.requests import Request, key
from eval.answers.worker import EvalWork, run_rank
from eval.harness.local import LOCAL
from eval.job import EvalJob, pinned, prepare, with_measured_orders
from eval.settings import ROLLING
from eval.stats import page, publish
from eval.stats.compare import SCREENED, Z
from eval.stats.outcomes import Outcomes
from eval.stats.report import GateRules, Report, ScoredVariant, choose_averaged, make_report
from eval.stats.sequential import FIRST, LOOKS, Z_SEQUENTIAL, sizes_at, verdict_at_a_look
from eval.variants import Variant
from recipes.common.cli import (
    GATE_FAILED,
    console,
    is_first,
    leave_stopped,
    main,
    on_every_rank,
    print_error,
    say,
    warm_up_ranks,
)
from recipes.common.manifest import record
from recipes.common.provenance import ROOT, commit_of, provenance

if TYPE_CHECKING:
    from eval.harness.tasks import Task

__all__ = ("pinned", "prepare", "task")  # slurm.submit calls these of a recipe
WARM = ("longctx.infer.engine", "eval.answers.score", "eval.answers.generate", "eval.answers.worker")


Asked = tuple[responses.StoredAnswers, Mapping[str, "Task"]]  # a variant's answers, and the tasks they belong to


def answer_all(job: EvalJob) -> list[Asked]:
    """Ask every variant all requests; return, for each variant in order, its answers and the job's tasks.

    Every rank that a launcher started must call this.
    """
    return [(answer_variant(job, number, job.requests), job.tasks) for number in range(len(job.variants))]


def answer_until_decided(job: EvalJob) -> list[Asked]:
    """Ask more examples until every variant has a verdict; return each variant's answers and tasks.

    The sample grows from look to look, that is, from analysis to analysis.  It ends early if no examples are left,
    after `LOOKS` looks, or if the baseline is near chance on every task.  Every rank that a launcher started must call
    this.  All ranks reach the same verdicts from the same answers.
    """
    from eval.harness.tasks import count_examples, first_examples

    asked: dict[int, Asked] = {}
    limits = {name: count_examples(task) for name, task in job.tasks.items()}

    def ask(number: int, sizes: Mapping[str, int]) -> Mapping[str, Outcomes]:
        tasks = {name: first_examples(task, sizes[name]) for name, task in job.tasks.items()}
        asked[number] = (answer_variant(job, number, job.requests_of(tasks)), tasks)
        return outcomes_of(job, *asked[number])

    # 1. Choose the tasks to average, from the baseline's first answers.
    screened = {name: min(SCREENED, limit) for name, limit in limits.items()}
    averaged, chance = choose_averaged(ask(0, screened))
    counted = {name: limits[name] for name in averaged}
    others = {name: min(FIRST, limits[name]) if name in chance else limits[name] for name in limits}
    # 2. Look until the verdicts are reached; a variant with a verdict gets no more requests.
    undecided = list(range(1, len(job.variants)))
    for step in range(LOOKS):
        sizes = others | sizes_at(step, counted)
        base = ask(0, {name: max(screened[name], size) for name, size in sizes.items()})
        for number in tuple(undecided):
            outcomes = ask(number, sizes)
            pairs = [(base[name].values[: sizes[name]], outcomes[name].values) for name in averaged]
            if averaged[0] not in chance and verdict_at_a_look(pairs, job.eval.allowed_drop) != "undecided":
                undecided.remove(number)
        names = ", ".join(job.variants[number].name for number in undecided) or "none"
        examples = max(sizes[name] for name in averaged)
        say(f"look {step + 1}, at up to {examples:,} examples of each task: variants without a verdict: {names}")
        if not undecided or averaged[0] in chance or all(sizes[name] == limit for name, limit in counted.items()):
            break
    return [asked[number] for number in range(len(job.variants))]


def answer_variant(job: EvalJob, number: int, requests: Sequence[Request]) -> responses.StoredAnswers:
    """Return all stored answers of variant ``number``, after its ranks have answered the ``requests`` that lack one.

    Every rank that a launcher started must call this.  Exits with code 75 if the run was asked to stop.
    """
    # 1. Read the stored answers.
    variant = job.variants[number]
    file = job.file(variant)
    speed = speed_settings(job, variant)
    stored = responses.read(file, speed)
    for line in stored.corrupt:
        say(f"{line} is corrupt: its answer is computed again")
    if others := stored.commits - {commit_of(ROOT)}:
        say(
            f"{file} has answers of another commit, {', '.join(sorted(others))}, which are used: to ask all again, "
            "use another out="
        )
    # 2. Ask what is missing.
    missing = tuple(request for request in requests if key(request) not in stored.answers)
    progress = f"{variant.name} ({number + 1} of {len(job.variants)})"
    say(f"{progress}: {len(missing):,} of {len(requests):,} requests to answer")
    if not missing:
        return stored
    work = EvalWork(
        name=f"{number + 1}/{len(job.variants)} {variant.name}",
        variant=variant,
        requests=missing,
        file=file,
        max_batch_tokens=job.eval.max_batch_tokens,
        speed=speed,
    )
    if on_every_rank(variant.target.mesh, run_rank, work):
        leave_stopped()
    return responses.read(file, speed)


def speed_settings(job: EvalJob, variant: Variant) -> str:
    """Return the settings of ``variant`` that change the speed of its answers and not the answers."""
    target = variant.target
    return f"dp={target.mesh.dp} threads={target.run.threads} batch={job.eval.max_batch_tokens}"


def outcomes_of(job: EvalJob, stored: responses.StoredAnswers, tasks: Mapping[str, Task]) -> Mapping[str, Outcomes]:
    """Apply lm-eval's metrics to ``stored`` answers; return the outcomes of each task."""
    from eval.harness.tasks import answer_tasks, collect_outcomes

    job.lm.answer = lambda requests: [stored.answers[key(request)] for request in requests]
    answer_tasks(tasks, job.lm)
    return {name: collect_outcomes(name, task) for name, task in tasks.items()}


def score_variant(job: EvalJob, variant: Variant, asked: Asked) -> ScoredVariant:
    """Return ``variant`` with the outcomes and the speeds of its answers ``asked``."""
    target, stored = variant.target, asked[0]
    seconds = stored.seconds or None
    return ScoredVariant(
        name=variant.name,
        model=target.model.name,
        mesh=str(target.mesh),
        dropped=variant.dropped,
        blocks=tuple(sorted(target.plan.dropped)) if target.plan else (),
        repaired=variant.repaired,
        outcomes=outcomes_of(job, *asked),
        tokens_per_s=stored.tokens / seconds if seconds else None,
        requests_per_s=stored.requests / seconds if seconds else None,
        reduce=target.reduce.name if target.reduce else "float32",
    )


def publish_report(job: EvalJob, scored: Sequence[ScoredVariant], commits: Set[str]) -> Report:
    """Write, track and show the report; ``commits`` are those of the code that computed the answers."""
    from longctx.train.track import start_tracking

    settings, z = job.eval, Z_SEQUENTIAL if job.eval.until else Z
    rules = GateRules(settings.allowed_drop, settings.resamples, settings.seed, settings.gate, settings.strict, z)
    title = f"{scored[0].model} on {len(job.tasks)} task(s)" + ", in its chat template" * settings.chat
    if settings.chat and (rolling := [name for name, task in job.tasks.items() if task.OUTPUT_TYPE == ROLLING]):
        title += f" except {', '.join(rolling)}"
    origin = {"title": title, **provenance(), "commit": ", ".join(sorted({*commits, commit_of(ROOT)}))}
    report = publish.write(make_report(scored, rules, origin), job.out)
    tracker, _ = start_tracking(job.track, job.out, job.config, first=True, say=say)
    publish.track(report, job.out, tracker)
    console.print(page.summary(report))
    for line in page.verdicts_on_one_task(report):
        say(line)
    console.print(f"written to {job.out}/report.md, report.json")
    return report


def files_read(job: EvalJob) -> list[Path]:
    """Return the files of the tasks in ``eval.data`` and of the folder ``eval.include``, for the manifest."""
    from eval.harness.ruler import QUESTIONS

    data, include = job.eval.folder, job.eval.include
    known = {name: task.file for name, task in LOCAL.items()} | {name: file for name, (file, _) in QUESTIONS.items()}
    files = [data / known[name] for name in job.eval.tasks if data and name in known]
    if include:
        files += [file for file in Path(include).expanduser().rglob("*") if file.is_file()]
    return files


def task(config: DictConfig) -> None:
    """Check the configuration, answer variant by variant, report; exit with code 3 if the gate fails."""
    # 1. Check.
    warm_up_ranks(WARM)
    job = prepare(config)
    if not job.eval.folder:
        say("benchmarks come from the hub: eval.data=DIR, or LONGCTX_DATA, names a folder of files (eval/README.md)")
    with record(config, "eval.run", [variant.target.folder for variant in job.variants], files_read(job)):
        # 2. Answer, on the ranks.
        job = with_measured_orders(job)
        asked = answer_until_decided(job) if job.eval.until else answer_all(job)
        if not is_first():
            return
        # 3. Score, compare and report, in one process.
        scored = [score_variant(job, variant, one) for variant, one in zip(job.variants, asked, strict=True)]
        report = publish_report(job, scored, set().union(*(stored.commits for stored, _ in asked)))
    if not report.gate.passed:
        print_error(", ".join(report.gate.failed), "gate failed")
        sys.exit(GATE_FAILED)


if __name__ == "__main__":
    main("evaluate", task)
