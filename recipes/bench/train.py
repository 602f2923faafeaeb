"""A training step on one rank and on several; and attention, forward and backward, compared with other projects' rings.

python -m recipes.bench train json=train.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Literal

import torch
from omegaconf import DictConfig
from pydantic import PositiveInt
from rich.table import Table

from longctx.config import Mesh
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unfit, refuse_unused
from longctx.shapes import Tensor
from recipes.bench import peers
from recipes.bench.timing import barrier, gather_numbers, measure_in_rounds, measure_seconds, time_on_ranks
from recipes.common.cli import console, on_ranks, say, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, sections, top_level
from recipes.common.train_job import TrainJob, resolve_train_job
from recipes.common.train_setup import build_state
from recipes.common.train_task import WARM

RECIPE = "recipes.bench train"


@dataclass(frozen=True)
class TrainBenchSettings:
    """Settings of configs/bench/train.yaml beyond those of a training run, without the list ``meshes``."""

    rounds: PositiveInt = 3
    compared_loss_rows: tuple[PositiveInt | None, ...] = ()
    peers: tuple[Literal["yunchang", "ring_flash_attn"], ...] = ("yunchang", "ring_flash_attn")
    json: str | None = None


@dataclass(frozen=True)
class TrainBenchJob:
    """A training job to run on each of ``meshes``, the first of one rank; each rank computes with one CPU thread."""

    settings: TrainBenchSettings
    training: TrainJob
    meshes: tuple[Mesh, ...]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of this rank's training steps, and activation bytes of a micro-batch on the rank that has the most.

    ``compared`` has the seconds of steps with other values of ``loss_rows``, by value ("all" for None).
    """

    seconds: list[float]
    activation_bytes: int
    compared: dict[str, list[float]]


@dataclass(frozen=True)
class AttentionTimes:
    """The slowest rank's seconds by variant and round; ``refused`` says why a variant does not run."""

    seconds: dict[str, list[float]]
    refused: dict[str, str]


@dataclass
class SavedActivations:
    """Bytes that a forward saves for its backward: each storage once, parameters not counted."""

    bytes: int = 0
    in_forward: bool = True

    @contextmanager
    def counting(self, net: torch.nn.Module) -> Iterator[None]:
        """Count the bytes that forward passes inside the ``with`` block save, until the first backward begins."""
        seen = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if self.in_forward and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return x

        def use(x: torch.Tensor) -> torch.Tensor:
            self.in_forward = False
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, use):
            yield


def prepare(config: DictConfig) -> TrainBenchJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    names, values = ("rounds", "compared_loss_rows", "peers", "json"), as_dict(config)
    settings = top_level(as_config({name: values[name] for name in names}), TrainBenchSettings)
    refuse_unwritable(settings.json, "json")
    plain = as_config({name: value for name, value in values.items() if name not in (*names, "meshes")})
    training = resolve_train_job(plain, RECIPE, from_scratch=True)
    meshes = resolve_meshes(config, training)
    refuse_unmeasured(training)
    target = training.target
    one_thread = replace(target, run=replace(target.run, threads=1))
    return TrainBenchJob(settings, replace(training, target=one_thread), meshes)


def resolve_meshes(config: DictConfig, job: TrainJob) -> tuple[Mesh, ...]:
    """Return the mesh of one rank, then those of the setting ``meshes``.

    Raises ValueError if the section ``mesh`` is set.  Also raises it for a mesh that uses dp, pp or ep, or that does
    not fit the model.
    """
    refuse_unused(job.target.mesh, RECIPE, tuple(vars(Mesh())))  # `meshes` is the setting to use
    meshes = sections(config, "meshes", Mesh)
    for mesh in meshes:
        refuse_unused(mesh, RECIPE, ("dp", "pp", "ep"))
        refuse_unfit(mesh, job.target.shape)
    return (Mesh(), *meshes)


