"""Memory of prefill, decoding and training steps by part: measured on one rank, and predicted by the cost model.

python -m recipes.bench memory json=memory.json
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig
from pydantic import PositiveInt
from rich.table import Table

from longctx.config import Mesh, Recompute
from longctx.cost.forward import Numbers
from longctx.cost.memory import inference_bytes
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unfit
from recipes.bench.prefill import build_shallow_engine
from recipes.bench.timing import refuse_gpu, refuse_set_by_runs
from recipes.common.cli import console, on_ranks, say, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.predicted import ELEMENT_BYTES
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, sections, top_level
from recipes.common.train_job import TrainJob, refuse_offload, refuse_offload_folder, refuse_unsplit, resolve_train_job
from recipes.common.train_memory import describe_memory, predict_memory
from recipes.common.train_setup import build_state, context_parallel
from recipes.common.train_task import WARM

if TYPE_CHECKING:
    from longctx.infer.session import Session
    from longctx.megatron.runtime import Runtime
    from longctx.parallel.measure.memory import MemoryMeter
    from longctx.shapes import AnyShape

RECIPE = "recipes.bench memory"
_OF_TRAINING = ("dp", "pp", "ep", "sequences", "zero1", "recompute", "mlp_rows", "offload")


@dataclass(frozen=True)
class MemoryBenchSettings:
    """Settings of configs/bench/memory.yaml beyond those of a training run, without the list ``runs``."""

    json: str | None = None


@dataclass(frozen=True)
class MemoryRun:
    """Work to measure, and its mesh; the last four are settings of a training step.

    Each data-parallel rank has ``sequences`` sequences in a step, each a micro-batch.
    """

    work: Literal["prefill", "decode", "train"] = "train"
    tp: PositiveInt = 1
    ulysses: PositiveInt = 1
    ring: PositiveInt = 1
    dp: PositiveInt = 1
    pp: PositiveInt = 1
    ep: PositiveInt = 1
    sequences: PositiveInt = 1
    strategy: Literal["pass_kv", "pass_q", "all_gather_kv"] = "pass_kv"
    zero1: bool = False
    recompute: Recompute = "none"
    mlp_rows: PositiveInt | None = None
    offload: str | None = None

    def __post_init__(self) -> None:
        plain = {name: getattr(MemoryRun, name) for name in _OF_TRAINING}
        if self.work != "train" and any(getattr(self, name) != value for name, value in plain.items()):
            raise ValueError(f"work={self.work} has no {', '.join(_OF_TRAINING)}: use work=train")
        if self.work == "decode" and self.strategy != MemoryRun.strategy:
            raise ValueError(f"strategy={self.strategy} is of prefill: with work=decode, set context.decode instead")

    @property
    def mesh(self) -> Mesh:
        """Mesh of the run."""
        return Mesh(self.tp, self.ulysses, self.ring, self.dp, self.pp, self.ep)

    def __str__(self) -> str:
        options: list[str] = [self.strategy] if self.strategy != "pass_kv" else []
        options += [f"sequences={self.sequences}"] if self.sequences > 1 else []
        options += ["zero1"] if self.zero1 else []
        options += [f"recompute={self.recompute}"] if self.recompute != "none" else []
        options += [f"mlp_rows={self.mlp_rows}"] if self.mlp_rows else []
        options += ["offload"] if self.offload else []
        return " ".join([self.work, str(self.mesh), *options])


@dataclass(frozen=True)
class MemoryBenchJob:
    """Training jobs, one for each run; a prefill or a decoded token uses the job's model, mesh and ``data.length``."""

    settings: MemoryBenchSettings
    runs: tuple[MemoryRun, ...]
    jobs: tuple[TrainJob, ...]


def prepare(config: DictConfig) -> MemoryBenchJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    values = as_dict(config)
    settings = top_level(as_config({"json": values["json"]}), MemoryBenchSettings)
    refuse_unwritable(settings.json, "json")
    runs = sections(config, "runs", MemoryRun)
    plain = as_config({name: value for name, value in values.items() if name not in ("json", "runs")})
    job = resolve_train_job(plain, RECIPE, from_scratch=True)
    refuse_gpu(job.target, RECIPE)
    if job.target.context.layout != "zigzag":
        raise ValueError(f"context.layout={job.target.context.layout}: {RECIPE} measures zigzag only; leave it out")
    if job.target.context.decode == "sharded":
        raise ValueError(f"context.decode=sharded is not measured by {RECIPE}: use gather_merge")
    if job.target.shape.mixture and any(run.work != "train" for run in runs):
        raise ValueError(f"{RECIPE} predicts mixtures of experts in training only: use runs with work: train")
    own = {name: getattr(job.settings, name) for name in ("recompute", "mlp_rows", "offload")}
    refuse_set_by_runs(job, RECIPE, {"optim.zero1": job.optim.zero1, **own})
    return MemoryBenchJob(settings, runs, tuple(_job_of(job, run) for run in runs))


def _job_of(job: TrainJob, run: MemoryRun) -> TrainJob:
    """Return ``job`` with the mesh and the settings of ``run``, and its sequences for each data-parallel rank."""
    data = replace(job.data, batch=run.dp * run.sequences)
    refuse_unfit(run.mesh, job.target.shape)
    refuse_unsplit(run.mesh, job.target.shape, data)
    refuse_offload(job.target, run.offload, job.lora)
    refuse_offload_folder(run.offload)
    return replace(
        job,
        target=replace(job.target, mesh=run.mesh, context=replace(job.target.context, strategy=run.strategy)),
        data=data,
        optim=replace(job.optim, zero1=run.zero1),
        settings=replace(job.settings, recompute=run.recompute, mlp_rows=run.mlp_rows, offload=run.offload),
    )


