"""What the ranks of the tests here run; apart from the tests, so that a rank imports no more than it needs."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from longctx.data.batches import Batch
from longctx.parallel.launch import Rank
from longctx.pretrained import shape_of
from longctx.schema import Mesh, Optim, Recompute


@dataclass(frozen=True)
class Run:
    """Steps on a mesh, from the weights of ``folder``, with sequences whose documents have these ``lengths``."""

    mesh: Mesh
    folder: Path
    lengths: tuple[tuple[int, ...], ...]
    steps: int = 1
    optim: Optim = field(default_factory=Optim)
    recompute: Recompute = "none"
    strategy: str = "pass_kv"
    layout: str = "zigzag"
    masked: str = "ends"
    dtype: str = "float32"


def sequences(run: Run, step: int) -> Batch:
    """Random tokens; documents' last targets do not count, and of ``masked`` "a rank's" none of a whole sequence's."""
    draw = torch.Generator().manual_seed(17 + step)
    length = sum(run.lengths[0])
    tokens = torch.randint(256, (len(run.lengths), length + 1), generator=draw)
    mask = torch.rand(len(run.lengths), length, generator=draw) < 0.8
    for row, lengths in enumerate(run.lengths):
        ends = torch.tensor(lengths).cumsum(0) - 1
        mask[row, ends] = False
    if run.masked == "a rank's":
        mask[1::2] = False
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, run.lengths, int(mask.sum()))


def train(rank: Rank, run: Run) -> list[tuple[float, float, int]]:
    """Loss, norm of the gradient and counted tokens, by step."""
    from longctx.attention.flash_cpu import flash_cpu
    from longctx.megatron import weights
    from longctx.megatron.runtime import runtime
    from longctx.megatron.training import trainable
    from longctx.parallel.strategy import STRATEGIES
    from longctx.train.step import Sharding, train_step

    shape = shape_of(run.folder)
    with runtime(rank, run.mesh, timeout_minutes=2, training=True) as here:
        trained = trainable(
            here,
            shape,
            run.optim,
            lambda net: weights.load(net, weights.Weights(run.folder), shape),
            dtype=getattr(torch, run.dtype),
            layers="local",
            steps=max(2, run.steps),
            recompute=run.recompute,
        )
        how = Sharding(
            sum(run.lengths[0]), run.layout, flash_cpu, STRATEGIES[run.strategy], keeping=run.recompute != "none"
        )
        out = []
        for step in range(run.steps):
            whole = sequences(run, step)
            part, parts = here.groups.dp.rank(), here.groups.dp.size()
            mine = [x[part::parts] for x in (whole.tokens, whole.targets, whole.mask, whole.lengths)]
            figures = train_step(trained, Batch(*mine, whole.counted), here, how)
            out.append((figures.loss, figures.grad_norm, figures.tokens))
    return out
