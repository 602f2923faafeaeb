"""The choice between pass-KV and pass-Q: the cheaper one by the cost model, or one of the paper's three rules."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longctx.cost.attention import Work, pass_kv_cost, pass_q_cost
from longctx.cost.hardware import Hardware
from longctx.cost.numerals import three_digits


@dataclass(frozen=True)
class StrategyChoice:
    """A strategy (pass_kv or pass_q), and the reason for it in one line for the user."""

    strategy: str
    why: str


def choose(rule: str, work: Work, hardware: Hardware) -> StrategyChoice:
    """Return the strategy that ``rule`` selects for ``work``.

    ``auto`` compares the modelled seconds.  ``alg1``, ``alg5`` and ``empirical`` are the rules of arXiv 2411.01783:
    Algorithms 1 and 5, and the fitted boundary of Appendix D.  A ring of one rank gets pass_kv by every rule.

    Raises ValueError for ``empirical`` on several ranks if ``hardware`` has no fitted constants.
    """
    if work.ranks == 1:
        return StrategyChoice("pass_kv", "one ring rank: nothing is sent")
    return RULES[rule](work, hardware)


def _auto(work: Work, hardware: Hardware) -> StrategyChoice:
    kv, q = pass_kv_cost(work, hardware).seconds, pass_q_cost(work, hardware).seconds
    reason = f"a layer takes {three_digits(kv * 1e3)} ms by pass-KV, {three_digits(q * 1e3)} ms by pass-Q"
    return StrategyChoice("pass_kv" if kv <= q else "pass_q", reason)


def overlap_threshold(work: Work, hardware: Hardware) -> float:
    """Return the smallest number of new tokens T for which computation hides the communication of pass-KV.

    It is N C H_KV e / (2 H_Q BW) (arXiv 2411.01783, Eq. 2), for N ranks of C FLOP/s, H_Q query and H_KV KV heads, e
    bytes per element, and links of BW bytes/s.
    """
    denominator = 2 * work.heads * hardware.hop.bytes_per_s
    return work.ranks * hardware.flops * work.kv_heads * work.element_bytes / denominator


def _alg1(work: Work, hardware: Hardware) -> StrategyChoice:
    return _by_threshold(work, hardware, 2 * work.kv_heads / work.heads)


def _alg5(work: Work, hardware: Hardware) -> StrategyChoice:
    # Eq. 5 lowers the threshold of Alg. 1 by the share of pass-KV's transfers that computation hides.
    hidden = 4 * work.new_total * hardware.hop.bytes_per_s / (work.ranks * hardware.flops * work.element_bytes)
    return _by_threshold(work, hardware, 2 * work.kv_heads / work.heads - hidden)


def _by_threshold(work: Work, hardware: Hardware, miss_rate: float) -> StrategyChoice:
    """Choose pass-KV if T reaches `overlap_threshold`, or if the miss rate T / (T + P) reaches ``miss_rate``."""
    hidden, miss = overlap_threshold(work, hardware), work.new_total / work.total
    kv = work.new_total >= hidden or miss >= miss_rate
    reason = f"T {work.new_total:,} (threshold {hidden:,.0f}), miss rate {miss:.2%} (threshold {miss_rate:.2%})"
    return StrategyChoice("pass_kv" if kv else "pass_q", reason)


def empirical_constants(hardware: Hardware | None) -> tuple[float, float, float]:
    """Return the constants (alpha, beta, gamma) of the rule ``empirical`` (see `fit_empirical`) in ``hardware``.

    Raises ValueError if ``hardware`` is None or lacks them.
    """
    if hardware is None or hardware.empirical is None:
        raise ValueError(
            "context.strategy=empirical needs a hardware file with fitted constants: run python -m recipes.bench "
            "crossover fitted=FILE.yaml and set hardware=FILE.yaml run.threads=1, or use context.strategy=auto"
        )
    return hardware.empirical


def _empirical(work: Work, hardware: Hardware) -> StrategyChoice:
    alpha, beta, gamma = empirical_constants(hardware)
    h = alpha * math.log(work.new_total) + beta * math.log(work.new_total / work.total) + gamma
    return StrategyChoice("pass_kv" if h > 0 else "pass_q", f"h(T, P) = {h:.3g}")


RULES: dict[str, Callable[[Work, Hardware], StrategyChoice]] = {
    "auto": _auto,
    "alg1": _alg1,
    "alg5": _alg5,
    "empirical": _empirical,
}


def fit_empirical(points: Sequence[tuple[int, int, float, float]]) -> tuple[float, float, float]:
    """Fit (alpha, beta, gamma) of the boundary h = alpha ln T + beta ln(T / (T + P)) + gamma between the strategies.

    ``points`` are (T, P, seconds by pass-KV, seconds by pass-Q).  Pass-KV is chosen if h > 0 (arXiv 2411.01783,
    App. D).  The fit is a logistic regression of "pass-KV was faster", by gradient ascent.  The weight of a point is
    |ln(seconds by pass-Q / seconds by pass-KV)|, so that near ties have little influence.  A small ridge penalty keeps
    the fit of separable points finite.

    Raises ValueError if one strategy was at least as fast at every point: there is no boundary to fit.
    """
    # 1. Targets and weights: positive gains are points at which pass-KV was faster.
    gains = [math.log(q / kv) for _, _, kv, q in points]
    if not any(gain > 0 for gain in gains) or not any(gain < 0 for gain in gains):
        raise ValueError(
            "no boundary can be fitted, since one of pass_kv and pass_q is at least as fast at every miss rate: add "
            "miss_rates at which the other one is faster"
        )
    # 2. Features, centred: ln T, ln of the miss rate, 1.
    rows = [(math.log(t), math.log(t / (t + p)), 1.0) for t, p, _, _ in points]
    means = [sum(row[i] for row in rows) / len(rows) for i in range(2)]
    centred = [(a - means[0], b - means[1], 1.0) for a, b, _ in rows]
    weights, scale = [0.0, 0.0, 0.0], max(map(abs, gains))
    # 3. Gradient ascent on the penalised log-likelihood; h is clipped to keep exp finite.
    for _ in range(20_000):
        slope = [-1e-3 * w for w in weights]
        for row, gain in zip(centred, gains, strict=True):
            h = sum(w * x for w, x in zip(weights, row, strict=True))
            residual = (1.0 if gain > 0 else 0.0) - 1 / (1 + math.exp(-max(-50.0, min(50.0, h))))
            slope = [s + abs(gain) / scale * residual * x for s, x in zip(slope, row, strict=True)]
        weights = [w + 0.2 * s / len(points) for w, s in zip(weights, slope, strict=True)]
    # 4. Undo the centring.
    alpha, beta, centred_gamma = weights
    return alpha, beta, centred_gamma - alpha * means[0] - beta * means[1]
