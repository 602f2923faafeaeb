"""The performance figures of a machine that the cost models use; ``python -m recipes.calibrate`` measures them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Link:
    """A communication link: a message of n bytes takes ``latency_s`` + n / ``bytes_per_s`` seconds.

    ``bulk`` is a second protocol with more latency and more bandwidth.  Each message uses the faster of the two.
    """

    latency_s: float
    bytes_per_s: float
    bulk: "Link | None" = None

    def seconds(self, size: float) -> float:
        """Return the seconds of a message of ``size`` bytes by the faster protocol; 0 if it is empty, and not sent."""
        if not size:
            return 0.0
        seconds = self.latency_s + size / self.bytes_per_s
        return min(seconds, self.bulk.seconds(size)) if self.bulk else seconds


def refuse_unknown(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise ValueError for a key of ``values`` that is not in ``known``; ``where`` names the section in the message.

    Without this check, a misspelled constant would silently get its default value.
    """
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{unknown[0]} is not a field of {where}: correct its name; the fields are {', '.join(known)}")


def refuse_impossible(constants: object, where: str, rates: Collection[str], seconds: Collection[str]) -> None:
    """Raise ValueError if a field in ``rates`` is not above 0, or one in ``seconds`` is negative or infinite.

    None passes, and NaN does not.

    ``where`` precedes the field's name in the message.
    """
    for name in (*rates, *seconds):
        value = getattr(constants, name)
        possible = value is None or value > 0 or (value == 0 and name in seconds)  # NaN is not
        if not possible or (name in seconds and value == math.inf):
            raise ValueError(f"{where}{name}={value}: use a number {'above 0' if name in rates else 'from 0 on'}")


def link_of(values: Mapping[str, Any]) -> Link:
    """Return the `Link` with the fields in ``values``, read from YAML; ``bulk`` is a link, too, and optional.

    Raises KeyError for a missing field, TypeError or ValueError for a wrong value, and ValueError for an unknown field.
    """
    refuse_unknown(values, [one.name for one in fields(Link)], "a link")
    bulk = values.get("bulk")
    latency_s, bytes_per_s = float(values["latency_s"]), float(values["bytes_per_s"])
    if not (0 <= latency_s < math.inf and bytes_per_s > 0):
        raise ValueError(f"latency_s={latency_s}, bytes_per_s={bytes_per_s}: use latency_s >= 0 and bytes_per_s > 0")
    return Link(latency_s, bytes_per_s, link_of(bulk) if bulk else None)


@dataclass(frozen=True)
class TrainRates:
    """Performance of one rank in a training step, outside attention.

    * ``backward``: time of a layer's backward divided by its forward's, with many rows: 2 by FLOPs.
    * ``gradient_s``: seconds for each weight and micro-batch: reading the weight, and adding to its gradient.
    * ``update_s``: seconds of the optimizer for each weight and step, with zeroing the gradients and taking their norm.
    * ``loss_s``: seconds of the loss for each logit, besides its GEMMs.
    """

    backward: float
    gradient_s: float
    update_s: float
    loss_s: float

    def __post_init__(self) -> None:
        refuse_impossible(self, "training ", ("backward",), ("gradient_s", "update_s", "loss_s"))


@dataclass(frozen=True)
class LayerRates:
    """Performance of one rank outside attention, for plans.

    * ``gemm_flops``: FLOP/s of a layer's GEMMs with many rows; the time includes norms and activations.
    * ``weight_bytes_per_s``: the rate of reading weights, measured with one row.
    * ``layer_s``: the overhead of a layer, which does not depend on the rows.
    * ``gather``: an all-gather of few rows, as in decoding.
    * ``reduce``: a step of a ring all-reduce; None uses `Hardware`'s latency of ``hop`` and rate of ``exchange``.
    * ``training``: a training step; None: derived from the fields above.
    """

    gemm_flops: float
    weight_bytes_per_s: float
    layer_s: float
    gather: Link
    reduce: Link | None = None
    training: TrainRates | None = None

    def __post_init__(self) -> None:
        refuse_impossible(self, "layer ", ("gemm_flops", "weight_bytes_per_s"), ("layer_s",))


