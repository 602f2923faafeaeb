"""Flash attention of one tile in Triton: sums and results are float32 for every input dtype.

The algorithm is FlashAttention-2's (arXiv 2307.08691).  Tensors are contiguous: queries [b sq hq d], keys [b sk hk d],
log-sum-exps [b sq hq]; each ``hq // hk`` consecutive query heads share a KV head.  A causal tile is square.  A program
computes one block of rows of one head: ``ROWS`` query rows, or ``KEYS`` key rows in `backward_kv`.

`triton_flash` imports this module on the first call, since it needs the package triton.
"""

from typing import no_type_check

import triton
import triton.language as tl

IN_INTERPRETER = bool(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x * LOG2E): GPUs have an instruction for exp2
LN2 = tl.constexpr(0.6931471805599453)

# Lengths differ from tile to tile: compiled code must not depend on them.
_lengths_vary = triton.jit(do_not_specialize=["sq", "sk"])


@triton.jit
@no_type_check  # run-time checks of types would hide the source, which Triton compiles
def _dot(a, b, INTERPRETED: tl.constexpr):
    """Return the product in float32.  The interpreter multiplies the bits of bfloat16 as integers, hence the cast."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
@no_type_check
def _round_to(x, like, INTERPRETED: tl.constexpr):
    """Return ``x`` rounded to the nearest number of the dtype of ``like``.

    The interpreter would truncate to bfloat16.  There, the result is float32 with the bits that bfloat16 has.
    """
    if INTERPRETED and like.dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        x = x.to(like.dtype)
    return x


@triton.jit
@no_type_check
def _address(x, batch, length, heads, head, first, D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Return pointers [SIZE WIDTH] to one head of ``x`` [b length heads D], from row ``first`` on, and their mask.

    The mask is true inside ``x``.
    """
    rows, channels = tl.arange(0, SIZE)[:, None], tl.arange(0, WIDTH)[None, :]
    # 64 bits: a long sequence has more than 2**31 elements.
    start = x + ((tl.cast(batch, tl.int64) * length + first) * heads + head) * D
    return start + rows * (heads * D) + channels, (rows < length - first) & (channels < D)