def refuse_unmeasured(job: TrainJob) -> None:
    """Raise ValueError for settings that one of the two measurements would ignore.

    These are the times of training steps and the times of one layer's attention.
    """
    target = job.target
    context, recompute = target.context, job.settings.recompute
    if recompute != "none":
        raise ValueError(f"recompute={recompute}: recomputed activations are not counted; use recompute=none")
    for name, value, measured in (
        ("mlp_rows", job.settings.mlp_rows or "null", "null"),
        ("offload", job.settings.offload or "null", "null"),
        ("run.device", target.run.device, "cpu"),
        ("run.threads", target.run.threads or 1, 1),
        ("model.dtype", target.model.dtype, "float32"),
        ("context.strategy", context.strategy, "pass_kv"),
        ("context.layout", context.layout, "zigzag"),
        ("context.kernel", "flash_cpu" if context.kernel == "auto" else context.kernel, "flash_cpu"),
        ("context.check_schedule", str(context.check_schedule).lower(), "false"),
        ("data.epochs", job.data.epochs or "null", "null"),
    ):
        if value != measured:
            raise ValueError(f"{name}={value}: this benchmark measures {measured} only; use {name}={measured}")


def time_steps(rank: Rank, job: TrainJob, settings: TrainBenchSettings) -> StepTimes:
    """Time ``settings.rounds`` steps on ``job``'s mesh, after a warm-up step whose activation bytes are counted.

    Steps with ``compared_loss_rows`` take turns with those of the job.  Every rank calls this; it returns this rank's
    seconds, and the bytes of the rank that has the most.
    """
    from longctx.attention.backends import kernel_for
    from longctx.data.batches import training_batches
    from longctx.hf.config import tokenizer_of
    from longctx.parallel.strategy import STRATEGIES
    from longctx.train.step import ContextParallel, train_step

    target, context = job.target, job.target.context
    with target.runtime(rank, training=True) as runtime:
        trained, saved = build_state(runtime, job), SavedActivations()
        kernel = kernel_for(context.kernel, "cpu", target.model.dtype)
        parallelism = ContextParallel(job.data.length, context.layout, kernel, STRATEGIES[context.strategy])
        batches = training_batches(job.data, tokenizer_of(target.folder))(None)

        def measure(loss_rows: int | None) -> float:
            batch, state = next(batches)[0], replace(trained, loss_rows=loss_rows)
            barrier(runtime.world)
            with nullcontext() if saved.bytes else saved.counting(trained.net):
                return measure_seconds(lambda: train_step(state, batch, runtime, parallelism))

        variants = [trained.loss_rows, *settings.compared_loss_rows]
        steps, *others = (of_variant.timed for of_variant in measure_in_rounds(variants, settings.rounds, measure))
        (activation_bytes,) = gather_numbers(runtime.world, saved.bytes)
    compared = {str(rows or "all"): seconds for rows, seconds in zip(variants[1:], others, strict=True)}
    return StepTimes(steps, int(max(activation_bytes)), compared)


def time_attention(rank: Rank, job: TrainJob, names: tuple[str, ...], rounds: int) -> AttentionTimes:
    """Time one layer's attention, forward and backward: ours and that of the peers ``names``, in turn."""
    from longctx.attention.flash_cpu import flash_cpu
    from longctx.attention.layout import zigzag
    from longctx.parallel.hybrid import hybrid
    from longctx.parallel.strategy import STRATEGIES

    shape = job.target.shape
    variants: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    refused: dict[str, str] = {}
    with replace(job.target, mesh=Mesh(ring=rank.world_size)).runtime(rank) as runtime:
        # 1. This rank's queries, keys and values.
        layout = zigzag(job.data.length, runtime.ring.size)
        rows = layout.rows(runtime.ring.rank)
        q, k, v = (torch.randn(1, rows, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads))
        # 2. Our variants, then every peer that runs.  The same ranks serve as a ring and as a Ulysses group.
        one, ring = runtime.ulysses, runtime.ring
        groups = {"ours, pass-KV ring": (one, ring), "ours, Ulysses": (ring, one)}
        try:
            refuse_unfit(Mesh(ulysses=ring.size), shape)
        except ValueError as error:  # its heads cannot be divided
            refused["ours, Ulysses"] = str(error)
            del groups["ours, Ulysses"]
        for name, two in groups.items():
            variants[name] = hybrid(*two, layout).attention(flash_cpu, STRATEGIES["pass_kv"])
        for name in names:
            peer, reason = peers.try_ring(partial(peers.zigzag_ring, name, ring.size, ring.rank), q, k, v)
            if peer:
                variants[f"{name}, zigzag ring"] = peer
            else:
                refused[name] = reason

        # 3. All of them in turn.
        def measure(name: str) -> float:
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            return time_on_ranks(runtime.world, lambda: variants[name](*leaves).sum().backward())

        times = measure_in_rounds(list(variants), rounds, measure)
    return AttentionTimes({name: each.timed for name, each in zip(variants, times, strict=True)}, refused)


