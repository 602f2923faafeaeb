"""RULER's thirteen tasks (arXiv 2404.06654): lm-eval's examples, sized to an exact number of tokens.

lm-eval's functions draw the questions, needles and words.  Three things are ours.  An example depends on the seed, the
length, its number and the text alone.  Prompt and answer together have at most the requested number of tokens; lm-eval
fills a length in coarse steps and exceeds it in ``ruler_fwe``.  The essays are ``eval.text``, which lm-eval downloads.
"""

from __future__ import annotations

import importlib
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eval.harness.tasks import Task

_DEFAULT_EXAMPLES = 50
_COMMON_WORDS = 10  # that ruler_cwe asks for
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
    least ``least`` and at most ``most``.
    """

    make: Callable[[int, int], RulerExample]
    least: int = 1
    most: int = _MOST_UNITS


@dataclass(frozen=True)
class RulerTask:
    """A task: its filler at a length, the tokens of an answer, and what separates the question from its beginning."""

    filler: Callable[[RulerSource], Filler]
    answer_tokens: int
    delimiter: str = " "


@dataclass(frozen=True)
class _Needles:
    """The needles of a task: where they lie, the kinds of keys and values, and how many are hidden and asked for."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    keys_hidden: int = 1
    values_per_key: int = 1
    keys_asked: int = 1


def _ruler(name: str) -> Any:
    try:
        return importlib.import_module(f"lm_eval.tasks.ruler.{name}")
    except ImportError as error:
        raise ValueError(f"eval.tasks: RULER's tasks need a package ({error}): pip install 'lm-eval[ruler]'") from error