@dataclass(frozen=True)
class Hardware:
    """Performance of one rank's attention kernel and links.  Rates are per second, times in seconds.

    * ``flops``: attention FLOP/s on large blocks.
    * ``kv_bytes_per_s``: the rate of reading keys and values with few query rows.
    * ``block_s``: the fixed overhead of one more block.
    * ``hop``: the link to the next rank of the ring.
    * ``exchange``: an all-to-all or all-gather, as a link for the bytes that one rank sends.
    * ``overlap``: the share of the shorter time that is hidden when a rank computes and sends at once; 1 for links that
      need no CPU core.
    * ``empirical``: the fitted (alpha, beta, gamma) of arXiv 2411.01783, App. D; None if they were not fitted.
    * ``peak_flops``: peak FLOP/s of GEMMs in the training dtype, the denominator of MFU; None if unknown.
    * ``layer``: performance outside attention; None if it was not measured.
    * ``backward``: time of a block's backward divided by its forward's: 2.5 by arithmetic (5 GEMMs against 2).
    * ``causal``: time of a causal tile of 512 rows relative to its visible pairs at the rate of a full tile: 1 by
      arithmetic.  Larger tiles have less.
    * ``ranks_at_once``: number of ranks that the machine's cores run at once; further ranks take turns.  None if each
      rank has its own device.

    Raises ValueError for a ``flops``, ``kv_bytes_per_s``, ``peak_flops``, ``backward`` or ``causal`` that is not
    positive, for ``ranks_at_once`` below 1, for an ``overlap`` outside 0 to 1, and for a negative ``block_s``.
    """

    flops: float
    kv_bytes_per_s: float
    block_s: float
    hop: Link
    exchange: Link
    overlap: float
    empirical: tuple[float, float, float] | None = None
    peak_flops: float | None = None
    layer: LayerRates | None = None
    ranks_at_once: int | None = None
    backward: float = 2.5
    causal: float = 1.0

    def __post_init__(self) -> None:
        rates = ("flops", "kv_bytes_per_s", "peak_flops", "backward", "causal", "ranks_at_once")
        refuse_impossible(self, "hardware ", rates, ("block_s",))
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"hardware overlap={self.overlap} is not a share; use a number from 0 to 1")


def hardware_of(values: Any, source: str) -> Hardware:
    """Return the `Hardware` in the parsed YAML ``values``; ``source`` names the file in errors.

    Raises ValueError, with the field and the fix, for a missing or unknown field or a value of the wrong type or range.
    """
    fix = "measure again with python -m recipes.calibrate out=FILE.yaml"
    try:
        refuse_unknown(values, ["measured", "errors", *(one.name for one in fields(Hardware))], "a hardware file")
        hop, exchange = link_of(values["hop"]), link_of(values["exchange"])
        flops, kv, block_s, overlap = (float(values[x]) for x in ("flops", "kv_bytes_per_s", "block_s", "overlap"))
        empirical = None
        if fitted := values.get("empirical"):
            alpha, beta, gamma = map(float, fitted)
            empirical = (alpha, beta, gamma)
        peak = values.get("peak_flops")
        peak = None if peak is None else float(peak)
        layer, at_once = _layer_of(values.get("layer")), values.get("ranks_at_once")
        at_once = None if at_once is None else whole(at_once)
        backward, causal = (float(values.get(x, getattr(Hardware, x))) for x in ("backward", "causal"))
        return Hardware(flops, kv, block_s, hop, exchange, overlap, empirical, peak, layer, at_once, backward, causal)
    except KeyError as missing:
        raise ValueError(f"{source} has no field {missing}; {fix}") from missing
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is not a hardware file ({error}); {fix}") from error


def whole(value: Any) -> int:
    """Return ``value`` as a whole number.  Raises ValueError if it has a fraction."""
    if not float(value).is_integer():
        raise ValueError(f"{value} is not a whole number")
    return int(value)


def _layer_of(values: Mapping[str, Any] | None) -> LayerRates | None:
    if values is None:
        return None
    refuse_unknown(values, [one.name for one in fields(LayerRates)], "the section layer")
    gemm, read, layer_s = (float(values[name]) for name in ("gemm_flops", "weight_bytes_per_s", "layer_s"))
    reduce = link_of(values["reduce"]) if values.get("reduce") else None
    training = values.get("training")
    if training is not None:
        refuse_unknown(training, [one.name for one in fields(TrainRates)], "the section training")
        training = TrainRates(**{one.name: float(training[one.name]) for one in fields(TrainRates)})
    return LayerRates(gemm, read, layer_s, link_of(values["gather"]), reduce, training)