@triton.jit
@no_type_check
def _load(x, batch, length, heads, head, first, D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the rows that `_address` points to, 0 outside ``x``."""
    pointers, inside = _address(x, batch, length, heads, head, first, D, SIZE, WIDTH)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _store(x, values, batch, length, heads, head, first, D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    pointers, inside = _address(x, batch, length, heads, head, first, D, SIZE, WIDTH)
    tl.store(pointers, values, mask=inside)


@triton.jit
@no_type_check
def _scores(q, k, row, key, sk, scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the scores, [ROWS KEYS], of query rows from ``row`` on and keys from ``key`` on, in base 2.

    They are q.k times ``scale`` and log2(e); masked scores are -inf.
    """
    scores = _dot(q, tl.trans(k), INTERPRETED) * (scale * LOG2E)
    if MASKED:
        rows, keys = row + tl.arange(0, q.shape[0])[:, None], key + tl.arange(0, k.shape[0])[None, :]
        seen = keys < sk
        if CAUSAL:
            seen = seen & (keys <= rows)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
@no_type_check
def _attend(state, q, K, V, batch, kv, row, key, sk, hk, scale,
            MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
            INTERPRETED: tl.constexpr):  # fmt: skip
    """Return ``state`` after one more block of keys, whose first key is ``key``.

    ``state`` has the weighted sum of values, the largest score, and the sum of weights of each query row.
    """
    values, largest, total = state
    k = _load(K, batch, sk, hk, kv, key, D, KEYS, WIDTH)
    v = _load(V, batch, sk, hk, kv, key, D, KEYS, WIDTH)
    scores = _scores(q, k, row, key, sk, scale, MASKED, CAUSAL, INTERPRETED)
    new = tl.maximum(largest, tl.max(scores, 1, keep_dims=True))
    weights, remaining = tl.exp2(scores - new), tl.exp2(largest - new)
    total = total * remaining + tl.sum(weights, 1, keep_dims=True)
    values = values * remaining + _dot(_round_to(weights, v, INTERPRETED), v, INTERPRETED)
    return values, new, total


@_lengths_vary
@no_type_check
def forward(Q, K, V, OUT, LSE, sq, sk, hq, hk, scale,
            CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
            INTERPRETED: tl.constexpr):  # fmt: skip
    """Write out and log-sum-exp of one block of query rows."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # last rows first: they take longest if causal
    batch, head = tl.program_id(1) // hq, tl.program_id(1) % hq
    kv = head // (hq // hk)
    q = _load(Q, batch, sq, hq, head, row, D, ROWS, WIDTH)
    largest, total = tl.full([ROWS, 1], float("-inf"), tl.float32), tl.zeros([ROWS, 1], tl.float32)
    state = tl.zeros([ROWS, WIDTH], tl.float32), largest, total
    # Blocks of keys that all rows see whole; then blocks that the diagonal or the last key cuts.
    whole = (row if CAUSAL else sk) // KEYS * KEYS
    for key in range(0, whole, KEYS):
        state = _attend(state, q, K, V, batch, kv, row, key, sk, hk, scale, False, CAUSAL, D, WIDTH, KEYS, INTERPRETED)
    for key in range(whole, tl.minimum(sk, row + ROWS) if CAUSAL else sk, KEYS):
        state = _attend(state, q, K, V, batch, kv, row, key, sk, hk, scale, True, CAUSAL, D, WIDTH, KEYS, INTERPRETED)
    values, largest, total = state
    _store(OUT, values / total, batch, sq, hq, head, row, D, ROWS, WIDTH)
    _store(LSE, largest * LN2 + tl.log(total), batch, sq, hq, head, row, 1, ROWS, 1)


@triton.jit
@no_type_check
def _dscores(scores, lse, a, b, delta, INTERPRETED: tl.constexpr):
    """Return the probabilities of ``scores``, the rows of ``a`` against the rows of ``b``, and the scores' gradients.

    ``scores`` is in base 2 (`_scores`); the gradients are those of the scaled scores before the factor log2(e).
    ``a`` is dout and ``b`` is v.  If ``scores``, ``lse`` and ``delta`` are transposed, ``a`` is v and ``b`` is dout.
    """
    probability = tl.exp2(scores - lse * LOG2E)
    return probability, probability * (_dot(a, tl.trans(b), INTERPRETED) - delta)


@triton.jit
@no_type_check
def _add_dq(dq, q, dout, lse, delta, K, V, batch, kv, row, key, sk, hk, scale,
            MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
            INTERPRETED: tl.constexpr):  # fmt: skip
    """Return ``dq`` plus the contribution of one block of keys, whose first key is ``key``.

    ``dq`` is without the factor ``scale``: `backward_q` multiplies by it at the end.
    """
    k = _load(K, batch, sk, hk, kv, key, D, KEYS, WIDTH)
    v = _load(V, batch, sk, hk, kv, key, D, KEYS, WIDTH)
    scores = _scores(q, k, row, key, sk, scale, MASKED, CAUSAL, INTERPRETED)
    _, dscores = _dscores(scores, lse, dout, v, delta, INTERPRETED)
    return dq + _dot(_round_to(dscores, k, INTERPRETED), k, INTERPRETED)


@_lengths_vary
@no_type_check
def backward_q(DOUT, Q, K, V, LSE, DELTA, DQ, sq, sk, hq, hk, scale,
               CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
               INTERPRETED: tl.constexpr):  # fmt: skip
    """Write dq of one block of query rows; DELTA [b sq hq] is the sum of dout * out over d."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch, head = tl.program_id(1) // hq, tl.program_id(1) % hq
    kv = head // (hq // hk)
    q = _load(Q, batch, sq, hq, head, row, D, ROWS, WIDTH)
    dout = _load(DOUT, batch, sq, hq, head, row, D, ROWS, WIDTH)
    lse = _load(LSE, batch, sq, hq, head, row, 1, ROWS, 1)
    delta = _load(DELTA, batch, sq, hq, head, row, 1, ROWS, 1)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    whole = (row if CAUSAL else sk) // KEYS * KEYS
    for key in range(0, whole, KEYS):
        dq = _add_dq(dq, q, dout, lse, delta, K, V, batch, kv, row, key, sk, hk, scale,
                     False, CAUSAL, D, WIDTH, KEYS, INTERPRETED)  # fmt: skip
    for key in range(whole, tl.minimum(sk, row + ROWS) if CAUSAL else sk, KEYS):
        dq = _add_dq(dq, q, dout, lse, delta, K, V, batch, kv, row, key, sk, hk, scale,
                     True, CAUSAL, D, WIDTH, KEYS, INTERPRETED)  # fmt: skip
    _store(DQ, dq * scale, batch, sq, hq, head, row, D, ROWS, WIDTH)


@triton.jit
@no_type_check
def _add_dkv(sums, k, v, DOUT, Q, LSE, DELTA, batch, head, row, key, sq, hq, scale, MASKED: tl.constexpr,
             D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Return ``sums``, (dk, dv), plus the contribution of one block of query rows, whose first row is ``row``.

    dk is without the factor ``scale``: `backward_kv` multiplies by it at the end.
    """
    dk, dv = sums
    q = _load(Q, batch, sq, hq, head, row, D, ROWS, WIDTH)
    dout = _load(DOUT, batch, sq, hq, head, row, D, ROWS, WIDTH)
    lse = _load(LSE, batch, sq, hq, head, row, 1, ROWS, 1)
    delta = _load(DELTA, batch, sq, hq, head, row, 1, ROWS, 1)
    # Keys are rows here: the second product of each pair then reads its first operand from registers.
    # Query rows after the last one are 0 in q, dout and delta: they add 0.
    scores = _dot(k, tl.trans(q), INTERPRETED) * (scale * LOG2E)
    if MASKED:
        keys, rows = key + tl.arange(0, k.shape[0])[:, None], row + tl.arange(0, ROWS)[None, :]
        scores = tl.where(keys <= rows, scores, float("-inf"))
    probability, dscores = _dscores(scores, tl.trans(lse), v, dout, tl.trans(delta), INTERPRETED)
    dv += _dot(_round_to(probability, dout, INTERPRETED), dout, INTERPRETED)
    dk += _dot(_round_to(dscores, q, INTERPRETED), q, INTERPRETED)
    return dk, dv


@_lengths_vary
@no_type_check
def backward_kv(DOUT, Q, K, V, LSE, DELTA, DK, DV, sq, sk, hq, hk, scale,
                CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                INTERPRETED: tl.constexpr):  # fmt: skip
    """Write dk and dv of one block of key rows: the sum over the query heads that share them, in a fixed order."""
    key = tl.program_id(0) * KEYS
    batch, kv = tl.program_id(1) // hk, tl.program_id(1) % hk
    k = _load(K, batch, sk, hk, kv, key, D, KEYS, WIDTH)
    v = _load(V, batch, sk, hk, kv, key, D, KEYS, WIDTH)
    sums = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    # Blocks of rows that the diagonal cuts; then blocks that see all of these keys.
    first = key // ROWS * ROWS if CAUSAL else 0
    whole = tl.minimum(tl.cdiv(key + KEYS, ROWS) * ROWS, sq) if CAUSAL else 0
    for head in range(kv * (hq // hk), (kv + 1) * (hq // hk)):
        for row in range(first, whole, ROWS):
            sums = _add_dkv(sums, k, v, DOUT, Q, LSE, DELTA, batch, head, row, key, sq, hq, scale,
                            True, D, WIDTH, ROWS, INTERPRETED)  # fmt: skip
        for row in range(whole, sq, ROWS):
            sums = _add_dkv(sums, k, v, DOUT, Q, LSE, DELTA, batch, head, row, key, sq, hq, scale,
                            False, D, WIDTH, ROWS, INTERPRETED)  # fmt: skip
    dk, dv = sums
    _store(DK, dk * scale, batch, sk, hk, kv, key, D, KEYS, WIDTH)
    _store(DV, dv, batch, sk, hk, kv, key, D, KEYS, WIDTH)


@triton.jit(do_not_specialize=["sq", "length", "first"])
@no_type_check
def merge(OUT, LSE, PART_OUT, PART_LSE, sq, length, first, hq,
          D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Merge one block of rows of a partial, [b sq hq d], into the rows from ``first`` on of OUT [b length hq d].

    A row with a log-sum-exp of -inf has no weight, even if its out is NaN.  A log-sum-exp of NaN stays NaN, whether or
    not ``tl.maximum`` drops it: on GPUs it does, in the interpreter it does not.
    """
    row = tl.program_id(0) * ROWS
    batch, head = tl.program_id(1) // hq, tl.program_id(1) % hq
    total_lse, _ = _address(LSE, batch, length, hq, head, first + row, 1, ROWS, 1)
    part_lse, in_part = _address(PART_LSE, batch, sq, hq, head, row, 1, ROWS, 1)
    a = tl.load(total_lse, mask=in_part, other=float("-inf"))
    b = tl.load(part_lse, mask=in_part, other=float("-inf"))
    largest = tl.maximum(a, b)
    unseen = (a == float("-inf")) & (b == float("-inf"))
    base = tl.where(unseen, 0.0, largest)  # -inf - -inf would be NaN
    weight_a, weight_b = tl.exp2((a - base) * LOG2E), tl.exp2((b - base) * LOG2E)
    weights = tl.where(unseen, 1.0, weight_a + weight_b)
    total_out, _ = _address(OUT, batch, length, hq, head, first + row, D, ROWS, WIDTH)
    part_out, inside = _address(PART_OUT, batch, sq, hq, head, row, D, ROWS, WIDTH)
    out_a = tl.load(total_out, mask=inside, other=0.0)
    out_b = tl.where(b == float("-inf"), 0.0, tl.load(part_out, mask=inside, other=0.0))
    tl.store(total_out, (out_a * weight_a + out_b * weight_b) / weights, mask=inside)
    tl.store(total_lse, largest + tl.log(weights), mask=in_part)
