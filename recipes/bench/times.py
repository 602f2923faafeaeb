"""Time of prefill, decoding and training steps on several meshes: measured, and predicted by the cost model.

python -m recipes.bench times hardware=laptop.yaml json=times.json
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt
from rich.table import Table

from longctx.config import Mesh
from longctx.cost.decode import SHARED_ROWS
from longctx.cost.forward import Numbers, decode_cost, prefill_cost
from longctx.cost.machine import Machine
from longctx.cost.step import step_cost
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unfit
from recipes.bench.prefill import build_shallow_engine
from recipes.bench.timing import make_random_cache, measure_in_rounds, time_on_ranks
from recipes.common.cli import console, on_ranks, say, warm_up_ranks, write_result
from recipes.common.hardware_file import read_machine, refuse_other_threads
from recipes.common.places import refuse_unwritable
from recipes.common.predicted import ELEMENT_BYTES
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, sections, top_level
from recipes.common.train_job import TrainJob, refuse_unsplit, resolve_train_job
from recipes.common.train_loop import build_state
from recipes.common.train_memory import step_work
from recipes.common.train_task import WARM

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.infer.session import Session
    from longctx.megatron.runtime import Runtime

RECIPE = "recipes.bench times"
STEPS = 4  # decoded tokens of a round


@dataclass(frozen=True)
class TimesSettings:
    """Settings of configs/bench/times.yaml that a training run does not have, other than the list ``runs``."""

    hardware: str
    rounds: PositiveInt = 3
    json: str | None = None


@dataclass(frozen=True)
class TimedRun:
    """Work to time, and its mesh; ``strategy`` is that of the prefill, of decoding, or of a training step.

    A prefill has ``data.length`` new tokens after ``cached`` ones; a decoded token follows ``cached`` ones.
    """

    work: Literal["prefill", "decode", "train"]
    tp: PositiveInt = 1
    ulysses: PositiveInt = 1
    ring: PositiveInt = 1
    dp: PositiveInt = 1
    strategy: Literal["pass_kv", "pass_q", "all_gather_kv", "gather_merge", "sharded"] = "pass_kv"
    cached: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.work != "decode" and self.strategy in SHARED_ROWS:
            raise ValueError(f"work={self.work} has no strategy={self.strategy}: use work=decode")
        if self.work != "train" and self.dp > 1:
            raise ValueError(f"work={self.work} has no dp={self.dp}: use work=train")
        if (self.cached == 0) if self.work == "decode" else (self.work == "train" and self.cached):
            raise ValueError(
                f"work={self.work} cached={self.cached}: decode needs cached tokens, and train has none; use "
                f"cached={'1024' if self.work == 'decode' else '0'}"
            )

    @property
    def mesh(self) -> Mesh:
        """Mesh of the run."""
        return Mesh(self.tp, self.ulysses, self.ring, self.dp)

    def __str__(self) -> str:
        cached = f" after {self.cached:,}" if self.cached else ""
        return f"{self.work}{cached}, {self.mesh}{f', {self.strategy}' if self.mesh.context > 1 else ''}"


@dataclass(frozen=True)
class TimesJob:
    """Training jobs, one for each run, and the machine that predictions are for."""

    settings: TimesSettings
    machine: Machine
    runs: tuple[TimedRun, ...]
    jobs: tuple[TrainJob, ...]


def prepare(config: DictConfig) -> TimesJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    values = as_dict(config)
    own = ("hardware", "rounds", "json")
    settings = top_level(as_config({name: values[name] for name in own}), TimesSettings)
    refuse_unwritable(settings.json, "json")
    runs = sections(config, "runs", TimedRun)
    plain = {name: value for name, value in values.items() if name not in (*own, "runs")}
    job = resolve_train_job(as_config({**plain, "hardware": None}), RECIPE, from_scratch=True)
    if job.target.shape.mixture:
        raise ValueError(f"{RECIPE} does not support mixtures of experts: use a dense model")
    return TimesJob(settings, read_machine(settings.hardware), runs, tuple(_job_of(job, run) for run in runs))


def _job_of(job: TrainJob, run: TimedRun) -> TrainJob:
    """Return ``job`` on the mesh of ``run``, with one sequence for each data-parallel rank."""
    data = replace(job.data, batch=run.dp)
    refuse_unfit(run.mesh, job.target.shape)
    refuse_unsplit(run.mesh, job.target.shape, data)
    chosen: dict[str, Any] = {"decode" if run.work == "decode" else "strategy": run.strategy}
    context = replace(job.target.context, **chosen)
    return replace(job, target=replace(job.target, mesh=run.mesh, context=context), data=data)


def predict(machine: Machine, job: TrainJob, run: TimedRun) -> Mapping[str, float]:
    """Return the predicted seconds of ``run`` by part."""
    target, size = job.target, ELEMENT_BYTES[job.target.model.dtype]
    shape, mesh, numbers = target.shape, target.mesh, Numbers(size, size)
    if run.work == "decode":
        return decode_cost(shape, mesh, machine, [run.cached], run.strategy, numbers).parts
    if run.work == "prefill":
        return prefill_cost(shape, mesh, machine, [job.data.length], [run.cached], run.strategy, numbers).parts
    return step_cost(shape, mesh, machine, step_work(job), run.strategy, numbers).parts


def measure(rank: Rank, job: TrainJob, run: TimedRun, rounds: int) -> list[float]:
    """Return the slowest rank's seconds of ``run`` in each round, after a warm-up round."""
    with job.target.runtime(rank, training=run.work == "train") as runtime:
        if run.work == "train":
            work, steps = train_step_of(runtime, job), 1
        else:
            engine = build_shallow_engine(runtime, job.target, job.target.shape.layers)
            if run.work == "prefill":
                work, steps = prefill_of(engine, job, run), 1
            else:
                work, steps = decode_of(runtime, engine, job, run), STEPS
        (times,) = measure_in_rounds([run], rounds, lambda _: time_on_ranks(runtime.world, work) / steps)
        return times.timed


