"""Answers on the first rank: takes requests from other threads, decides each step, and hands out the tokens."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from longctx.infer.answer import AnswerText
from longctx.infer.continuous import ContinuousSession
from longctx.infer.page_files import PageFiles
from longctx.infer.sample import TokenLogprob
from longctx.parallel.comm import Comm
from longctx.serve.one_rank import ALL_RANKS, OneRank
from longctx.serve.prefix_cache import PrefixCache
from longctx.serve.rank_pages import RankPages
from longctx.serve.ranks import run_plan, share_plan
from longctx.serve.schedule import Limits, NewSequence, Scheduler, StepPlan

_IDLE_S = 0.5  # while there is nothing to do, the ranks exchange an empty plan this often, to notice a lost rank


@dataclass(frozen=True)
class Token:
    """The next token of sequence ``number``, and the ``piece`` of text that became certain.

    ``finish`` says why the answer ends with this token, "stop" or "length"; None if the answer goes on.  With
    ``score_prompt``, a sequence's first token has the log-probabilities of the ``prompt``, without that of the prompt's
    first token.  ``token`` is None if the request wants no new tokens.
    """

    number: int
    token: int | None
    piece: str
    logprob: TokenLogprob | None = None
    finish: str | None = None
    prompt: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Sequence ``number`` has no further tokens because of an error of the server."""

    number: int
    message: str


Emit = Callable[[Token | Failure], None]  # called in the thread that runs the model


@dataclass
class _Answer:
    new: NewSequence
    emit: Emit
    text: AnswerText
    tokens: list[int] = field(default_factory=list)


class Service:
    """The first rank's part of serving.

    Make it while the other ranks of ``world`` call `follow`, since all ranks read stored pages together.  `submit` and
    `cancel` may be called from any thread; all other methods belong to the thread that runs the model.  ``passes`` and
    ``seconds`` count the steps that ran the model, and their time.  ``sequence_bytes`` are the bytes of the sequences'
    caches on each ring rank.  ``files`` stores pages on disk for the next server (None: memory only).  ``restored`` are
    pages that an earlier server stored.  ``one_rank`` decides whether one ring rank or all of them prefill.
    """

    def __init__(
        self,
        session: ContinuousSession,
        world: Comm,
        tokenizer: Any,
        limits: Limits,
        files: PageFiles | None = None,
        one_rank: OneRank = ALL_RANKS,
    ) -> None:
        self.session, self.world, self.tokenizer, self.one_rank = session, world, tokenizer, one_rank
        self.pages, engine = RankPages(session, files), session.engine
        self.prefixes = PrefixCache(limits.page_tokens, limits.page_bytes // engine.row_bytes, engine.ring.size)
        self.restored = self.pages.restore(world, self.prefixes.limit)
        self.prefixes.restore(self.restored.pages)
        self.scheduler = Scheduler(limits, self.prefixes)
        self._inbox: queue.SimpleQueue[_Answer | int] = queue.SimpleQueue()
        self._answers: dict[int, _Answer] = {}
        self.passes, self.seconds = 0, 0.0
        self.sequence_bytes = [0] * engine.ring.size

    @property
    def page_bytes(self) -> list[int]:
        """Bytes of the pages on each ring rank."""
        return [rows * self.session.engine.row_bytes for rows in self.prefixes.rows]

    def submit(self, sequence: NewSequence, emit: Emit, after: Sequence[int] = ()) -> None:
        """Queue ``sequence``, which has an unused number, and return at once.  ``after`` is as for `AnswerText`.

        ``emit`` is called with each `Token`, the last one with ``finish``, or with a `Failure`, in the thread that runs
        the model.  After `cancel`, it is not called again.
        """
        self._inbox.put(_Answer(sequence, emit, AnswerText(self.tokenizer, sequence.sampling.stop, after)))

    def cancel(self, number: int) -> None:
        """Ask to stop sequence ``number`` and to free its cache, and return at once; the next step does it."""
        self._inbox.put(number)

    @property
    def busy(self) -> bool:
        """True if a sequence waits, runs or is still cached, or if a request or cancellation has just arrived."""
        return self.scheduler.busy or not self._inbox.empty()

    def step(self) -> None:
        """Take what has arrived, and run one step on all ranks; wait a moment if there is nothing to do.

        A ValueError of the model is not raised: the sequences of the step get a `Failure` and end.

        Raises `LostPeer` if a rank has gone.
        """
        self._take(wait=not self.scheduler.busy)
        for number, sequence in self.session.sequences.items():
            self.prefixes.give(number, sequence.tokens, sequence.cache.layout)
        plan, began = self.scheduler.plan(), time.perf_counter()
        share_plan(self.world, plan, self.session.engine.device)
        try:
            tokens = run_plan(self.session, self.pages, plan, self.one_rank)
        except ValueError as error:  # on all ranks
            numbers = {*plan.prefill, *plan.decode}
            self.fail(str(error), numbers)
            self.prefixes.distrust(numbers)
            return
        for number, token in tokens.items():
            self._hand_out(number, token)
        self.sequence_bytes = [rows * self.session.engine.row_bytes for rows in self.session.rows_per_rank]
        if plan.prefill or plan.decode:
            self.passes, self.seconds = self.passes + 1, self.seconds + time.perf_counter() - began

    def stop(self) -> None:
        """Let the other ranks leave their loop (`follow`): send them a plan that stops."""
        share_plan(self.world, StepPlan(stop=True), self.session.engine.device)

    def fail(self, message: str, numbers: Iterable[int] | None = None) -> None:
        """Report an error to the clients of the sequences ``numbers`` (None: all), and end these sequences."""
        if numbers is None:
            self._take(wait=False)
            numbers = self._answers
        for number in list(numbers):
            self._answers.pop(number).emit(Failure(number, message))
            self.scheduler.end(number)

    def _take(self, *, wait: bool) -> None:
        """Take what other threads have sent: new sequences, and requests to stop one.

        With ``wait``, wait a moment for the first of them.
        """
        try:
            arrived = self._inbox.get(timeout=_IDLE_S) if wait else self._inbox.get_nowait()
            while True:
                if isinstance(arrived, _Answer):
                    self._answers[arrived.new.number] = arrived
                    self.scheduler.add(arrived.new)
                else:
                    self._answers.pop(arrived, None)
                    self.scheduler.end(arrived)
                arrived = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _hand_out(self, number: int, token: int) -> None:
        """Give ``token`` to the client of sequence ``number``, and end the sequence after its last token."""
        answer, sequence = self._answers[number], self.session.sequences[number]
        if not answer.new.max_new_tokens:
            answer.emit(Token(number, None, "", None, "length", tuple(sequence.prompt_logprobs or ())))
            del self._answers[number]
            self.scheduler.end(number)
            return
        answer.tokens.append(token)
        piece, finish = answer.text.add(token), None
        if answer.text.stopped or self.session.is_at_end(number):
            finish = "stop"
        elif len(answer.tokens) == answer.new.max_new_tokens:
            finish = "length"
        logprob = sequence.logprobs[-1] if sequence.logprobs else None
        prompt = tuple(sequence.prompt_logprobs or ()) if len(answer.tokens) == 1 else ()
        answer.emit(Token(number, token, piece + (answer.text.end() if finish else ""), logprob, finish, prompt))
        if finish:
            del self._answers[number]
            self.scheduler.end(number)
