"""A task whose question and answering fact share no content word, in the manner of NoLiMa (arXiv 2502.05167).

Example: the text says "Greta sees the Alhambra from her desk."; the question is who lives in Granada.  A model must
know what connects the two, and cannot find the fact by its words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval.harness.ruler_fillers import Filler, RulerExample

if TYPE_CHECKING:
    from eval.harness.ruler_fillers import RulerSource

_HIDDEN = 4  # facts in a text, each about one person: a guess is right in a quarter of cases


@dataclass(frozen=True)
class Association:
    """A fact about a person, and the questions that it answers.

    ``fact`` is a format string: {} becomes the person's name.  A question is "Which person", then ``frame``, then one
    of ``asked``.  Example: fact "{} sees the Louvre from her desk.", frame "lives in", asked ("Paris", "France").
    """

    fact: str
    frame: str
    asked: tuple[str, ...]


_LANDMARKS: Mapping[str, tuple[str, str]] = {  # the city, and the country or region
    "the Alhambra": ("Granada", "Spain"),
    "the Louvre": ("Paris", "France"),
    "the Brandenburg Gate": ("Berlin", "Germany"),
    "the Colosseum": ("Rome", "Italy"),
    "the Acropolis": ("Athens", "Greece"),
    "Big Ben": ("London", "England"),
    "the Kremlin": ("Moscow", "Russia"),
    "the Hagia Sophia": ("Istanbul", "Turkey"),
    "the Taj Mahal": ("Agra", "India"),
    "the Petronas Towers": ("Kuala Lumpur", "Malaysia"),
    "the Space Needle": ("Seattle", "Washington"),
    "the Burj Khalifa": ("Dubai", "the Emirates"),
    "the Rijksmuseum": ("Amsterdam", "the Netherlands"),
    "the statue of the Little Mermaid": ("Copenhagen", "Denmark"),
    "the Atomium": ("Brussels", "Belgium"),
    "the Hofburg": ("Vienna", "Austria"),
    "the CN Tower": ("Toronto", "Canada"),
    "Copacabana beach": ("Rio de Janeiro", "Brazil"),
    "the Forbidden City": ("Beijing", "China"),
    "Shibuya crossing": ("Tokyo", "Japan"),
    "the pyramids at Giza": ("Cairo", "Egypt"),
}
_TRADES: Mapping[str, str] = {
    "milks forty cows before sunrise": "farmer",
    "fills cavities and pulls wisdom teeth": "dentist",
    "defends the accused before the jury": "lawyer",
    "kneads dough long before dawn": "baker",
    "flies jumbo jets over the ocean": "pilot",
    "marks homework until late at night": "teacher",
    "trims fringes and shaves beards": "barber",
    "hammers glowing iron on an anvil": "blacksmith",
    "mends leaking pipes and taps": "plumber",
    "delivers babies at night": "midwife",
    "lends novels and collects the fines": "librarian",
    "grinds lenses and tests eyesight": "optician",
}
ASSOCIATIONS: Sequence[Association] = (
    *(Association(f"{{}} sees {place} from her desk.", "lives in", asked) for place, asked in _LANDMARKS.items()),
    *(Association(f"{{}} {habit}.", "works as a", (trade,)) for habit, trade in _TRADES.items()),
)
NAMES = (
    "Adela", "Benita", "Cosima", "Dagmar", "Elvira", "Fatima", "Greta", "Henrike", "Ingrid", "Jolanda", "Katinka",
    "Ludmila", "Mathilda", "Nadia", "Ottilie", "Paloma", "Rosalind", "Svetlana", "Tamara", "Violeta", "Wanda", "Zelda",
)  # fmt: skip


def association_filler(source: RulerSource) -> Filler:
    """Return the filler of ``association``: a stretch of the text with four facts about four people.

    It uses only names and ends of questions that do not occur in the text.
    Raises ValueError if fewer than four names or facts are left.
    """
    seen = set(re.findall(r"\w+", " ".join(source.words).lower()))
    names = [name for name in NAMES if name.lower() not in seen]
    usable = [(one, ends) for one in ASSOCIATIONS if (ends := [end for end in one.asked if not _is_in(end, seen)])]
    if min(len(names), len(usable)) < _HIDDEN:
        raise ValueError("eval.text has too many of the names or places of the task association: give another text")

    def make(size: int, _: int) -> RulerExample:
        chosen = list(zip(random.sample(names, _HIDDEN), random.sample(usable, _HIDDEN), strict=True))
        facts = [one.fact.format(name) for name, (one, _) in chosen]
        name, (one, ends) = random.choice(chosen)
        asked = f"{one.frame} {random.choice(ends)}"
        text = _insert(facts, source.words, size)
        question = f"Question: Which person {asked}?"
        return {"input": f"{text}\n\n{question}", "gen_prefix": f"Answer: The person who {asked} is", "outputs": [name]}

    return Filler(make, least=_HIDDEN, most=len(source.words))


def _is_in(end: str, seen: Collection[str]) -> bool:
    return all(word in seen for word in end.lower().split())


def _insert(facts: Sequence[str], words: Sequence[str], size: int) -> str:
    """Return ``size`` words from a random one on, wrapping at the end, with ``facts`` after random sentences."""
    first = random.randrange(len(words))
    stretch = [words[(first + i) % len(words)] for i in range(size)]
    ends = [0, *(i for i, word in enumerate(stretch, 1) if word.endswith((".", "!", "?")))]
    places = sorted((int(random.random() * len(ends)) for _ in facts), reverse=True)
    for place, fact in zip(places, facts, strict=True):
        stretch.insert(ends[place], fact)
    return " ".join(stretch)
