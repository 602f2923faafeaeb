"""Engines whose context ranks are threads of the test's process, so that tests can try many meshes quickly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from longctx.attention.kernel import reference
from longctx.config import Mesh
from longctx.hf.config import shape_of
from longctx.infer.engine import Engine
from longctx.megatron.hf_io import load as hf_load
from longctx.megatron.model import build_model
from longctx.megatron.runtime import Runtime, open_runtime
from longctx.megatron.sharded import share_weights
from longctx.parallel.comm import Comm
from longctx.parallel.launch import Rank
from longctx.parallel.threads import ThreadWorld, run_threads

Result = TypeVar("Result")


@contextmanager
def single_rank(folder: Path) -> Iterator[Runtime]:
    """Open the runtime of this process alone; ``folder`` is for its store."""
    with open_runtime(Rank(0, 1, 0, 1, f"file://{folder}/store"), Mesh()) as runtime:
        yield runtime


def run_engines(
    runtime: Runtime,
    folder: Path,
    mesh: Mesh,
    rank_main: Callable[[Engine], Result],
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[str, Comm], Comm] = lambda _, comm: comm,
    **build: Any,
) -> list[Result]:
    """Run ``rank_main`` on an engine of each context rank of ``mesh`` and return the results in rank order.

    ``wrap`` may replace a rank's groups, by name; ``build`` are options of `build_model`.
    """
    shape, u = shape_of(folder), mesh.ulysses

    def thread_main(world: ThreadWorld, rank: int) -> Result:
        model = build_model(shape, runtime.alone, dtype=dtype, layers="local", device=runtime.device, **build)
        hf_load.load(model, hf_load.Weights(folder, ()), shape)
        first, member = rank - rank % u, rank % u
        ulysses, ring = world.group(rank, range(first, first + u)), world.group(rank, range(member, world.size, u))
        context, tp_context = (wrap(name, world.group(rank)) for name in ("context", "tp_context"))
        share = share_weights(model, shape, context, tp_context)
        return rank_main(Engine(model, shape, reference, ulysses=ulysses, ring=ring, context=context, share=share))

    return run_threads(mesh.context, thread_main)
