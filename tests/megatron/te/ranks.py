"""Functions that the ranks of test_te.py run: Transformer Engine's layers beside megatron-core's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from longctx.attention.kernel import Kernel, reference
from longctx.config import Mesh, Optim, Recompute
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan
from tests.train.ranks import Run, rows_of_rank, sequences

LAYERS = ("local", "te")
LENGTHS = ((13, 0, 22, 2), (5, 11, 20, 1))


@dataclass(frozen=True)
class Training:
    """A training step to run with both kinds of layers."""

    folder: Path
    recompute: Recompute = "none"
    mlp_rows: int | None = None
    zero1: bool = False
    dropped: tuple[int, ...] = ()
    sequence_parallel: bool = True
    dtype: str = "float64"
    fp8: str | None = None


def compare_logits(
    rank: Rank,
    mesh: Mesh,
    models: Mapping[str, Path],
    dtype: str,
    dropped: tuple[int, ...],
    to: Path,
    fp8: str | None = None,
) -> dict[str, tuple[float, bool]]:
    """Return, by model, the largest difference of the logits of both kinds of layers, relative to the largest logit.

    The second value is True if an export from Transformer Engine's layers has the tensors of the model's folder.  With
    ``fp8``, the products of local layers are those of `fp8_oracle`.
    """
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, mesh, timeout_minutes=2) as runtime, torch.inference_mode():
        return {
            kind: _compare_logits(runtime, folder, dtype, dropped, to / kind, fp8) for kind, folder in models.items()
        }


def _compare_logits(
    runtime: Any, folder: Path, dtype: str, dropped: tuple[int, ...], to: Path, fp8: str | None
) -> tuple[float, bool]:  # fmt: skip
    from longctx.attention.layout import zigzag
    from longctx.infer.engine import Engine, next_logits
    from longctx.infer.prefill import run_pass
    from longctx.megatron.hf_io import export, load
    from longctx.megatron.model import build_model
    from longctx.parallel.ring import pass_kv
    from tests.megatron.te.fp8_oracle import round_products

    shape, each = shape_of(folder), {}
    plan = SPDPlan(shape.layers, runtime.mesh.tp, dropped) if dropped else None
    tokens = torch.randint(shape.vocab_size, (53,), generator=torch.Generator().manual_seed(3))
    for layers in LAYERS:
        net = build_model(
            shape, runtime.groups, dtype=getattr(torch, dtype), layers=layers, device=runtime.device, plan=plan,
            fp8=fp8 if layers == "te" else None,
        )  # fmt: skip
        load.load(net, load.Weights(folder), shape)
        if fp8 and layers == "local":
            round_products(net, fp8)
        engine = Engine(net, shape, reference, tp=runtime.tp)
        hidden = run_pass(engine, tokens, zigzag(53, 1), engine.cache(53), engine.everywhere(pass_kv))
        each[layers] = next_logits(engine, hidden)
    export.save(net, shape, to, folder)
    error = (each["te"] - each["local"]).abs().max() / each["local"].abs().max()
    return float(error), runtime.tp.rank > 0 or same_tensors(folder, to)  # rank 0 writes


def same_tensors(one: Path, other: Path) -> bool:
    """Return True if the two Hugging Face folders have the same tensors."""
    from safetensors.torch import load_file

    from longctx.hf.checkpoint import tensor_files

    first, second = (
        {name: tensor for file in set(tensor_files(folder).values()) for name, tensor in load_file(file).items()}
        for folder in (one, other)
    )
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def compare_training(rank: Rank, mesh: Mesh, cases: Sequence[Training]) -> list[dict[str, float]]:
    """Return, for each case, the relative differences of both kinds of layers.

    ``gradient`` is the largest of all tensors.  In float32 there are also ``norm``, of all gradients, and ``next``, the
    loss after the optimizer's step.  With ``fp8``, there is ``changed``, the loss after the weights have changed.
    """
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, mesh, timeout_minutes=2, training=True) as runtime:
        return [_errors(*(_train(runtime, case, layers) for layers in LAYERS)) for case in cases]


def _errors(local: Mapping[str, Any], te: Mapping[str, Any]) -> dict[str, float]:
    assert local["keys"] == te["keys"], "a checkpoint of one kind of layers does not load into the other"
    assert set(local["gradients"]) == set(te["gradients"])
    gradients = [(te["gradients"][name] - g).norm() / g.norm() for name, g in local["gradients"].items()]
    errors = {name: abs(te[name] / local[name] - 1) for name in ("loss", "norm", "next", "changed") if name in local}
    return {**errors, "gradient": float(torch.stack(gradients).max())}


def _train(runtime: Any, case: Training, layers: str, kernel: Kernel = reference) -> dict[str, Any]:
    from longctx.megatron.hf_io.names import tensor_views
    from longctx.megatron.training.optimizer import clear_gradients, forward_backward, optimizer_step

    with patch.object(Mesh, "sequence_parallel", runtime.mesh.tp > 1 and case.sequence_parallel):
        trained, batches = train_state(runtime, case, layers, kernel)
        clear_gradients(trained)
        loss = forward_backward(trained, batches()).mean
        weights = {p: p.data.clone() for p in trained.net.parameters()}
        for p in weights:
            p.data.copy_(p.main_grad)
        gradients = {each.name: each.view.detach().clone() for each in tensor_views(trained.net, trained.shape)}
        for p, weight in weights.items():
            p.data.copy_(weight)
        keys = {each.key for each in trained.net.sharded_state_dict(metadata={}).values()}
        results = {"loss": loss, "gradients": gradients, "keys": keys}
        if case.fp8:
            for p in trained.net.parameters():
                p.data.mul_(1.5)
            results["changed"] = forward_backward(trained, batches(), learn=False).mean
        if case.dtype == "float64":  # which megatron-core's optimizers do not take
            return results
        norm, _ = optimizer_step(trained)
        clear_gradients(trained)
        return {**results, "norm": norm, "next": forward_backward(trained, batches()).mean}


def train_state(runtime: Any, case: Training, layers: str, kernel: Kernel = reference) -> tuple[Any, Any]:
    """Return the state of a training run, and a function that returns the micro-batches of its step."""
    from longctx.megatron.hf_io import load
    from longctx.megatron.training.state import build_train_state
    from longctx.parallel.ring import pass_kv
    from longctx.parallel.validate import FP8_ROWS
    from longctx.train.step import ContextParallel, micro_batches
    from tests.megatron.te.fp8_oracle import round_products

    shape, run, fp8 = shape_of(case.folder), Run(runtime.mesh, case.folder, LENGTHS, tokens=211), case.fp8
    trained = build_train_state(
        runtime, shape, Optim(zero1=case.zero1),
        lambda net: load.load(net, load.Weights(case.folder), shape),
        dtype=getattr(torch, case.dtype), layers=layers, steps=9, recompute=case.recompute, mlp_rows=case.mlp_rows,
        plan=SPDPlan(shape.layers, runtime.mesh.tp, case.dropped) if case.dropped else None,
        fp8=fp8 if layers == "te" else None,
    )  # fmt: skip
    if fp8 and layers == "local":
        round_products(trained.net, fp8)
    parallelism = ContextParallel(
        37, "zigzag", kernel, pass_kv, case.recompute != "none", getattr(torch, case.dtype),
        row_multiple=FP8_ROWS[fp8],
    )  # fmt: skip
    mine = rows_of_rank(sequences(run, 0), runtime.groups.dp)
    return trained, lambda: micro_batches(mine, runtime, shape, parallelism)


def round_trip(rank: Rank, mesh: Mesh, case: Training, folder: Path) -> dict[str, bool]:
    """Save a checkpoint of local layers, load it into Transformer Engine's, save that, load it into local layers.

    Returns whether the ``weights`` and the ``next`` step's loss and gradient norm are those of the first run.
    """
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.training import checkpoint
    from longctx.megatron.training.optimizer import clear_gradients, forward_backward, optimizer_step

    def step(trained: Any, batches: Any) -> tuple[float, float]:
        clear_gradients(trained)
        return forward_backward(trained, batches()).mean, optimizer_step(trained)[0]

    with open_runtime(rank, mesh, timeout_minutes=2, training=True) as runtime:
        first, batches = train_state(runtime, case, "local")
        step(first, batches)
        place, trained = _saved(first, folder / "local"), first
        for layers in ("te", "local"):
            trained, _ = train_state(runtime, case, layers)
            with torch.no_grad():
                for parameter in trained.net.parameters():
                    parameter.zero_()
            checkpoint.load(place, trained)
            place = _saved(trained, folder / f"from-{layers}")
        pairs = zip(first.net.parameters(), trained.net.parameters(), strict=True)
        weights = all(torch.equal(one, other) for one, other in pairs)
        return {"weights": weights, "next": step(first, batches) == step(trained, batches)}


def _saved(trained: Any, folder: Path) -> Path:
    from longctx.megatron.training.checkpoint import Checkpoints

    saved = Checkpoints(folder, keep=1)
    saved.save(trained, 1, {})
    saved.poll(wait=True)
    return saved.latest


def run_layers(rank: Rank, tp: int, cases: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return `run_layer` of each case, with Transformer Engine's linear layers."""
    from tests.megatron.spd.spd_ranks import run_layer

    return [run_layer(rank, tp, *case, layers="te") for case in cases]


