"""What a machine can do, in the few numbers that the costs need; measured by ``python -m recipes.calibrate``."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes ``latency_s`` + n / ``bytes_per_s`` seconds."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size: float) -> float:
        """Seconds that ``size`` bytes take; nothing is sent if there is nothing to send."""
        return self.latency_s + size / self.bytes_per_s if size else 0.0


@dataclass(frozen=True)
class Hardware:
    """One rank's kernel and its links.

    ``flops``: attention FLOP/s of wide blocks; ``kv_bytes_per_s``: how fast few query rows read keys and values;
    ``block_s``: what one more block costs, whatever its size; ``hop``: to the next rank of the ring;
    ``exchange``: an all-to-all, by the bytes that a rank sends; ``overlap``: the share of the shorter of computing
    and sending that is really hidden behind the longer (1 on links that need no core).
    ``empirical``: (alpha, beta, gamma) of arXiv 2411.01783, App. D, if they were fitted.
    ``peak_flops``: FLOP/s of matrix products in the dtype of training that MFU is a share of, if somebody knows it.
    """

    flops: float
    kv_bytes_per_s: float
    block_s: float
    hop: Link
    exchange: Link
    overlap: float
    empirical: tuple[float, float, float] | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        for name in ("flops", "kv_bytes_per_s", "peak_flops"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"hardware {name}={getattr(self, name)}: a rate is more than 0")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"hardware overlap={self.overlap}: a share, from 0 to 1")


def hardware_of(values: Any, where: str) -> Hardware:
    """The hardware that a file's ``values`` describe.  Raises ValueError, naming the field and the fix."""
    fix = "measure it anew with python -m recipes.calibrate out=FILE.yaml"
    try:
        hop, exchange = (Link(**{k: float(v) for k, v in values[name].items()}) for name in ("hop", "exchange"))
        flops, kv, block_s, overlap = (float(values[x]) for x in ("flops", "kv_bytes_per_s", "block_s", "overlap"))
        empirical = None
        if fitted := values.get("empirical"):
            alpha, beta, gamma = map(float, fitted)
            empirical = (alpha, beta, gamma)
        peak = values.get("peak_flops")
        return Hardware(flops, kv, block_s, hop, exchange, overlap, empirical, None if peak is None else float(peak))
    except KeyError as missing:
        raise ValueError(f"{where} does not say {missing}: {fix}") from missing
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no hardware file ({error}): {fix}") from error
