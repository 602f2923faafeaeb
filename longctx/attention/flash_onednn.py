"""Attention by oneDNN's products, for CPUs on which these are much faster than MKL's (`longctx.onednn`).

PyTorch's op for CPUs (`longctx.attention.flash_cpu`) calls MKL.  Here, blocks of scores fit a core's cache and pass
through two products and a softmax.  The log-sum-exp of a block's row follows from its largest score and its largest
probability: p = exp(s - lse), so lse = max s - log max p.  The backward multiplies each block five times
(arXiv 2307.08691, Alg. 2).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from longctx import onednn
from longctx.attention.partial import Partial, merge_all
from longctx.shapes import AnyShape, Float, Keys, LogSumExp, Queries, Tensor

_ROWS = 256  # query rows of a block, over the heads that share keys
_KEYS = 1024  # keys of a block
# PyTorch's op is as fast for smaller tiles.
_LEAST_ROWS, _LEAST_KEYS = 128, 256
_LEAST_CAUSAL = 512  # rows and keys of a triangle


@dataclass(frozen=True)
class _Block:
    """Some rows of the query heads that share a KV head: of sequence ``i``, ``rows`` of ``heads``, over ``kv_head``."""

    i: int
    rows: slice
    heads: slice
    kv_head: int

    def of(self, x: AnyShape) -> AnyShape:
        """Return this block of ``x`` [b s h ...], head by head: [g n ...], so that a mask is the same for each head."""
        return x[self.i, self.rows, self.heads].transpose(0, 1).contiguous()

    def write(self, x: AnyShape, block: AnyShape) -> None:
        """Write ``block`` [g * n ...] to this block of ``x`` [b s h ...]."""
        target = x[self.i, self.rows, self.heads].transpose(0, 1)
        target.copy_(block.view(target.shape))


def suits(q: Queries, k: Keys, causal: bool) -> bool:
    """Return True if this is faster than PyTorch's op for ``q`` over ``k``.

    It is not with several threads: they meet after each operation on a block, and each wait for a busy core adds up.
    """
    rows, keys = q.shape[1] * q.shape[2] // k.shape[2], k.shape[1]
    is_large = rows >= _LEAST_ROWS and keys >= (_LEAST_CAUSAL if causal else _LEAST_KEYS)
    return q.dtype == torch.float32 and is_large and torch.get_num_threads() == 1 and onednn.is_faster()


@torch.no_grad()
def forward(q: Queries, k: Keys, v: Keys, causal: bool) -> Partial:
    """Return the attention of ``q`` over a tile of keys, as `Kernel.forward` does; all are float32 on a CPU."""
    scaled = q / math.sqrt(q.shape[3])
    total = Partial(torch.empty_like(scaled), scaled.new_empty(q.shape[:-1]))
    for block in _blocks(q, k):
        keys, values = (x[block.i, :, block.kv_head].contiguous() for x in (k, v))
        part = _attend(block.of(scaled), keys, values, block.rows.start if causal else None)
        block.write(total.out, part.out)
        block.write(total.lse, part.lse)
    lost = total.lse == -math.inf  # rows without a finite score
    if lost.any():
        total.lse.masked_fill_(lost, math.nan)
        total.out.masked_fill_(lost.unsqueeze(-1), math.nan)
    return total


@torch.no_grad()
def backward(
    dout: Queries, q: Queries, k: Keys, v: Keys, out: Queries, lse: LogSumExp, causal: bool
) -> tuple[Queries, Keys, Keys]:
    """Return a tile's contribution to (dq, dk, dv), as `Kernel.backward` does; all are float32 on a CPU."""
    scale = 1 / math.sqrt(q.shape[3])
    scaled, delta = q * scale, (dout * out).sum(-1)
    dq, dk, dv = torch.empty_like(scaled), *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for block in _blocks(q, k):
        keys, values = (x[block.i, :, block.kv_head].contiguous() for x in (k, v))
        rows, d_rows, row_lse, row_delta = (block.of(x) for x in (scaled, dout, lse, delta))
        d_block = torch.zeros_like(rows)
        flat, d_flat = rows.flatten(0, 1), d_rows.flatten(0, 1)
        first = block.rows.start if causal else None
        for begin, end in _key_blocks(len(keys), first, rows.shape[1]):
            probabilities = _scores(rows, keys, begin, end, first).sub_(row_lse.unsqueeze(-1)).exp_().flatten(0, 1)
            d_scores = onednn.multiply(d_flat, values[begin:end].T)
            d_scores.sub_(row_delta.view(-1, 1)).mul_(probabilities)
            dv[block.i, begin:end, block.kv_head] += onednn.multiply(probabilities.T, d_flat)
            dk[block.i, begin:end, block.kv_head] += onednn.multiply(d_scores.T, flat)
            d_block += onednn.multiply(d_scores, keys[begin:end]).view(rows.shape)
        block.write(dq, d_block.mul_(scale))
    return dq, dk, dv


def _blocks(q: Queries, k: Keys) -> Iterator[_Block]:
    """Yield blocks of all rows of ``q``."""
    sharing = q.shape[2] // k.shape[2]
    step = max(1, _ROWS // sharing)
    for i, head, begin in product(range(q.shape[0]), range(k.shape[2]), range(0, q.shape[1], step)):
        yield _Block(i, slice(begin, begin + step), slice(head * sharing, (head + 1) * sharing), head)


def _attend(
    q: Float[Tensor, "g n d"], keys: Float[Tensor, "sk d"], values: Float[Tensor, "sk d"], first: int | None
) -> Partial:
    """Return the attention of the scaled queries ``q`` as a partial of g * n rows and one head.

    Row i of each of the g heads sees the keys up to ``first`` + i (None: all).  Rows without a finite score have a
    log-sum-exp of -inf.
    """
    parts = []
    for begin, end in _key_blocks(len(keys), first, q.shape[1]):
        scores = _scores(q, keys, begin, end, first).flatten(0, 1)
        largest, probabilities = scores.amax(1), torch.softmax(scores, 1)
        lse = (largest - probabilities.amax(1).log()).masked_fill_(largest == -math.inf, -math.inf)
        out = onednn.multiply(probabilities, values[begin:end])
        parts.append(Partial(out[None, :, None], lse[None, :, None]))
    return merge_all(parts) if len(parts) > 1 else parts[0]


def _key_blocks(keys: int, first: int | None, rows: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of blocks of the keys that at least one of ``rows`` rows sees; all rows see the first key.

    All keys that only some rows see are in the last block, together with a key that all see.
    """
    seen_by_all, end = (keys, keys) if first is None else (first + 1, first + rows)
    begins = range(0, seen_by_all, _KEYS)
    return zip(begins, [*begins[1:], end], strict=True)


def _scores(
    q: Float[Tensor, "g n d"], keys: Float[Tensor, "sk d"], begin: int, end: int, first: int | None
) -> Float[Tensor, "g n keys"]:
    """Return the scores of the scaled queries with keys ``begin`` to ``end``; -inf for row i after ``first`` + i."""
    scores = onednn.multiply(q, keys[begin:end].T)
    if first is not None and end > first + 1:
        later = scores[:, :, first + 1 - begin :]
        later.masked_fill_(torch.ones(later.shape[1:], dtype=torch.bool).triu(), -math.inf)
    return scores
