"""Requests to a model: plain values that travel to the ranks, and the keys that their answers are stored under."""

import hashlib
import json
from dataclasses import dataclass, field

from longctx.config import Sampling


@dataclass(frozen=True)
class Score:
    """Ask for the log-probability of ``tokens[begin:]`` given the tokens before them.

    The answer is (sum of log-probabilities in nats, whether every token was the most likely one).
    Example: tokens (5, 6, 7, 8) with begin 2 ask for log p(7 | 5 6) + log p(8 | 5 6 7).
    The choices of one example have the same ``question``: their common prefix is computed once.
    """

    tokens: tuple[int, ...]
    begin: int
    question: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        assert 0 < self.begin < len(self.tokens), "score at least one token, after at least one other"


@dataclass(frozen=True)
class Continue:
    """Ask for the continuation of ``tokens``, greedy or by ``sampling``.

    It ends before the first text in ``until``, at an end token, or after ``max_new_tokens`` tokens.
    """

    tokens: tuple[int, ...]
    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        assert self.tokens and self.max_new_tokens > 0, "give a prompt, and ask for at least one token"


Request = Score | Continue
Answer = tuple[float, bool] | str


def key(request: Request) -> str:
    """Return a digest of the fields of ``request`` that its answer depends on: all but ``question``.

    Stored answers are found by this digest, so it must not change between releases.  It therefore hashes the class's
    name and the values of the fields, not their names.
    """
    if isinstance(request, Score):
        values: list[object] = [request.tokens, request.begin]
    else:
        values = [request.tokens, request.until, request.max_new_tokens]
        values += [vars(request.sampling)] if request.sampling else []
    return hashlib.sha256(json.dumps([type(request).__name__, *values]).encode()).hexdigest()[:32]
