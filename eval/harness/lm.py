"""Our model behind lm-evaluation-harness' `LM`: its requests become plain ones, which someone else answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.answers.requests import Answer, Continue, Request, Score

Answerer = Callable[[Sequence[Request]], Sequence[Any]]
_MOST_NEW = 256  # tokens of an answer where the task does not say: lm-eval's own default
_END = "<|endoftext|>"


class EngineLM(TemplateLM):
    """An `LM` of lm-eval whose answers come from ``answer``, all requests of a call at once.

    The text is cut on the left to ``longest`` tokens, as lm-eval's ``hf`` does; a text without context follows
    ``prefix_token``.
    """

    def __init__(self, tokenizer: Any, longest: int, prefix_token: int, answer: Answerer) -> None:
        super().__init__()
        self.tokenizer, self.max_length, self.answer = tokenizer, longest, answer
        self.cut = 0  # texts that were longer
        self._prefix, self._begun = prefix_token, str(tokenizer.decode([prefix_token]))

    @property
    def eot_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of ``string``, begun as the tokenizer begins a text unless it is begun so already, as ``hf`` does."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._begun)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        asked = []
        for request in requests:
            before, after = self._encoded(*request.args)
            asked.append(self._score(before, after, f"{request.task_name} {request.doc_id}"))
        return list(self.answer(asked))

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[Any]:
        return list(self.answer([self._score(before, after, "") for _, before, after in requests]))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(*request.args) for request in requests]
        answers = iter(self.answer([window for of_text in windows for window in of_text]))
        return [sum(next(answers)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return list(self.answer([self._continue(*request.args) for request in requests]))

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            before, after = self._encode_pair(context, continuation)
            return before or [self._prefix], after  # a context of spaces alone belongs to what follows
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [self._prefix] else ([self._prefix], tokens)

    def _score(self, before: Sequence[int], after: Sequence[int], question: str) -> Score:
        if not 0 < len(after) <= self.max_length:
            raise ValueError(
                f"{question or 'a text'} has an answer of {len(after):,} tokens, where at least one and at most "
                f"eval.max_length={self.max_length:,} can be scored: leave that example out, or allow more"
            )
        tokens = self._fitting((*before, *after), self.max_length + 1)
        return Score(tokens, len(tokens) - len(after), question)

    def _fitting(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        self.cut += len(tokens) > most
        return tuple(tokens[-most:])

    def _windows(self, text: str) -> list[Score]:
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text), prefix_token=self._prefix, max_seq_len=self.max_length, context_len=1
        )
        pairs = [make_disjoint_window(window) for window in rolling]
        return [self._score(before, after, "") for before, after in pairs]

    def _continue(self, context: str, settings: Mapping[str, Any]) -> Continue:
        if settings.get("do_sample") or settings.get("temperature"):
            raise ValueError(f"{dict(settings)}: only greedy answers are compared; set do_sample: false in the task")
        until = settings.get("until") or []
        most = settings.get("max_gen_toks", settings.get("max_new_tokens", _MOST_NEW))
        if most >= self.max_length:
            raise ValueError(f"eval.max_length={self.max_length} has no room for an answer of {most} tokens: use more")
        tokens = self._fitting(self.tok_encode(context), self.max_length - most)
        return Continue(tokens, (until,) if isinstance(until, str) else tuple(filter(None, until)), most)


def prefix_token_of(tokenizer: Any, asked: int | None) -> int:
    """The token before a text without context: as asked, else what texts are separated by, else the first or the end.

    Raises ValueError if the tokenizer has none of them.
    """
    separator = tokenizer.get_vocab().get(_END)
    for token in (asked, separator, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(f"the tokenizer has no {_END} and no first or end token: set eval.prefix_token to a token's id")


def recorder(asked: list[Request]) -> Answerer:
    """Puts down what is asked, and answers with nothing of worth."""

    def answer(requests: Sequence[Request]) -> list[Answer]:
        asked.extend(requests)
        return [(0.0, False) if isinstance(request, Score) else "" for request in requests]

    return answer
