"""Tasks of long texts in the manner of RULER (arXiv 2404.06654): find facts that lie anywhere in real text.

An example depends on the seed, the length, its number and the text alone.  Prompt and answer together have at most the
requested number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eval.harness.tasks import Task

_ANSWER_TOKENS = 48
_QUESTION_TOKENS = 64  # first estimate of the tokens of the facts and the question
Random = np.random.Generator


@dataclass(frozen=True)
class LongText:
    """Real text by sentence, the number of tokens of each, and the text's different words of 5 to 9 letters, sorted."""

    sentences: tuple[str, ...]
    tokens: tuple[int, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class HiddenFacts:
    """Sentences to hide in a text, the question to ask after it, and all words that a correct answer contains."""

    facts: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


class LongExample(TypedDict):
    """An example: the ``prompt``, and all words that a correct answer contains."""

    prompt: str
    answers: list[str]


def _number(random: Random) -> str:
    return str(random.integers(10_000, 100_000))


def _names(random: Random, text: LongText, count: int) -> list[str]:
    if count > len(text.words):
        raise ValueError(
            f"eval.text has {len(text.words)} different words of 5 to 9 letters, and this task needs {count}: "
            "give a longer text in English, or leave the task out of eval.tasks"
        )
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
    chosen = int(random.integers(len(names)))
    return HiddenFacts(facts, f"The special number of {names[chosen]} is", (numbers[chosen],))


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


# Tasks that hide facts in a stretch of the text.
_HIDDEN: Mapping[str, Callable[[Random, LongText], HiddenFacts]] = {
    "needle": _needle,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "tracking": _tracking,
}


def _hide_in_text(
    make: Callable[[Random, LongText], HiddenFacts], random: Random, text: LongText, room: int
) -> tuple[str, Sequence[str]]:
    """Return (prompt, answers): a stretch of ``text`` with facts inserted at random places, and a question about them.

    ``make`` gives the facts, which keep their order.  The stretch has about ``room`` tokens.
    """
    hidden = make(random, text)
    sentences = _choose_stretch(random, text, room)
    places = sorted(random.integers(0, len(sentences) + 1, len(hidden.facts)).tolist(), reverse=True)
    for place, fact in zip(places, reversed(hidden.facts), strict=True):
        sentences.insert(place, fact)
    return f"{' '.join(sentences)}\n\n{hidden.question}", hidden.answers


def _common_words(random: Random, text: LongText, room: int) -> tuple[str, Sequence[str]]:
    """Return (prompt, answers): a list of words, and the question which three of them it repeats most often.

    The list has about ``room`` tokens.
    """
    entries = max(20, room // 6)  # an entry takes about five tokens
    repeated = entries // 2 // 3  # how often each of the three words is listed
    least_rare = -(-(entries - entries // 2) // (repeated - 1))  # so that each rare word is listed less often
    words = _names(random, text, min(max(len(text.words), 3 + least_rare), 3 + entries // 2))
    common, rare = words[:3], words[3:]
    listed = [common[i % 3] for i in range(entries // 2)]
    listed += [rare[i % len(rare)] for i in range(entries - len(listed))]
    order = random.permutation(len(listed))
    lines = " ".join(f"{i}. {listed[at]}" for i, at in enumerate(order, 1))
    question = "Question: Which three words are in the list most often?\nAnswer: The three words are"
    return f"Some words are in this list more often than others.\n{lines}\n\n{question}", common


def _long_qa(random: Random, text: LongText, room: int) -> tuple[str, Sequence[str]]:
    """Return (prompt, answers): a stretch of ``text``, and the question how one of its sentences ends.

    The stretch has about ``room`` tokens.  Raises ValueError if no sentence can be asked about.
    """
    for _ in range(100):
        sentences = _choose_stretch(random, text, room)
        whole = " ".join(sentences)
        for at in random.permutation(len(sentences)):
            beginning, _, last = sentences[at].rstrip(".!?").rpartition(" ")
            is_plain = len(beginning.split()) >= 6 and last.isalpha() and len(last) > 4
            if is_plain and whole.count(beginning) == 1:
                question = (
                    f"Question: How does the sentence go on that begins so: {beginning} ...?\nAnswer: {beginning}"
                )
                return f"{whole}\n\n{question}", (last,)
    raise ValueError(
        "eval.text: none of 100 random passages has a sentence that task long_qa can ask about (seven words or more, "
        "the last one of five letters or more): give a text of ordinary sentences, or leave long_qa out of eval.tasks"
    )


def _choose_stretch(random: Random, text: LongText, room: int) -> list[str]:
    """Return consecutive sentences from a random place, with ``room`` tokens in total or slightly more.

    Raises ValueError if the text is shorter than that.
    """
    total = np.cumsum(text.tokens)
    starts = np.flatnonzero(total[-1] - total >= room)
    if not len(starts):
        raise ValueError(
            f"eval.text has {total[-1]:,} tokens, too few for eval.lengths: use shorter ones, or give a longer text"
        )
    first = int(random.choice(starts))
    end = int(np.searchsorted(total, total[first] + room)) + 1
    return list(text.sentences[first + 1 : end])


MakeExample = Callable[[Random, LongText, int], tuple[str, Sequence[str]]]  # room in tokens -> prompt, answers
LONG: Mapping[str, MakeExample] = {
    **{name: lambda *args, make=make: _hide_in_text(make, *args) for name, make in _HIDDEN.items()},
    "common_words": _common_words,
    "long_qa": _long_qa,
}


def read_text(source: str, tokenizer: PreTrainedTokenizerBase) -> LongText:
    """Return the text of a file, or of the documentation that CPython ships if ``source`` is pydoc.

    Raises ValueError for a file that cannot be read or is not text.
    """
    from longctx.data.prompt import text_in

    if source == "pydoc":
        from pydoc_data.topics import topics

        whole = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        whole = text_in(source, "eval.text")
    sentences = [" ".join(one.split()) for one in re.split(r"(?<=[.!?])\s+|\n\s*\n", whole)]
    sentences = [one for one in sentences if one]
    counts = [len(ids) for ids in tokenizer([f" {one}" for one in sentences], add_special_tokens=False)["input_ids"]]
    words = sorted(set(re.findall(r"\b[a-z]{5,9}\b", whole)))
    return LongText(tuple(sentences), tuple(counts), tuple(words))


def make_examples(
    make: MakeExample,
    text: LongText,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    answer_tokens: int,
    examples: int,
    seed: int,
) -> list[LongExample]:
    """Return ``examples`` rows for lm-eval; a prompt has at most ``length - answer_tokens`` tokens.

    Raises ValueError if ``length`` is too short for the question, or ``text`` too short for ``length``.
    """
    rows: list[LongExample] = []
    for i in range(examples):
        room, excess = length - answer_tokens - _QUESTION_TOKENS, 1
        # Make the same example again with less text, until it fits.
        while excess > 0 and room > 0:
            prompt, answers = make(np.random.default_rng([seed, length, i]), text, room)
            tokens = len(tokenizer(prompt)["input_ids"])  # with BOS, if the tokenizer adds it
            excess = tokens + answer_tokens - length
            room = min(room - 8, room * (length - answer_tokens) // tokens)
        if excess > 0:
            raise ValueError(f"eval.lengths={length}: too short for this task and its question: use a greater length")
        rows.append({"prompt": prompt, "answers": list(answers)})
    return rows


def make_long_tasks(
    examples: Mapping[str, int],
    lengths: Sequence[int],
    text: LongText,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> dict[str, Task]:
    """Return lm-eval tasks named ``NAME_LENGTH``, with ``examples[NAME]`` examples each.

    Raises ValueError as `make_examples` does.
    """
    from eval.harness.tasks import make_task

    config = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answers | join(', ')}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": _ANSWER_TOKENS, "do_sample": False},
        "process_results": score_answer,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }
    tasks = {}
    for name, count in examples.items():
        for length in lengths:
            rows = make_examples(LONG[name], text, tokenizer, length, _ANSWER_TOKENS, count, seed)
            tasks[f"{name}_{length}"] = make_task(f"{name}_{length}", config, rows)
    return tasks


def score_answer(doc: LongExample, results: Sequence[str]) -> dict[str, float]:
    """Return ``{"exact_match": 1.0}`` if the text contains each answer of ``doc`` as a whole word, else 0.0."""
    text = results[0]
    return {"exact_match": float(all(re.search(rf"\b{re.escape(answer)}\b", text) for answer in doc["answers"]))}
