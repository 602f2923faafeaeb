"""Benchmarks by name: lm-eval's tasks over local files or the hub, their requests, and the outcomes of examples."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask as Task

from eval.harness.generated import GENERATED, depth_of
from eval.harness.local import LOCAL, LocalTask, join_names, read_rows
from eval.stats.compare import SCREENED
from eval.stats.outcomes import Outcomes

if TYPE_CHECKING:
    from lm_eval.api.model import LM

__all__ = ("Task", "answer_tasks", "build_requests", "collect_outcomes", "load_tasks", "make_task")
# Metrics that say whether an example was answered correctly, in lm-eval's names; the first that a task has is used.
# RULER's recall is the share of the answer that was found.
_ACCURACY = ("acc", "exact_match", "recall")
# InfiniteBench's score is a match, an F1 score or ROUGE-L.  In two of its tasks the answer is one of four letters,
# generated as text: a guess is right in a quarter of cases.
_SCORED = "infinitebench_"
_KNOWN_CHANCE = {"infinitebench_code_debug": 0.25, "infinitebench_longbook_choice_en": 0.25,
                 "association": 0.25, "coreference": 0.25}  # fmt: skip
_PREFERRED = "exact_match,flexible-extract"
_PERPLEXITY = "word_perplexity"
# Tasks whose choices differ in length: judged by likelihood per character (acc_norm), as is customary.
_LENGTH_NORMALIZED = ("arc_challenge", "hellaswag")
_FEWSHOT_SEED = 1234  # lm-eval's default, which only its evaluator sets: without it every rank draws other examples


def load_tasks(names: Sequence[str], data: Path | None, fewshot: int | None, include: str | None) -> dict[str, Task]:
    """Return lm-eval's tasks by name; the name of one of lm-eval's groups gives all of its tasks.

    Tasks in `LOCAL` are read from files in the folder ``data``, if it is given.  The others come from lm-eval's
    registry.
    ``include`` is a folder of further tasks in lm-eval's format.  ``fewshot`` examples are shown before each question
    (None: as each task is configured).  A task that is configured to show none stays so, as in lm-eval.
    Raises ValueError for

    * a missing or malformed file, and a task without examples;
    * an unknown task, and a task whose data cannot be fetched;
    * an ``include`` that is not used.
    """
    tasks = {}
    for name in names:
        if name in LOCAL and data:
            tasks[name] = _load_local(name, LOCAL[name], data)
    rest = [name for name in names if name not in tasks]
    if include and not any(Path(include).expanduser().rglob("*.yaml")):
        raise ValueError(f"eval.include={include} has no tasks: give a folder with their .yaml files")
    if include and not rest:
        raise ValueError(f"eval.include={include} is not used: name some of its tasks in eval.tasks, or leave it out")
    if rest:
        tasks |= _load_registered(rest, include)
    for task in tasks.values():
        task.set_fewshot_seed(_FEWSHOT_SEED)
        if fewshot is not None and task.config.num_fewshot != 0:
            task.set_config("num_fewshot", fewshot)
            _refuse_no_shots(task)
    return tasks


def make_task(name: str, config: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> Task:
    """Return the lm-eval task ``name`` of ``config``, with ``rows`` as its examples.

    Raises ValueError if there are no rows.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it prints long advice for every task
    if not rows:
        raise ValueError(f"eval.tasks: {name} has no examples: give it a file that has some")
    dataset = Dataset.from_list([dict(row) for row in rows])
    # Shown examples come from the same rows; lm-eval leaves out the example that is asked.
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
    merged = {**config, **splits, "task": name, "dataset_path": name, "custom_dataset": lambda **_: {"test": dataset}}
    for structure in ("tag", "group", "task_list", "dataset_name"):
        merged.pop(structure, None)
    return Task(config=merged)


def _load_local(name: str, local: LocalTask, data: Path) -> Task:
    from lm_eval.tasks._yaml_loader import load_yaml  # lm-eval's public function indexes 14,000 files first

    path = data / local.file
    if not path.is_file():
        raise ValueError(
            f"eval.tasks: {name} is read from {path}, which does not exist: add it (see eval/README.md), "
            "name another folder with eval.data=DIR, or use eval.data=hub"
        )
    rows = read_rows(local, path)
    if local.sorted:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / local.config_file)
    return make_task(name, {**config, **local.changes}, rows)