def show(tokens: int, steps: list[tuple[str, StepTimes]], attention: AttentionTimes) -> None:
    """Print the times of steps and of attention as two tables, relative to the first row of each.

    ``steps`` are by mesh; each step has ``tokens`` tokens.
    """
    # 1. Training steps.
    table = Table(box=None)
    for column in ("a step on", "tokens/s", "of one rank's", "activations a rank", "of one rank's"):
        table.add_column(column, justify="left" if column == "a step on" else "right")
    _, first = steps[0]
    for mesh, each in steps:
        seconds = median(each.seconds)
        speed, memory = median(first.seconds) / seconds, each.activation_bytes / first.activation_bytes
        megabytes = f"{each.activation_bytes / 1e6:,.1f} MB"
        table.add_row(mesh, f"{tokens / seconds:,.0f}", f"{speed:.2f}", megabytes, f"{memory:.3f}")
        for rows, of_rows in each.compared.items():
            other = median(of_rows)
            table.add_row(f"  loss_rows={rows}", f"{tokens / other:,.0f}", f"{median(first.seconds) / other:.2f}")
    console.print(table)
    # 2. Attention.
    table = Table(box=None)
    table.add_column("attention of a layer, 2 ranks")
    table.add_column("seconds, of ours", justify="right")
    ours = median(next(iter(attention.seconds.values())))
    for name, of_rounds in attention.seconds.items():
        table.add_row(name, f"{median(of_rounds) / ours:.2f}")
    for name, reason in attention.refused.items():
        table.add_row(name, reason)
    console.print(table)


def task(config: DictConfig) -> None:
    """Time steps on every mesh, and attention on two ranks; show the times, and write them if ``json`` is set."""
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    job = prepare(config)
    settings, training = job.settings, job.training
    # 1. Training steps, mesh by mesh.
    steps: list[tuple[str, StepTimes]] = []
    for mesh in job.meshes:
        say(f"steps on {mesh}")
        on_mesh = replace(training, target=replace(training.target, mesh=mesh))
        if (times := on_ranks(mesh, time_steps, on_mesh, settings)) is not None:
            steps.append((str(mesh), times))
    # 2. Attention of one layer.
    versions = {name: peers.installed_version(name) for name in settings.peers}
    names = tuple(name for name, version in versions.items() if version)
    say(f"attention, 2 ranks: ours and {', '.join(names) or 'no peer (none is installed)'}")
    attention = on_ranks(Mesh(ring=2), time_attention, training, names, settings.rounds)
    if attention is None:
        return
    # 3. The results.
    show(training.data.length * training.data.batch, steps, attention)
    if settings.json:
        shape = {name: value for name, value in vars(training.target.shape).items() if name != "rotaries"}
        result = {
            **provenance(),
            "length": training.data.length,
            "shape": shape,
            "peers": versions,
            "steps": [{"mesh": mesh, **asdict(each)} for mesh, each in steps],
            "attention": asdict(attention),
        }
        write_result(settings.json, result)
