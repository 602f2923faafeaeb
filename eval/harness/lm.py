"""lm-evaluation-harness' model interface, `LM`: its requests become plain values, and a function answers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.answers.requests import Answer, Continue, Request, Score
from longctx.data.tokenize import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Scores for requests to score, texts for requests to continue; lm-eval mixes the two in no call.
Answerer = Callable[[Sequence[Request]], Sequence[Any]]
_DEFAULT_NEW_TOKENS = 256  # limit of a generated answer if the task gives none: lm-eval's default
_TEXT_SEPARATOR = "<|endoftext|>"


class GenerationSettings(TypedDict, total=False):
    """Settings of a generated answer that are read, in lm-eval's names; ``until`` are the texts that end it."""

    do_sample: bool
    temperature: float
    until: str | list[str] | None
    max_gen_toks: int
    max_new_tokens: int


class EngineLM(TemplateLM):
    """An lm-eval `LM` whose answers come from ``answer``, called once for all requests of a kind.

    Text is cut on the left to ``max_length`` tokens, as lm-eval's ``hf`` model does; ``cut`` counts the texts that
    were.  A text without context follows ``prefix_token``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, prefix_token: int, answer: Answerer
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length, self.answer = tokenizer, max_length, answer
        self.cut = 0
        self._made: dict[int, list[Request]] = {}
        self._prefix, self._prefix_text = prefix_token, str(tokenizer.decode([prefix_token]))

    @property
    def eot_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return the tokens of ``string``.

        By default the tokenizer adds its first token unless the text begins with it, as in lm-eval's ``hf`` model.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return tokenize(string, self.tokenizer, special_tokens=add_special_tokens).tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return list(self.answer([score for request in requests for score in self._once(request, self._make_choice)]))

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        return list(self.answer([self._make_score(before, after, "") for _, before, after in requests]))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [self._once(request, lambda one: self._make_windows(*one.args)) for request in requests]
        answers = iter(self.answer([window for of_text in windows for window in of_text]))
        return [sum(next(answers)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = [self._once(request, lambda one: [self._make_continue(*one.args)]) for request in requests]
        return list(self.answer([one for of_request in texts for one in of_request]))

    def _once(self, request: Instance, make: Callable[[Instance], Sequence[Request]]) -> Sequence[Request]:
        """Return ``make(request)``, which is cached because each variant, and each look, asks ``request`` again."""
        if id(request) not in self._made:
            self._made[id(request)] = list(make(request))
        return self._made[id(request)]

    def _make_choice(self, request: Instance) -> list[Score]:
        """Return the request that scores one choice of a question."""
        before, after = self._encode(*request.args)
        return [self._make_score(before, after, f"{request.task_name} {request.doc_id}")]

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens before the answer, at least one, and those of the answer."""
        if context:
            before, after = self._encode_pair(context, continuation)
            return before or [self._prefix], after  # lm-eval moves a context of spaces alone to the continuation
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [self._prefix] else ([self._prefix], tokens)

    def _make_score(self, before: Sequence[int], after: Sequence[int], question: str) -> Score:
        if not 0 < len(after) <= self.max_length:
            raise ValueError(
                f"{question or 'a text'} has an answer of {len(after):,} tokens, and only 1 to "
                f"eval.max_length={self.max_length:,} can be scored: leave that example out, or raise eval.max_length"
            )
        # The last token is predicted, not run: one more than max_length fits.
        tokens = self._cut_left((*before, *after), self.max_length + 1)
        return Score(tokens, len(tokens) - len(after), question)

    def _cut_left(self, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        self.cut += len(tokens) > max_tokens
        return tuple(tokens[-max_tokens:])

    def _make_windows(self, text: str) -> list[Score]:
        """Split ``text`` into lm-eval's disjoint windows, each of which scores its own tokens."""
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text), prefix_token=self._prefix, max_seq_len=self.max_length, context_len=1
        )
        pairs = [make_disjoint_window(window) for window in rolling]
        return [self._make_score(before, after, "") for before, after in pairs]

    def _make_continue(self, context: str, settings: GenerationSettings) -> Continue:
        if settings.get("do_sample") or settings.get("temperature"):
            raise ValueError(
                f"{dict(settings)}: only greedy answers are compared; set do_sample: false, temperature: 0 in the task"
            )
        until = settings.get("until") or []
        new_tokens = settings.get("max_gen_toks", settings.get("max_new_tokens", _DEFAULT_NEW_TOKENS))
        if new_tokens >= self.max_length:
            raise ValueError(
                f"eval.max_length={self.max_length} has no room for an answer of {new_tokens} tokens: "
                f"use more than {new_tokens}"
            )
        tokens = self._cut_left(self.tok_encode(context), self.max_length - new_tokens)
        return Continue(tokens, (until,) if isinstance(until, str) else tuple(filter(None, until)), new_tokens)


def choose_prefix_token(tokenizer: PreTrainedTokenizerBase, requested: int | None) -> int:
    """Return the token that a text without context follows.

    The first that exists: ``requested``, the token <|endoftext|>, the tokenizer's first token, its end token.
    Raises ValueError if there is none.
    """
    separator = tokenizer.get_vocab().get(_TEXT_SEPARATOR)
    for token in (requested, separator, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        f"the tokenizer has no {_TEXT_SEPARATOR} and no first or end token: set eval.prefix_token to a token's id"
    )


def make_recorder(requests: list[Request]) -> Answerer:
    """Return an answerer that appends what it is asked to ``requests``, and gives placeholder answers."""

    def answer(asked: Sequence[Request]) -> list[Answer]:
        requests.extend(asked)
        return [(0.0, False) if isinstance(request, Score) else "" for request in asked]

    return answer
