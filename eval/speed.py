"""Examples a second, beside lm-eval's own model on the same tasks, weights and threads.

python -m eval.speed eval.tasks=[arc_easy,hellaswag] eval.limit=50 out=outputs/speed
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pydantic import PositiveInt
from rich.table import Table

from eval import run
from eval.answers import responses
from eval.answers.requests import key
from eval.answers.worker import EvalWork, run_rank
from eval.harness.lm import recorder
from eval.harness.tasks import answered
from eval.job import EvalJob
from longctx.parallel.launch import Rank, run_ranks
from recipes.common.cli import console, main, threads_for, warm_up_ranks, write_result
from recipes.common.manifest import record
from recipes.common.provenance import provenance
from recipes.common.settings import section

OURS = "ours"


@dataclass(frozen=True)
class SpeedSettings:
    """Rounds, in each of which ours and lm-eval's at each of ``batches`` take turns; the median is told."""

    rounds: PositiveInt
    batches: tuple[PositiveInt, ...]


@dataclass(frozen=True)
class SpeedRequests:
    """What lm-eval's model in ``folder`` is asked: pairs of (context, continuation)."""

    folder: Path
    pairs: tuple[tuple[str, str], ...]
    prefix_token: int
    batch: int
    threads: int | None


def theirs(rank: Rank, asked: SpeedRequests) -> tuple[float, list[float]]:
    """Seconds, without loading and without tokenizing, and log-probabilities (nats) of lm-eval's ``hf`` model."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(threads_for(asked.threads, rank))
    lm = HFLM(
        str(asked.folder), device="cpu", dtype="float32", batch_size=asked.batch, prefix_token_id=asked.prefix_token
    )
    without = [asked.prefix_token]  # what lm-eval puts before a text that has no context
    encoded = [((a, b), *(lm._encode_pair(a, b) if a else (without, lm.tok_encode(b)))) for a, b in asked.pairs]
    began = time.perf_counter()
    answers = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    return time.perf_counter() - began, [likely for likely, _ in answers]


def ours(rank: Rank, work: EvalWork) -> tuple[float, dict[str, Any]]:
    """The same of ours; answers by the key of their request."""
    if run_rank(rank, work):
        raise InterruptedError("asked to stop: what was timed is not the whole")
    kept = responses.read(work.file)
    return kept.seconds, kept.answers


def measured(job: EvalJob, task: Any, speed: SpeedSettings) -> dict[str, Any]:
    """Seconds of every round, by contestant; the largest difference of a log-probability; examples of ``task``."""
    requests: list[Any] = []
    job.lm.answer = recorder(requests)
    answered({"": task}, job.lm)
    pairs = tuple(tuple(instance.args) for instance in task.instances)
    base = job.variants[0]
    asked = SpeedRequests(base.target.folder, pairs, job.lm.eot_token_id, 1, base.target.run.threads)
    work = EvalWork(
        OURS,
        base,
        tuple(dict.fromkeys(requests)),
        Path(),
        job.eval.max_batch_tokens,
    )
    seconds: dict[str, list[float]] = {}
    off = 0.0
    for _ in range(speed.rounds):
        with tempfile.TemporaryDirectory() as folder:
            took, answers = run_ranks(1, ours, replace(work, file=Path(folder, "answers.jsonl")))[0]
        seconds.setdefault(OURS, []).append(took)
        for batch in speed.batches:
            took, likely = run_ranks(1, theirs, replace(asked, batch=batch))[0]
            seconds.setdefault(f"hf, batch {batch}", []).append(took)
            off = max(off, *(abs(answers[key(r)][0] - x) for r, x in zip(requests, likely, strict=True)))
    return {"examples": len({i.doc_id for i in task.instances}), "seconds": seconds, "largest_difference": off}


def refuse_unlike(job: EvalJob) -> None:
    """ValueError for what lm-eval's model is not given here."""
    base = job.variants[0]
    if len(job.variants) > 1 or base.target.mesh.ranks > 1 or base.target.plan:
        raise ValueError("eval.speed compares one rank as it is: leave mesh, spd and variants out")
    if base.target.model.dtype != "float32" or base.target.run.device != "cpu" or job.eval.max_length:
        raise ValueError("eval.speed compares in model.dtype=float32, run.device=cpu, eval.max_length=null: use these")
    for name, of in job.tasks.items():
        if any(instance.request_type != "loglikelihood" for instance in of.instances):
            raise ValueError(f"eval.speed compares scores of answers: leave {name} out of eval.tasks")


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Examples a second, and how many times as many are ours."""
    table = Table("task", "examples", *(f"{name}, a second" for name in _names(found)), "times", box=None)
    for task, told in found.items():
        each = [told["examples"] / statistics.median(of) for of in told["seconds"].values()]
        times = " ".join(f"{each[0] / other:.2f}" for other in each[1:])
        table.add_row(task, str(told["examples"]), *(f"{rate:.2f}" for rate in each), times)
    console.print(table)


def _names(found: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    return list(next(iter(found.values()))["seconds"])


def task(config: DictConfig) -> None:
    """Refuse what cannot be compared; measure task by task; write and show."""
    warm_up_ranks((*run.WARM, "lm_eval.models.huggingface"))
    speed, job = section(config, "speed", SpeedSettings), run.prepare(config)
    refuse_unlike(job)
    record(config, [job.variants[0].target.folder])
    found = {}
    for name, of in job.tasks.items():
        console.print(f"{name}: {speed.rounds} rounds")
        found[name] = measured(job, of, speed)
        write_result(str(job.out / "speed.json"), {"tasks": found, **provenance()})
    show(found)


if __name__ == "__main__":
    main("eval_speed", task)
