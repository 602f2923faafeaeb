"""context.check_schedule in training: a faulty strategy is found before a sequence's attention runs."""

from dataclasses import replace

import pytest
import torch

from longctx.attention.kernel import reference
from longctx.config import Mesh
from longctx.data.batches import Batch
from longctx.megatron.runtime import ProcessGroupCollection, Runtime
from longctx.model_shape import ModelShape
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.launch import Rank
from longctx.parallel.ring import pass_kv
from longctx.parallel.schedule import ScheduleError
from longctx.parallel.strategy import STRATEGIES
from longctx.train.step import ContextParallel, micro_batches

SHAPE = ModelShape(
    layers=2, hidden=24, heads=12, kv_heads=6, head_dim=4, ffn=8, vocab_size=11, max_positions=97, norm_eps=1e-6,
    tied=True, qkv_bias=False, windows=(None, 5),
)  # fmt: skip
MESHES = [Mesh(ring=3), Mesh(tp=2, ulysses=3, ring=2)]


def runtime_of(mesh: Mesh) -> Runtime:
    """Return the runtime of the first rank of ``mesh``, whose groups send nothing."""
    tp, ulysses, ring, context = (SingleRankComm(0, size) for size in (mesh.tp, mesh.ulysses, mesh.ring, mesh.context))
    groups, rank = ProcessGroupCollection(), Rank(0, 1, 0, 1, "file://unused")
    return Runtime(
        rank, mesh, torch.device("cpu"), groups, groups, tp, ulysses, ring, context, context, context, context
    )


def batch() -> Batch:
    """Return one sequence of three documents, of which one is empty."""
    tokens = torch.arange(23).unsqueeze(0) % 11
    return Batch(tokens, tokens, torch.ones(1, 23, dtype=torch.bool), ((13, 0, 10),), 23)


def short_of_a_row(q, k, v, ring, kernel):
    skipped = int(ring.comm.rank == 1)
    return pass_kv(q, k[:, skipped:], v[:, skipped:], ring, kernel)


def in_float32(q, k, v, ring, kernel):
    """Send one rank's keys and values in the dtype of sums, which only half precision shows."""
    dtype = torch.float32 if ring.comm.rank == 1 else k.dtype
    return pass_kv(q, k.to(dtype), v.to(dtype), ring, kernel)


def test_messages_are_proved_in_the_dtype_of_the_model():
    parallelism = ContextParallel(23, "zigzag", reference, in_float32, check_schedule=True)
    assert micro_batches(batch(), runtime_of(Mesh(ring=3)), SHAPE, parallelism)
    with pytest.raises(ScheduleError, match=r"\(bfloat16\) .* \(float32\)"):
        micro_batches(batch(), runtime_of(Mesh(ring=3)), SHAPE, replace(parallelism, dtype=torch.bfloat16))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_faulty_strategy_is_found_before_the_step(mesh):
    parallelism = ContextParallel(23, "zigzag", reference, short_of_a_row, check_schedule=True)
    with pytest.raises(ScheduleError, match="mismatch: in exchange of ring"):
        micro_batches(batch(), runtime_of(mesh), SHAPE, parallelism)
    assert micro_batches(batch(), runtime_of(mesh), SHAPE, replace(parallelism, check_schedule=False))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checked_sequences_have_the_same_rows(mesh, strategy):
    parallelism = ContextParallel(23, "zigzag", reference, STRATEGIES[strategy], check_schedule=True)
    (checked,) = micro_batches(batch(), runtime_of(mesh), SHAPE, parallelism)
    (plain,) = micro_batches(batch(), runtime_of(mesh), SHAPE, replace(parallelism, check_schedule=False))
    assert torch.equal(checked.tokens, plain.tokens)
