"""Makers of RULER's examples, of any size: lm-eval's functions draw the questions, needles and words."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMMON_WORDS = 10  # words that ruler_cwe asks for
_HOPS = 4  # ruler_vt's chain has five variables
_MOST_UNITS = 1_000_000  # no example has more sentences, words or documents


class RulerExample(TypedDict):
    """An example: the prompt is ``input`` and ``gen_prefix``; ``outputs`` are the words that the answer must have."""

    input: str
    gen_prefix: str
    outputs: list[str]


@dataclass(frozen=True)
class RulerSource:
    """Material of examples, and their length.

    ``words`` are of running text.  ``data`` is the folder of files with questions; without it lm-eval downloads them.
    ``length`` is in tokens of ``tokenizer``, prompt and answer together.
    """

    words: Sequence[str]
    data: Path | None
    tokenizer: PreTrainedTokenizerBase
    length: int


@dataclass(frozen=True)
class Filler:
    """A way to make examples of any size.

    ``make(size, number)`` makes example ``number`` with ``size`` units of filler text (sentences, words, documents), at
    least ``least`` and at most ``most``.  There are ``examples`` different ones (None: any number).
    """

    make: Callable[[int, int], RulerExample]
    least: int = 1
    most: int = _MOST_UNITS
    examples: int | None = None


@dataclass(frozen=True)
class Needles:
    """The needles of a task: what surrounds them, and the kinds and numbers of keys and values.

    ``haystack`` is "essay" (the text), "repeat" (one sentence, repeated) or "needle" (other needles).  ``keys_hidden``
    keys with ``values_per_key`` values each are hidden, and ``keys_asked`` of the keys are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    keys_hidden: int = 1
    values_per_key: int = 1
    keys_asked: int = 1


def ruler_module(name: str) -> Any:
    """Return module ``name`` of lm-eval's RULER.  Raises ValueError if a package that it needs is missing."""
    try:
        return importlib.import_module(f"lm_eval.tasks.ruler.{name}")
    except ImportError as error:
        raise ValueError(f"eval.tasks: RULER's tasks need a package ({error}): pip install 'lm-eval[ruler]'") from error


@cache
def niah() -> Any:
    """Return lm-eval's module ``prepare_niah`` of RULER, which makes needles in a haystack.

    Its import downloads NLTK's sentence splitter and lists all 6 million pairs of an adjective and a noun.  Here it
    does neither: sentences end as those of ``eval.text`` do, and a pair is drawn when it is needed.
    """
    import nltk
    import wonderwords

    words = wonderwords.RandomWord()._categories
    kinds = (words["adjectives"], words["nouns"])
    before = nltk.data.find, wonderwords.RandomWord
    nltk.data.find, wonderwords.RandomWord = (lambda *_: None), _NoWords
    try:
        module = ruler_module("prepare_niah")
    finally:
        nltk.data.find, wonderwords.RandomWord = before
    module.generate_random_word = lambda: "-".join(map(random.choice, kinds))
    module.cached_sent_tokenize = lambda text: re.split(r"(?<=[.!?])\s+", text)
    return module


class _NoWords:
    _categories: Mapping[str, list[str]] = {"nouns": [], "adjectives": [], "verbs": []}


def needle_filler(needles: Needles, source: RulerSource) -> Filler:
    """Return the filler of the ``niah`` tasks: text, repeated sentences or other needles around the ``needles``."""
    module = niah()
    is_essay = needles.haystack == "essay"
    haystack = list(source.words) if is_essay else module.get_haystack(needles.haystack)
    template = ruler_module("niah_utils").TEMPLATE
    hidden = needles.keys_hidden * needles.values_per_key

    def make(size: int, _: int) -> RulerExample:
        text, answers, query = module.generate_input_output(
            size, haystack, type_haystack=needles.haystack, template=template,
            num_needle_k=needles.keys_hidden, type_needle_k=needles.keys,
            num_needle_v=needles.values_per_key, type_needle_v=needles.values, num_needle_q=needles.keys_asked,
        )  # fmt: skip
        is_one = needles.keys_asked * needles.values_per_key == 1
        asked = f"{needles.values[:-1] if is_one else needles.values} for {query}"
        prefix = f"The special magic {asked} mentioned in the provided text {'is' if is_one else 'are'}"
        return {"input": text, "gen_prefix": prefix, "outputs": answers}

    return Filler(make, hidden, len(haystack) if is_essay else _MOST_UNITS)


