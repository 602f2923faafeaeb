"""Prove every strategy and every pass on every mesh of up to 8 ranks; print the number of proofs and the CPU seconds.

This runs in a separate process, without the type checks of pytest's processes, which would take most of the time.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from longctx.attention.kernel import reference
from longctx.attention.layout import contiguous, shard_balanced, zigzag
from longctx.config import Mesh
from longctx.hf.config import shape_of
from longctx.infer.engine import Engine
from longctx.infer.prefill import run_pass, run_replicated
from longctx.infer.prove import pass_schedules
from longctx.megatron.model import GPTModel, build_model
from longctx.megatron.runtime import Runtime
from longctx.megatron.sharded import share_weights
from longctx.model_shape import ModelShape
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.recording import META
from longctx.parallel.ring import pass_kv
from longctx.parallel.schedule import refuse_faulty
from longctx.parallel.strategy import STRATEGIES
from tests.infer.thread_ranks import single_rank
from tests.parallel.test_schedule import LAYOUTS, schedules_of
from tests.tiny import tiny_model

F32, CPU = torch.float32, torch.device("cpu")  # small tensors are faster there than on meta
MESHES = [Mesh(tp=tp, ulysses=u, ring=r) for tp in (1, 2) for u in range(1, 9) for r in range(1, 9) if tp * u * r <= 8]


def prove_attention() -> int:
    """Prove forward and backward of every strategy and layout; return the number of proofs."""
    proofs = [(mesh, name, strategy) for mesh in MESHES if mesh.tp == 1 for name in LAYOUTS for strategy in STRATEGIES]
    for mesh, name, strategy in proofs:
        refuse_faulty(schedules_of(mesh, name, STRATEGIES[strategy]))
    return len(proofs)


def models_of(runtime: Runtime, folder: Path) -> dict[int, tuple[ModelShape, GPTModel]]:
    """Return, by Ulysses degree, a model without weights whose heads suit it; the second layer has a window."""
    models = {}
    for ulysses in range(1, 9):
        heads = {"heads": 2 * ulysses, "kv_heads": 1 if ulysses % 2 else ulysses}
        shape = replace(shape_of(folder), **heads, windows=(None, 5))
        models[ulysses] = shape, build_model(shape, runtime.alone, dtype=F32, layers="local", device=META)
    return models


def engine_of(shape: ModelShape, model: GPTModel, mesh: Mesh) -> Engine:
    """Return the engine of the first rank of ``mesh``."""
    groups = {name: SingleRankComm(0, size) for name, size in (("tp", mesh.tp), ("ulysses", mesh.ulysses))}
    context, tp_context = SingleRankComm(0, mesh.context), SingleRankComm(0, mesh.context * mesh.tp)
    share = share_weights(model, shape, context, tp_context)
    return Engine(model, shape, reference, **groups, ring=SingleRankComm(0, mesh.ring), context=context, share=share)


def prove_passes(runtime: Runtime, folder: Path) -> int:
    """Prove prefill and decoding of two sequences with uneven caches, by each strategy; return the number of proofs.

    With tp=2, only the two ways to decode are proved: in prefill, each of two tensor-parallel ranks sends the messages
    that are proved with tp=1.
    """
    models, proofs = models_of(runtime, folder), 0
    for mesh in MESHES:
        engine = engine_of(*models[mesh.ulysses], mesh)
        cached = [zigzag(11, mesh.ring), contiguous(3, mesh.ring)]
        rows = [sum(layout.rows(rank) for layout in cached) for rank in range(mesh.ring)]
        for lengths in ([7, 2], [1, 1]):
            layout = shard_balanced(lengths, zigzag, rows)
            tokens = torch.zeros(sum(lengths), dtype=torch.long)
            for strategy in STRATEGIES.values() if mesh.tp == 1 else ():
                strategies = {None: strategy, 5: pass_kv}
                run = partial(run_pass, tokens=tokens, layout=layout.split(mesh.ulysses), strategies=strategies)
                refuse_faulty(pass_schedules(engine, cached, run, CPU))
                proofs += 1
        for share in (None, engine.share):
            run = partial(run_replicated, tokens=tokens, layout=layout, share=share)
            with share.in_use() if share else nullcontext():
                schedules = pass_schedules(engine, cached, run, CPU)
            refuse_faulty(schedules)
            proofs += 1
            # Four exchanges a layer with a share of the weights, one without, on each context rank.
            exchanges = 4 if share else 1
            sums = 2 if share and mesh.tp > 1 else 0  # exchanges that include the tensor-parallel ranks
            expected = exchanges if mesh.context > 1 else sums
            assert [len(schedule) for schedule in schedules] == [2 * expected] * mesh.tp * mesh.context, mesh
    return proofs


if __name__ == "__main__":
    with TemporaryDirectory() as folder, single_rank(Path(folder)) as single_runtime:
        began = time.process_time()
        proved = prove_attention()
        proved += prove_passes(single_runtime, tiny_model(Path(folder) / "tiny", max_positions=97, heads=6))
        print(proved, time.process_time() - began)
