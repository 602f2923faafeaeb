"""What the ranks of the tests here run; apart from the tests, so that a rank imports no more than it needs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longctx.config import Mesh, Optim, Recompute
from longctx.data.batches import Batch
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan


@dataclass(frozen=True)
class Run:
    """Steps ``begin`` to ``steps`` on a mesh, with sequences whose documents have these ``lengths``.

    From the weights of ``folder``, or, where ``begin`` is not 0, from the last checkpoint of ``checkpoints``, where a
    checkpoint is made behind step ``save_at``.  The first step's gradients go to ``gradients``, a Hugging Face folder.
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
    strategy: str = "pass_kv"
    layout: str = "zigzag"
    masked: str = "ends"
    tokens: int = 256  # of the vocabulary
    dtype: str = "float32"
    dropped: tuple[int, ...] = ()


def sequences(run: Run, step: int) -> Batch:
    """Random tokens; documents' last targets do not count, and of ``masked`` "a rank's" none of a whole sequence's."""
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


@dataclass(frozen=True)
class Step:
    """What a step gave."""

    loss: float
    norm: float
    tokens: int
    rate: float


def train(rank: Rank, run: Run) -> list[Step]:
    """The steps of ``run``, one by one."""
    from longctx.attention.flash_cpu import flash_cpu
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.runtime import runtime
    from longctx.megatron.training import checkpoint
    from longctx.megatron.training.optimizer import build_train_state
    from longctx.parallel.strategy import STRATEGIES
    from longctx.train.step import Sharding, micro_batches, train_step

    shape = shape_of(run.folder)
    with runtime(rank, run.mesh, timeout_minutes=2, training=True) as here:
        trained = build_train_state(
            here,
            shape,
            run.optim,
            lambda net: hf_load.load(net, hf_load.Weights(run.folder), shape),
            dtype=getattr(torch, run.dtype),
            layers="local",
            steps=max(2, run.steps),
            recompute=run.recompute,
            plan=SPDPlan(shape.layers, run.mesh.tp, run.dropped) if run.dropped else None,
        )
        strategy, keeping = STRATEGIES[run.strategy], run.recompute != "none"
        how = Sharding(sum(run.lengths[0]), run.layout, flash_cpu, strategy, keeping)
        part, parts = here.groups.dp.rank(), here.groups.dp.size()

        def batch(step: int) -> Batch:
            whole = sequences(run, step)
            mine = [x[part::parts] for x in (whole.tokens, whole.targets, whole.mask, whole.lengths)]
            return Batch(*mine, whole.counted)

        if run.gradients:
            write_gradients(trained, micro_batches(batch(0), here, shape, how), run.gradients, run.folder)
            return []
        saved = checkpoint.Checkpoints(run.checkpoints, keep=1) if run.checkpoints else None
        if run.begin:
            with torch.no_grad():
                for parameter in trained.net.parameters():
                    parameter.zero_()  # what is not loaded shows
            checkpoint.load(checkpoint.agreed_on_all_ranks(run.checkpoints)[0], trained)
        out = []
        for step in range(run.begin, run.steps):
            did = train_step(trained, batch(step), here, how)
            out.append(Step(did.loss, did.grad_norm, did.tokens, did.rate))
            if saved and step + 1 == run.save_at:
                saved.save(trained, run.save_at, {"told": "something"})
        if saved:
            saved.poll(wait=True)
    return out


def write_gradients(trained: Any, batches: Any, folder: Path, source: Path) -> None:
    """Gradients as a Hugging Face folder, by the table that weights are written by."""
    from longctx.megatron.hf_io import export
    from longctx.megatron.training.optimizer import clear_gradients, forward_backward

    clear_gradients(trained)
    forward_backward(trained, batches)
    for parameter in trained.net.parameters():
        parameter.data.copy_(parameter.main_grad)
    export.save(trained.net, trained.shape, folder, source)
