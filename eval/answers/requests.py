"""What a model is asked, and how a question is told from others: plain values that travel to ranks and to disk."""

import hashlib
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """How likely ``tokens[begin:]`` are behind those before: answered by (log-probability in nats, all likeliest).

    What is asked of one ``question``, an example's choices, is computed together, and what they have in common once.
    """

    tokens: tuple[int, ...]
    begin: int
    question: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        assert 0 < self.begin < len(self.tokens), "something is scored, and something comes before it"


@dataclass(frozen=True)
class Continue:
    """The greedy text behind ``tokens``: up to one of ``until``, an end token, or ``most`` tokens."""

    tokens: tuple[int, ...]
    until: tuple[str, ...]
    most: int

    def __post_init__(self) -> None:
        assert self.tokens and self.most > 0, "a prompt, and at least one token"


Request = Score | Continue
Answer = tuple[float, bool] | str


def key(request: Request) -> str:
    """What the answer of ``request`` is kept under: all that it depends on but the model."""
    asked = [request.tokens, request.begin] if isinstance(request, Score) else list(vars(request).values())
    return hashlib.sha256(json.dumps([type(request).__name__, *asked]).encode()).hexdigest()[:32]
