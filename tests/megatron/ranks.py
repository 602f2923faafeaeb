"""Functions that the ranks of these tests run, in a module of few imports so that ranks start fast."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from longctx.attention.layout import zigzag
from longctx.config import Mesh, ModelSource
from longctx.hf.config import shape_of
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.ring import pass_kv


def all_logits(
    rank: Rank, mesh: Mesh, folder: Path, tokens: list[int], dtype: Any, device: str = "cpu", kernel: str = "auto"
) -> torch.Tensor | None:
    """Return the logits [s v] of every position on the first rank, and None on the others.

    In float64, megatron-core's router is kept from its float32 softmax.  Models without one show that nothing of ours
    rounds to float32.
    """
    from longctx.infer.engine import load_engine
    from longctx.infer.prefill import run_pass
    from longctx.megatron.model import logits
    from longctx.megatron.runtime import open_runtime
    from tests.float64 import KeepFloat64

    with open_runtime(rank, mesh, timeout_minutes=2, device=device) as runtime:
        engine = load_engine(runtime, ModelSource("test", str(folder), dtype=dtype), shape_of(folder), folder, kernel)
        layout = zigzag(len(tokens), mesh.ring).split(mesh.ulysses)
        router_rounds = dtype == "float64" and engine.shape.mixture
        with KeepFloat64() if router_rounds else nullcontext():
            cache, attention = engine.cache(len(tokens)), engine.everywhere(pass_kv)
            hidden = run_pass(engine, torch.tensor(tokens), layout, cache, attention)
        with torch.inference_mode():
            local = logits(engine.model, hidden, engine.tp, engine.shape.vocab_size)
        shapes = [(layout.rows(r), *local.shape[1:]) for r in range(engine.ranks)]
        gathered = layout.unshard(runtime.context.all_gather(local, shapes))[:, 0]
    return gathered.clone() if rank.rank == 0 else None


def all_logits_of_each(
    rank: Rank, mesh: Mesh, folders: Sequence[Path], tokens: list[int], dtype: Any
) -> list[torch.Tensor | None]:
    """Return `all_logits` of each model."""
    return [all_logits(rank, mesh, folder, tokens, dtype) for folder in folders]


def load_and_save(
    rank: Rank,
    mesh: Mesh,
    folders: Sequence[tuple[Path, Path, str]],
    shape: ModelShape | None = None,
    changed: Mapping[str, Any] | None = None,
    file_size: str = "75KB",
) -> None:
    """For each (source, destination, dtype) in ``folders``, load the source on ``mesh`` and save it to the destination.

    With ``shape``, the model has that shape instead of the source's, and config.json has the fields ``changed``.
    """
    from longctx.megatron.cpu_shim import let_training_run
    from longctx.megatron.hf_io import export
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.model import build_model
    from longctx.megatron.runtime import open_runtime

    let_training_run()  # with several stages, megatron-core compares the copies of a tied embedding on the GPU
    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        for source, to, dtype in folders:
            model_shape = shape or shape_of(source)
            torch_dtype = getattr(torch, dtype)
            stages = {"pipeline_model_parallel_size": mesh.pp, "pipeline_dtype": torch_dtype}
            model = build_model(
                model_shape, runtime.groups, dtype=torch_dtype, layers="local", device=runtime.device, **stages
            )
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)
            hf_load.load(model, hf_load.Weights(source), model_shape)
            export.save(model, model_shape, to, source, changed=changed, file_size=file_size)
