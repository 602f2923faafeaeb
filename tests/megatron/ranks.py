"""What the ranks of the tests here run; apart from the tests, so that a rank imports no more than it needs."""

from collections.abc import Mapping, Sequence
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
    """Logits [s v] of every position, on the first rank."""
    from longctx.infer.engine import load_engine
    from longctx.infer.prefill import run_pass
    from longctx.megatron.model import logits
    from longctx.megatron.runtime import runtime

    with runtime(rank, mesh, timeout_minutes=2, device=device) as here:
        engine = load_engine(here, ModelSource("test", str(folder), dtype=dtype), shape_of(folder), folder, kernel)
        layout = zigzag(len(tokens), mesh.ring).split(mesh.ulysses)
        hidden = run_pass(engine, torch.tensor(tokens), layout, engine.cache(len(tokens)), engine.everywhere(pass_kv))
        with torch.inference_mode():
            mine = logits(engine.model, hidden, engine.tp, engine.shape.vocab_size)
        shapes = [(layout.rows(r), *mine.shape[1:]) for r in range(engine.ranks)]
        whole = layout.unshard(here.context.all_gather(mine, shapes))[:, 0]
    return whole.clone() if rank.rank == 0 else None


def loaded_and_saved(
    rank: Rank,
    mesh: Mesh,
    folders: Sequence[tuple[Path, Path, str]],
    shape: ModelShape | None = None,
    changed: Mapping[str, Any] | None = None,
    file_size: str = "75KB",
) -> None:
    """Loads each (folder, other folder, dtype)'s weights over ``mesh`` and saves them in the other folder.

    With ``shape`` as a model of that, whose configuration has ``changed``.
    """
    from longctx.megatron.cpu_shim import let_training_run
    from longctx.megatron.hf_io import export
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.model import build_model
    from longctx.megatron.runtime import runtime

    let_training_run()  # of several stages megatron-core compares the copies of a tied embedding on the GPU
    with runtime(rank, mesh, timeout_minutes=2) as here:
        for source, to, dtype in folders:
            its = shape or shape_of(source)
            kind = getattr(torch, dtype)
            stages = {"pipeline_model_parallel_size": mesh.pp, "pipeline_dtype": kind}
            model = build_model(its, here.groups, dtype=kind, layers="local", device=here.device, **stages)
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)
            hf_load.load(model, hf_load.Weights(source), its)
            export.save(model, its, to, source, changed=changed, file_size=file_size)
