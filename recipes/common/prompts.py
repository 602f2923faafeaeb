"""Prompts of recipes.generate: the one that its settings describe, or a file of many, each checked to fit the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.config import PromptSource
from longctx.model_shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and the largest number of tokens of its answer."""

    tokens: tuple[int, ...]
    max_new_tokens: int


def read_prompts(
    file: str | None,
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    shape: ModelShape,
) -> tuple[Prompt, ...]:
    """Return the prompt that ``source`` describes, or one per line of ``file``, the setting ``prompts``.

    ``max_new_tokens`` is the default for lines of ``file`` that do not set it.

    Raises ValueError if both or neither are given, or if a prompt and its answer do not fit the model's ``shape``: more
    tokens than its context, or a token beyond its vocabulary.
    """
    from longctx.data.prompt import prompt_tokens
    from longctx.data.turns import turns_from

    if file is None:
        tokens, text = prompt_tokens(source, tokenizer)
        advice = "cut its text with prompt.tokens={}"
        refuse_too_long("", len(tokens), max_new_tokens, shape.max_positions, advice, text)
        shape.refuse_unknown_token(max(tokens, default=0), "the prompt")
        return (Prompt(tuple(tokens), max_new_tokens),)
    if also := [name for name, value in vars(source).items() if value is not None]:
        raise ValueError(f"prompts={file} and prompt.{also[0]} are both given: use one of them")
    prompts = []
    for turn in turns_from(file, max_new_tokens, "prompts"):
        tokens, text = prompt_tokens(PromptSource(text=turn.text), tokenizer)
        advice = "cut its text to {} tokens"
        refuse_too_long(f"{turn.where}: ", len(tokens), turn.max_new_tokens, shape.max_positions, advice, text)
        shape.refuse_unknown_token(max(tokens, default=0), turn.where)
        prompts.append(Prompt(tuple(tokens), turn.max_new_tokens))
    return tuple(prompts)


def refuse_too_long(name: str, prompt: int, new_tokens: int, max_positions: int, advice: str, text_tokens: int) -> None:
    """Raise ValueError if a prompt of ``prompt`` tokens and ``new_tokens`` exceed ``max_positions``.

    ``name`` begins the message and says which prompt it is.  ``advice``, a format string, says how to shorten it: {}
    becomes the number of text tokens that fit.  The prompt has ``text_tokens`` of text; the rest, its chat template and
    question, cannot be cut.
    """
    if new_tokens >= max_positions:
        raise ValueError(
            f"{name}max_new_tokens={new_tokens} fills the model's context of {max_positions:,}: use fewer, so that the "
            "prompt has room"
        )
    if (over := prompt + new_tokens - max_positions) > 0:
        fits = text_tokens - over
        shorter = advice.format(fits) if fits > 0 else "use fewer max_new_tokens, or a shorter question"
        raise ValueError(
            f"{name}the prompt has {prompt:,} tokens, and with max_new_tokens={new_tokens} that is {over:,} more than "
            f"the model's context of {max_positions:,}: {shorter}"
        )
