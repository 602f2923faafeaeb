"""A model's scores on benchmarks, on any mesh; and what a change to it costs, with statistics and a verdict.

    python -m eval.run model=smollm2_135m eval.tasks=[arc_easy] eval.limit=50 mesh.ring=2 out=outputs/scores
    python -m eval.run experiment=evaluate/spd_regression eval.limit=200 out=outputs/spd

Exit codes: 0 done; 3 done, and a variant of the gate is worse (eval.strict: or undecided); 2 the command line asks for
what cannot be done (nothing was started); 1 a rank failed; 75 asked to stop (SIGUSR1).  The same command again goes on
where it was interrupted.
"""

import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from eval.answers import responses
from eval.answers.requests import key
from eval.answers.worker import EvalWork, run_rank
from eval.harness.local import LOCAL
from eval.job import EvalJob, ordered, pinned, prepare
from eval.stats import report
from eval.variants import Variant
from recipes.common.cli import GATE_FAILED, console, is_first, leave_stopped, main, on_every_rank, say, warm_up_ranks
from recipes.common.manifest import record
from recipes.common.provenance import ROOT, commit_of, provenance

__all__ = ("pinned", "prepare", "task")  # what slurm.submit asks of a recipe
WARM = ("longctx.infer.engine", "eval.answers.score", "eval.answers.generate", "eval.answers.worker")


def answer(job: EvalJob, number: int) -> responses.StoredAnswers:
    """All answers of a variant: those that are kept, and the others by its ranks."""
    variant = job.variants[number]
    file = job.file(variant)
    kept = responses.read(file)
    for where in kept.corrupt:
        say(f"{where} is not as it was written: what was there is computed again")
    if others := kept.commits - {commit_of(ROOT)}:
        say(f"{file} has answers of another commit, {', '.join(sorted(others))}: another out= asks all of them anew")
    left = tuple(request for request in job.requests if key(request) not in kept.answers)
    which = f"{variant.name} ({number + 1} of {len(job.variants)})"
    say(f"{which}: {len(left):,} of {len(job.requests):,} requests to answer")
    if not left:
        return kept
    work = EvalWork(
        name=f"{number + 1}/{len(job.variants)} {variant.name}",
        variant=variant,
        requests=left,
        file=file,
        max_batch_tokens=job.eval.max_batch_tokens,
    )
    if on_every_rank(variant.target.mesh, run_rank, work):
        leave_stopped()
    return responses.read(file)


def scored(job: EvalJob, variant: Variant, kept: responses.StoredAnswers) -> report.ScoredVariant:
    """The variant's outcomes, of the answers that are ``kept``."""
    from eval.harness.tasks import answered, outcomes

    job.lm.answer = lambda asked: [kept.answers[key(request)] for request in asked]
    answered(job.tasks, job.lm)
    seconds = kept.seconds or None
    return report.ScoredVariant(
        name=variant.name,
        model=variant.target.model.name,
        mesh=str(variant.target.mesh),
        dropped=variant.dropped,
        blocks=tuple(sorted(variant.target.plan.dropped)) if variant.target.plan else (),
        repaired=variant.repaired,
        outcomes={name: outcomes(name, task) for name, task in job.tasks.items()},
        tokens_per_s=kept.tokens / seconds if seconds else None,
        requests_per_s=kept.requests / seconds if seconds else None,
    )


def finish(job: EvalJob, found: Sequence[report.ScoredVariant], commits: Set[str]) -> dict[str, Any]:
    """The report, written, tracked and shown; ``commits`` are those that its answers are of."""
    from longctx.train.track import start_tracking

    judged = report.GateRules(job.eval.allowed_drop, job.eval.resamples, job.eval.seed, job.eval.gate, job.eval.strict)
    title = f"{found[0].model} on {len(job.tasks)} task(s)"
    about = {"title": title, **provenance(), "commit": ", ".join(sorted({*commits, commit_of(ROOT)}))}
    made = report.write(report.report_of(found, judged, about), job.out)
    tracker, _ = start_tracking(job.track, job.out, job.config, first=True, say=say)
    report.track(made, job.out, tracker)
    console.print(report.summary(made))
    console.print(f"written to {job.out}/report.md, report.json")
    return made


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; answer, variant by variant; report; exit code 3 if the gate fails."""
    warm_up_ranks(WARM)
    job = prepare(config)
    folder = job.eval.folder
    if not folder:
        say("benchmarks come from the hub: eval.data=DIR, or LONGCTX_DATA, names a folder of files (eval/README.md)")
    read = [folder / LOCAL[name].file for name in job.tasks if folder and name in LOCAL]
    if job.eval.include:
        read += [file for file in Path(job.eval.include).expanduser().rglob("*") if file.is_file()]
    record(config, [variant.target.folder for variant in job.variants], read)
    job = ordered(job)
    kept = [answer(job, number) for number in range(len(job.variants))]
    if not is_first():
        return
    found = [scored(job, variant, of) for variant, of in zip(job.variants, kept, strict=True)]
    made = finish(job, found, set().union(*(of.commits for of in kept)))
    if not made["gate"]["passed"]:
        say(f"[bold red]gate failed[/]: {', '.join(made['gate']['failed'])}")
        sys.exit(GATE_FAILED)


if __name__ == "__main__":
    main("evaluate", task)