def predict(job: TrainJob, run: MemoryRun) -> dict[str, float]:
    """Return the predicted bytes of a rank at the peak of ``run``, by part; ``job`` is the training job of the run."""
    if run.work == "train":
        return predict_memory(job)
    target, element = job.target, ELEMENT_BYTES[job.target.model.dtype]
    new, cached = ([job.data.length], [0]) if run.work == "prefill" else ([1], [job.data.length])
    strategy = run.strategy if run.work == "prefill" else target.context.decode
    return inference_bytes(target.shape, target.mesh, new, cached, strategy, Numbers(element, element))


def measure(rank: Rank, job: TrainJob, run: MemoryRun) -> dict[str, int]:
    """Return the bytes by part at the peak of ``run``, on the rank where it is largest."""
    with job.target.runtime(rank, training=run.work == "train") as runtime:
        meter = meter_step(runtime, job) if run.work == "train" else meter_inference(runtime, job, run)
        return meter.largest_peak(runtime.world, runtime.device)


def meter_step(runtime: Runtime, job: TrainJob) -> MemoryMeter:
    """Run two training steps, and return the meter that counted the memory of the second.

    The first step creates the optimizer's moments.
    """
    from longctx.attention.backends import kernel_for
    from longctx.data.batches import training_batches
    from longctx.hf.config import tokenizer_of
    from longctx.train.memory import memory_meter
    from longctx.train.step import train_step

    target, dp = job.target, runtime.groups.dp
    state, kernel = build_state(runtime, job), kernel_for(target.context.kernel, "cpu", target.model.dtype)
    parallelism = context_parallel(runtime, state, job, kernel)
    batches = training_batches(job.data, tokenizer_of(target.folder), dp.rank(), dp.size())(None)
    train_step(state, next(batches)[0], runtime, parallelism)
    meter = memory_meter(state)
    with meter:
        train_step(state, next(batches)[0], runtime, parallelism)
    return meter


def meter_inference(runtime: Runtime, job: TrainJob, run: MemoryRun) -> MemoryMeter:
    """Run a prefill, or one decoded token after it, as ``run`` says; return the meter that counted its memory."""
    import torch

    from longctx.config import Sampling
    from longctx.infer.session import Session

    target, tokens = job.target, torch.arange(job.data.length).remainder(job.target.shape.vocab_size).tolist()
    engine = build_shallow_engine(runtime, target, target.shape.layers)
    session, meter = Session(engine, target.context, Sampling()), inference_meter(engine.model.parameters())
    if run.work == "prefill":
        with meter:
            session.turn({0: tokens}, {0: 1})
        return meter
    session.turn({0: tokens}, {0: 2})
    meter.hold("kv_cache", cached_tensors(session, target.shape.layers))
    with meter:
        session.decode([0])
    return meter


def inference_meter(weights: Iterable[AnyShape]) -> MemoryMeter:
    """Return a meter of the memory of inference, by part: ``weights``, KV cache, logits, communication, activations.

    The ``weights`` exist already.
    """
    from longctx.infer.cache import KVCache
    from longctx.infer.engine import next_logits
    from longctx.parallel.dist_comm import ALLOCATORS
    from longctx.parallel.measure.memory import MemoryMeter

    meter = MemoryMeter({"kv_cache": [KVCache.append], "logits": [next_logits], "communication": ALLOCATORS})
    meter.hold("weights", weights)
    return meter


def cached_tensors(session: Session, layers: int) -> Iterator[AnyShape]:
    """Yield the keys and values of all sequences and layers."""
    caches = [sequence.cache for sequence in session.sequences.values()]
    return chain.from_iterable(cache.layer(layer) for cache in caches for layer in range(layers))


def errors(result: Mapping[str, Any]) -> tuple[float, float]:
    """Return the error of predicted memory, predicted / measured - 1: of the sum, and of the part with the largest.

    ``result`` has the bytes by part under "predicted" and "measured".  A part counts only if one of the two is above
    1 % of the measured sum.  Its error is infinite if its measured size is 0.
    """
    measured, predicted = result["measured"], result["predicted"]
    total = sum(measured.values())
    pairs = [(measured.get(part, 0), predicted.get(part, 0)) for part in {**measured, **predicted}]
    of_parts = [guess / size - 1 if size else math.inf for size, guess in pairs if max(size, guess) > total / 100]
    return sum(predicted.values()) / total - 1, max(of_parts, key=abs)


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each run: measured and predicted sum, the error of the sum, and the largest error of a part."""
    table = Table(box=None)
    for column in ("run", "measured", "predicted", "error", "worst part"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for result in results:
        sums = [f"{sum(result[name].values()) / 1e6:,.1f} MB" for name in ("measured", "predicted")]
        table.add_row(result["run"], *sums, *(f"{error:+.1%}" for error in errors(result)))
    console.print(table)


def task(config: DictConfig) -> None:
    """Measure every run on its mesh; show and write the largest rank's bytes with the prediction."""
    warm_up_ranks([*WARM, "recipes.common.train_loop", "longctx.infer.session", "longctx.train.memory"])
    job, results = prepare(config), list[dict[str, Any]]()
    for run, training in zip(job.runs, job.jobs, strict=True):
        measured = on_ranks(run.mesh, measure, training, run)
        if measured is not None:
            results.append({"run": str(run), "measured": measured, "predicted": predict(training, run)})
            say(f"{run}: {describe_memory(measured, results[-1]['predicted'])}")
    if not results:
        return
    show(results)
    if job.settings.json:
        one, settings = job.jobs[0], job.jobs[0].settings
        metadata = {"model": one.target.model.name, "length": one.data.length, "loss_rows": settings.loss_rows}
        write_result(job.settings.json, {**provenance(), **metadata, "runs": results})
