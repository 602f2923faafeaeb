"""Runs of recipes.bench times: their settings, and how one of them is timed on its ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from longctx.config import Mesh, Reduce, ReduceDtype
from longctx.cost.decode import SHARED_ROWS
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan, within
from recipes.bench.prefill import build_shallow_engine
from recipes.bench.timing import make_random_cache, measure_in_rounds, time_on_ranks
from recipes.common.train_job import TrainJob
from recipes.common.train_setup import build_state, context_parallel

if TYPE_CHECKING:
    from longctx.data.batches import Batch
    from longctx.infer.engine import Engine
    from longctx.infer.session import Session
    from longctx.megatron.runtime import Runtime

STEPS = 4  # decoded tokens of a round


@dataclass(frozen=True)
class TimedRun:
    """Work to time, and its mesh; ``strategy`` is that of the prefill, of decoding, or of a training step.

    A prefill has ``new`` tokens (None: ``data.length``) after ``cached`` ones; a decoded token follows ``cached`` ones.
    The share ``drop`` of the blocks drops a reduction, and ``reduce`` is the dtype of the other reductions' messages.
    With a ``rate``, each rank is an emulated host; ``latency_us`` is the one-way latency of the links.  Runs of the
    same ``group`` are reported together.
    """

    work: Literal["prefill", "decode", "train"]
    tp: PositiveInt = 1
    ulysses: PositiveInt = 1
    ring: PositiveInt = 1
    dp: PositiveInt = 1
    strategy: Literal["pass_kv", "pass_q", "all_gather_kv", "gather_merge", "sharded"] = "pass_kv"
    new: PositiveInt | None = None
    cached: NonNegativeInt = 0
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    reduce: ReduceDtype = "float32"
    rate: str | None = None
    latency_us: NonNegativeFloat = 0.0
    group: str = "runs"

    def __post_init__(self) -> None:
        if self.work != "decode" and self.strategy in SHARED_ROWS:
            raise ValueError(f"work={self.work} has no strategy={self.strategy}: use work=decode, or strategy=pass_kv")
        if self.work != "train" and self.dp > 1:
            raise ValueError(f"work={self.work} has no dp={self.dp}: use work=train, or dp=1")
        if (self.cached == 0) if self.work == "decode" else (self.work == "train" and self.cached):
            raise ValueError(
                f"work={self.work} cached={self.cached}: decode needs cached tokens, and train has none; use "
                f"cached={'1024' if self.work == 'decode' else '0'}"
            )
        if self.work != "prefill" and self.new:
            raise ValueError(
                f"new={self.new} is the length of a prefill, not of {self.work}: use work=prefill, or leave new out"
            )
        if (self.drop or self.reduce != "float32") and (self.tp == 1 or self.work != "prefill"):
            raise ValueError(
                f"drop={self.drop} reduce={self.reduce} need a prefill with tp: use work=prefill and tp=2 or more"
            )
        if self.latency_us and not self.rate:
            raise ValueError(f"latency_us={self.latency_us} is for emulated hosts: set a rate, such as 1gbit")

    @property
    def mesh(self) -> Mesh:
        """Mesh of the run."""
        return Mesh(self.tp, self.ulysses, self.ring, self.dp)

    @property
    def network(self) -> tuple[int, str | None, float]:
        """Number of ranks, rate of the links between emulated hosts (None: no such hosts), latency in microseconds."""
        return self.mesh.ranks, self.rate, self.latency_us

    def __str__(self) -> str:
        words = [self.work + (f" of {self.new:,}" if self.new else "")]
        words[0] += f" after {self.cached:,}" if self.cached else ""
        words += [str(self.mesh), *([self.strategy] if self.mesh.context > 1 else [])]
        words += [f"{self.drop:.0%} dropped, {self.reduce}"] if self.group == "spd" or self.drop else []
        words += [f"{self.rate} + {self.latency_us:g} us" if self.latency_us else self.rate] if self.rate else []
        return ", ".join(words)


def dropped_share(job: TrainJob, run: TimedRun) -> float:
    """Return the share of blocks that drop a reduction, after rounding to whole blocks."""
    layers = job.target.shape.layers
    return len(within(range(layers), run.drop)) / layers


def measure_all(rank: Rank, jobs: Sequence[TrainJob], runs: Sequence[TimedRun], rounds: int) -> list[list[float]]:
    """Measure ``runs`` in turn, and return the seconds of every round for each of them; every rank calls this.

    ``jobs[i]`` is the training job of ``runs[i]``, as in `measure`.
    """
    return [measure(rank, job, run, rounds) for job, run in zip(jobs, runs, strict=True)]


def measure(rank: Rank, job: TrainJob, run: TimedRun, rounds: int) -> list[float]:
    """Return, for each round after a warm-up, the slowest rank's seconds of a prefill, a decoded token or a step."""
    with job.target.runtime(rank, training=run.work == "train") as runtime:
        if run.work == "train":
            work, steps = train_step_of(runtime, job), 1
        else:
            engine = engine_of(runtime, job, run)
            if run.work == "prefill":
                work, steps = prefill_of(engine, job, run), 1
            else:
                work, steps = decode_of(runtime, engine, job, run), STEPS
        (times,) = measure_in_rounds([run], rounds, lambda _: time_on_ranks(runtime.world, work) / steps)
        return times.timed


