"""Tasks of long texts in the manner of RULER (arXiv 2404.06654): what has to be found lies anywhere in real text.

An example depends on the seed, its number and the text alone, and is at most as long as asked for in tokens, answer
included.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Random = np.random.Generator


@dataclass(frozen=True)
class LongText:
    """Real text, sentence by sentence, with how many tokens each has; ``words`` are of its long, plain ones."""

    sentences: tuple[str, ...]
    tokens: tuple[int, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class HiddenFacts:
    """What is hidden in a text (``facts``, each a sentence), what is asked behind it, and all of the right answers."""

    facts: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


def _number(random: Random) -> str:
    return str(random.integers(10_000, 100_000))


def _names(random: Random, text: LongText, count: int) -> list[str]:
    return [str(name) for name in random.choice(text.words, count, replace=False)]


def _fact(name: str, number: str) -> str:
    return f"The special number of {name} is {number}."


def _needle(random: Random, text: LongText) -> HiddenFacts:
    (name,), number = _names(random, text, 1), _number(random)
    return HiddenFacts((_fact(name, number),), f"The special number of {name} is", (number,))


def _multikey(random: Random, text: LongText) -> HiddenFacts:
    names = _names(random, text, 4)
    numbers = [_number(random) for _ in names]
    facts = tuple(map(_fact, names, numbers))
    asked = int(random.integers(len(names)))  # any of them, wherever it lies
    return HiddenFacts(facts, f"The special number of {names[asked]} is", (numbers[asked],))


def _multivalue(random: Random, text: LongText) -> HiddenFacts:
    (name,), numbers = _names(random, text, 1), [_number(random) for _ in range(3)]
    facts = tuple(f"One of the special numbers of {name} is {number}." for number in numbers)
    return HiddenFacts(facts, f"The three special numbers of {name} are", tuple(numbers))


def _tracking(random: Random, text: LongText) -> HiddenFacts:
    names, number = [name.upper() for name in _names(random, text, 4)], _number(random)
    values = [number, *(f"VAR {name}" for name in names[:-1])]
    facts = tuple(f"VAR {name} = {value}." for name, value in zip(names, values, strict=True))
    question = f"Question: Which four variables are {number}, directly or by another one?\nAnswer: They are VAR"
    return HiddenFacts(facts, question, tuple(names))


# What hides facts in text; the others are texts of their own.
_HIDDEN: Mapping[str, Callable[[Random, LongText], HiddenFacts]] = {
    "needle": _needle,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "tracking": _tracking,
}


def _hidden(
    make: Callable[[Random, LongText], HiddenFacts], random: Random, text: LongText, room: int
) -> tuple[str, Sequence[str]]:
    """A stretch of the text with the facts in it, in order but for where they lie, and the question behind it."""
    asked = make(random, text)
    taken = _stretch(random, text, room)
    places = sorted(random.integers(0, len(taken) + 1, len(asked.facts)).tolist(), reverse=True)
    for place, fact in zip(places, reversed(asked.facts), strict=True):
        taken.insert(place, fact)
    return f"{' '.join(taken)}\n\n{asked.question}", asked.answers


def _common_words(random: Random, text: LongText, room: int) -> tuple[str, Sequence[str]]:
    """A list of words, three of which are there over and over; each entry takes about five tokens."""
    entries = max(20, room // 6)
    words = _names(random, text, min(len(text.words), 3 + entries // 2))
    common, rare = words[:3], words[3:]
    listed = [common[i % 3] for i in range(entries // 2)]
    listed += [rare[i % len(rare)] for i in range(entries - len(listed))]
    order = random.permutation(len(listed))
    lines = " ".join(f"{i}. {listed[at]}" for i, at in enumerate(order, 1))
    question = "Question: Which three words are in the list most often?\nAnswer: The three words are"
    return f"Some words are in this list more often than others.\n{lines}\n\n{question}", common


def _long_qa(random: Random, text: LongText, room: int) -> tuple[str, Sequence[str]]:
    """A stretch of the text; the question is how one of its sentences ends."""
    for _ in range(100):
        taken = _stretch(random, text, room)
        whole = " ".join(taken)
        for at in random.permutation(len(taken)):
            beginning, _, last = taken[at].rstrip(".!?").rpartition(" ")
            plain = len(beginning.split()) >= 6 and last.isalpha() and len(last) > 4
            if plain and whole.count(beginning) == 1:
                ask = f"Question: How does the sentence go on that begins so: {beginning} ...?\nAnswer: {beginning}"
                return f"{whole}\n\n{ask}", (last,)
    raise ValueError("eval.text has no sentence of seven plain words or more: give prose, or leave long_qa out")


def _stretch(random: Random, text: LongText, room: int) -> list[str]:
    """Neighbouring sentences of ``room`` tokens together, or few more, from a random one on."""
    total = np.cumsum(text.tokens)
    starts = np.flatnonzero(total[-1] - total >= room)
    if not len(starts):
        raise ValueError(f"eval.text has {total[-1]:,} tokens: ask for shorter eval.lengths, or give a longer text")
    first = int(random.choice(starts))
    end = int(np.searchsorted(total, total[first] + room)) + 1
    return list(text.sentences[first + 1 : end])


Make = Callable[[Random, LongText, int], tuple[str, Sequence[str]]]
LONG: Mapping[str, Make] = {
    **{name: lambda *given, make=make: _hidden(make, *given) for name, make in _HIDDEN.items()},
    "common_words": _common_words,
    "long_qa": _long_qa,
}


def read_text(source: str, tokenizer: Any) -> LongText:
    """The text of a file, or of the documentation that CPython ships.  Raises ValueError if it is not there."""
    from longctx.config import PromptSource
    from longctx.data.prompt import prompt_tokens

    if source == "pydoc":
        from pydoc_data.topics import topics

        whole = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        prompt_tokens(PromptSource(file=source, tokens=1), tokenizer)  # refuses what is no text, in words of its own
        whole = Path(source).expanduser().read_text(encoding="utf-8")
    sentences = [" ".join(one.split()) for one in re.split(r"(?<=[.!?])\s+|\n\s*\n", whole)]
    sentences = [one for one in sentences if one]
    counts = [len(ids) for ids in tokenizer([f" {one}" for one in sentences], add_special_tokens=False)["input_ids"]]
    words = sorted(set(re.findall(r"\b[a-z]{5,9}\b", whole)))
    return LongText(tuple(sentences), tuple(counts), tuple(words))


def rows(
    make: Make, text: LongText, tokenizer: Any, length: int, answer: int, examples: int, seed: int
) -> list[dict[str, Any]]:
    """So many examples of at most ``length`` tokens, ``answer`` of them left for the answer."""
    out = []
    for i in range(examples):
        room, over = length - answer - 64, 1
        while over > 0 and room > 0:
            prompt, answers = make(np.random.default_rng([seed, length, i]), text, room)
            tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            over = tokens + answer - length
            room = min(room - 8, room * (length - answer) // tokens)
        if over > 0:
            raise ValueError(f"eval.lengths={length}: too short for this task and its question: use more")
        out.append({"prompt": prompt, "answers": list(answers)})
    return out


def long_tasks(
    examples: Mapping[str, int], lengths: Sequence[int], source: str, tokenizer: Any, most: int, seed: int
) -> dict[str, Any]:
    """lm-eval tasks ``NAME_LENGTH``, of each name so many ``examples``.

    Raises ValueError for a length that is more than the model's ``most`` tokens.
    """
    from eval.harness.tasks import built

    if over := [length for length in lengths if length > most]:
        raise ValueError(
            f"eval.lengths={over[0]}: the model's context is {most:,}; use at most that, or another context "
            "(model.max_positions and a larger model.rope_theta, or model.rope_factor)"
        )
    text, answer = read_text(source, tokenizer), 48
    config = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answers | join(', ')}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": answer, "do_sample": False},
        "process_results": found_all,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }
    wanted = [(name, length) for name in examples for length in lengths]
    tasks = {}
    for name, length in wanted:
        made = rows(LONG[name], text, tokenizer, length, answer, examples[name], seed)
        tasks[f"{name}_{length}"] = built(f"{name}_{length}", config, made)
    return tasks


def found_all(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Right if each of the answers, as it stands, is in what the model says."""
    return {"exact_match": float(all(re.search(rf"\b{re.escape(answer)}\b", results[0]) for answer in doc["answers"]))}
