"""Training runs on ranks for the tests; in a separate module, so that a rank imports only what it needs."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longctx.config import DataSettings, Mesh, Optim, Recompute
from longctx.data.batches import Batch, training_batches
from longctx.hf.config import shape_of, tokenizer_of
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan


@dataclass(frozen=True)
class Run:
    """Steps ``begin`` to ``steps`` on a mesh, with sequences whose documents have these ``lengths``.

    Starts from the weights of ``folder``, or, if ``begin`` is not 0, from the latest checkpoint in ``checkpoints``.  A
    checkpoint is saved after step ``save_at``.  If ``gradients`` is set, the run only writes the first step's gradients
    there, as a Hugging Face folder.  ``tokens`` is the number of token ids to draw from.  With ``data``, every step
    takes the first batch of this text.
    """

    mesh: Mesh
    folder: Path
    lengths: tuple[tuple[int, ...], ...]
    steps: int = 1
    begin: int = 0
    checkpoints: Path | None = None
    save_at: int = 0
    gradients: Path | None = None
    optim: Optim = field(default_factory=Optim)
    recompute: Recompute = "none"
    loss_rows: int | None = 5
    mlp_rows: int | None = None
    strategy: str = "pass_kv"
    layout: str = "zigzag"
    masked: str = "ends"
    tokens: int = 256  # token ids to draw from
    dtype: str = "float32"
    dropped: tuple[int, ...] = ()
    data: DataSettings | None = None


def sequences(run: Run, step: int) -> Batch:
    """Random tokens; a fifth of the targets and the last target of each document do not count.

    With ``masked`` "a rank's", no target of every second sequence counts.
    """
    if run.data:
        return next(training_batches(run.data, tokenizer_of(run.folder), ends=shape_of(run.folder).end_tokens)(None))[0]
    draw = torch.Generator().manual_seed(17 + step)
    length = sum(run.lengths[0])
    tokens = torch.randint(run.tokens, (len(run.lengths), length + 1), generator=draw)
    mask = torch.rand(len(run.lengths), length, generator=draw) < 0.8
    for row, lengths in enumerate(run.lengths):
        ends = torch.tensor(lengths).cumsum(0) - 1
        mask[row, ends] = False
    if run.masked == "a rank's":
        mask[1::2] = False
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, run.lengths, int(mask.sum()))


def rows_of_rank(whole: Batch, dp: Any) -> Batch:
    """Return the sequences of this data-parallel rank."""
    mine = [x[dp.rank() :: dp.size()] for x in (whole.tokens, whole.targets, whole.mask, whole.lengths)]
    return Batch(*mine, whole.counted)


@dataclass(frozen=True)
class Step:
    """`StepResult` as a picklable value that leaves the rank."""

    loss: float
    norm: float
    tokens: int
    rate: float
    experts_bytes: int = 0
    router_loss: float | None = None


def train(rank: Rank, run: Run) -> list[Step]:
    """Run the steps of ``run`` on this rank and return each step's result; its loss alone if it writes gradients."""
    from longctx.attention.flash_cpu import flash_cpu
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.training import checkpoint
    from longctx.megatron.training.optimizer import mean_router_loss
    from longctx.megatron.training.state import build_train_state
    from longctx.parallel.strategy import STRATEGIES
    from longctx.train.step import ContextParallel, micro_batches, train_step

    shape = shape_of(run.folder)
    route_in(run.dtype)
    with open_runtime(rank, run.mesh, timeout_minutes=2, training=True) as runtime:
        trained = build_train_state(
            runtime,
            shape,
            run.optim,
            lambda net: hf_load.load(net, hf_load.Weights(run.folder), shape),
            dtype=getattr(torch, run.dtype),
            layers="local",
            steps=max(2, run.steps),
            recompute=run.recompute,
            loss_rows=run.loss_rows,
            mlp_rows=run.mlp_rows,
            plan=SPDPlan(shape.layers, run.mesh.tp, run.dropped) if run.dropped else None,
        )
        strategy, keep_partials = STRATEGIES[run.strategy], run.recompute != "none"
        parallelism = ContextParallel(
            sum(run.lengths[0]), run.layout, flash_cpu, strategy, keep_partials, getattr(torch, run.dtype)
        )

        def batch(step: int) -> Batch:
            return rows_of_rank(sequences(run, step), runtime.groups.dp)

        if run.gradients:
            batches = micro_batches(batch(0), runtime, shape, parallelism)
            loss = write_gradients(trained, batches, run.gradients, run.folder)
            return [Step(loss, math.nan, batch(0).counted, 0.0, router_loss=mean_router_loss(trained))]
        saved = checkpoint.Checkpoints(run.checkpoints, keep=1) if run.checkpoints else None
        if run.begin:
            with torch.no_grad():
                for parameter in trained.net.parameters():
                    parameter.zero_()  # a parameter that is not loaded would stay 0
            checkpoint.load(checkpoint.agreed_on_all_ranks(run.checkpoints)[0], trained)
        out = []
        for step in range(run.begin, run.steps):
            result = train_step(trained, batch(step), runtime, parallelism)
            figures = (result.loss, result.grad_norm, result.tokens, result.rate, result.experts_bytes)
            out.append(Step(*figures, result.router_loss))
            if saved and step + 1 == run.save_at:
                saved.save(trained, run.save_at, {"note": "something"})
        if saved:
            saved.poll(wait=True)
    return out


def route_in(dtype: str) -> None:
    """For float64, let megatron-core's router choose experts in float64; its softmax is in float32."""
    if dtype != "float64":
        return
    from megatron.core.transformer.moe import router

    from tests.float64 import KeepFloat64

    choose_experts = router.topk_routing_with_score_function

    def in_float64(*args: Any, **kwargs: Any) -> Any:
        with KeepFloat64():
            return choose_experts(*args, **kwargs)

    router.topk_routing_with_score_function = in_float64


def write_gradients(trained: Any, batches: Any, folder: Path, source: Path) -> float:
    """Write gradients as a Hugging Face folder, with the table of names that export uses; return the loss."""
    from longctx.megatron.hf_io import export
    from longctx.megatron.training.optimizer import clear_gradients, forward_backward

    clear_gradients(trained)
    loss: float = forward_backward(trained, batches).mean
    for parameter in trained.net.parameters():
        parameter.data.copy_(parameter.main_grad)
    export.save(trained.net, trained.shape, folder, source)
    return loss


def train_each(rank: Rank, runs: list[Run]) -> list[list[Step]]:
    """Run ``runs`` on one rank, one after the other."""
    return [train(rank, run) for run in runs]