def engine_of(runtime: Runtime, job: TrainJob, run: TimedRun) -> Engine:
    """Return an engine with random weights that drops and rounds the reductions that ``run`` names."""
    from longctx.megatron.reduce import set_reductions

    layers, tp, plan = job.target.shape.layers, job.target.mesh.tp, None
    if run.drop:
        plan = SPDPlan(layers, tp, within(range(layers), run.drop))
    engine = build_shallow_engine(runtime, job.target, layers, plan)
    if run.reduce != "float32":
        set_reductions(engine.model, engine.tp, Reduce(run.reduce, run.reduce))
    return engine


def train_step_of(runtime: Runtime, job: TrainJob) -> Callable[[], object]:
    """Return a function that takes a training step, in every call on the first batch."""
    from longctx.attention.backends import kernel_for
    from longctx.train.step import train_step

    target, dp = job.target, runtime.groups.dp
    state, kernel = build_state(runtime, job), kernel_for(target.context.kernel, "cpu", target.model.dtype)
    parallelism = context_parallel(runtime, state, job, kernel)
    batch = first_batch(job, dp.rank(), dp.size())
    return lambda: train_step(state, batch, runtime, parallelism)


def first_batch(job: TrainJob, dp_rank: int = 0, dp_size: int = 1) -> Batch:
    """Return the batch on which a training step is timed: this data-parallel rank's sequences of the first one."""
    from longctx.data.batches import training_batches
    from longctx.hf.config import tokenizer_of

    batch, _ = next(training_batches(job.data, tokenizer_of(job.target.folder), dp_rank, dp_size)(None))
    return batch


def prefill_of(engine: Engine, job: TrainJob, run: TimedRun) -> Callable[[], object]:
    """Return a function that prefills ``data.length`` tokens after ``run.cached`` random keys and values.

    Each call ends by removing the new tokens from the cache.
    """
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
    """Return a function that decodes `STEPS` tokens after ``run.cached`` random keys and values.

    The decoded tokens stay in the cache, and the next call continues after them.
    """
    from longctx.config import Sampling
    from longctx.infer.session import Session
    from longctx.infer.turn import Conversation
    from longctx.megatron.sharded import share_weights

    if run.strategy == "sharded":
        share = share_weights(engine.model, engine.shape, runtime.context, runtime.tp_context)
        engine = replace(engine, share=share)
    session: Session = Session(engine, job.target.context, Sampling())
    cache = make_random_cache(engine, run.cached, run.cached + 16 * STEPS)
    session.sequences[0] = Conversation(cache, [0] * run.cached + [1])
    return lambda: [session.decode([0]) for _ in range(STEPS)]
