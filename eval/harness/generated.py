"""Tasks whose examples are generated at a requested length: those of `long`, RULER's, and two more of `ruler`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.harness.long import LONG, make_long_tasks, read_text
from eval.harness.ruler import SIZED, make_ruler_tasks
from eval.harness.ruler_fillers import RulerSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eval.harness.tasks import Task

GENERATED = (*LONG, *SIZED)
_DEFAULT_EXAMPLES = 50


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

    ``data`` is the folder of the files that RULER's questions come from; without it lm-eval downloads them.
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
