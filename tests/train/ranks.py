"""Training runs on ranks for the tests; in a separate module, so that a rank imports only what it needs."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from longctx.config import DataSettings, LoRA, Mesh, Optim, Recompute
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
    takes the first batch of this text.  With ``offload``, activations wait for the backward in a file of the system's
    temporary folder.
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
    shared_by: int = 1  # context ranks that share the weights of dropped blocks, instead of tensor-parallel ranks
    data: DataSettings | None = None
    lora: LoRA | None = None
    offload: bool = False


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


def refusal(rank: Rank, folders: tuple[Path, Path]) -> str:
    """Return the error about the checkpoints in ``folders[rank]``: each rank's machine has its own folder."""
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.training import checkpoint

    with open_runtime(rank, Mesh(dp=2), timeout_minutes=2, training=True):
        try:
            checkpoint.agreed_on_all_ranks(folders[rank.rank])
        except ValueError as error:
            return str(error)
    return ""


def train(rank: Rank, run: Run) -> list[Step]:
    """Run the steps of ``run`` on this rank and return each step's result; its loss alone if it writes gradients."""
    from longctx.attention.flash_cpu import flash_cpu
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.training import checkpoint
    from longctx.megatron.training.offload import Files, Offload
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
            plan=SPDPlan(shape.layers, run.mesh.tp * run.shared_by, run.dropped) if run.dropped else None,
            lora=run.lora,
            seed=5,
        )
        strategy, keep_partials = STRATEGIES[run.strategy], run.recompute != "none"
        files = Files(Path(gettempdir())) if run.offload else None
        parallelism = ContextParallel(
            sum(run.lengths[0]), run.layout, flash_cpu, strategy, keep_partials, getattr(torch, run.dtype),
            offload=Offload(files, trained.net.parameters(), smallest=64) if files else None,
        )  # fmt: skip

        def batch(step: int) -> Batch:
            return rows_of_rank(sequences(run, step), runtime.groups.dp)

        if run.gradients:
            write = write_adapters if run.lora else write_gradients
            return write(trained, micro_batches(batch(0), runtime, shape, parallelism), batch(0).counted, run)
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


def write_gradients(trained: Any, batches: Any, tokens: int, run: Run) -> list[Step]:
    """Write gradients as a Hugging Face folder, with the table of names that export uses; return the loss."""
    from longctx.megatron.hf_io import export
    from longctx.megatron.training.optimizer import clear_gradients, forward_backward, mean_router_loss

    clear_gradients(trained)
    loss = forward_backward(trained, batches).mean
    for parameter in trained.net.parameters():
        parameter.data.copy_(parameter.main_grad)
    export.save(trained.net, trained.shape, run.gradients, run.folder)
    return [Step(loss, math.nan, tokens, 0.0, router_loss=mean_router_loss(trained))]


def write_adapters(trained: Any, batches: Any, tokens: int, run: Run) -> Any:
    """Return loss, tokens and, by name, each adapter's matrices with their gradients; B is drawn by name.

    Matrices are gathered from tensor-parallel ranks.  The model with merged adapters is written.
    """
    from longctx.megatron.hf_io import export
    from longctx.megatron.lora import merge_adapters
    from longctx.megatron.training.optimizer import clear_gradients, forward_backward
    from longctx.parallel.dist_comm import DistComm

    tp, drawn = DistComm(trained.groups.tp), torch.Generator().manual_seed(41)
    adapters = {
        f"{layer.layer_number} {target}": getattr(part, target).adapter
        for layer in trained.net.decoder.layers
        for part, target in (
            (layer.self_attention, "linear_qkv"),
            (layer.self_attention, "linear_proj"),
            (layer.mlp, "linear_fc1"),
            (layer.mlp, "linear_fc2"),
        )
    }
    for name, adapter in adapters.items():
        drawn.manual_seed(len(name) + 10 * int(name[0]))
        for up in adapter.up:
            ranks = tp.size if adapter.divided == "up" else 1
            whole = torch.randn(len(up) * ranks, up.shape[1], generator=drawn, dtype=torch.float64)
            up.data.copy_(whole.chunk(ranks)[tp.rank % ranks])
    clear_gradients(trained)
    loss = forward_backward(trained, batches).mean

    def whole_of(adapter: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        shards = tp.all_gather(tensor.contiguous(), [tuple(tensor.shape)] * tp.size)
        return torch.cat(shards, adapter.dimension) if name.startswith(adapter.divided) else shards[0]

    found = {
        name: {
            matrix: (whole_of(adapter, matrix, p.detach()), whole_of(adapter, matrix, p.main_grad))
            for matrix, p in adapter.named_parameters()
        }
        for name, adapter in adapters.items()
    }
    merge_adapters(trained.net)
    export.save(trained.net, trained.shape, run.gradients, run.folder)
    return loss, tokens, found


def train_each(rank: Rank, runs: list[Run]) -> list[list[Step]]:
    """Run ``runs`` on one rank, one after the other."""
    return [train(rank, run) for run in runs]