def _load_registered(names: Sequence[str], include: str | None) -> dict[str, Task]:
    manager = lm_eval.tasks.TaskManager(include_path=include)
    unknown = [name for name in names if name not in manager.task_index and not Path(name).is_file()]
    if unknown:
        raise ValueError(
            f"eval.tasks: there is no task {unknown[0]}: use one that is read from files ({join_names()}), "
            f"one of long texts ({', '.join(GENERATED)}), or one of lm-eval's, which python -m lm_eval ls tasks lists"
        )
    tasks: dict[str, Task] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # fetching raises many kinds: no network, no such data set, no access
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"eval.tasks: {name} cannot be fetched from the hub ({type(error).__name__}: {reason}): "
                "use a task that eval/README.md reads from files, or a machine with a network"
            ) from error
    return tasks


def _refuse_no_shots(task: Task) -> None:
    if task.config.num_fewshot and task.fewshot_docs() is None:
        raise ValueError(
            f"eval.num_fewshot={task.config.num_fewshot}: {task.config.task} has no examples to show; "
            "use eval.num_fewshot=0, or leave the task out"
        )


def build_requests(
    tasks: Mapping[str, Task], limits: Mapping[str, int | None], chat_template: Callable[..., str] | None = None
) -> None:
    """Build and store every task's requests, for its first ``limits[name]`` examples (None: all).

    ``chat_template`` turns messages into text.  With it, a prompt is a conversation, and the examples that are shown
    are its earlier turns.

    Raises ValueError for a task without examples, and for one without a metric that can be compared.
    """
    chat: dict[str, Any] = {}
    if chat_template:
        chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": chat_template}
    for name, task in tasks.items():
        metrics, comparable = tuple(task.aggregation()), (*_accuracy_metrics(name), _PERPLEXITY)
        if not set(metrics) & set(comparable):
            raise ValueError(
                f"eval.tasks: {name} has the metrics {join_names(metrics)}, and none of {join_names(comparable)}, "
                "so it cannot be compared: leave it out"
            )
        try:
            with _silence_progress():
                task.build_all_requests(limit=limits[name], rank=0, world_size=1, **chat)
        except (ValueError, AssertionError) as error:  # samplers assert that there are enough examples to show
            shots = f" with {task.config.num_fewshot} examples shown (eval.num_fewshot)" * bool(task.config.num_fewshot)
            mend = f"use a smaller eval.num_fewshot, or leave {name} out" if shots else f"leave {name} out"
            raise ValueError(f"eval.tasks: {name}{shots}: {str(error) or 'lm-eval cannot build it'}: {mend}") from error


def first_examples(task: Task, n: int) -> Task:
    """Return a copy of ``task`` with the requests of its first ``n`` examples only; the requests are shared objects."""
    view = copy.copy(task)
    view._instances = [instance for instance in task.instances if instance.doc_id < n]
    return view


def count_examples(task: Task) -> int:
    """Return the number of examples to which the requests of ``task`` belong."""
    return len({instance.doc_id for instance in task.instances})


def answer_tasks(tasks: Mapping[str, Task], lm: LM) -> None:
    """Ask ``lm`` the requests of all tasks, in one call for each kind, and store its answers in the tasks.

    Earlier answers are discarded.
    """
    by_kind: dict[str, list[Instance]] = {}
    for task in tasks.values():
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
            by_kind.setdefault(instance.request_type, []).append(instance)
    for kind, instances in by_kind.items():
        for instance, response in zip(instances, getattr(lm, kind)(instances), strict=True):
            instance.resps.append(response)


def collect_outcomes(name: str, task: Task) -> Outcomes:
    """Return each example's outcome by the metric that decides the task, and the totals of all of lm-eval's metrics.

    `answer_tasks` must have stored the answers.
    """
    # 1. Apply lm-eval's filters, and group the requests by example.
    task.apply_filters()
    examples: dict[int, list[Instance]] = {}
    for instance in task.instances:
        examples.setdefault(instance.doc_id, []).append(instance)
    # 2. Compute each metric of each example; "metric,filter" unless the filter is "none".
    values: dict[str, list[Any]] = {}
    margins: list[float | None] = []
    for filter_name in task.instances[0].filtered_resps:
        for instances in examples.values():
            answers = [one.filtered_resps[filter_name] for one in sorted(instances, key=lambda one: one.idx)]
            if len(margins) < len(examples):  # filters change no log-probability
                margins.append(_margin(task, instances[0].doc, answers))
            for metric, value in task.process_results(instances[0].doc, answers).items():
                values.setdefault(metric if filter_name == "none" else f"{metric},{filter_name}", []).append(value)
    with _silence_progress():
        totals = {metric: _aggregate(task, metric, each) for metric, each in values.items()}
    # 3. Choose the metric to compare.
    if _PERPLEXITY in values:
        log_likelihoods, words = zip(*values[_PERPLEXITY], strict=True)
        return Outcomes(name, tuple(map(float, log_likelihoods)), words=tuple(map(float, words)), others=totals)
    metric = _choose_accuracy(name, values)
    kind, _, length = name.rpartition("_")
    is_generated = kind in GENERATED
    depths = [depth_of(name, instances[0].doc) for instances in examples.values()]
    is_choice = task.OUTPUT_TYPE == "multiple_choice"
    chance = _KNOWN_CHANCE.get(name, _KNOWN_CHANCE.get(kind, 0.0))
    if is_choice:
        chance = _chance(task, list(examples.values())[:SCREENED], metric.partition(",")[0])
    return Outcomes(
        name,
        tuple(float(value) for value in values[metric]),
        chance,
        others=totals,
        margins=tuple(one for one in margins if one is not None) if None not in margins else (),
        available=(task.config.metadata or {}).get("available") if is_generated else len(task.eval_docs),
        depths=tuple(one for one in depths if one is not None),
        length=int(length) if is_generated else None,
    )


