"""Responses in the form of OpenAI's API, as plain values that become JSON."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from longctx.infer.answer import TokenOffsets
from longctx.infer.detokenize import token_bytes
from longctx.infer.sample import TokenLogprob
from longctx.serve.bodies import RequestRefused
from longctx.serve.request import Ask

Json = dict[str, Any]
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PLAIN = {*range(32, 127)} - {ord("\\")}  # bytes that are written as themselves


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Return a response's field ``usage``: the numbers of tokens of a request, of its answers, and of both together."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> Json:
    """Return the body of an error response; the error's type follows from the HTTP ``status``.

    ``param`` and ``code`` are those of `RequestRefused`.
    """
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": _encodable(message), "type": kind, "param": param and _encodable(param), "code": code}}


def refusal(one: RequestRefused) -> Json:
    """Return the body of the response to a request that was refused."""
    return error(str(one), one.status, one.param, one.code)


def _encodable(text: str) -> str:
    """Return ``text`` with halves of surrogate pairs, which a request may have, as escapes such as ``\\ud800``."""
    return text.encode(errors="backslashreplace").decode()


def model_list(name: str, created: int, max_positions: int) -> Json:
    """Return the body of the list of models, whose only entry is ``name``.

    ``created`` is in seconds since 1970; ``max_positions`` is the model's longest sequence in tokens.
    """
    model = {"id": name, "object": "model", "created": created, "owned_by": "longctx", "max_model_len": max_positions}
    return {"object": "list", "data": [model]}


@dataclass
class Choice:
    """One answer as far as it exists: its ``text``, number of ``tokens``, and log-probabilities.

    ``finish`` says why the answer has ended (None: it has not).  ``began`` is True once it has got a first token.
    """

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    began: bool = False


@dataclass(frozen=True)
class Form:
    """The form of the response to ``ask``: a completion or a chat completion, whole or in chunks."""

    ask: Ask
    tokenizer: Any
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    _texts: dict[int, str] = field(default_factory=dict, repr=False)  # by token

    def whole(self, choices: Sequence[Choice]) -> Json:
        """Return the body of the whole response, not streamed, with all ``choices``."""
        listed = []
        for index, one in enumerate(choices):
            text = self.prompt_text(index) + one.text
            content = {"message": {"role": "assistant", "content": text}} if self.ask.chat else {"text": text}
            if self.ask.score_prompts:
                logprobs = self._with_prompt(index, one)
            else:
                logprobs = self._logprobs(one.logprobs, _places(self.offsets(index), one.logprobs))
            listed.append({"index": index, **content, "logprobs": logprobs, "finish_reason": one.finish})
        return {**self._head(stream=False), "choices": listed, "usage": self.usage(choices)}

    def first(self, index: int, prompt: tuple[TokenLogprob, ...] = ()) -> Json:
        """Return the first chunk of choice ``index``: its role in a chat, the prompt's text with ``echo``.

        ``prompt`` has the log-probabilities of the prompt's tokens but the first, if the request asks for them.
        """
        chunk = self.chunk(index, self.prompt_text(index), role=True)
        if self.ask.score_prompts:
            chunk["choices"][0]["logprobs"] = self._with_prompt(index, Choice(prompt_logprobs=prompt))
        return chunk

    def chunk(
        self,
        index: int,
        piece: str,
        logprob: TokenLogprob | None = None,
        finish: str | None = None,
        *,
        offset: int = 0,
        role: bool = False,
    ) -> Json:
        """Return one streamed chunk of choice ``index``: the next ``piece`` of its text.

        ``offset`` is the place of the token of ``logprob`` in the choice's text, for ``text_offset``.  ``finish`` is
        set in the choice's last chunk; with ``role``, a chat's chunk names the assistant.
        """
        delta = {"role": "assistant", "content": piece} if role else {"content": piece}
        content: Json = {"delta": delta} if self.ask.chat else {"text": piece}
        logprobs = self._logprobs([logprob], [offset]) if logprob else None
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(stream=True), "choices": [choice]}

    def last(self, choices: Sequence[Choice]) -> Json:
        """Return the last chunk, which comes after all choices and has the numbers of tokens."""
        return {**self._head(stream=True), "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Return the response's field ``usage``; the tokens of a prompt count once, for any number ``n`` of answers."""
        return usage(sum(map(len, self.ask.prompts)), sum(one.tokens for one in choices))

    def prompt_text(self, index: int) -> str:
        """Return the text that choice ``index`` begins with: its prompt with ``echo``, otherwise an empty text."""
        return self.ask.prompt_texts[index // self.ask.n] if self.ask.echo else ""

    def _head(self, *, stream: bool) -> Json:
        chat = self.ask.chat
        kind = f"chat.completion{'.chunk' if stream else ''}" if chat else "text_completion"
        head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created}
        return {**head, "model": self.ask.model}

    def offsets(self, index: int) -> TokenOffsets:
        """Return the places of the tokens of choice ``index`` in its text, which begins with the prompt's if echoed."""
        prompt = self.ask.prompts[index // self.ask.n]
        return TokenOffsets(self.tokenizer, len(self.prompt_text(index)), self.ask.after(prompt))

    def _logprobs(self, logprobs: Sequence[TokenLogprob], offsets: Sequence[int]) -> Json | None:
        if self.ask.sampling.logprobs is None:
            return None
        if self.ask.chat:
            return {"content": [self._chat_logprob(one) for one in logprobs], "refusal": None}
        return {
            "tokens": [self._name(one.token) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [self._top(one) for one in logprobs],
            "text_offset": list(offsets),
        }

    def _with_prompt(self, index: int, choice: Choice) -> Json | None:
        """Return the log-probabilities of prompt and answer of choice ``index``; those of the first token are None."""
        first, *others = self.ask.prompts[index // self.ask.n]
        special = {*self.tokenizer.all_special_ids}
        # The tokenizer may have added a first token, such as a BOS, that the echoed text does not have.
        is_added = first in special and not self.prompt_text(index).startswith(self.tokenizer.decode([first]))
        shown = others if is_added else [first, *others]
        of_prompt = TokenOffsets(self.tokenizer, after=[first] * is_added, special=not special.isdisjoint(shown))
        offsets = [0 if is_added else of_prompt.add(first), *_places(of_prompt, choice.prompt_logprobs)]
        offsets += _places(self.offsets(index), choice.logprobs)
        rest = self._logprobs([*choice.prompt_logprobs, *choice.logprobs], offsets[1:])
        assert rest, "asked for"
        head = {"tokens": self._name(first), "token_logprobs": None, "top_logprobs": None, "text_offset": offsets[0]}
        return {name: [head[name], *values] for name, values in rest.items()}

    def _top(self, one: TokenLogprob) -> Json:
        """Return the log-probabilities of the likeliest tokens in the place of ``one``, by text, the largest first.

        If several tokens have one text, the most likely of them counts.
        """
        top: Json = {}
        for token, logprob in one.top:
            top.setdefault(self._name(token), logprob)
        return top

    def _chat_logprob(self, one: TokenLogprob) -> Json:
        first, *top = [
            {"token": self._text(token), "logprob": logprob, "bytes": list(self._bytes(token))}
            for token, logprob in [(one.token, one.logprob), *one.top]
        ]
        return {**first, "top_logprobs": top}

    def _name(self, token: int) -> str:
        """Return the text of ``token``, or its bytes in OpenAI's form, ``bytes:\\xe9``, if they are no characters."""
        text, content = self._text(token), self._bytes(token)
        if text.encode() == content:
            return text
        return "bytes:" + "".join(chr(one) if one in _PLAIN else f"\\x{one:02x}" for one in content)

    def _bytes(self, token: int) -> bytes:
        text = self._text(token)
        return text.encode() if _REPLACEMENT not in text else token_bytes(self.tokenizer, token, text)

    def _text(self, token: int) -> str:
        """Return the text of ``token`` inside a text: a tokenizer may leave out a space at the beginning of a text."""
        if token not in self._texts:
            self._texts[token] = self._decode(token)
        return self._texts[token]

    def _decode(self, token: int) -> str:
        before, tokens = self._beginning
        text = str(self.tokenizer.decode([*tokens, token]))
        return text.removeprefix(before) if text.startswith(before) else str(self.tokenizer.decode([token]))

    @cached_property
    def _beginning(self) -> tuple[str, list[int]]:
        tokens = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        return str(self.tokenizer.decode(tokens)), tokens


def _places(offsets: TokenOffsets, logprobs: Sequence[TokenLogprob]) -> list[int]:
    return [offsets.add(one.token) for one in logprobs]
