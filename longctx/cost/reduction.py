"""Bytes and seconds of reductions over tensor-parallel ranks, in models in which some blocks drop one."""

_SCALE_BYTES = 2  # a bfloat16
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int6": 0.75}


def message_bytes(rows: int, width: int, dtype: str, group: int = 64) -> int:
    """Return the bytes of a message of ``rows`` rows of ``width`` values, in a reduction with messages of ``dtype``.

    In int8 and int6, ``group`` values share a scale of two bytes, and the last group of a row is padded.
    """
    if dtype not in ("int8", "int6"):
        return int(rows * width * _BYTES[dtype])
    return rows * -(-width // group) * int(group * _BYTES[dtype] + _SCALE_BYTES)


def two_step_bytes(rows: int, width: int, rank: int, ranks: int, dtype: str, group: int = 64) -> int:
    """Return the bytes that ``rank`` sends in one sum over ``ranks`` ranks by ``longctx.parallel.quantised``.

    The sum is over ``rows`` rows of ``width`` values, cut into G groups of ``group`` values.  The rank adds up its
    share of g groups.  It sends the other G - g groups, and then its g sums to each of the other ranks.
    """
    unit = message_bytes(1, 1, dtype, group)
    groups = message_bytes(rows, width, dtype, group) // unit
    own = groups * (rank + 1) // ranks - groups * rank // ranks
    return (groups - own + (ranks - 1) * own) * unit


def reduction_seconds(
    rows: int, width: int, ranks: int, hop_s: float, bytes_per_s: float, dtype: str = "float32", group: int = 64
) -> float:
    """Return the seconds of one reduction of ``rows`` x ``width`` values with messages of ``dtype``.

    float32 is a ring all-reduce (`all_reduce_seconds`).  Other dtypes take two steps over n = ``ranks`` ranks.  In each
    step, a rank sends n - 1 messages of 1/n of the bytes through its link, one after the other.  Their latencies
    overlap, so the latency ``hop_s`` counts once in a step: 2 (hop_s + (n - 1) size / n / bytes_per_s).  ``group`` is
    that of `message_bytes`.
    """
    size = message_bytes(rows, width, dtype, group)
    if dtype == "float32":
        return all_reduce_seconds(size, ranks, hop_s, bytes_per_s)
    return 2 * (hop_s + (ranks - 1) * size / ranks / bytes_per_s)


def all_reduce_seconds(size: float, ranks: int, hop_s: float, bytes_per_s: float) -> float:
    """Return the seconds of a ring all-reduce of ``size`` bytes per rank over n = ``ranks`` ranks.

    The reduce-scatter and the all-gather take n - 1 hops each, with a latency of ``hop_s``.  In every hop, each link
    carries size / n bytes at the same time: 2 (n - 1) (hop_s + size / n / bytes_per_s).
    """
    return 2 * (ranks - 1) * (hop_s + size / ranks / bytes_per_s)


def spd_reducing_seconds(
    layers: int, share: float, attention_s: float, mlp_s: float, both_s: float | None = None
) -> float:
    """Return the seconds of all reductions of a forward in which a ``share`` of the ``layers`` drops its first one.

    ``attention_s`` and ``mlp_s`` are the seconds of one reduction after attention and after the MLP.  If the two are
    equal, this is L (2 - p) t_AR of arXiv 2502.20727: T(p) = T_compute + L (2 - p) t_AR.

    In models that normalise the outputs of attention and MLP, a block that drops a reduction sums both outputs in one,
    which takes ``both_s`` (None: ``mlp_s``).
    """
    one_s = mlp_s if both_s is None else both_s
    return layers * ((1 - share) * (attention_s + mlp_s) + share * one_s)
