"""A task of many similar turns, one of which must be repeated, in the manner of MRCR (arXiv 2409.12640).

Example: a conversation has four answers for a song about rivers among many others; the model must repeat the third.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from eval.harness.ruler_fillers import Filler, RulerExample

if TYPE_CHECKING:
    from eval.harness.ruler_fillers import RulerSource

_FORMS = ("song", "poem", "letter", "speech")
_ORDINALS = ("first", "second", "third", "fourth")
_TOPICS = 4
_ANSWER_WORDS = 5


def coreference_filler(source: RulerSource) -> Filler:
    """Return the filler of ``coreference``: turns that ask for five words each, four of them for the same thing.

    All words have six letters, so that none contains another, and come from the text.  The words of the four turns
    occur in no other turn.  Raises ValueError if the text has too few words of six letters.
    """
    words = sorted(set(re.findall(r"\b[a-z]{6}\b", " ".join(source.words))))
    least = 2 * len(_ORDINALS) * _ANSWER_WORDS + _TOPICS
    if len(words) < least:
        raise ValueError(
            f"eval.text has {len(words)} different lower-case words of six letters, coreference needs {least}: "
            "give a longer text"
        )

    def make(size: int, _: int) -> RulerExample:
        number = random.randrange(len(_ORDINALS))
        shuffled = random.sample(words, len(words))
        topics, rest = shuffled[:_TOPICS], shuffled[_TOPICS:]
        asked, *others = random.sample([f"a {form} about {topic}" for form, topic in product(_FORMS, topics)], 16)
        answers = [[rest.pop() for _ in range(_ANSWER_WORDS)] for _ in _ORDINALS]
        turns = [(random.choice(others), random.sample(rest, _ANSWER_WORDS)) for _ in range(size - len(answers))]
        for place, answer in zip(sorted(random.sample(range(size), len(answers))), answers, strict=True):
            turns.insert(place, (asked, answer))
        question = f"User: Repeat your {_ORDINALS[number]} answer for {asked}."
        return {
            "input": "\n".join([*map(_say, turns), question]),
            "gen_prefix": "Assistant:",
            "outputs": answers[number],
        }

    return Filler(make, least=len(_ORDINALS))


def _say(turn: tuple[str, Sequence[str]]) -> str:
    asked, answer = turn
    return f"User: Give me five words for {asked}.\nAssistant: {', '.join(answer)}."
