"""What a training step costs on one rank and on several; and attention, forward and backward, beside its peers.

python -m recipes.bench train json=train.json
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt
from rich.table import Table

from longctx.config import Mesh
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unfit, refuse_unused
from recipes.bench import peers
from recipes.common.cli import console, on_ranks, refuse_unwritable, say, warm_up_ranks, write_result
from recipes.common.provenance import provenance
from recipes.common.settings import sections, top_level
from recipes.common.train_job import TrainJob, resolve_train_job
from recipes.common.train_loop import build_state
from recipes.pretrain import WARM


@dataclass(frozen=True)
class TrainBenchSettings:
    """The settings of configs/bench_train.yaml that are not those of a training run, nor a list of meshes."""

    rounds: PositiveInt
    peers: tuple[Literal["yunchang", "ring_flash_attn"], ...]
    json: str | None


@dataclass
class SavedActivations:
    """Bytes that a forward keeps for its backward: activations, each storage once, parameters not counted."""

    bytes: int = 0
    in_forward: bool = True

    @contextmanager
    def counting(self, net: torch.nn.Module) -> Iterator[None]:
        """Count what is saved in the block until its first backward begins: the forward of one micro-batch."""
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


def step_on_rank(rank: Rank, job: TrainJob, rounds: int) -> dict[str, Any]:
    """Seconds of ``rounds`` steps, and bytes of activations of a micro-batch, of the largest rank."""
    from itertools import islice

    from longctx.attention.backends import kernel_for
    from longctx.data.batches import training_batches
    from longctx.hf.config import tokenizer_of
    from longctx.megatron.runtime import runtime
    from longctx.parallel.strategy import STRATEGIES
    from longctx.train.step import Sharding, train_step

    with runtime(rank, job.target.mesh, threads=1, training=True) as here:
        trained = build_state(here, job)
        kernel = kernel_for(job.target.context.kernel, "cpu", job.target.model.dtype)
        how = Sharding(job.data.length, job.target.context.layout, kernel, STRATEGIES[job.target.context.strategy])
        stage, took, saved = training_batches(job.data, tokenizer_of(job.target.folder))(None), [], SavedActivations()
        for i, (batch, _) in enumerate(islice(stage, rounds + 1)):
            here.world.all_gather(torch.zeros(1), [(1,)] * here.world.size)
            began = time.perf_counter()
            if i == 0:
                with saved.counting(trained.net):
                    train_step(trained, batch, here, how)
            else:
                train_step(trained, batch, here, how)
                took.append(time.perf_counter() - began)
        most = torch.cat(here.world.all_gather(torch.tensor([saved.bytes]), [(1,)] * here.world.size)).max()
    return {"seconds": took, "activation_bytes": int(most)}


def attention_on_rank(rank: Rank, job: TrainJob, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Seconds of a layer's attention, forward and backward, by way; the ways in turn within each round."""
    from longctx.attention.flash_cpu import flash_cpu
    from longctx.attention.layout import zigzag
    from longctx.megatron.runtime import runtime
    from longctx.parallel.hybrid import hybrid
    from longctx.parallel.strategy import STRATEGIES

    shape, length = job.target.shape, job.data.length
    ways: dict[str, Any] = {}
    refused: dict[str, str] = {}
    with runtime(rank, Mesh(ring=rank.world_size), threads=1) as here:
        layout = zigzag(length, here.ring.size)
        rows = layout.rows(here.ring.rank)
        q, k, v = (torch.randn(1, rows, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads))
        ours = {"ours, pass-KV ring": (here.ulysses, here.ring), "ours, Ulysses": (here.ring, here.ulysses)}
        for way, groups in ours.items():
            ways[way] = hybrid(*groups, layout).attention(flash_cpu, STRATEGIES["pass_kv"])
        for name in names:
            make = partial(peers.zigzag_ring, name, here.ring.size, here.ring.rank)
            ring, why = peers.tried(make, q, k, v)
            if ring:
                ways[f"{name}, zigzag ring"] = ring
            else:
                refused[name] = why
        took: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(rounds + 1):
            for way, attention in ways.items():
                leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
                here.world.all_gather(torch.zeros(1), [(1,)] * here.world.size)
                began = time.perf_counter()
                attention(*leaves).sum().backward()
                mine = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
                slowest = float(torch.cat(here.world.all_gather(mine, [(1,)] * here.world.size)).max())
                if round_:
                    took[way].append(slowest)
    return {"seconds": took, "refused": refused}


