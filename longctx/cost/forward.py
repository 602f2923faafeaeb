"""Seconds and bytes of a model's pass over new tokens: the prefill of a prompt or a turn, and a decoded token.

Per layer, a rank with T / (U R) rows of the new tokens computes

    products   GEMMs, 2 W / tp FLOPs per row                    W: weights of the layer's projections
    weights    e W / tp bytes, read once                 e: bytes per weight; with few rows this time dominates
    attention  `longctx.cost.attention`, with the heads of one rank
    reductions (2 - p) all-reduces of rows x hidden      p: share of blocks that drop one (arXiv 2502.20727)

and once, for its shard of the vocabulary, an all-reduce of the embedding, which no setting rounds.

The times are added, because only the ring's communication is hidden by computation.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from longctx.cost.attention import COSTS, Work, block_seconds, ulysses_bytes, ulysses_seconds
from longctx.cost.decode import (
    SHARED_ROWS,
    DecodeHardware,
    DecodeWork,
    exchange_seconds,
    exchanges,
    product_seconds,
)
from longctx.cost.machine import Degrees, Machine
from longctx.cost.reduction import message_bytes
from longctx.cost.training import Decoder
from longctx.cost.window import most_keys


@dataclass(frozen=True)
class Numbers:
    """Sizes of numbers, in bytes, and the share of blocks that drop a reduction.

    ``element`` is the size of an activation, a cached key and a weight; ``ffn`` is the size of an FFN weight.
    ``reduce`` is the dtype of the messages of tensor-parallel all-reduces; "float32" is the exact one, with ``element``
    bytes.
    """

    element: int = 2
    ffn: float = 2
    spd_share: float = 0.0
    reduce: str = "float32"


@dataclass(frozen=True)
class PassCost:
    """Cost of a pass or a step on one rank: seconds by part, and bytes sent by axis of the mesh.

    `prefill_cost`, `decode_cost` and `longctx.cost.step.step_cost` list their parts and axes.
    """

    parts: Mapping[str, float]
    bytes: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Return the sum of the seconds of all parts."""
        return sum(self.parts.values())


def layer_weights(shape: Decoder) -> tuple[int, float]:
    """Return how many weights multiply a token in a layer: in attention's projections, and in feed-forward networks.

    For experts, these are the chosen experts and the router.  The second number is the mean over all layers.
    """
    heads = 2 * shape.heads + 2 * shape.kv_heads
    return shape.hidden * heads * shape.head_dim, shape.ffn_weights_per_token / shape.layers


def forward_flops(shape: Decoder, new: Sequence[int], cached: Sequence[int]) -> float:
    """Return the FLOPs, on all ranks, of a pass over ``new`` tokens of each sequence after its ``cached`` ones.

    These are 2 per weight of the layers and token, and those of all visible scores; the output layer is left out.
    """
    scores = sum(work.flops * layers for work, layers in ring_works(shape, _ALONE, new, cached, Numbers()))
    return 2 * sum(layer_weights(shape)) * shape.layers * sum(new) + scores


@dataclass(frozen=True)
class _OneRank:
    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1


_ALONE = _OneRank()


def ring_works(
    shape: Decoder,
    mesh: Degrees,
    new: Sequence[int],
    cached: Sequence[int],
    numbers: Numbers,
    partial_element_bytes: int = 4,
) -> Iterator[tuple[Work, int]]:
    """Yield, for each window of the model, one rank's attention in a layer, and the number of layers with this window.

    Tensor parallelism and Ulysses divide the heads.  With more ranks than KV heads, each KV head is replicated.
    """
    degree = mesh.tp * mesh.ulysses
    heads, kv_heads = shape.heads / degree, max(1, shape.kv_heads / degree)
    for window, layers in Counter(shape.windows).items():
        yield (
            Work(
                new, cached, mesh.ring, heads, kv_heads, shape.head_dim, numbers.element, window, partial_element_bytes
            ),
            layers,
        )


