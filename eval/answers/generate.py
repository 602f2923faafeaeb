"""Greedy texts behind many prompts at once, up to a text that ends them; every rank makes the same calls."""

from collections.abc import Sequence
from typing import Any

from eval.answers.requests import Continue
from longctx.config import Context, Sampling
from longctx.infer.engine import Engine
from longctx.infer.session import Session


def texts(engine: Engine, context: Context, tokenizer: Any, requests: Sequence[Continue]) -> list[str]:
    """What the model goes on with behind each prompt, without the text that ended it."""
    session = Session(engine, context, Sampling())
    prompts = {i: request.tokens for i, request in enumerate(requests)}
    first = session.turn(prompts, dict.fromkeys(prompts, 1))
    made = {i: first.tokens[i] for i in prompts}
    going = list(prompts)
    while going := [i for i in going if not _ended(engine, tokenizer, requests[i], made[i])]:
        for i in set(session.sequences) - set(going):
            session.drop(i)
        for i, token in session.decode(going).items():
            made[i].append(token)
    return [_answer(engine, tokenizer, requests[i], made[i]) for i in prompts]


def _ended(engine: Engine, tokenizer: Any, request: Continue, made: Sequence[int]) -> bool:
    if len(made) >= request.most or made[-1] in engine.shape.end_tokens:
        return True
    text = tokenizer.decode(made)  # with special tokens: what is to end it may be one
    return any(end in text for end in request.until)


def _answer(engine: Engine, tokenizer: Any, request: Continue, made: Sequence[int]) -> str:
    ended = made[-1] in engine.shape.end_tokens
    text = str(tokenizer.decode(made[:-1] if ended else made, skip_special_tokens=True))
    for end in request.until:
        text = text.partition(end)[0]
    return text
