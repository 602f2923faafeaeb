"""Tests on a GPU (``make test-gpu``): kernels, the ring with threads on one device, and a real model."""

import pytest
import torch

from longctx.attention.backends import KERNELS, installed
from longctx.attention.layout import contiguous, documents, zigzag
from longctx.attention.mask import BIDIRECTIONAL, CAUSAL, Mask, window
from longctx.attention.verify import refuse_inexact
from longctx.config import Mesh
from longctx.parallel.launch import run_ranks
from longctx.parallel.measure.comm_timer import ExposedCommTimer
from longctx.parallel.ring import Ring
from longctx.parallel.strategy import STRATEGIES, ring_attention
from longctx.parallel.threads import run_threads
from tests import oracle
from tests.megatron.ranks import all_logits

CUDA_KERNELS = [name for name in KERNELS if "cuda" in KERNELS[name].devices and installed(name)]
DTYPES = [torch.bfloat16, torch.float16]
kernels = pytest.mark.parametrize("name", CUDA_KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@kernels
@dtypes
def test_kernel_is_exact_on_this_device(name, dtype):
    refuse_inexact(KERNELS[name], torch.device("cuda"), dtype)


@kernels
@dtypes
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize(
    ("layout", "mask"),
    [
        (lambda size: zigzag(1021, size), CAUSAL),
        (lambda size: documents([11, 0, 701, 1], size), CAUSAL),
        (lambda size: contiguous(701, size), window(131)),
        (lambda size: zigzag(701, size), BIDIRECTIONAL),
        (lambda size: zigzag(701, size), Mask(5, 3)),
    ],
)
def test_ring_attention_is_exact(name, dtype, strategy, heads, layout, mask):
    """Three ranks are threads on one GPU.  Output and gradients agree with float64 on the CPU within one epsilon."""
    ranks, (hq, hk), d = 3, heads, 64
    rows = layout(ranks)
    shapes = [(1, rows.total, h, d) for h in (hq, hk, hk, hq)]
    q, k, v, dout = (torch.randn(shape).to(dtype) for shape in shapes)

    def rank_main(world, rank):
        local = [rows.shard(x, rank, 1).cuda() for x in (q, k, v, dout)]
        leaves = [x.requires_grad_() for x in local[:3]]
        out = ring_attention(Ring(world.group(rank), rows, rows, mask), KERNELS[name], STRATEGIES[strategy])(*leaves)
        out.backward(local[3])
        return [x.detach().cpu() for x in (out, *(leaf.grad for leaf in leaves))]

    packed = oracle.pack_rows(rows.lengths)
    visible = oracle.visible(packed, packed, mask.before, mask.after)
    exact = (oracle.attention(q, k, v, visible)[0], *oracle.gradients(q, k, v, visible, dout))
    for shards, expected in zip(zip(*run_threads(ranks, rank_main), strict=True), exact, strict=True):
        oracle.assert_close(rows.unshard(list(shards), 1), expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_logits_equal_those_of_the_cpu(name, smollm2):
    tokens = torch.randint(49152, (499,)).tolist()
    on_gpu = run_ranks(1, all_logits, Mesh(), smollm2[1], tokens, "bfloat16", "cuda", name)[0]
    on_cpu = run_ranks(1, all_logits, Mesh(), smollm2[1], tokens, "float32")[0]
    assert float((on_gpu.cpu() - on_cpu).abs().max() / on_cpu.abs().max()) < 0.05


def test_timer_counts_waiting_of_the_stream_and_not_computing():
    """The CPU continues while the stream waits, so only CUDA events can measure the wait."""
    device, cycles = torch.device("cuda"), 10**8
    timer, other = ExposedCommTimer(), torch.cuda.Stream()
    torch.cuda._sleep(cycles)  # computation before the wait
    with torch.cuda.stream(other):
        torch.cuda._sleep(4 * cycles)  # the transfer that the stream waits for
    with timer.during("shift", device):
        torch.cuda.current_stream().wait_stream(other)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    assert timer.pop_seconds()["shift"] == pytest.approx(3 * start.elapsed_time(end) / 1e3, rel=0.2)