def prefill_cost(
    shape: Decoder,
    mesh: Degrees,
    machine: Machine,
    new: Sequence[int],
    cached: Sequence[int],
    strategy: str,
    numbers: Numbers,
    *,
    in_session: bool = False,
) -> PassCost:
    """Return the cost of prefilling ``new`` tokens of each sequence after its ``cached`` ones, by ``strategy``.

    ``in_session`` adds the machine's ``turn_s``, the time for keeping keys and values for later turns.

    The parts are "products", "weights", "attention", "ring", "ulysses", "tp" and "overhead".  The axes are "tp",
    "ulysses" and "ring".
    """
    stride, machine = mesh.tp * mesh.ulysses, machine.shared_by(mesh)
    hardware = machine.kernel(mesh.ring, stride)
    exchange = machine.level(mesh.ulysses, mesh.tp).exchange
    attention = ring = ulysses = ring_bytes = exchange_bytes = 0.0
    for work, layers in ring_works(shape, mesh, new, cached, numbers, machine.partial_element_bytes):
        cost = COSTS[strategy](work, hardware)
        blocks = mesh.ring * block_seconds(work, hardware)
        attention += layers * blocks
        ring += layers * (cost.seconds - blocks)
        ring_bytes += layers * cost.bytes_sent
        ulysses += layers * ulysses_seconds(work, mesh.ulysses, exchange)
        exchange_bytes += layers * sum(ulysses_bytes(work, mesh.ulysses))
    rows = sum(new) / (mesh.ulysses * mesh.ring)
    parts, reduced = _layers(shape, mesh, machine, rows, len(new), numbers)
    overhead = parts["overhead"] + shape.layers * mesh.ring * machine.step_s + in_session * machine.turn_s
    parts |= {"attention": attention, "ring": ring, "ulysses": ulysses, "overhead": overhead}
    return PassCost(parts, {"tp": reduced, "ulysses": exchange_bytes, "ring": ring_bytes})


def decode_work(shape: Decoder, mesh: Degrees, batch: int, numbers: Numbers) -> DecodeWork:
    """Return the sizes of a decode step of ``batch`` sequences that `longctx.cost.decode` needs."""
    projections, ffn = layer_weights(shape)
    sums, pairs, norm_sums = layer_reductions(shape, numbers.spd_share)
    return DecodeWork(
        batch=batch,
        ranks=mesh.ulysses * mesh.ring,
        layers=shape.layers,
        layer_weights=(projections + ffn) / mesh.tp,
        layer_bytes=(projections * numbers.element + ffn * numbers.ffn) / mesh.tp,
        head_weights=shape.hidden * shape.vocab_size / mesh.tp,
        hidden=shape.hidden,
        heads=shape.heads / mesh.tp,
        kv_heads=max(1, shape.kv_heads / mesh.tp),
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size / mesh.tp,
        element_bytes=numbers.element,
        ulysses=mesh.ulysses,
        tp=mesh.tp,
        sums=sums,
        pairs=pairs,
        norm_sums=norm_sums,
    )


def layer_reductions(shape: Decoder, spd_share: float) -> tuple[float, float, int]:
    """Return a layer's average numbers of tensor-parallel all-reduces in a forward pass, by kind.

    They are those of hidden states, those of two hidden states in one message, and those of one number for each row.
    The share ``spd_share`` of the blocks drops its first reduction.  If the outputs of attention and MLP are
    normalised, such a block sums both in one message of twice the size.  A norm of queries or keys over all heads sums
    squares.
    """
    norm_sums = 2 if shape.qk_norm == "width" else 0
    if shape.norms == "pre":
        return 2 - spd_share, 0.0, norm_sums
    return 2 - 2 * spd_share, spd_share, norm_sums


def decode_cost(
    shape: Decoder, mesh: Degrees, machine: Machine, cached: Sequence[int], strategy: str, numbers: Numbers
) -> PassCost:
    """Return the cost of one more token for each sequence of ``cached`` tokens, by a decode ``strategy``.

    The GEMMs of every strategy, and the collectives of ``gather_merge`` and ``sharded``, are those of
    `longctx.cost.decode`.  The other strategies are the prefill strategies with T = 1.  No computation hides their
    communication.  Pass-Q, for example, takes N blocks, N - 1 hops and an all-to-all (arXiv 2411.01783, Table 8).

    The parts are "products", "weights", "attention", "merge" (communication of context ranks), "tp" and "overhead".
    The time of GEMMs is in "weights" if reading the weights takes longer than the arithmetic, else in "products".  The
    axes are "tp" and "context".  With ``sharded``, both values of "tp" are 0, since "merge" and "context" include them.
    """
    machine = machine.shared_by(mesh, decodes=True)
    work, shares = decode_work(shape, mesh, len(cached), numbers), strategy == "sharded"
    level = machine.level(work.ranks, mesh.tp)
    # 1. Attention, and the collectives of context ranks.
    if strategy in SHARED_ROWS:
        attention = _shared_rows_seconds(shape, mesh, machine, cached, numbers)
        exchanged = exchange_seconds(work, level.gather_link, strategy)
        sent = sum(count * size for count, size in exchanges(work, strategy))
    else:
        attention, exchanged, sent = _ring_of_one_row(shape, mesh, machine, cached, strategy, numbers)
    # 2. GEMMs, and the all-reduces over tensor-parallel ranks; in `sharded`, step 1 has counted the latter.
    rates = DecodeHardware(machine.memory_bytes_per_s, machine.gemm_flops, level.gather_link)
    parts, reduced = _layers(shape, mesh, machine, len(cached), len(cached), numbers)
    bound = "weights" if parts["weights"] >= parts["products"] else "products"
    products = {"weights": 0.0, "products": 0.0, bound: product_seconds(work, rates, work.ranks if shares else 1)}
    parts |= {**products, "attention": attention, "merge": exchanged, "tp": 0.0 if shares else parts["tp"]}
    return PassCost(parts, {"tp": 0.0 if shares else reduced, "context": sent})


