"""Measure our examples per second and those of lm-eval's own model, on the same tasks, weights and threads.

python -m eval.speed eval.tasks=[arc_easy,hellaswag] eval.limit=50 out=outputs/speed
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from eval import run
from eval.answers import responses
from eval.answers.requests import Answer, Request, key
from eval.answers.worker import EvalWork, run_rank
from eval.harness.lm import make_recorder
from eval.harness.tasks import answer_tasks
from eval.job import EvalJob, prepare
from longctx.parallel.launch import Rank, run_ranks
from recipes.common.cli import console, main, threads_for, warm_up_ranks, write_result
from recipes.common.manifest import record
from recipes.common.provenance import provenance
from recipes.common.settings import section

if TYPE_CHECKING:
    from eval.harness.tasks import Task

RECIPE = "eval.speed"
OURS = "ours"


@dataclass(frozen=True)
class SpeedSettings:
    """Section ``speed``: in each round, our model and lm-eval's at each batch size of ``batches`` take turns."""

    rounds: PositiveInt = 3
    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)


@dataclass(frozen=True)
class HFWork:
    """The input of lm-eval's model in ``folder``: ``pairs`` of context and continuation, ``batch`` at a time.

    An empty context is replaced by ``prefix_token``.  ``threads`` is the setting ``run.threads``.
    """

    folder: Path
    pairs: tuple[tuple[str, str], ...]
    prefix_token: int
    batch: int
    threads: int | None


@dataclass(frozen=True)
class HFTiming:
    """Seconds of scoring, without loading and tokenizing, and the log-probability of each pair (nats)."""

    seconds: float
    log_probs: list[float]


@dataclass(frozen=True)
class EngineTiming:
    """Seconds of a run without loading the model, and the answers by request key."""

    seconds: float
    answers: Mapping[str, Answer]


@dataclass(frozen=True)
class TaskSpeed:
    """Number of ``examples`` a round, and the seconds of every round, by model.

    ``largest_difference`` is between our log-probabilities and those of lm-eval's model (nats).
    """

    examples: int
    seconds: Mapping[str, Sequence[float]]
    largest_difference: float


def time_hf(rank: Rank, work: HFWork) -> HFTiming:
    """Score all pairs of ``work`` with lm-eval's ``hf`` model, in float32 on one CPU rank.

    Return the seconds, without loading and tokenizing, and the log-probability of each pair.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(threads_for(work.threads, rank))
    lm = HFLM(str(work.folder), device="cpu", dtype="float32", batch_size=work.batch, prefix_token_id=work.prefix_token)
    no_context = [work.prefix_token]
    encoded = [((a, b), *(lm._encode_pair(a, b) if a else (no_context, lm.tok_encode(b)))) for a, b in work.pairs]
    begin = time.perf_counter()
    answers = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    return HFTiming(time.perf_counter() - begin, [log_prob for log_prob, _ in answers])


def time_engine(rank: Rank, work: EvalWork) -> EngineTiming:
    """Answer the requests of ``work`` with our model on one rank.

    Return the seconds, without loading the model, and the answers, which are written to the new file ``work.file``.
    Raises InterruptedError if it was asked to stop before the end.
    """
    if run_rank(rank, work):
        raise InterruptedError("asked to stop before all requests were timed")
    stored = responses.read(work.file)
    return EngineTiming(stored.seconds, stored.answers)


def measure_task(job: EvalJob, task: Task, speed: SpeedSettings) -> TaskSpeed:
    """Time our model and lm-eval's ``hf`` model, at each batch size, on ``task``; compare their log-probabilities.

    The two models take turns in each round.
    """
    # 1. The same requests for both: ours in tokens, lm-eval's as text.
    requests: list[Request] = []
    job.lm.answer = make_recorder(requests)
    answer_tasks({"": task}, job.lm)
    base = job.variants[0]
    pairs = tuple(tuple(instance.args) for instance in task.instances)
    hf_work = HFWork(base.target.folder, pairs, job.lm.eot_token_id, 1, base.target.run.threads)
    work = EvalWork(OURS, base, tuple(dict.fromkeys(requests)), Path(), job.eval.max_batch_tokens)
    # 2. Rounds.
    seconds: dict[str, list[float]] = {}
    difference = 0.0
    for _ in range(speed.rounds):
        with tempfile.TemporaryDirectory() as folder:
            engine = run_ranks(1, time_engine, replace(work, file=Path(folder, "answers.jsonl")))[0]
        seconds.setdefault(OURS, []).append(engine.seconds)
        for batch in speed.batches:
            hf = run_ranks(1, time_hf, replace(hf_work, batch=batch))[0]
            seconds.setdefault(f"hf, batch {batch}", []).append(hf.seconds)
            difference = max(difference, _largest_difference(requests, engine, hf))
    return TaskSpeed(len({instance.doc_id for instance in task.instances}), seconds, difference)


def _largest_difference(requests: Sequence[Request], engine: EngineTiming, hf: HFTiming) -> float:
    """Return the largest difference between our log-probability of a request and that of lm-eval's model, in nats."""
    differences = []
    for request, log_prob in zip(requests, hf.log_probs, strict=True):
        answer = engine.answers[key(request)]
        assert not isinstance(answer, str), "a score"
        differences.append(abs(answer[0] - log_prob))
    return max(differences)