def train_step_of(runtime: Runtime, job: TrainJob) -> Callable[[], object]:
    """Return a function that takes a training step on the first batch."""
    from longctx.attention.backends import kernel_for
    from longctx.data.batches import training_batches
    from longctx.hf.config import tokenizer_of
    from longctx.parallel.strategy import STRATEGIES
    from longctx.train.step import ContextParallel, train_step

    target, dp = job.target, runtime.groups.dp
    state, kernel = build_state(runtime, job), kernel_for(target.context.kernel, "cpu", target.model.dtype)
    parallelism = ContextParallel(
        job.data.length, target.context.layout, kernel, STRATEGIES[target.context.strategy], False
    )
    batch, _ = next(training_batches(job.data, tokenizer_of(target.folder), dp.rank(), dp.size())(None))
    return lambda: train_step(state, batch, runtime, parallelism)


def prefill_of(engine: Engine, job: TrainJob, run: TimedRun) -> Callable[[], object]:
    """Return a function that prefills ``data.length`` tokens after ``run.cached`` random keys and values."""
    import torch

    from longctx.attention.layout import zigzag
    from longctx.infer.engine import next_logits
    from longctx.infer.prefill import run_pass
    from longctx.parallel.strategy import STRATEGIES

    new = job.data.length
    cache = make_random_cache(engine, run.cached, run.cached + new) if run.cached else engine.cache(new)
    before, layout = cache.layout, zigzag(new, engine.ring.size).split(engine.ulysses.size)
    tokens = torch.arange(new).remainder(engine.shape.vocab_size)

    def prefill() -> None:
        hidden = run_pass(engine, tokens, layout, cache, engine.everywhere(STRATEGIES[run.strategy]))
        next_logits(engine, hidden[-1:])
        cache.rewind(before)

    return prefill


def decode_of(runtime: Runtime, engine: Engine, job: TrainJob, run: TimedRun) -> Callable[[], object]:
    """Return a function that decodes `STEPS` tokens after ``run.cached`` random keys and values."""
    from longctx.config import Sampling
    from longctx.infer.session import Session
    from longctx.infer.turn import Conversation
    from longctx.megatron.shared import share_weights

    if run.strategy == "sharded":
        share = share_weights(engine.model, engine.shape, runtime.context, runtime.tp_context)
        engine = replace(engine, share=share)
    session: Session = Session(engine, job.target.context, Sampling())
    cache = make_random_cache(engine, run.cached, run.cached + 16 * STEPS)
    session.sequences[0] = Conversation(cache, [0] * run.cached + [1])
    return lambda: [session.decode([0]) for _ in range(STEPS)]


def errors(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the relative error of each prediction, against the median round."""
    return [sum(result["predicted"].values()) / median(result["measured"]) - 1 for result in results]


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Print measured and predicted times as a table, and the mean absolute error."""
    table = Table(box=None)
    for column in ("run", "measured", "fastest", "slowest", "predicted", "error"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for result, error in zip(results, errors(results), strict=True):
        measured, predicted = result["measured"], sum(result["predicted"].values())
        seconds = (median(measured), min(measured), max(measured), predicted)
        table.add_row(result["run"], *(f"{each * 1e3:,.1f} ms" for each in seconds), f"{error:+.0%}")
    console.print(table)
    console.print(f"mean absolute error: {mean(map(abs, errors(results))):.1%}")


def task(config: DictConfig) -> None:
    """Measure every run on its mesh; show and write the seconds with the prediction."""
    warm_up_ranks([*WARM, "recipes.common.train_loop", "longctx.infer.session", "longctx.train.step"])
    job, results = prepare(config), list[dict[str, Any]]()
    for run, training in zip(job.runs, job.jobs, strict=True):
        refuse_other_threads(job.settings.hardware, training.target.run.threads, run.mesh)
        seconds = on_ranks(run.mesh, measure, training, run, job.settings.rounds)
        if seconds is not None:
            results.append({"run": str(run), "measured": seconds, "predicted": predict(job.machine, training, run)})
            say(f"{run}: {median(seconds) * 1e3:,.1f} ms")
    if not results:
        return
    show(results)
    if job.settings.json:
        one = job.jobs[0]
        metadata = {"model": one.target.model.name, "length": one.data.length, "loss_rows": one.settings.loss_rows}
        write_result(job.settings.json, {**provenance(), **metadata, "runs": results})
