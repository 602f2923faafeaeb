"""Seconds of an all-reduce, and of a forward pass of which some blocks drop one of their two."""


def all_reduce_seconds(size: float, ranks: int, hop_s: float, bytes_per_s: float) -> float:
    """Of ``size`` bytes on every rank, around a ring.

    Scatter and gather take n - 1 hops each, and every hop carries an n-th of the bytes over every link at once:
    2 (n - 1) (hop_s + size / n / bytes_per_s).
    """
    return 2 * (ranks - 1) * (hop_s + size / ranks / bytes_per_s)


def communication_saved(share: float) -> float:
    """Of all reductions of blocks, the part that is left out where ``share`` of the blocks drop one of two."""
    return share / 2


def with_dropped(seconds: float, layers: int, share: float, all_reduce_s: float) -> float:
    """A pass of ``seconds`` with nothing dropped, where ``share`` of its ``layers`` drop a reduction of that length.

    arXiv 2502.20727: T(p) = T_compute + L (2 - p) t_AR, so T(0) - p L t_AR.
    """
    return seconds - share * layers * all_reduce_s
