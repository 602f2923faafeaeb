"""What runs on a CPU, on a GPU: kernels, the ring over threads of one device, a real model.  ``make test-gpu``."""

import pytest
import torch

from longctx.attention.backends import KERNELS
from longctx.attention.flash_attn import installed
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

KERNELS_HERE = [name for name in KERNELS if "cuda" in KERNELS[name].devices and (name != "flash_attn" or installed)]
HALVES = [torch.bfloat16, torch.float16]
kernels = pytest.mark.parametrize("name", KERNELS_HERE)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


@kernels
@halves
def test_kernel_is_exact_on_this_device(name, dtype):
    refuse_inexact(KERNELS[name], torch.device("cuda"), dtype)


@kernels
@halves
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
def test_the_ring_is_exact(name, dtype, strategy, heads, layout, mask):
    """Ranks as threads of one GPU: forward and gradients against float64 on the CPU, to half an epsilon twice."""
    ranks, (hq, hk), d = 3, heads, 64
    rows = layout(ranks)
    shapes = [(1, rows.total, h, d) for h in (hq, hk, hk, hq)]
    q, k, v, dout = (torch.randn(shape).to(dtype) for shape in shapes)

    def rank_main(world, rank):
        mine = [rows.shard(x, rank, 1).cuda() for x in (q, k, v, dout)]
        leaves = [x.requires_grad_() for x in mine[:3]]
        out = ring_attention(Ring(world.group(rank), rows, rows, mask), KERNELS[name], STRATEGIES[strategy])(*leaves)
        out.backward(mine[3])
        return [x.detach().cpu() for x in (out, *(leaf.grad for leaf in leaves))]

    packed = oracle.packed(rows.lengths)
    seen = oracle.visible(packed, packed, mask.before, mask.after)
    exact = (oracle.attention(q, k, v, seen)[0], *oracle.gradients(q, k, v, seen, dout))
    for parts, right in zip(zip(*run_threads(ranks, rank_main), strict=True), exact, strict=True):
        oracle.assert_close(rows.unshard(list(parts), 1), right, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", KERNELS_HERE)
def test_a_models_logits_are_those_of_a_cpu(name, smollm2):
    tokens = torch.randint(49152, (499,)).tolist()
    there = run_ranks(1, all_logits, Mesh(), smollm2[1], tokens, "bfloat16", "cuda", name)[0]
    here = run_ranks(1, all_logits, Mesh(), smollm2[1], tokens, "float32")[0]
    assert float((there.cpu() - here).abs().max() / here.abs().max()) < 0.05


def test_what_a_stream_waits_is_measured_and_what_it_computes_is_not():
    """The process has long gone on when the stream waits: only its events can tell."""
    device, cycles = torch.device("cuda"), 10**8
    waiting, other = ExposedCommTimer(), torch.cuda.Stream()
    torch.cuda._sleep(cycles)  # computing before the wait
    with torch.cuda.stream(other):
        torch.cuda._sleep(4 * cycles)  # what comes from another rank
    with waiting.during("shift", device):
        torch.cuda.current_stream().wait_stream(other)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    torch.cuda._sleep(cycles)
    ended.record()
    ended.synchronize()
    assert waiting.pop_seconds()["shift"] == pytest.approx(3 * began.elapsed_time(ended) / 1e3, rel=0.2)
