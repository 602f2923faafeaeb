"""RULER's thirteen tasks (arXiv 2404.06654) and two more, sized to an exact number of tokens.

lm-eval's functions draw RULER's questions, needles and words.  Three things differ from lm-eval:

* An example depends on the seed, the length, its number and the text alone.
* Prompt and answer together have at most the requested number of tokens; lm-eval fills a length in coarse steps and
  exceeds it in ``ruler_fwe``.
* The essays come from ``eval.text``; lm-eval downloads essays.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from eval.harness.associations import association_filler
from eval.harness.coreference import coreference_filler
from eval.harness.ruler_fillers import (
    Filler,
    Needles,
    RulerExample,
    RulerSource,
    common_words_filler,
    frequent_words_filler,
    needle_filler,
    question_filler,
    ruler_module,
    tracking_filler,
)

if TYPE_CHECKING:
    from eval.harness.tasks import Task


@dataclass(frozen=True)
class RulerTask:
    """A RULER task: its filler, the number of tokens of an answer, and the text between question and answer.

    ``delimiter`` separates the question from ``gen_prefix``, the beginning of the answer.  ``until`` are texts that end
    an answer.
    """

    filler: Callable[[RulerSource], Filler]
    answer_tokens: int
    delimiter: str = " "
    until: tuple[str, ...] = ()


_NEEDLES = {
    "niah_single_1": Needles("repeat"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", keys_hidden=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", values_per_key=4),
    "niah_multiquery": Needles("essay", keys_hidden=4, keys_asked=4),
}
# Tasks of questions: the file, relative to the folder of data, and the name of lm-eval's function that reads it.
QUESTIONS = {
    "ruler_qa_squad": ("squad/dev-v2.0.json", "read_squad"),
    "ruler_qa_hotpot": ("hotpotqa/hotpot_dev_distractor_v1.json", "read_hotpotqa"),
}
RULER: Mapping[str, RulerTask] = {
    **{name: RulerTask(partial(needle_filler, needles), 128) for name, needles in _NEEDLES.items()},
    "ruler_vt": RulerTask(tracking_filler, 30),
    "ruler_cwe": RulerTask(common_words_filler, 120, "\n\n"),
    "ruler_fwe": RulerTask(frequent_words_filler, 50),
    **{name: RulerTask(partial(question_filler, file, read), 32) for name, (file, read) in QUESTIONS.items()},
}
# All tasks that are sized here.
SIZED: Mapping[str, RulerTask] = {
    **RULER,
    "association": RulerTask(association_filler, 16, "\n", ("\n",)),
    "coreference": RulerTask(coreference_filler, 48, "\n", ("\n",)),
}


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seed the generators that lm-eval draws from with ``numbers`` inside the ``with`` block; restore them after it."""
    before, numpy_before = random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def make_ruler_examples(
    name: str, source: RulerSource, examples: int, seed: int, *, first: int = 0, step: int = 1
) -> list[RulerExample]:
    """Return the examples of task ``name``; prompt and answer have at most ``source.length`` tokens.

    Tasks with a file of questions ask question ``first`` and every ``step``-th one after it.

    Each example is filled up to about that length.  It may be shorter where filler is limited: lm-eval has only 8,000
    words for ``ruler_cwe``.
    Raises ValueError if the length is too short for the task, or the text or the file of questions too short for the
    examples.
    """
    task, length = SIZED[name], source.length
    filler = task.filler(source)
    if filler.examples and first + step * (examples - 1) >= filler.examples:
        share = f" for {step} lengths" if step > 1 else ""
        each = filler.examples // step
        fix = f"eval.limit={each} or fewer" if each else f"at most {filler.examples} eval.lengths"
        raise ValueError(f"{name} has {filler.examples} questions{share}: use {fix}")

    def make(size: int, number: int) -> RulerExample | None:
        with _seeded(seed, length, number, zlib.crc32(name.encode())):
            example = filler.make(size, first + step * number)
        prompt = f"{example['input']}{task.delimiter}{example['gen_prefix']}"
        fits = len(source.tokenizer(prompt)["input_ids"]) + task.answer_tokens <= length
        return example if fits else None

    most = _largest(lambda size: make(size, 0) is not None, filler.least, filler.most)
    if most == filler.most == len(source.words):
        raise ValueError(
            f"eval.text has {most:,} words, too few for eval.lengths={length}: give a longer text, or a shorter length"
        )
    rows = [_fit(partial(make, number=number), most, filler) for number in range(examples)]
    if None in rows:
        raise ValueError(f"eval.lengths={length}: too short for {name}: use a greater length")
    return [row for row in rows if row is not None]


def _fit(make: Callable[[int], RulerExample | None], size: int, filler: Filler) -> RulerExample | None:
    """Return the example of about the largest size that fits, beginning with ``size``; None if none does.

    ``make`` returns None for an example that is too long.
    """
    example = make(size)
    is_short = example is not None
    while example is None and size > filler.least:
        size = max(filler.least, size - max(1, size // 64))
        example = make(size)
    while is_short and size < filler.most:
        size = min(filler.most, size + max(1, size // 64))
        larger = make(size)
        if larger is None:
            break
        example = larger
    return example


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """Return about the largest size from ``least`` to ``most`` that ``fits`` accepts; ``least`` if it accepts none."""
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
    examples: Mapping[str, int], lengths: Sequence[int], source: RulerSource, seed: int
) -> dict[str, Task]:
    """Return lm-eval tasks named ``NAME_LENGTH``, with ``examples[NAME]`` examples each.

    ``lengths`` take the place of ``source.length``.  Each length has questions of its own: an interval takes examples
    for independent.  Raises ValueError as `make_ruler_examples` does.
    """
    from eval.harness.tasks import make_task

    tasks = {}
    for name, count in examples.items():
        task = SIZED[name]
        questions = task.filler(source).examples
        config = {
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}",
            "target_delimiter": task.delimiter,
            "generation_kwargs": {"until": list(task.until), "max_gen_toks": task.answer_tokens, "do_sample": False},
            "process_results": score_answer,
            "metric_list": [{"metric": "recall", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
            "metadata": {"available": questions // len(lengths) if questions else None},
        }
        for first, length in enumerate(lengths):
            sized = replace(source, length=length)
            rows = make_ruler_examples(name, sized, count, seed, first=first, step=len(lengths))
            tasks[f"{name}_{length}"] = make_task(f"{name}_{length}", config, rows)
    return tasks


def score_answer(doc: RulerExample, results: Sequence[str]) -> dict[str, float]:
    """Return lm-eval's score as ``recall``: the share of ``doc``'s outputs that the generated text contains."""
    common = ruler_module("common_utils")
    return {"recall": float(common.string_match_all(common.postprocess_pred(results), [doc["outputs"]]))}
