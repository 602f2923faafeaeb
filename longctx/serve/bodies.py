"""Bodies of requests in the form of OpenAI's API, and the fields that are accepted without being implemented."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
)

from longctx.config.run import SAMPLING_RANGES

_MOST_CHOICES = 128
# Fields of OpenAI's that change nothing here.
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
}  # fmt: skip
_FIELD = re.compile(
    r"""(?<!\bloop)\.\s*(\w+)\b(?!\s*\()|\[\s*['"](\w+)['"]\s*\]|\bget\(\s*['"](\w+)['"]|['"](\w+)['"]\s+(?:not\s+)?in\b"""
)
_TOOL_FIELDS = ("tool_calls", "tool_call_id", "function_call")
_IGNORED_IN_MESSAGES = ("name", "reasoning_content")
# Values with which a field of OpenAI's or vLLM's that is not implemented changes nothing, besides null.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "suffix": ("",),
    "echo": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (True,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False, True),
    "bad_words": ([],),
    "priority": (0,),
    "early_stopping": (False,),
    "length_penalty": (1.0, 1),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "return_token_strs": (False,),
}

_TAGS = ("text", "list", "texts", "tokens", "token_lists")  # kinds of a field's value, which are no fields
TokenId = Annotated[StrictInt, Field(ge=0)]
# A list may have a million wrong items: stop at the first.  A list of prompts or messages is bounded, too.
_MOST_ITEMS, _MOST_STOP_TOKENS = 10_000, 1024  # every step looks for its tokens among the stop tokens
_Tokens = Annotated[list[TokenId], Field(fail_fast=True)]
_Texts = Annotated[list[StrictStr], Field(fail_fast=True, max_length=_MOST_ITEMS)]
_TokenLists = Annotated[list[_Tokens], Field(fail_fast=True, max_length=_MOST_ITEMS)]
_Parts = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=_MOST_ITEMS)]


def _text_or_list(value: object) -> str:
    """Return the tag of the kind that ``value`` is checked against: no other one is tried."""
    return "list" if isinstance(value, list) else "text"


def _kind_of_prompt(value: object) -> str:
    """Return the tag of a prompt's kind; the first item decides for a list."""
    if not isinstance(value, list):
        return "text"
    if isinstance(value[0] if value else "", str):
        return "texts"
    return "token_lists" if isinstance(value[0], list) else "tokens"


_Text = Annotated[StrictStr, Tag("text")]
_Stop = Annotated[_Text | Annotated[_Texts, Tag("list")], Discriminator(_text_or_list)]
_Content = Annotated[_Text | Annotated[_Parts, Tag("list")], Discriminator(_text_or_list)]
_Prompt = Annotated[
    _Text | Annotated[_Texts, Tag("texts")] | Annotated[_Tokens, Tag("tokens")]
    | Annotated[_TokenLists, Tag("token_lists")],
    Discriminator(_kind_of_prompt),
]  # fmt: skip


def _shown(**bounds: float) -> Any:
    """Return the `Field` of a number whose ``bounds`` are shown in /openapi.json; `Sampling` checks them."""
    return Field(allow_inf_nan=False, json_schema_extra=dict(bounds))


def _shown_range(setting: str) -> Any:
    """Return `_shown` with the range of a ``setting`` of sampling."""
    least, most, _ = SAMPLING_RANGES[setting]
    return _shown(minimum=least, maximum=most)


class RequestRefused(ValueError):
    """A request that cannot be answered; the message says what to change.

    ``param`` names the request's field, ``status`` is the HTTP status, and ``code`` OpenAI's error code.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class StreamOptions(BaseModel):
    """Options of a stream: with ``include_usage``, the last chunk has the number of tokens.

    Other fields are accepted with the values that change nothing.
    """

    model_config = ConfigDict(extra="allow")

    include_usage: StrictBool | None = None


class Body(BaseModel):
    """Fields that completions and chat completions share; ``top_k`` to ``stop_token_ids`` are not OpenAI's."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    temperature: Annotated[StrictFloat, _shown(minimum=0)] | None = None
    top_p: Annotated[StrictFloat, _shown(exclusiveMinimum=0, maximum=1)] | None = None
    presence_penalty: Annotated[StrictFloat, _shown_range("presence_penalty")] | None = None
    frequency_penalty: Annotated[StrictFloat, _shown_range("frequency_penalty")] | None = None
    seed: StrictInt | None = None
    n: Annotated[StrictInt, Field(ge=1, le=_MOST_CHOICES)] | None = None
    stop: _Stop | None = None
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[StrictInt, Field(json_schema_extra={"minimum": -1})] | None = None
    min_p: Annotated[StrictFloat, _shown_range("min_p")] | None = None
    repetition_penalty: Annotated[StrictFloat, _shown_range("repetition_penalty")] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=_MOST_STOP_TOKENS)] | None = None


