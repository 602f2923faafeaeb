"""Conversion of requests (`bodies`) to checked plain values."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longctx.config import Sampling
from longctx.data.tokenize import tokenize
from longctx.model_shape import ModelShape
from longctx.serve.bodies import (
    Body,
    ChatBody,
    ChatMessage,
    CompletionBody,
    RequestRefused,
    TokenizeBody,
    refuse_fields,
    refuse_half_character,
)

_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
_MOST_STOPS, _MOST_STOP_CHARACTERS = 16, 1_000  # each token is compared with all of them
_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Ask:
    """A checked request: the prompts as tokens, and how to answer each.

    Choice ``i * n + j`` is answer j to prompt i.  ``max_new_tokens`` has one number for each prompt.  With ``echo``, an
    answer's text begins with its prompt's text, from ``prompt_texts``.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: tuple[int, ...]
    sampling: Sampling
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    prompt_texts: tuple[str, ...] = ()
    chat: bool = False

    @property
    def score_prompts(self) -> bool:
        """True if the request asks for log-probabilities of the prompts' tokens, too."""
        return self.echo and self.sampling.logprobs is not None

    def after(self, prompt: Sequence[int]) -> Sequence[int]:
        """Return the tokens whose text an answer continues: those of ``prompt``, but none in a chat."""
        return () if self.chat else prompt

    @property
    def choices(self) -> list[tuple[tuple[int, ...], int, Sampling]]:
        """Prompt, largest number of new tokens and sampling settings of each choice; choice i has the seed + i."""
        sizes = [pair for pair in zip(self.prompts, self.max_new_tokens, strict=True) for _ in range(self.n)]
        return [(prompt, most, self.sampling.for_answer(i)) for i, (prompt, most) in enumerate(sizes)]


