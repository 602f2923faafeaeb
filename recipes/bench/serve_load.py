"""The load of recipes.bench serve: its requests, the clients that send them, and the figures of their answers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

from longctx.config import Sampling

if TYPE_CHECKING:
    from longctx.serve.schedule import NewSequence
    from longctx.serve.service import Failure, Service, Token
    from recipes.bench.serve import ServeBenchSettings


@dataclass
class LoadFigures:
    """Figures of one variant: seconds to the last answer; by request, seconds to the first token and the whole answer.

    A request that failed has no answer, and a message in ``failures``.
    ``top`` has the `TokenLogprob.top` of each answered token, () without log-probabilities.  ``page_bytes`` are the
    bytes of cached pages on each ring rank at the end.  For each request with another answer than alone, ``margins``
    has the difference (nats) between the two most likely tokens where the answers part.
    """

    variant: str
    seconds: float = 0.0
    first_token_s: dict[int, float] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    hit_rate: float = 0.0
    evicted: int = 0
    page_bytes: list[int] = field(default_factory=list)
    top: dict[int, list[tuple[tuple[int, float], ...]]] = field(default_factory=dict)
    margins: dict[int, float] = field(default_factory=dict)

    def record(self, event: Token | Failure, waited_s: float) -> bool:
        """Add ``event`` to its request's answer, or to ``failures``; return True if it is the request's last event.

        ``waited_s`` are the seconds since the request was sent.
        """
        from longctx.serve.service import Failure

        if isinstance(event, Failure):
            self.failures.append(event.message)
            self.answers.pop(event.number, None)
            return True
        self.first_token_s.setdefault(event.number, waited_s)
        self.answers.setdefault(event.number, []).extend([] if event.token is None else [event.token])
        self.top.setdefault(event.number, []).append(event.logprob.top if event.logprob else ())
        return event.finish is not None

    def count_equal(self, alone: LoadFigures) -> int:
        """Return the number of requests with the same whole answer in ``alone`` and here."""
        return sum(alone.answers.get(number) == answer for number, answer in self.answers.items())

    def other_than(self, alone: LoadFigures) -> dict[int, int]:
        """Return, for each request with another answer than in ``alone``, how many first tokens are equal.

        Requests that failed are left out.
        """
        both = alone.answers.keys() & self.answers.keys()
        pairs = {number: (alone.answers[number], self.answers[number]) for number in sorted(both)}
        return {
            number: sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False)))
            for number, pair in pairs.items()
            if pair[0] != pair[1]
        }


def make_load(settings: ServeBenchSettings, text: Sequence[int]) -> list[NewSequence]:
    """Return the requests: prompts of random lengths, uniform in the logarithm, drawn with ``settings.seed``.

    The first half of each prompt begins at one of ``settings.prefixes`` random places in ``text``, which many prompts
    share.  The second half begins at a random place of its own.  Both halves wrap around at the end of ``text``.
    """
    from longctx.serve.schedule import NewSequence

    draw = random.Random(settings.seed)  # noqa: S311 (no secret)
    begins = [draw.randrange(len(text)) for _ in range(settings.prefixes)]

    def cut(begin: int, tokens: int) -> list[int]:
        return [text[(begin + i) % len(text)] for i in range(tokens)]

    load = []
    for number in range(settings.requests):
        length = round(settings.min_length * (settings.max_length / settings.min_length) ** draw.random())
        common = cut(draw.choice(begins), length // 2)
        prompt = (*common, *cut(draw.randrange(len(text)), length - len(common)))
        load.append(NewSequence(number, prompt, settings.new_tokens, Sampling()))
    return load


def play_clients(
    service: Service, load: Sequence[NewSequence], clients: int, figures: LoadFigures, done: Callable[[], None]
) -> None:
    """Send the requests of ``load`` in order, and run ``service`` until all are answered.

    Each of ``clients`` clients sends its next request after the answer to its last one.  ``figures`` gets the answers
    and times; ``done`` is called after each answer or failure.
    """
    requests, sent = iter(load), dict[int, float]()

    def send_next() -> None:
        if (request := next(requests, None)) is not None:
            sent[request.number] = time.perf_counter()
            service.submit(request, receive)

    def receive(event: Token | Failure) -> None:
        if figures.record(event, time.perf_counter() - sent[event.number]):
            done()
            send_next()

    began = time.perf_counter()
    for _ in range(clients):
        send_next()
    while service.busy:
        service.step()
    figures.seconds = time.perf_counter() - began
