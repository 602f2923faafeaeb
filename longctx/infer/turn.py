"""A sequence of a session, and the result of a turn."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from longctx.attention.layout import Layout
from longctx.config import Sampling
from longctx.infer.cache import KVCache
from longctx.infer.sample import TokenLogprob
from longctx.shapes import Tensor


@dataclass
class Conversation:
    """One sequence: all its tokens, and a cache of the tokens that the model has run.

    After a turn, only a decoded last token is not cached.  The latest answer begins at ``tokens[answer_begin]``;
    ``logprobs`` has the log-probabilities of its tokens, if ``sampling.logprobs`` is set.  ``prompt_logprobs`` has
    those of the prompt's prefilled tokens, except the first token.  To request them, set this field to an empty list
    before a `ContinuousSession` prefills the prompt; None requests none.
    """

    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    answer_begin: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None

    @property
    def cached(self) -> int:
        """Number of cached tokens, over all ranks."""
        return self.cache.layout.total

    def append_prompt(self, prompt: Sequence[int]) -> None:
        """Append the tokens of ``prompt``, after which a new answer begins; ``logprobs`` is emptied."""
        self.tokens += prompt
        self.answer_begin = len(self.tokens)
        self.logprobs = []


@dataclass
class Turn:
    """Result of a turn: the decoded ``tokens`` by sequence, and its costs.

    ``new`` and ``cached`` are the numbers of prefilled tokens (T) and of tokens cached before (P), over the turn's
    sequences.  ``strategy`` names the prefill's strategies, and ``why`` has the reasons for them.  ``ttft_s`` is the
    seconds from the start of the turn to its first tokens, ``decode_s`` from there to the last ones, in ``steps``
    steps.  Bytes are those that this rank sent, as `Engine.sent` counts them.  ``passes`` has, for each prefill pass,
    the hidden states of this rank's rows and the layout of all ranks' rows, if `Session.turn` had ``keep_states``;
    otherwise it is empty.
    """

    tokens: dict[int, list[int]]
    new: int
    cached: int
    strategy: str = ""
    why: str = ""
    ttft_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0
    prefill_bytes: int = 0
    decode_bytes: int = 0
    passes: list[tuple[Tensor, Layout]] = field(default_factory=list)

    @property
    def ttit_s(self) -> float | None:
        """Mean seconds from one token to the next; None if the turn had no decode step."""
        return self.decode_s / self.steps if self.steps else None
