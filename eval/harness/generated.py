"""Tasks whose examples are generated at a requested length: those of `long`, RULER's, and two more of `ruler`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.harness.long import LONG, make_long_tasks, read_text
from eval.harness.ruler import SIZED, make_ruler_tasks
from eval.harness.ruler_fillers import RulerSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eval.harness.tasks import Task

GENERATED = (*LONG, *SIZED)
# Tasks whose examples ask for one fact that occurs once in the text.
_NEEDLES = (
    "needle",
    "multikey",
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "association",
)
_DEFAULT_EXAMPLES = 50


def depth_of(name: str, doc: Mapping[str, Any]) -> float | None:
    """Return where the fact that ``doc`` asks for lies in its prompt: the share of characters before it, from 0 to 1.

    ``name`` is a task's name with its length, such as needle_1024.  The depth is None unless that task asks for one
    fact.
    """
    if name.rpartition("_")[0] not in _NEEDLES:
        return None
    text = doc["prompt"] if "prompt" in doc else doc["input"]
    (answer,) = doc["answers"] if "prompt" in doc else doc["outputs"]
    return float(text.index(answer) / len(text))


def make_generated_tasks(
    examples: Mapping[str, int | None],
    lengths: Sequence[int],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    data: Path | None,
    seed: int,
) -> dict[str, Task]:
    """Return lm-eval tasks named ``NAME_LENGTH``, with ``examples[NAME]`` examples each (None: 50).

    ``text`` is what `read_text` takes: a file, or pydoc.  ``data`` is the folder of the files that RULER's questions
    come from; without it lm-eval downloads them.
    Raises ValueError for a length of more than ``max_length`` tokens, and as `read_text` and the tasks' makers do.
    """
    if too_long := [length for length in lengths if length > max_length]:
        raise ValueError(
            f"eval.lengths={too_long[0]}: the model's context is {max_length:,}; use at most that, or another context "
            "(model.max_positions and a larger model.rope_theta, or model.rope_factor)"
        )
    source = read_text(text, tokenizer)
    words = " ".join(source.sentences).split(" ")
    counts = {name: count or _DEFAULT_EXAMPLES for name, count in examples.items()}
    sized = {name: counts.pop(name) for name in examples if name in SIZED}
    tasks = make_long_tasks(counts, lengths, source, tokenizer, seed)
    return tasks | make_ruler_tasks(sized, lengths, RulerSource(words, data, tokenizer, max_length), seed)
