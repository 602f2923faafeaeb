"""Constants of a machine with many GPUs, for plans: compute rates, and the links between GPUs.

The files of configs/machine/ list the constants with their sources; `longctx.cost.machine_file` reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, gcd, prod
from typing import Protocol, runtime_checkable

from longctx.cost.hardware import Hardware, Link, TrainRates, refuse_impossible
from longctx.cost.reduction import all_reduce_seconds, reduction_seconds

# Linux lets a process run for 1 to 3 ms before another one gets its core.
TURN_S = 2e-3


@runtime_checkable
class Degrees(Protocol):
    """Number of ranks along each axis of a mesh.  Ranks are numbered with tp fastest, then ulysses, ring, dp, pp.

    ``ep`` adds no ranks: it divides the ulysses x ring x dp ranks into groups of ``ep`` consecutive ranks, which divide
    the experts.
    """

    @property
    def tp(self) -> int: ...
    @property
    def ulysses(self) -> int: ...
    @property
    def ring(self) -> int: ...
    @property
    def dp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def ep(self) -> int: ...


@dataclass(frozen=True)
class Level:
    """Links within a block of ``ranks`` consecutive GPUs, such as a node.

    ``hop`` is a hop of a ring, ``exchange`` an all-to-all.

    ``name`` is shown to the user, for example "within a node".  ``step_s`` is the latency of one step of an all-reduce.
    It can be less than the latency of a hop, because all steps run in one kernel; None uses the latency of a hop.
    ``gather`` is an all-gather of few rows, as in decoding; None uses ``exchange``.  ``reduce`` is a step of an
    all-reduce; None uses ``step_s`` and the rate of ``exchange``.
    """

    name: str
    ranks: int
    hop: Link
    exchange: Link
    step_s: float | None = None
    gather: Link | None = None
    reduce: Link | None = None

    @property
    def gather_link(self) -> Link:
        """Return the link of an all-gather of few rows: ``gather``, or ``exchange`` if it is None."""
        return self.gather or self.exchange

    @property
    def reduce_step_s(self) -> float:
        """Return the latency of one step of an all-reduce: of ``reduce``, else ``step_s``, else of ``hop``."""
        if self.reduce:
            return self.reduce.latency_s
        return self.hop.latency_s if self.step_s is None else self.step_s

    @property
    def reduce_bytes_per_s(self) -> float:
        """Return the bytes/s that a rank's link carries in a large all-reduce within one block of this level."""
        if self.reduce:
            return self.reduce.bytes_per_s
        return self.exchange.bulk.bytes_per_s if self.exchange.bulk else self.exchange.bytes_per_s

    def later(self, seconds: float) -> "Level":
        """Return this level with ``seconds`` more latency for each message, except those of ``gather``, of decoding."""

        def link(one: Link) -> Link:
            return replace(one, latency_s=one.latency_s + seconds, bulk=link(one.bulk) if one.bulk else None)

        step_s = None if self.step_s is None else self.step_s + seconds
        reduce = link(self.reduce) if self.reduce else None
        return replace(self, hop=link(self.hop), exchange=link(self.exchange), step_s=step_s, reduce=reduce)