@dataclass(frozen=True)
class Reader:
    """Reads requests to one model; ``defaults`` are the settings for fields that a request leaves out.

    The exceptions are the seed, which is then random, and log-probabilities, which are then off.  A request may cache
    at most ``max_tokens`` tokens for one choice, and have at most ``max_choices`` choices.  The reader's methods raise
    `RequestRefused` with what to change.
    """

    model: str
    shape: ModelShape
    tokenizer: Any
    defaults: Sampling
    max_tokens: int
    max_choices: int

    def completion(self, body: CompletionBody) -> Ask:
        """Check ``body`` and return it as plain values, with its prompts as tokens.

        Without ``max_tokens``, an answer has at most 16 tokens, and at most as many as fit.
        """
        self._refuse(body)
        given = body.prompt
        several = isinstance(given, list) and given and not isinstance(given[0], int)
        texts: list[Any] = list(given) if several else [given]
        self._refuse_choices(len(texts), body.n or 1)
        prompts = tuple(self._tokens(one) for one in texts)
        sampling = self._sampling(body, body.logprobs)
        if body.max_tokens == 0 and not body.echo:
            raise RequestRefused("max_tokens=0 answers nothing: use echo=true, or at least 1", "max_tokens")
        if body.max_tokens is None:
            most = tuple(min(_COMPLETION_TOKENS, self._room(one)) for one in prompts)
        else:
            most = (body.max_tokens,) * len(prompts)
        echoed = tuple(one if isinstance(one, str) else str(self.tokenizer.decode(one)) for one in texts)
        return self._checked(body, prompts, most, sampling, echo=bool(body.echo), prompt_texts=echoed)

    def chat(self, body: ChatBody) -> Ask:
        """Check ``body`` and return it as plain values, with its messages as the tokens of one prompt.

        Without ``max_completion_tokens`` and ``max_tokens``, an answer has at most as many tokens as fit.
        """
        self._refuse(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestRefused("top_logprobs needs logprobs=true", "top_logprobs")
        self._refuse_choices(1, body.n or 1)
        prompt = self._refuse_tokens(self.chat_tokens(body.messages), "messages")
        sampling = self._sampling(body, (body.top_logprobs or 0) if body.logprobs else None)
        if body.max_tokens == 0:
            raise RequestRefused("max_tokens=0 answers nothing: use at least 1", "max_tokens")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise RequestRefused("max_tokens and max_completion_tokens differ: leave one of them out", "max_tokens")
        most = body.max_completion_tokens or body.max_tokens or self._room(prompt)
        return self._checked(body, (prompt,), (most,), sampling, chat=True)

    def tokens(self, body: TokenizeBody) -> tuple[int, ...]:
        """Return the tokens of the text or of the conversation in ``body``."""
        refuse_fields(body)
        if body.model is not None:
            self._refuse_other_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestRefused("give either prompt or messages", "prompt")
        if body.messages is not None:
            return self.chat_tokens(body.messages)
        refuse_half_character(str(body.prompt), "prompt")
        return tuple(
            tokenize(str(body.prompt), self.tokenizer, special_tokens=body.add_special_tokens is not False).tolist()
        )

    def chat_tokens(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Return the tokens of a conversation in the model's chat template, up to the point where the answer begins."""
        if not self.tokenizer.chat_template:
            raise RequestRefused(f"{self.model} has no chat template: use /v1/completions", "messages")
        try:
            template = str(self.tokenizer.get_chat_template())
            plain = [message.plain(template) for message in messages]
            chat = self.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)
        except RequestRefused:
            raise
        except Exception as error:  # a template can raise any error, such as for the order of roles
            raise RequestRefused(f"the model's chat template refuses these messages: {error}", "messages") from error
        return tuple(chat["input_ids"])

    def _refuse(self, body: Body) -> None:
        self._refuse_other_model(body.model)
        refuse_fields(body)
        if body.stream_options:
            refuse_fields(body.stream_options)

    def _refuse_other_model(self, model: str) -> None:
        if model != self.model:
            raise RequestRefused(
                f"the model {model!r} does not exist: use {self.model!r}", "model", 404, "model_not_found"
            )

    def _tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            refuse_half_character(prompt, "prompt")
        tokens = tokenize(prompt, self.tokenizer).tolist() if isinstance(prompt, str) else prompt
        return self._refuse_tokens(tokens, "prompt")

    def _refuse_tokens(self, tokens: Sequence[int], param: str) -> tuple[int, ...]:
        """Return ``tokens`` unless there are none, or one is beyond the vocabulary."""
        if not tokens:
            raise RequestRefused("a prompt is empty: give it some text", param)
        self._refuse_unknown_token(max(tokens), param)
        return tuple(tokens)

    def _room(self, prompt: Sequence[int]) -> int:
        """Return how many tokens fit after ``prompt``, at least one."""
        return max(1, min(self.max_tokens, self.shape.max_positions) - len(prompt))

    def _sampling(self, body: Body, logprobs: int | None) -> Sampling:
        given: dict[str, Any] = {name: getattr(body, name) for name in _SAMPLED if getattr(body, name) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0  # vLLM's value for all tokens
        if body.stop is not None:
            given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        if body.stop_token_ids is not None:
            given["stop_tokens"] = tuple(body.stop_token_ids)
        _refuse_stops(given.get("stop", ()))
        seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
        try:
            greedy = not given.get("temperature", self.defaults.temperature)
            if greedy:  # check the settings that do not change the most likely token, then leave them out
                replace(self.defaults, **{**given, "temperature": 1.0})
                given |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
            return replace(self.defaults, **given, seed=seed, logprobs=logprobs)
        except ValueError as error:
            message = str(error).replace("sampling.", "")
            raise RequestRefused(message, message.partition("=")[0].split()[0]) from error

    def _checked(
        self,
        body: Body,
        prompts: tuple[tuple[int, ...], ...],
        max_new_tokens: tuple[int, ...],
        sampling: Sampling,
        **others: Any,
    ) -> Ask:
        """Return the request as an `Ask`, if its prompts and answers fit the model and the server.

        ``others`` are further fields of `Ask`.
        """
        most = min(self.max_tokens, self.shape.max_positions)
        for prompt, new in zip(prompts, max_new_tokens, strict=True):
            if len(prompt) + new > most:
                prompt_field = "messages" if isinstance(body, ChatBody) else "prompt"
                self._refuse_length(len(prompt), new, most, prompt_field, _limit_field(body))
        self._refuse_unknown_token(max(sampling.stop_tokens, default=0), "stop_token_ids")
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return Ask(body.model, prompts, max_new_tokens, sampling, body.n or 1, bool(body.stream), usage, **others)

    def _refuse_length(self, prompt: int, new: int, most: int, prompt_field: str, limit_field: str | None) -> None:
        """Raise `RequestRefused` for a prompt of ``prompt`` tokens with ``new`` tokens, of which ``most`` fit."""
        if limit_field and prompt < most:
            more = f"with {limit_field}={new:,} that is more than the {most:,} that fit"
            advice = f"{more}: shorten the prompt, or lower {limit_field}"
        elif new:
            advice = f"and {most:,} fit, with at least one of an answer: shorten the prompt"
        else:
            advice = f"and {most:,} fit: shorten the prompt"
        raise RequestRefused(
            f"the prompt has {prompt:,} tokens, {advice}",
            limit_field if limit_field and prompt < most else prompt_field,
            code="context_length_exceeded",
        )

    def _refuse_choices(self, prompts: int, n: int) -> None:
        """Raise `RequestRefused` for too many answers; call this before the prompts are tokenized, which takes long."""
        if prompts * n > self.max_choices:
            raise RequestRefused(
                f"{prompts} prompts with n={n} are {prompts * n} answers: use 1 to {self.max_choices}", "n"
            )

    def _refuse_unknown_token(self, largest: int, param: str) -> None:
        try:
            self.shape.refuse_unknown_token(largest, param)
        except ValueError as error:
            raise RequestRefused(str(error), param) from error


def _limit_field(body: Body) -> str | None:
    """Return the name of the field of ``body`` that limits the new tokens; None if there is none."""
    fields = ("max_completion_tokens", "max_tokens")
    return next((name for name in fields if getattr(body, name, None) is not None), None)


def _refuse_stops(stops: Sequence[str]) -> None:
    """Raise `RequestRefused` for stop texts that are too many or too long, or no whole characters."""
    if len(stops) > _MOST_STOPS:
        raise RequestRefused(f"stop has {len(stops)} texts: use at most {_MOST_STOPS}", "stop")
    if (characters := sum(map(len, stops))) > _MOST_STOP_CHARACTERS:
        raise RequestRefused(f"stop has {characters:,} characters: use at most {_MOST_STOP_CHARACTERS:,}", "stop")
    for text in stops:
        refuse_half_character(text, "stop")
