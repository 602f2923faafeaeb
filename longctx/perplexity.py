"""Perplexity: the exponential of a mean loss."""

import math


def perplexity(loss: float) -> float:
    """Return the exponential of ``loss`` (nats a token): inf if it is beyond a float, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:  # above 709 nats
        return math.inf