def strategies_differ(work: str, mesh: Degrees) -> bool:
    """Return True if the strategies of ``work`` ("decode", or any other kind) differ in their time on ``mesh``.

    Those of prefill and training are all the same on one ring rank, and those of decoding on one context rank.
    """
    return (mesh.ulysses * mesh.ring if work == "decode" else mesh.ring) > 1


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of predictions: for 80 % of the compared runs, the relative error was at most ``share`` (0.1: 10 %).

    It is valid for meshes like those of the runs, of at most ``ranks`` ranks and with 1 rank on each axis not in
    ``axes``, and for numbers of ``element_bytes`` bytes.  If strategies differ on a mesh (`strategies_differ`), it is
    valid for ``strategies`` only.
    """

    share: float
    axes: Sequence[str]
    ranks: int
    element_bytes: int = 2
    strategies: Sequence[str] = ()


@dataclass(frozen=True)
class Machine:
    """Constants of a machine.  Rates are those of one GPU, per second; times are in seconds.

    * ``levels``: links, the smallest block of GPUs first.  The last block is the whole machine.
    * ``gpus_per_node``: GPUs that share a node; each GPU has its own network link.
    * ``gemm_flops``: rate of GEMMs with many rows.  ``attention_flops``: rate of attention on large blocks.
    * ``memory_bytes_per_s``: rate of reading weights.  ``kv_bytes_per_s``: rate of reading keys and values.
    * ``block_s``: overhead of one block of attention.  ``step_s``: overhead of one step of the ring in prefill and
      training, which no computation hides.
    * ``layer_s``: overhead of a layer, such as kernel launches.  ``turn_s``: overhead of a turn of a session.
    * ``overlap``: the share of communication that computation hides, as in `Hardware`.
    * ``memory_bytes``: memory of a GPU; None sets no limit.
    * ``peak_flops``: the denominator of MFU.  ``ffn_element_bytes``: size of an FFN weight, 1 if measured with FP8.
    * ``partial_element_bytes``: see `longctx.cost.attention.Work`.
    * ``errors``: accuracy for each kind of work whose predictions were compared with runs.
    * ``backward``: time of the backward of a block of attention, divided by the forward's.
    * ``causal``: time of a causal tile relative to its visible pairs at the rate ``attention_flops``.
    * ``ranks_at_once``: ranks that compute at once, if ranks share the cores of a CPU; None sets no limit.
    * ``training``: rates of a training step outside attention; None derives them from FLOPs and bytes.
    """

    levels: Sequence[Level]
    gpus_per_node: int
    gemm_flops: float
    attention_flops: float
    memory_bytes_per_s: float
    kv_bytes_per_s: float
    overlap: float
    block_s: float
    step_s: float
    layer_s: float
    turn_s: float = 0.0
    memory_bytes: float | None = None
    peak_flops: float | None = None
    ffn_element_bytes: float | None = None
    partial_element_bytes: int = 4
    errors: Mapping[str, Accuracy] = field(default_factory=dict)
    ranks_at_once: int | None = None
    backward: float = 2.5
    causal: float = 1.0
    training: TrainRates | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels is empty: give at least one level of links, as the files of configs/machine do")
        rates = ("gpus_per_node", "gemm_flops", "attention_flops", "memory_bytes_per_s", "kv_bytes_per_s", "backward")
        limits = ("memory_bytes", "peak_flops", "ffn_element_bytes", "ranks_at_once")
        refuse_impossible(self, "", (*rates, "causal", *limits), ("block_s", "step_s", "layer_s", "turn_s"))
        sizes = [level.ranks for level in self.levels]
        if sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"levels have {sizes} ranks: give the smallest block of GPUs first, and each size once")
        for level in self.levels:
            refuse_impossible(level, f"{level.name}: ", (), ("step_s",))
        if self.partial_element_bytes < 1:
            raise ValueError(f"partial_element_bytes={self.partial_element_bytes}: use 1 or more")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap={self.overlap} is not a share; use a number from 0 to 1")

    @property
    def gpus(self) -> int:
        """Return the largest number of GPUs whose links the machine describes: those of the last level."""
        return self.levels[-1].ranks

    def shared_by(self, mesh: Degrees, *, decodes: bool = False) -> "Machine":
        """Return the constants of one rank while all ranks of ``mesh`` run on this machine.

        Levels beyond the smallest block that holds all ranks are left out.  If the ranks are more than `ranks_at_once`,
        they take turns on the cores.  Rates of a rank's own work then fall, and overheads grow, by the number of turns:
        ranks / `ranks_at_once`, rounded up, because ranks wait for each other in every layer.  Computation hides no
        communication, and a message takes `TURN_S` longer, because its receiver waits for a core.  With ``decodes`` it
        does not: between two messages of decoding, ranks compute less than a turn.

        ``mesh`` may have at most `gpus` ranks.
        """
        ranks = mesh.tp * mesh.ulysses * mesh.ring * mesh.dp * mesh.pp
        assert ranks <= self.gpus, f"{ranks} ranks on a machine of {self.gpus} GPUs"
        smaller = [level for level in self.levels if level.ranks < ranks]
        one = replace(self, levels=self.levels[: len(smaller) + 1])
        turns = ceil(ranks / self.ranks_at_once) if self.ranks_at_once else 1
        if turns <= 1:
            return one
        rates = ("gemm_flops", "attention_flops", "memory_bytes_per_s", "kv_bytes_per_s")
        times = ("block_s", "step_s", "layer_s", "turn_s")
        scaled = {name: getattr(self, name) / turns for name in rates}
        scaled |= {name: getattr(self, name) * turns for name in times}
        if self.training:
            seconds = {name: getattr(self.training, name) * turns for name in ("gradient_s", "update_s", "loss_s")}
            one = replace(one, training=replace(self.training, **seconds))
        levels = one.levels if decodes else [level.later(TURN_S) for level in one.levels]
        return replace(one, **scaled, levels=levels, overlap=0.0, ranks_at_once=None)

    def with_links(self, latency_s: float, bytes_per_s: float) -> "Machine":
        """Return the machine with one kind of link between all ranks: the first level's, made slower.

        A message takes ``latency_s`` more than on a hop of the first level, and travels at most ``bytes_per_s`` fast.
        """
        hop = self.levels[0].hop
        link = Link(hop.latency_s + latency_s, min(hop.bytes_per_s, bytes_per_s))
        return replace(self, levels=[Level("between hosts", 2**31, link, link)])

    def level(self, ranks: int, stride: int) -> Level:
        """Return the links of a group of ``ranks`` ranks whose numbers are ``stride`` apart.

        Groups begin at multiples of ranks x ``stride``, and blocks at multiples of their size.  The links are those of
        the smallest level none of whose blocks divides a group, or of the last level, whose block is the whole machine.
        For example, with nodes of 8 GPUs, the group of ranks 6, 7 and 8 uses the links between nodes, and so do all
        other groups of 3.
        """
        span = ranks * stride if ranks > 1 else 1
        return next((level for level in self.levels if level.ranks % span == 0), self.levels[-1])

    def expected_error(self, work: str, mesh: Degrees, strategy: str, element_bytes: int) -> float | None:
        """Return the relative error that 80 % of predictions for ``work``, a key of ``errors``, are within.

        Returns None if no runs of this kind were compared, or if ``mesh``, ``strategy`` or the bytes of a number,
        ``element_bytes``, are not like those of the compared runs (`Accuracy`).
        """
        accuracy = self.errors.get(work)
        ranks = {axis: getattr(mesh, axis) for axis in ("tp", "ulysses", "ring", "dp", "pp", "ep")}
        if accuracy is None or accuracy.element_bytes != element_bytes:
            return None
        if prod(ranks.values()) / mesh.ep > accuracy.ranks:
            return None
        if strategies_differ(work, mesh) and strategy not in accuracy.strategies:
            return None
        return accuracy.share if all(n == 1 or axis in accuracy.axes for axis, n in ranks.items()) else None

    def kernel(self, ring: int, stride: int, *, decodes: bool = False) -> Hardware:
        """Return the constants of a ring of ``ring`` ranks with numbers ``stride`` apart, for `longctx.cost.attention`.

        With ``decodes``, no communication is hidden, because in decoding a block is as short as the latency of a
        message.
        """
        level = self.level(ring, stride)
        return Hardware(
            self.attention_flops,
            self.kv_bytes_per_s,
            self.block_s,
            level.hop,
            level.exchange,
            0.0 if decodes else self.overlap,
            backward=self.backward,
            causal=self.causal,
        )

    def all_reduce_seconds(self, size: float, ranks: int, stride: int = 1) -> float:
        """Return the seconds of an all-reduce of ``size`` bytes per rank over ``ranks`` that are ``stride`` apart.

        With stride 1, the ranks of a node use all their network links together, up to the rate of the links within the
        node; the node with the fewest ranks of the group counts.  Other groups use one link, as the tp=2 rows of arXiv
        2405.07719, Table 6 show.  The latency is 2 steps for each other rank of the node, and 2 for each other node.
        """
        if ranks == 1 or not size:
            return 0.0
        outer, node, span = self.level(ranks, stride), self.gpus_per_node, ranks * stride
        fewest = gcd(span, node)  # consecutive GPUs of a group in one node, if the group does not begin with the node
        nodes = 1 if outer.ranks <= node else min(ranks, -(-(node - fewest + span) // node))
        if nodes == 1:
            return all_reduce_seconds(size, ranks, outer.reduce_step_s, outer.reduce_bytes_per_s)
        # 1. Within a node.
        inner = next((level for level in reversed(self.levels) if level.ranks <= node), self.levels[0])
        local = max(1, min(ranks, node // stride))
        rate = inner.reduce_bytes_per_s if local > 1 else float("inf")
        # 2. Between nodes.
        rate = min(rate, (fewest if stride == 1 else 1) * outer.hop.bytes_per_s)
        latency = 2 * (local - 1) * inner.reduce_step_s + 2 * (nodes - 1) * outer.reduce_step_s
        return latency + all_reduce_seconds(size, ranks, 0.0, rate)

    def rounded_reduction_seconds(self, rows: float, width: int, ranks: int, dtype: str) -> float:
        """Return the seconds of an all-reduce of ``rows`` x ``width`` values with messages of ``dtype``.

        The ranks are ``ranks`` consecutive ones.  Rounding itself takes no time in this model.
        """
        level = self.level(ranks, 1)
        return reduction_seconds(int(rows), width, ranks, level.reduce_step_s, level.reduce_bytes_per_s, dtype)