def _margin(task: Task, doc: Mapping[str, Any], answers: Sequence[Any]) -> float | None:
    """Return the margin of the right answer (nats): its log-probability, minus the largest other one if there is any.

    Returns None for generated text, if several answers are right, or if a choice has no single log-probability.  A task
    that computes its results itself may have several right answers.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return float(answers[0][0])
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return None
    choices = task.doc_to_choice(doc)
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    right = choices.index(right) if right in choices else right
    if not isinstance(right, int) or len(answers) != len(choices) or not 0 <= right < len(choices) > 1:
        return None
    log_probs = [float(value) for value, _ in answers]
    return log_probs.pop(right) - max(log_probs)


def _chance(task: Task, examples: Sequence[Sequence[Instance]], metric: str) -> float:
    """Return the accuracy of guessing, from the first `SCREENED` examples, so that it does not depend on their number.

    It is the mean of 1 / choices.  If all questions have the same choices, such as yes and no, it is the share of the
    most common answer, if that is larger.  A task that computes its results itself, such as TruthfulQA with several
    right answers, is asked for its ``metric`` with each choice in turn as the only likely one.
    """
    if callable(task.config.process_results):
        return fmean(_chance_of_example(task, instances, metric) for instances in examples)
    uniform = fmean(1 / len(task.doc_to_choice(instances[0].doc)) for instances in examples)
    choices = {tuple(one.args[1] for one in instances) for instances in examples}
    if len(choices) > 1 or len(examples) == 1:
        return uniform
    answers = Counter(str(task.doc_to_target(instances[0].doc)) for instances in examples)
    return max(uniform, answers.most_common(1)[0][1] / len(examples))


def _chance_of_example(task: Task, instances: Sequence[Instance], metric: str) -> float:
    """Return the mean of ``metric`` over guesses, each of which makes one of the choices certain."""
    numbers = range(len(instances))
    guesses = [[(0.0 if one == guess else -1e4, False) for one in numbers] for guess in numbers]
    return fmean(float(task.process_results(instances[0].doc, guess)[metric]) for guess in guesses)


def _choose_accuracy(name: str, metrics: Mapping[str, object]) -> str:
    """Return the metric of task ``name`` that says whether an example was answered correctly.

    It is one of the keys of ``metrics``: "metric", or "metric,filter".
    """
    if name in _LENGTH_NORMALIZED and "acc_norm" in metrics:
        return "acc_norm"
    first = [_PREFERRED] if _PREFERRED in metrics else []
    return [*first, *(metric for metric in metrics if metric.partition(",")[0] in _accuracy_metrics(name))][0]


def _accuracy_metrics(name: str) -> Sequence[str]:
    return (*_ACCURACY, "score") if name.startswith(_SCORED) else _ACCURACY


def _aggregate(task: Task, metric: str, values: Sequence[Any]) -> float:
    try:
        return float(_aggregation(task, metric)(values))
    except OverflowError:  # lm-eval's perplexity of a model that predicts nothing
        return math.inf


def _aggregation(task: Task, metric: str) -> Callable[[Sequence[Any]], float]:
    """Return the function by which lm-eval sums up ``metric`` of ``task`` over examples; the mean if it names none."""
    aggregation: Callable[[Sequence[Any]], float] = task.aggregation().get(metric.partition(",")[0], fmean)
    return aggregation


@contextlib.contextmanager
def _silence_progress() -> Iterator[None]:
    """Hide lm-eval's progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
