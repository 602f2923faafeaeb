"""Seconds of an all-reduce, and of a forward pass in which some blocks drop one of their two all-reduces."""


def all_reduce_seconds(size: float, ranks: int, hop_s: float, bytes_per_s: float) -> float:
    """Return the seconds of a ring all-reduce of ``size`` bytes per rank.

    The reduce-scatter and the all-gather take n - 1 hops each.  In every hop, each link carries size / n bytes at the
    same time: 2 (n - 1) (hop_s + size / n / bytes_per_s).
    """
    return 2 * (ranks - 1) * (hop_s + size / ranks / bytes_per_s)


def communication_saved(share: float) -> float:
    """Return the share of all all-reduces that is saved if a ``share`` of the blocks drops one of its two."""
    return share / 2


def spd_forward_seconds(seconds: float, layers: int, share: float, all_reduce_s: float) -> float:
    """Return the seconds of a forward pass in which a ``share`` of the ``layers`` drops one all-reduce.

    ``seconds`` is the time of the pass without drops, and ``all_reduce_s`` that of one all-reduce.  arXiv 2502.20727
    has T(p) = T_compute + L (2 - p) t_AR, so T(p) = T(0) - p L t_AR.
    """
    return seconds - share * layers * all_reduce_s
