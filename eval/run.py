"""Score a model on benchmarks, on any mesh; compare variants of it, with statistics and a verdict.

    python -m eval.run model=smollm2_135m eval.tasks=[arc_easy] eval.limit=50 mesh.ring=2 out=outputs/scores
    python -m eval.run experiment=evaluate/spd_regression eval.limit=200 out=outputs/spd

Exit codes: 0 done; 1 a rank failed; 2 the command line asks for what cannot be run, and nothing was started; 3 done,
and a variant of ``eval.gate`` is worse, or undecided (unless ``eval.strict=false``); 75 stopped by SIGUSR1.
The same command resumes an interrupted run.
"""

import sys
from collections.abc import Sequence, Set
from pathlib import Path

from omegaconf import DictConfig

from eval.answers import responses
from eval.answers.requests import key
from eval.answers.worker import EvalWork, run_rank
from eval.harness.local import LOCAL
from eval.job import EvalJob, pinned, prepare, with_measured_orders
from eval.stats import page, publish
from eval.stats.report import GateRules, Report, ScoredVariant, make_report
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

__all__ = ("pinned", "prepare", "task")  # slurm.submit calls these of a recipe
WARM = ("longctx.infer.engine", "eval.answers.score", "eval.answers.generate", "eval.answers.worker")


def answer_variant(job: EvalJob, number: int) -> responses.StoredAnswers:
    """Return all answers of variant ``number``: those that are stored, and the others from its ranks."""
    # 1. Read the stored answers.
    variant = job.variants[number]
    file = job.file(variant)
    stored = responses.read(file)
    for line in stored.corrupt:
        say(f"{line} is corrupt: its answer is computed again")
    if others := stored.commits - {commit_of(ROOT)}:
        say(f"{file} has answers of another commit, {', '.join(sorted(others))}: use another out= to ask all again")
    # 2. Ask what is missing.
    missing = tuple(request for request in job.requests if key(request) not in stored.answers)
    progress = f"{variant.name} ({number + 1} of {len(job.variants)})"
    say(f"{progress}: {len(missing):,} of {len(job.requests):,} requests to answer")
    if not missing:
        return stored
    work = EvalWork(
        name=f"{number + 1}/{len(job.variants)} {variant.name}",
        variant=variant,
        requests=missing,
        file=file,
        max_batch_tokens=job.eval.max_batch_tokens,
    )
    if on_every_rank(variant.target.mesh, run_rank, work):
        leave_stopped()
    return responses.read(file)


def score_variant(job: EvalJob, variant: Variant, stored: responses.StoredAnswers) -> ScoredVariant:
    """Return ``variant`` with its outcomes by lm-eval's metrics, from its ``stored`` answers."""
    from eval.harness.tasks import answer_tasks, collect_outcomes

    job.lm.answer = lambda requests: [stored.answers[key(request)] for request in requests]
    answer_tasks(job.tasks, job.lm)
    target, seconds = variant.target, stored.seconds or None
    return ScoredVariant(
        name=variant.name,
        model=target.model.name,
        mesh=str(target.mesh),
        dropped=variant.dropped,
        blocks=tuple(sorted(target.plan.dropped)) if target.plan else (),
        repaired=variant.repaired,
        outcomes={name: collect_outcomes(name, task) for name, task in job.tasks.items()},
        tokens_per_s=stored.tokens / seconds if seconds else None,
        requests_per_s=stored.requests / seconds if seconds else None,
    )


def publish_report(job: EvalJob, scored: Sequence[ScoredVariant], commits: Set[str]) -> Report:
    """Write, track and show the report; ``commits`` are those of the code that computed the answers."""
    from longctx.train.track import start_tracking

    rules = GateRules(job.eval.allowed_drop, job.eval.resamples, job.eval.seed, job.eval.gate, job.eval.strict)
    title = f"{scored[0].model} on {len(job.tasks)} task(s)"
    origin = {"title": title, **provenance(), "commit": ", ".join(sorted({*commits, commit_of(ROOT)}))}
    report = publish.write(make_report(scored, rules, origin), job.out)
    tracker, _ = start_tracking(job.track, job.out, job.config, first=True, say=say)
    publish.track(report, job.out, tracker)
    console.print(page.summary(report))
    console.print(f"written to {job.out}/report.md, report.json")
    return report


def files_read(job: EvalJob) -> list[Path]:
    """Return the files of data that the tasks read, for the manifest."""
    data, include = job.eval.folder, job.eval.include
    files = [data / LOCAL[name].file for name in job.tasks if data and name in LOCAL]
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
        stored = [answer_variant(job, number) for number in range(len(job.variants))]
        if not is_first():
            return
        # 3. Score, compare and report, in one process.
        scored = [score_variant(job, variant, answers) for variant, answers in zip(job.variants, stored, strict=True)]
        report = publish_report(job, scored, set().union(*(answers.commits for answers in stored)))
    if not report.gate.passed:
        print_error(", ".join(report.gate.failed), "gate failed")
        sys.exit(GATE_FAILED)


if __name__ == "__main__":
    main("evaluate", task)
