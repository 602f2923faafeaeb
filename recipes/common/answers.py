"""Answers of recipes.generate, as it prints and writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from recipes.common.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longctx.infer.sample import TokenLogprob


class Answer(TypedDict, total=False):
    """An answer as written to ``out``: its text and token ids, and the prompt's length and token ids.

    Only ``text`` ends before a stop text; ``token_ids`` has all tokens.  If ``sampling.logprobs`` is set, ``logprobs``
    has the log-probabilities of the answer's tokens.
    """

    text: str
    prompt_tokens: int
    token_ids: list[int]
    prompt_token_ids: list[int]
    logprobs: list[dict[str, object]]


def decode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    token_ids: Sequence[list[int]],
    logprobs: Sequence[Sequence[TokenLogprob]] | None,
    stop: Sequence[str],
) -> list[Answer]:
    """Return the answer to each prompt, decoded from its ``token_ids``; its text ends before the first ``stop`` text.

    ``token_ids`` and ``logprobs`` have an entry for each prompt.  ``logprobs`` has the log-probabilities of its
    answer's tokens (None: not asked for).
    """
    from longctx.infer.answer import cut_at_stop

    answers: list[Answer] = []
    for i, prompt in enumerate(prompts):
        answer: Answer = {
            "text": cut_at_stop(tokenizer.decode(token_ids[i], skip_special_tokens=True), stop),
            "prompt_tokens": len(prompt.tokens),
            "token_ids": token_ids[i],
            "prompt_token_ids": list(prompt.tokens),
        }
        if logprobs is not None:
            answer["logprobs"] = [vars(one) for one in logprobs[i]]
        answers.append(answer)
    return answers


def in_megabytes(sizes: Sequence[int]) -> str:
    """Return ``sizes``, bytes by rank, as one text in MB, such as 1.50 | 1.25 MB."""
    return " | ".join(f"{size / 1e6:,.2f}" for size in sizes) + " MB"
