"""Pass-KV or pass-Q: an argmin over the cost model, and the paper's three rules beside it for comparison."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longctx.cost.attention import Work, pass_kv_cost, pass_q_cost
from longctx.cost.hardware import Hardware


@dataclass(frozen=True)
class Choice:
    """A strategy, and why in a line."""

    strategy: str
    why: str


def choose(rule: str, work: Work, on: Hardware) -> Choice:
    """The strategy that ``rule`` (auto, alg1, alg5, empirical) takes for ``work``.

    Raises ValueError for ``empirical`` on hardware that nobody has fitted it to.
    """
    if work.ranks == 1:
        return Choice("pass_kv", "one ring rank: nothing travels")
    return RULES[rule](work, on)


def _auto(work: Work, on: Hardware) -> Choice:
    kv, q = pass_kv_cost(work, on).seconds, pass_q_cost(work, on).seconds
    says = f"a layer takes {kv * 1e3:.3g} ms by pass-KV, {q * 1e3:.3g} by pass-Q"
    return Choice("pass_kv" if kv <= q else "pass_q", says)


def kv_hidden_from(work: Work, on: Hardware) -> float:
    """The T from which a pass-KV ring hides behind its compute (Eq. 2): N C H_KV e / (2 H_Q BW)."""
    return work.ranks * on.flops * work.kv_heads * work.element_bytes / (2 * work.heads * on.hop.bytes_per_s)


def _alg1(work: Work, on: Hardware) -> Choice:
    return _by_threshold(work, on, 2 * work.kv_heads / work.heads)


def _alg5(work: Work, on: Hardware) -> Choice:
    # Eq. 5: where pass-KV is exposed, pass-Q must also earn its all-to-all.
    paid = 4 * work.new_total * on.hop.bytes_per_s / (work.ranks * on.flops * work.element_bytes)
    return _by_threshold(work, on, 2 * work.kv_heads / work.heads - paid)


def _by_threshold(work: Work, on: Hardware, miss_rate: float) -> Choice:
    hidden, miss = kv_hidden_from(work, on), work.new_total / work.total
    kv = work.new_total >= hidden or miss >= miss_rate
    says = f"T {work.new_total:,} against {hidden:,.0f}, miss rate {miss:.2%} against {miss_rate:.2%}"
    return Choice("pass_kv" if kv else "pass_q", says)


def _empirical(work: Work, on: Hardware) -> Choice:
    if on.empirical is None:
        raise ValueError(
            "context.strategy=empirical needs alpha, beta and gamma fitted to this machine: "
            "python -m recipes.bench crossover fitted=FILE.yaml writes them, for hardware=FILE.yaml; "
            "or use context.strategy=auto"
        )
    alpha, beta, gamma = on.empirical
    h = alpha * math.log(work.new_total) + beta * math.log(work.new_total / work.total) + gamma
    return Choice("pass_kv" if h > 0 else "pass_q", f"h(T, P) = {h:.3g}")


RULES: dict[str, Callable[[Work, Hardware], Choice]] = {
    "auto": _auto,
    "alg1": _alg1,
    "alg5": _alg5,
    "empirical": _empirical,
}


def fit_empirical(points: Sequence[tuple[int, int, float, float]]) -> tuple[float, float, float]:
    """(alpha, beta, gamma) of h = alpha ln T + beta ln(T / (T + P)) + gamma (App. D) for (T, P, s by KV, s by Q).

    Logistic regression of "pass-KV was faster", each point weighing by how much was at stake,
    |ln(s by Q / s by KV)|, so that ties do not pull; by gradient ascent, a small ridge keeping separable points
    finite.  Raises ValueError where one strategy won everywhere: there is no boundary to fit.
    """
    gains = [math.log(q / kv) for _, _, kv, q in points]
    if not any(gain > 0 for gain in gains) or not any(gain < 0 for gain in gains):
        raise ValueError("one strategy won every row: measure further to either side of the crossover")
    rows = [(math.log(t), math.log(t / (t + p)), 1.0) for t, p, _, _ in points]
    means = [sum(row[i] for row in rows) / len(rows) for i in range(2)]
    centred = [(a - means[0], b - means[1], 1.0) for a, b, _ in rows]
    weights, scale = [0.0, 0.0, 0.0], max(map(abs, gains))
    for _ in range(20_000):
        slope = [-1e-3 * w for w in weights]
        for row, gain in zip(centred, gains, strict=True):
            h = sum(w * x for w, x in zip(weights, row, strict=True))
            residual = (1.0 if gain > 0 else 0.0) - 1 / (1 + math.exp(-max(-50.0, min(50.0, h))))
            slope = [s + abs(gain) / scale * residual * x for s, x in zip(slope, row, strict=True)]
        weights = [w + 0.2 * s / len(points) for w, s in zip(weights, slope, strict=True)]
    alpha, beta, at_means = weights
    return alpha, beta, at_means - alpha * means[0] - beta * means[1]
