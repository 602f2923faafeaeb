"""Continuation of many prompts at once, greedy or sampled; every rank makes the same calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.answers.requests import Continue, key
from longctx.config import Context, Sampling
from longctx.infer.engine import Engine
from longctx.infer.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate_texts(
    engine: Engine, context: Context, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Continue]
) -> list[str]:
    """Return the continuation of each of ``requests``, in their order, without the text that ended it.

    Every rank must make the same call.  A sampled continuation has a seed that depends on its request, not on the other
    requests.
    """
    # 1. Prefill all prompts in one pass; it gives every first token.
    session = Session(engine, context, Sampling())
    prompts = {i: request.tokens for i, request in enumerate(requests)}
    for i, request in enumerate(requests):
        if request.sampling:
            session.add(i, len(request.tokens), 1, request.sampling.for_answer(int(key(request)[:8], 16)))
    first = session.turn(prompts, dict.fromkeys(prompts, 1))
    new_tokens = {i: first.tokens[i] for i in prompts}
    # 2. Decode a token at a time; drop the sequences that have ended.
    running = list(prompts)
    while running := [i for i in running if not has_ended(engine, tokenizer, requests[i], new_tokens[i])]:
        for i in set(session.sequences) - set(running):
            session.drop(i)
        for i, token in session.decode(running).items():
            new_tokens[i].append(token)
    return [decode_answer(engine, tokenizer, requests[i], new_tokens[i]) for i in prompts]


def has_ended(engine: Engine, tokenizer: PreTrainedTokenizerBase, request: Continue, new_tokens: Sequence[int]) -> bool:
    """Return True if the answer ``new_tokens`` has ended.

    This is so if it has as many tokens as the request allows, if its last token is an end token, or if its text
    contains a text of ``until``.
    """
    if len(new_tokens) >= request.max_new_tokens or new_tokens[-1] in engine.shape.end_tokens:
        return True
    text = tokenizer.decode(new_tokens)  # with special tokens, since ``until`` may name one
    return any(end in text for end in request.until)


def decode_answer(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, request: Continue, new_tokens: Sequence[int]
) -> str:
    """Return the text of ``new_tokens`` before the first text of ``until``.

    If the last token is an end token, it is left out.  Special tokens are not part of the text.
    """
    has_end_token = new_tokens[-1] in engine.shape.end_tokens
    text = str(tokenizer.decode(new_tokens[:-1] if has_end_token else new_tokens, skip_special_tokens=True))
    for end in request.until:
        text = text.partition(end)[0]
    return text