def tracking_filler(source: RulerSource) -> Filler:
    """Return the filler of ``ruler_vt``: sentences around a chain of variables, after an example with its answer."""
    module = ruler_module("vt_utils")
    template, question = (module.CONFIG["variable_tracking"][name] for name in ("template", "answer_prefix"))
    beginning = question[: question.index("{")]

    def make(size: int, _: int) -> RulerExample:
        shown, variables = module.generate_input_output(_shown_noise(module, source), 1, _HOPS, is_icl=True)
        shown = module.randomize_icl(f"{shown} {' '.join(variables)}\n\n")
        text, outputs = module.generate_input_output(size, 1, _HOPS)
        at, end = text.index(template[:20]), text.rindex(beginning)
        return {
            "input": f"{text[:at]}{shown}\n\n{text[at:end]}",
            "gen_prefix": text[end:].strip(),
            "outputs": outputs,
        }

    return Filler(make, least=_HOPS + 2)


def _shown_noise(module: Any, source: RulerSource) -> int:
    """Return the number of noise sentences in the solved example of ``ruler_vt``, which has at most 500 tokens."""
    sizes = range(5, 500, 5)
    for size in sizes:
        text, outputs = module.generate_input_output(size, 1, _HOPS, is_icl=True)
        if len(source.tokenizer(f"{text} {outputs}")["input_ids"]) + 30 > 500:
            break
    return max(5, size - 5)


def common_words_filler(source: RulerSource) -> Filler:
    """Return the filler of ``ruler_cwe``: a list with ``size`` different words, ten of which occur more often."""
    module = ruler_module("cwe_utils")

    def make(size: int, _: int) -> RulerExample:
        module.RNG.seed(random.getrandbits(64))
        _shown, text, outputs = module.generate_input_output(size, source.length)
        prefix = module.CONFIG["answer_prefix"]
        return {"input": text[: text.rindex(prefix)].strip(), "gen_prefix": prefix.strip(), "outputs": outputs}

    return Filler(make, _COMMON_WORDS + 1, len(module.WORDS))


def frequent_words_filler(source: RulerSource) -> Filler:
    """Return the filler of ``ruler_fwe``: coded words, whose frequencies fall with their rank (Zipf)."""
    module = ruler_module("fwe_utils")

    def make(size: int, _: int) -> RulerExample:
        text, outputs, _ = module.generate_input_output(
            2**60, source.tokenizer, num_words=size, vocab_size=max(4, source.length // 50)
        )
        prefix = module.CONFIG["answer_prefix"]
        return {"input": text[: text.rindex(prefix)].strip(), "gen_prefix": prefix.strip(), "outputs": outputs}

    return Filler(make, least=30)  # fewer words do not hold the three that are asked for


def question_filler(file: str, read: str, source: RulerSource) -> Filler:
    """Return the filler of the tasks of questions: documents of the data set around those that have the answer.

    ``file`` is relative to the folder of data; ``read`` is the name of lm-eval's function that reads it.
    """
    module = ruler_module("qa_utils")
    questions, documents = _read_questions(module, read, source.data / file if source.data else None)

    def make(size: int, number: int) -> RulerExample:
        # A copy: with all documents, lm-eval shuffles the list in place, and the questions refer to places in it.
        text, outputs = module.generate_input_output(number, size, questions, list(documents))
        return {"input": text, "gen_prefix": "Answer:", "outputs": list(outputs)}

    least = max(len(one["context"]) for one in questions)
    return Filler(make, least, max(least, len(documents)), len(questions))


def _read_questions(module: Any, read: str, path: Path | None) -> Any:
    """Return the lists of questions and documents of ``path``, or of lm-eval's download if it is None.

    Raises ValueError for a file that is not there, is not in the set's own format, or has no questions.
    """
    if path is None:
        return getattr(module, read)()
    if not path.is_file():
        raise ValueError(f"eval.tasks: {path} does not exist: add it (see eval/README.md), or use eval.data=hub")
    download = module.download_json
    module.download_json = lambda _: json.loads(path.read_text(encoding="utf-8"))
    try:
        questions, documents = getattr(module, read).__wrapped__()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"eval.tasks: {path} is not in the data set's own format ({error!r}): give the file as it was published"
        ) from error
    finally:
        module.download_json = download
    if not questions:
        raise ValueError(f"eval.tasks: {path} has no questions: give the file as it was published")
    return questions, documents