def refuse_unlike(job: EvalJob) -> None:
    """Raise ValueError unless our model and lm-eval's can be compared on ``job``: equal settings, and scored answers.

    lm-eval's model runs on one CPU rank in float32, without dropped reductions, variants or ``eval.max_length``.  Tasks
    of generated text are refused.
    """
    target = job.variants[0].target
    if len(job.variants) > 1 or target.mesh.ranks > 1 or target.plan:
        raise ValueError(
            "eval.speed compares one rank without dropped reductions: leave mesh, spd and variants at their defaults"
        )
    if target.model.dtype != "float32" or target.run.device != "cpu" or job.eval.max_length:
        raise ValueError("eval.speed compares in model.dtype=float32, run.device=cpu, eval.max_length=null: use these")
    for name, task in job.tasks.items():
        if any(instance.request_type != "loglikelihood" for instance in task.instances):
            raise ValueError(
                f"eval.speed times only tasks that score given answers, and {name} does not: leave it out of eval.tasks"
            )


def show(speeds: Mapping[str, TaskSpeed]) -> None:
    """Print each model's median examples per second, and our speed divided by that of each other model."""
    names = list(next(iter(speeds.values())).seconds)
    table = Table("task", "examples", *(f"{name}, per second" for name in names), "ratio", box=None)
    for task, speed in speeds.items():
        rates = [speed.examples / statistics.median(seconds) for seconds in speed.seconds.values()]
        ratios = " ".join(f"{rates[0] / rate:.2f}" for rate in rates[1:])
        table.add_row(task, str(speed.examples), *(f"{rate:.2f}" for rate in rates), ratios)
    console.print(table)


def task(config: DictConfig) -> None:
    """Check the configuration, measure task by task, then write and show the figures."""
    warm_up_ranks((*run.WARM, "lm_eval.models.huggingface"))
    settings, job = section(config, "speed", SpeedSettings), prepare(config, RECIPE)
    refuse_unlike(job)
    speeds: dict[str, TaskSpeed] = {}
    with record(config, RECIPE, [job.variants[0].target.folder], run.files_read(job)):
        for name, one in job.tasks.items():
            console.print(f"{name}: {settings.rounds} rounds")
            speeds[name] = measure_task(job, one, settings)
            figures = {task_name: vars(speed) for task_name, speed in speeds.items()}
            write_result(str(job.out / "speed.json"), {"tasks": figures, **provenance()})
    show(speeds)


if __name__ == "__main__":
    main("eval_speed", task)