class CompletionBody(Body):
    """Body of /v1/completions: one prompt or several, each as text or as tokens."""

    prompt: _Prompt
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None


class ChatMessage(BaseModel):
    """A message of a conversation; its content is a text, or a list of parts of type ``text``."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: _Content

    def plain(self, template: str) -> dict[str, Any]:
        """Return the message with its content as one text; null and empty fields are left out.

        Raises `RequestRefused` for calls of tools, for other parts than text, and for other fields that the chat
        ``template`` does not read; a name and a chain of thought are then ignored, as transformers does.
        """
        extra = _filled(self.model_extra or {})
        for name in extra:
            if name in _TOOL_FIELDS or name not in {*_IGNORED_IN_MESSAGES, *_fields_of(template)}:
                raise RequestRefused(f"{name} of a message is not implemented: leave it out", "messages")
        content = self.content
        text = content if isinstance(content, str) else "".join(map(_text_of, content))
        for one in (self.role, text):
            refuse_half_character(one, "messages")
        return {**extra, "role": self.role, "content": text}


@lru_cache(maxsize=4)
def _fields_of(template: str) -> frozenset[str]:
    """Return the names that a chat template may read from a message, such as x of ``m.x``, ``m['x']`` and ``'x' in m``.

    Names of methods and of a loop's variables are left out.
    """
    code = " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))
    return frozenset(name for names in _FIELD.findall(code) for name in names if name)


def _filled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``fields`` without those that are null or empty."""
    return {name: value for name, value in fields.items() if value not in (None, [], {}, "")}


def _text_of(part: Mapping[str, Any]) -> str:
    """Return the text of a ``part`` of a message.  Raises `RequestRefused` for another part, or an unknown field."""
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestRefused(f"a part of type {part.get('type')} is not implemented: use text", "messages")
    if unknown := {*_filled(part)} - {"type", "text", "cache_control"}:
        raise RequestRefused(f"{min(unknown)} of a part is not implemented: leave it out", "messages")
    return str(part["text"])


def refuse_half_character(text: str, param: str) -> None:
    """Raise `RequestRefused` if ``text``, of the field ``param``, has half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"character {error.start} is half of a surrogate pair: send whole characters"
        raise RequestRefused(message, param) from error


class ChatBody(Body):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True, max_length=_MOST_ITEMS)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class TokenizeBody(BaseModel):
    """Body of /tokenize: a text, or messages of a conversation.

    ``model`` may be left out; ``add_special_tokens`` (default: true) acts on a text only.  Other fields are accepted
    with the values that change nothing.
    """

    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, max_length=_MOST_ITEMS)] | None = None
    add_special_tokens: StrictBool | None = None


def refuse_fields(body: BaseModel) -> None:
    """Raise `RequestRefused` for a field that is not implemented and has a value that would change something."""
    for name, value in (body.model_extra or {}).items():
        neutral = (None, *_NEUTRAL.get(name, ()))
        if name not in _WITHOUT_EFFECT and not any(_same(value, one) for one in neutral):
            raise RequestRefused(f"{name} is not implemented: leave it out", name)


def _same(value: object, other: object) -> bool:
    """Return True for equal values of one type: False does not equal 0."""
    return type(value) is type(other) and value == other


def describe_invalid(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Return the message and the field of the first of pydantic's ``errors``; the field is None for a broken body."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", *_TAGS)]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}, at character {place[0]}", None
    return f"{'.'.join(place) or 'the body'}: {first['msg']}", place[0] if place else None