def noticed(rank: Rank, mesh: Mesh, models: Mapping[str, Path]) -> dict[str, bool]:
    """Return, for each mutation, True if the step of Transformer Engine's layers then differs from local layers'."""
    from longctx.megatron.runtime import open_runtime
    from tests.megatron.te.mutations import MUTATIONS

    results, local = {}, {}
    with open_runtime(rank, mesh, timeout_minutes=2, training=True) as runtime:
        for name, mutation in MUTATIONS.items():
            case = Training(models[mutation.kind], **mutation.training)
            if case not in local:
                local[case] = _train(runtime, case, "local")
            with mutation.apply():
                results[name] = _differs(runtime, case, local[case])
    return results


def _differs(runtime: Any, case: Training, local: Mapping[str, Any]) -> bool:
    try:
        errors = _errors(local, _train(runtime, case, "te"))
        return not all(error < 1e-12 for error in errors.values())  # NaN differs
    except (AssertionError, ValueError):  # on all ranks: names or shapes that do not fit
        return True


def run_kernels(rank: Rank, folder: Path, kernels: Mapping[str, Sequence[str]]) -> dict[tuple[str, str, str], Any]:
    """Return, by kernel, kind of layers and dtype, the differences of a step from local layers in float64.

    ``kernels`` has the dtypes to run by kernel.  ``loss`` and ``gradient`` are as in `compare_training`.
    """
    from longctx.megatron.runtime import open_runtime
    from tests.megatron.te.capabilities import kernel_on_cpu

    errors, cases = {}, [(kernel, dtype) for kernel, dtypes in kernels.items() for dtype in dtypes]
    with open_runtime(rank, Mesh(), timeout_minutes=2, training=True) as runtime:
        exact = _train(runtime, Training(folder), "local")
        for (name, dtype), layers in product(cases, LAYERS):
            with kernel_on_cpu(name) as kernel:
                step = _train(runtime, Training(folder, dtype=dtype), layers, kernel)
            errors[name, layers, dtype] = _errors(exact, step)
    return errors


def run_large(rank: Rank, folder: Path, prompt: int) -> dict[str, Any]:
    """Return `meta.run_on_meta`, which imports Transformer Engine."""
    from tests.megatron.te.meta import run_on_meta

    return run_on_meta(rank, folder, prompt)