def _shared_rows_seconds(
    shape: Decoder, mesh: Degrees, machine: Machine, cached: Sequence[int], numbers: Numbers
) -> float:
    """Return the seconds of attention of a decode step by ``gather_merge`` or ``sharded``, over all layers.

    Every context rank has one new row of each sequence, and attends to the visible keys among those that it caches.
    """
    hardware = machine.kernel(mesh.ulysses * mesh.ring, mesh.tp, decodes=True)
    seconds = 0.0
    for work, layers in ring_works(shape, mesh, [1] * len(cached), cached, numbers):
        rows = sum(most_keys(total + 1, work.ranks, work.window) for total in cached)
        arithmetic = 4 * work.head_dim * work.heads * rows / hardware.flops
        seconds += layers * (hardware.block_s + max(arithmetic, rows * work.kv_row_bytes / hardware.kv_bytes_per_s))
    return seconds


def _ring_of_one_row(
    shape: Decoder, mesh: Degrees, machine: Machine, cached: Sequence[int], strategy: str, numbers: Numbers
) -> tuple[float, float, float]:
    """Return one rank's (seconds of attention's blocks, seconds of its communication, bytes sent).

    The rank runs one new token per sequence, in a ring by ``strategy``.  Communication includes the all-to-alls of
    Ulysses.  The figures are sums over all layers; ``cached`` has the sequences' cached tokens.
    """
    hardware = machine.kernel(mesh.ring, mesh.tp * mesh.ulysses, decodes=True)
    exchange = machine.level(mesh.ulysses, mesh.tp).exchange
    attention = sent_s = sent = 0.0
    for work, layers in ring_works(shape, mesh, [1] * len(cached), cached, numbers, machine.partial_element_bytes):
        cost, blocks = COSTS[strategy](work, hardware), work.ranks * block_seconds(work, hardware)
        attention += layers * blocks
        sent_s += layers * (cost.seconds - blocks + ulysses_seconds(work, mesh.ulysses, exchange))
        sent += layers * (cost.bytes_sent + sum(ulysses_bytes(work, mesh.ulysses)))
    return attention, sent_s, sent


def _layers(
    shape: Decoder, mesh: Degrees, machine: Machine, rows: float, sequences: int, numbers: Numbers
) -> tuple[dict[str, float], float]:
    """Return a rank's seconds outside attention, by part, and the bytes that its all-reduces send.

    The rank runs ``rows`` rows through all layers.  The output layer computes only the last row of each of the
    ``sequences``.
    """
    projections, ffn = layer_weights(shape)
    head = shape.hidden * shape.vocab_size / mesh.tp
    weights = (projections + ffn) * shape.layers / mesh.tp
    read = (projections * numbers.element + ffn * numbers.ffn) * shape.layers / mesh.tp + head * numbers.element
    reduce_s, reduced = _reductions(shape, mesh, machine, rows, numbers)
    parts = {
        "products": (2 * weights * rows + 2 * head * sequences) / machine.gemm_flops,
        "weights": read / machine.memory_bytes_per_s,
        "tp": reduce_s,
        "overhead": shape.layers * machine.layer_s,
    }
    return parts, reduced


def _reductions(shape: Decoder, mesh: Degrees, machine: Machine, rows: float, numbers: Numbers) -> tuple[float, float]:
    """Return the seconds of all layers' tensor-parallel all-reduces of ``rows`` rows, and a rank's bytes sent."""
    if mesh.tp == 1:
        return 0.0, 0.0
    sums, pairs, norm_sums = layer_reductions(shape, numbers.spd_share)
    seconds = norm_sums * machine.all_reduce_seconds(4 * rows, mesh.tp)  # float32
    size = norm_sums * 4 * rows
    for count, states in ((sums, 1), (pairs, 2)):
        if numbers.reduce == "float32":
            one = states * rows * shape.hidden * numbers.element
            seconds += count * machine.all_reduce_seconds(one, mesh.tp)
        else:
            one = message_bytes(int(states * rows), shape.hidden, numbers.reduce)
            seconds += count * machine.rounded_reduction_seconds(states * rows, shape.hidden, mesh.tp, numbers.reduce)
        size += count * one
    embedded = rows * shape.hidden * numbers.element
    seconds = shape.layers * seconds + machine.all_reduce_seconds(embedded, mesh.tp)
    return seconds, 2 * (mesh.tp - 1) / mesh.tp * (shape.layers * size + embedded)