def show(tokens: int, steps: list[dict[str, Any]], attention: dict[str, Any]) -> None:
    """Both as tables; what is compared with is the first line of each."""
    table = Table(box=None)
    for column in ("a step on", "tokens/s", "of one rank's", "activations a rank", "of one rank's"):
        table.add_column(column, justify="left" if column == "a step on" else "right")
    first = steps[0]
    for row in steps:
        speed = median(first["seconds"]) / median(row["seconds"])
        memory = row["activation_bytes"] / first["activation_bytes"]
        megabytes = f"{row['activation_bytes'] / 1e6:,.1f} MB"
        table.add_row(
            row["mesh"], f"{tokens / median(row['seconds']):,.0f}", f"{speed:.2f}", megabytes, f"{memory:.3f}"
        )
    console.print(table)
    table = Table(box=None)
    table.add_column("attention of a layer, 2 ranks")
    table.add_column("seconds, of ours", justify="right")
    ours = median(next(iter(attention["seconds"].values())))
    for way, took in attention["seconds"].items():
        table.add_row(way, f"{median(took) / ours:.2f}")
    for name, why in attention["refused"].items():
        table.add_row(name, why)
    console.print(table)


def refuse_unmeasured(job: TrainJob) -> None:
    """ValueError for settings that one of the two tables would not follow."""
    settings, context = job.settings, job.target.context
    if settings.recompute != "none":
        raise ValueError(f"recompute={settings.recompute}: what it keeps is not counted; use recompute=none")
    for name, asked, measured in (
        ("run.device", job.target.run.device, "cpu"),
        ("run.threads", job.target.run.threads or 1, 1),
        ("model.dtype", job.target.model.dtype, "float32"),
        ("context.strategy", context.strategy, "pass_kv"),
        ("context.layout", context.layout, "zigzag"),
        ("context.kernel", "flash_cpu" if context.kernel == "auto" else context.kernel, "flash_cpu"),
        ("data.epochs", job.data.epochs or "null", "null"),
    ):
        if asked != measured:
            raise ValueError(f"{name}={asked}: this benchmark measures one only; use {name}={measured}")


def meshes_of(config: DictConfig, job: TrainJob) -> list[Mesh]:
    """One rank, and the meshes beside it.  Raises ValueError for one that does not fit, or would not be used."""
    refuse_unused(job.target.mesh, "recipes.bench train", ("tp", "ulysses", "ring", "dp", "pp"))  # meshes= says on what
    meshes = sections(config, "meshes", Mesh)
    for mesh in meshes:
        refuse_unused(mesh, "recipes.bench train", ("dp", "pp"))
        refuse_unfit(mesh, job.target.shape)
    return [Mesh(), *meshes]


def task(config: DictConfig) -> None:
    """Measure; write and show what the first rank gives."""
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    own = {name: config[name] for name in ("rounds", "peers", "json")}
    asked = top_level(OmegaConf.create(own), TrainBenchSettings)
    refuse_unwritable(asked.json, "json")
    plain = OmegaConf.create({str(k): v for k, v in config.items() if k not in (*own, "meshes")})
    job = resolve_train_job(plain, "recipes.bench train", from_scratch=True)
    meshes = meshes_of(config, job)
    refuse_unmeasured(job)
    there = {name: peers.installed(name) for name in asked.peers}
    steps = []
    for mesh in meshes:
        say(f"steps on {mesh}")
        measured = on_ranks(mesh, step_on_rank, replace(job, target=replace(job.target, mesh=mesh)), asked.rounds)
        steps.append({"mesh": str(mesh), **measured})
    names = tuple(name for name, version in there.items() if version)
    say(f"attention, 2 ranks: ours and {', '.join(names) or 'no peer (none is installed)'}")
    attention = on_ranks(Mesh(ring=2), attention_on_rank, job, names, asked.rounds)
    show(job.data.length * job.data.batch, steps, attention)
    if asked.json:
        about = {"length": job.data.length, "shape": {k: v for k, v in vars(job.target.shape).items() if k != "rotary"}}
        write_result(asked.json, {**provenance(), **about, "peers": there, "steps": steps, "attention": attention})
