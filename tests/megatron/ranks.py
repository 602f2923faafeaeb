"""What the ranks of the tests here run; apart from the tests, so that a rank imports no more than it needs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longctx.attention.layout import zigzag
from longctx.parallel.launch import Rank
from longctx.parallel.ring import pass_kv
from longctx.pretrained import shape_of
from longctx.schema import Mesh, ModelShape, ModelSource


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
            mine = logits(engine.model, hidden, engine.tp, engine.shape.vocabulary)
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
    from longctx.megatron import export, weights
    from longctx.megatron.runtime import runtime

    with runtime(rank, mesh, timeout_minutes=2) as here:
        for source, to, dtype in folders:
            its = shape or shape_of(source)
            model = stage(its, mesh, here.groups, getattr(torch, dtype))
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)
            weights.load(model, weights.Weights(source), its)
            export.save(model, its, to, source, changed=changed, file_size=file_size)


def stage(shape: ModelShape, mesh: Mesh, groups: Any, dtype: torch.dtype) -> Any:
    """This rank's part of a model: all of it, or a pipeline stage, of which the first has one layer."""
    from longctx.megatron import model as ours

    if mesh.pp == 1:
        return ours.build_model(shape, groups, dtype=dtype, layers="local", device=torch.device("cpu"))
    torch.Tensor.cuda = lambda x: x  # megatron-core moves a tied embedding there to compare the stages' copies
    first, last = groups.pp.rank() == 0, groups.pp.rank() == mesh.pp - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="full scope is deprecated")  # megatron-core's own default
        config = replace(
            ours._config(shape, groups, dtype),
            pipeline_model_parallel_size=mesh.pp,
            pipeline_dtype=dtype,
            num_layers_in_first_pipeline_stage=1,
        )
    layers = 1 if first else (shape.layers - 1) // (mesh.pp - 1)
    norm = ours.RMSNorm if last else None
    return ours.GPTModel(
        config,
        ours.TransformerBlockSubmodules(layer_specs=[ours._local_layer()] * layers, layer_norm=norm),
        vocab_size=ours.padded_vocabulary(shape, mesh.tp),
        max_sequence_length=shape.positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",
        pg_collection=groups,
    )