@cache
def _niah() -> Any:
    """Return lm-eval's module of needles.

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
        module = _ruler("prepare_niah")
    finally:
        nltk.data.find, wonderwords.RandomWord = before
    module.generate_random_word = lambda: "-".join(map(random.choice, kinds))
    module.cached_sent_tokenize = lambda text: re.split(r"(?<=[.!?])\s+", text)
    return module


class _NoWords:
    _categories: Mapping[str, list[str]] = {"nouns": [], "adjectives": [], "verbs": []}


def _needle_filler(needles: _Needles, source: RulerSource) -> Filler:
    module = _niah()
    is_essay = needles.haystack == "essay"
    haystack = list(source.words) if is_essay else module.get_haystack(needles.haystack)
    template = _ruler("niah_utils").TEMPLATE
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


def _tracking_filler(source: RulerSource) -> Filler:
    module = _ruler("vt_utils")
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
    """Return the sentences of noise in the example that ``ruler_vt`` shows first: it has at most 500 tokens."""
    sizes = range(5, 500, 5)
    for size in sizes:
        text, outputs = module.generate_input_output(size, 1, _HOPS, is_icl=True)
        if len(source.tokenizer(f"{text} {outputs}")["input_ids"]) + 30 > 500:
            break
    return max(5, size - 5)


def _common_words_filler(source: RulerSource) -> Filler:
    module = _ruler("cwe_utils")

    def make(size: int, _: int) -> RulerExample:
        module.RNG.seed(random.getrandbits(64))
        _shown, text, outputs = module.generate_input_output(size, source.length)
        prefix = module.CONFIG["answer_prefix"]
        return {"input": text[: text.rindex(prefix)].strip(), "gen_prefix": prefix.strip(), "outputs": outputs}

    return Filler(make, _COMMON_WORDS + 1, len(module.WORDS))


def _frequent_words_filler(source: RulerSource) -> Filler:
    module = _ruler("fwe_utils")

    def make(size: int, _: int) -> RulerExample:
        text, outputs, _ = module.generate_input_output(
            2**60, source.tokenizer, num_words=size, vocab_size=max(4, source.length // 50)
        )
        prefix = module.CONFIG["answer_prefix"]
        return {"input": text[: text.rindex(prefix)].strip(), "gen_prefix": prefix.strip(), "outputs": outputs}

    return Filler(make, least=30)  # fewer words do not hold the three that are asked for


def _question_filler(file: str, read: str, source: RulerSource) -> Filler:
    module = _ruler("qa_utils")
    questions, documents = _read_questions(module, read, source.data / file if source.data else None)

    def make(size: int, number: int) -> RulerExample:
        if number >= len(questions):
            raise ValueError(f"{file} has {len(questions)} questions: use eval.limit={len(questions)} or fewer")
        text, outputs = module.generate_input_output(number, size, questions, documents)
        return {"input": text, "gen_prefix": "Answer:", "outputs": list(outputs)}

    least = max(len(one["context"]) for one in questions)
    return Filler(make, least, max(least, len(documents)))


def _read_questions(module: Any, read: str, path: Path | None) -> Any:
    """Return the lists of questions and documents of ``path``, or of lm-eval's download if it is None.

    Raises ValueError for a file that is not there or is not in the set's own format.
    """
    if path is None:
        return getattr(module, read)()
    if not path.is_file():
        raise ValueError(f"eval.tasks: {path} is not there: put it there (eval/README.md), or use eval.data=hub")
    download = module.download_json
    module.download_json = lambda _: json.loads(path.read_text(encoding="utf-8"))
    try:
        return getattr(module, read).__wrapped__()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"eval.tasks: {path} is not in the data set's own format ({error!r})") from error
    finally:
        module.download_json = download


_NEEDLES = {
    "niah_single_1": _Needles("repeat"),
    "niah_single_2": _Needles("essay"),
    "niah_single_3": _Needles("essay", values="uuids"),
    "niah_multikey_1": _Needles("essay", keys_hidden=4),
    "niah_multikey_2": _Needles("needle"),
    "niah_multikey_3": _Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": _Needles("essay", values_per_key=4),
    "niah_multiquery": _Needles("essay", keys_hidden=4, keys_asked=4),
}
RULER: Mapping[str, RulerTask] = {
    **{name: RulerTask(partial(_needle_filler, needles), 128) for name, needles in _NEEDLES.items()},
    "ruler_vt": RulerTask(_tracking_filler, 30),
    "ruler_cwe": RulerTask(_common_words_filler, 120, "\n\n"),
    "ruler_fwe": RulerTask(_frequent_words_filler, 50),
    "ruler_qa_squad": RulerTask(partial(_question_filler, "squad/dev-v2.0.json", "read_squad"), 32),
    "ruler_qa_hotpot": RulerTask(
        partial(_question_filler, "hotpotqa/hotpot_dev_distractor_v1.json", "read_hotpotqa"), 32
    ),
}


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seed the generators that lm-eval draws from, and restore them afterwards."""
    before, numpy_before = random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def make_ruler_examples(name: str, source: RulerSource, examples: int, seed: int) -> list[RulerExample]:
    """Return the examples of task ``name``; prompt and answer have at most ``source.length`` tokens.

    All examples have as much filler as fits the first one, as far as there is filler (lm-eval has 8,000 words for
    ``ruler_cwe``).  An example that is longer gets less.
    Raises ValueError if the length is too short for the task, or the text or file too short for the length.
    """
    task, length = RULER[name], source.length
    filler = task.filler(source)

    def make(size: int, number: int) -> tuple[RulerExample, bool]:
        with _seeded(seed, length, number, zlib.crc32(name.encode())):
            example = filler.make(size, number)
        prompt = f"{example['input']}{task.delimiter}{example['gen_prefix']}"
        return example, len(source.tokenizer(prompt)["input_ids"]) + task.answer_tokens <= length

    most = _largest(lambda size: make(size, 0)[1], filler.least, filler.most)
    if most == filler.most == len(source.words):
        raise ValueError(f"eval.text has {most:,} words, too few for eval.lengths={length}: give a longer text")
    rows = []
    for number in range(examples):
        size = most
        example, fits = make(size, number)
        while not fits and size > filler.least:
            size = max(filler.least, size - max(1, size // 64))
            example, fits = make(size, number)
        if not fits:
            raise ValueError(f"eval.lengths={length}: too short for {name}: use more")
        rows.append(example)
    return rows


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """Return about the largest size from ``least`` to ``most`` that fits; ``least`` if none does."""
    size = least
    while size < most and fits(min(2 * size, most)):
        size = min(2 * size, most)
    step = size // 2
    while step:
        if size + step <= most and fits(size + step):
            size += step
        step //= 2
    return size


def make_ruler_tasks(
    examples: Mapping[str, int | None], lengths: Sequence[int], source: RulerSource, seed: int
) -> dict[str, Task]:
    """Return lm-eval tasks named ``NAME_LENGTH``, with ``examples[NAME]`` examples each (None: 50).

    ``lengths`` take the place of ``source.length``.  Raises ValueError as `make_ruler_examples` does.
    """
    from eval.harness.tasks import make_task

    tasks = {}
    for name, count in examples.items():
        task = RULER[name]
        config = {
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}",
            "target_delimiter": task.delimiter,
            "generation_kwargs": {"until": [], "max_gen_toks": task.answer_tokens, "do_sample": False},
            "process_results": score_answer,
            "metric_list": [{"metric": "recall", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
        }
        for length in lengths:
            rows = make_ruler_examples(name, replace(source, length=length), count or _DEFAULT_EXAMPLES, seed)
            tasks[f"{name}_{length}"] = make_task(f"{name}_{length}", config, rows)
    return tasks


def score_answer(doc: RulerExample, results: Sequence[str]) -> dict[str, float]:
    """Return lm-eval's score as ``recall``: the share of the outputs of ``doc`` that the text contains."""
    common = _ruler("common_utils")
    return {"recall": float(common.string_match_all(common.postprocess_pred(results), [doc["outputs"]]))}
