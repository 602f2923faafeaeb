"""A sum over ranks whose messages are bfloat16, int8 or int6 (`two_step_sum`), for tensor-parallel reductions.

Two steps, for N ranks.  The last dim of x is cut into groups, and each rank owns about 1/N of the groups:

    1. every rank encodes its x and sends each owner that owner's groups                 (all-to-all)
    2. the owner decodes N messages, adds them in float32 in rank order, encodes the sum
       and sends it to every rank                                                         (all-gather)

All ranks decode the same bytes, so they get the same bits.  A row's sum does not depend on the rows beside it.

int8 and int6 encode a group as one scale s and a whole number q for each value, x = s q, with |q| <= L: 127 or 31.
s is the group's largest magnitude over L, in bfloat16.  int6 packs four values in three bytes.  bfloat16 rounds each
value and has no groups.

Error bound.  Let a_r be the largest magnitude in rank r's group.  For float32 x, each value of the sum is within

    (1 + 1/64) sum_r a_r / L + N 2^-126

of the exact one.  Each step rounds by at most half a scale: a_r / 2L in step 1, and (sum_r a_r) / 2L in step 2.
1/64 covers the rounding of scales and of float32 sums.  N 2^-126 covers scales below the smallest normal number.
For bfloat16, a_r is the magnitude of the value itself, and L = 128.
"""

import torch

from longctx.parallel.comm import Comm, doing
from longctx.shapes import Float, Tensor, UInt8

REDUCTION = "reduction"  # purpose under which the bytes are counted
LEVELS = {"bfloat16": 128, "int8": 127, "int6": 31}  # L of the module docstring
_SMALLEST_SCALE = 2.0**-126  # the smallest normal number of bfloat16
_SMALL = 65_536  # bytes of a message up to which its latency matters more than its length


def two_step_sum(comm: Comm, x: Float[Tensor, "... n"], dtype: str, group: int = 64) -> Float[Tensor, "... n"]:
    """Return the sum of every rank's ``x`` in the dtype of ``x``, with messages of ``dtype``: a key of `LEVELS`.

    ``group`` values of the last dim share a scale; ``group`` must be a multiple of 4, and bfloat16 ignores it.  If it
    does not divide n, the last group of a row is padded with zeros.  A NaN or an infinity makes the group's sum NaN or
    infinite.  One rank alone gets ``x`` itself, not rounded.
    """
    if comm.size == 1:
        return x
    with comm.traffic.counted_as(REDUCTION), doing("summing partial outputs"):
        return _two_step_sum(comm, x, dtype, group)


def _two_step_sum(comm: Comm, x: Tensor, dtype: str, group: int) -> Tensor:
    size = 1 if dtype == "bfloat16" else group
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    groups = padded.reshape(-1, size)
    # 1. Send each owner its groups, and add in rank order.
    owned = owned_groups(len(groups), comm.size)
    message = encode(groups, dtype)
    small = message.numel() <= _SMALL
    shape = (owned[comm.rank], message.shape[1])
    parts = comm.all_to_all(message.split(owned), [shape] * comm.size, small=small)
    total = torch.zeros(owned[comm.rank], size, device=x.device)
    for part in parts:
        total += decode(part, dtype, size)
    # 2. Send the encoded sums to every rank.
    sums = comm.all_gather(encode(total, dtype), [(count, message.shape[1]) for count in owned])
    return decode(torch.cat(sums), dtype, size).view(padded.shape)[..., : x.shape[-1]].to(x.dtype)


def owned_groups(groups: int, ranks: int) -> list[int]:
    """Return how many of the ``groups`` each rank adds up: near-equal counts, in rank order."""
    return [groups * (rank + 1) // ranks - groups * rank // ranks for rank in range(ranks)]


def encode(groups: Float[Tensor, "g n"], dtype: str) -> UInt8[Tensor, "g bytes"]:
    """Encode each of ``groups`` in ``dtype``; return the bytes of each group.

    In int8 and int6, two bytes of scale come before the values.
    """
    if dtype == "bfloat16":
        return groups.to(torch.bfloat16).view(torch.uint8)
    levels, values = LEVELS[dtype], groups.float()
    scale = (values.abs().amax(1, keepdim=True) / levels).clamp_min(_SMALLEST_SCALE).to(torch.bfloat16)
    rounded = (values / scale.float()).round_().clamp_(-levels, levels).to(torch.int8)
    packed = rounded.view(torch.uint8) if dtype == "int8" else _pack(rounded)
    return torch.cat([scale.view(torch.uint8), packed], 1)


def decode(message: UInt8[Tensor, "g bytes"], dtype: str, size: int) -> Float[Tensor, "g n"]:
    """Return the float32 values of the groups that `encode` encoded in ``dtype``; each group has ``size`` values."""
    if dtype == "bfloat16":
        return message.contiguous().view(torch.bfloat16).float()
    scale, packed = message.split([2, message.shape[1] - 2], 1)
    values = packed.contiguous().view(torch.int8) if dtype == "int8" else _unpack(packed, size)
    scales = scale.flatten().clone().view(torch.bfloat16)  # a copy, since a slice may begin at an odd byte
    decoded: Tensor = values.float() * scales.float().unsqueeze(1)
    return decoded


def _pack(values: Tensor) -> UInt8[Tensor, "g bytes"]:
    """Pack four whole numbers a, b, c, d from -31 to 31, of 6 bits each, in three bytes.

    The bytes hold a, b and c, each with two bits of d.
    """
    a, b, c, d = (values + 32).view(torch.uint8).unflatten(1, (-1, 4)).unbind(-1)
    return torch.stack([a | (d & 3) << 6, b | (d >> 2 & 3) << 6, c | d >> 4 << 6], -1).flatten(1)


def _unpack(packed: UInt8[Tensor, "g bytes"], size: int) -> Tensor:
    """Return the ``size`` whole numbers of each group; inverse of `_pack`."""
    triples = packed.unflatten(1, (-1, 3))
    abc, (x, y, z) = triples & 63, (triples >> 6).unbind(-1)
    d = x | y << 2 | z << 4
    return torch.cat([abc, d.unsqueeze(-1)], -1).view(torch.int8).reshape(-1, size) - 32
