"""Benchmarks by name: lm-eval's tasks, over local files or the hub; what they ask, and what became of the answers."""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lm_eval.tasks
import numpy as np
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from eval.harness.lm import EngineLM
from eval.harness.local import LOCAL, LocalTask, names, rows_of
from eval.stats.outcomes import Outcomes

# Outcomes of an example that are compared, the first that the task has; lm-eval's words.
_ACCURACY = ("acc", "exact_match")
_PREFERRED = "exact_match,flexible-extract"
_PERPLEXITY = "word_perplexity"
# Choices of uneven length, which are judged by likelihood a character wherever these two are reported.
_BY_LENGTH = ("arc_challenge", "hellaswag")


def load(wanted: Sequence[str], data: Path | None, fewshot: int | None, include: str | None) -> dict[str, Any]:
    """lm-eval's tasks by name, those of ``LOCAL`` from files in ``data``, if that is given, the others by its registry.

    ``include`` is a folder of further tasks in lm-eval's own format.  Raises ValueError for a file that is not there
    or not as it should be, a task without examples, one that nobody knows, and one whose data cannot be fetched.
    """
    tasks = {}
    for name in wanted:
        if name in LOCAL and data:
            tasks[name] = _from_file(name, LOCAL[name], data)
    rest = [name for name in wanted if name not in tasks]
    if rest:
        tasks |= _registered(rest, include)
    for task in tasks.values():
        task.set_fewshot_seed(1234)  # lm-eval's own default, which only its evaluator sets: else every rank has others
        if fewshot is not None and task.config.num_fewshot != 0:  # lm-eval leaves those alone that say none
            task.set_config("num_fewshot", fewshot)
            _refuse_no_shots(task)
    return tasks


def built(name: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """An lm-eval task of ``config`` over ``rows``.  Raises ValueError if there are none."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises at length
    if not rows:
        raise ValueError(f"eval.tasks: {name} has no examples: give it a file that has some")
    dataset = Dataset.from_list([dict(row) for row in rows])
    # Shots come from the same rows; lm-eval leaves the example itself out.
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
    whole = {**config, **splits, "task": name, "dataset_path": name, "custom_dataset": lambda **_: {"test": dataset}}
    for structure in ("tag", "group", "task_list", "dataset_name"):
        whole.pop(structure, None)
    return ConfigurableTask(config=whole)


def _from_file(name: str, local: LocalTask, data: Path) -> Any:
    from lm_eval.tasks._yaml_loader import load_yaml  # the public way indexes 14,000 files first

    path = data / local.file
    if not path.is_file():
        raise ValueError(
            f"eval.tasks: {name} is read from {path}, which is not there: put it there (eval/README.md), "
            "name another folder by eval.data, or use eval.data=hub"
        )
    rows = rows_of(local, path)
    if local.sorted:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / local.of)
    return built(name, {**config, **local.changes}, rows)


def _registered(wanted: Sequence[str], include: str | None) -> dict[str, Any]:
    manager = lm_eval.tasks.TaskManager(include_path=include)
    unknown = [name for name in wanted if name not in manager.task_index and not Path(name).is_file()]
    if unknown:
        raise ValueError(
            f"eval.tasks: there is no task {unknown[0]}: from files there are {names()}; lm-eval's own are listed by "
            "python -m lm_eval ls tasks"
        )
    tasks: dict[str, Any] = {}
    for name in wanted:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # whatever fetching raises: no network, no such set, no rights
            says = " ".join(str(error).split())[:200]
            raise ValueError(
                f"eval.tasks: {name} cannot be fetched from the hub ({type(error).__name__}: {says}): "
                "use a task that eval/README.md reads from files, or a machine with a network"
            ) from error
    return tasks


def _refuse_no_shots(task: Any) -> None:
    if task.config.num_fewshot and task.fewshot_docs() is None:
        raise ValueError(f"eval.num_fewshot={task.config.num_fewshot}: {task.config.task} has no examples to show")


def ask(tasks: Mapping[str, Any], limits: Mapping[str, int | None]) -> None:
    """Make every task's requests, of its first so many examples (None: all).

    Raises ValueError if there are none, or if their outcomes are none that can be compared.
    """
    for name, task in tasks.items():
        there, known = tuple(task.aggregation()), (*_ACCURACY, _PERPLEXITY)
        if not set(there) & set(known):
            raise ValueError(f"eval.tasks: {name} has {names(there)}, none of {names(known)}: it cannot be compared")
        try:
            with _quiet():
                task.build_all_requests(limit=limits[name], rank=0, world_size=1)
        except (ValueError, AssertionError) as error:  # samplers assert that there are as many as are to be shown
            shots = f" with {task.config.num_fewshot} examples shown (eval.num_fewshot)" * bool(task.config.num_fewshot)
            raise ValueError(f"eval.tasks: {name}{shots}: {error}") from error


def answered(tasks: Mapping[str, Any], lm: EngineLM) -> None:
    """Put ``lm``'s answers to all requests of all tasks, in one call of each kind."""
    kinds: dict[str, list[Any]] = {}
    for task in tasks.values():
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
            kinds.setdefault(instance.request_type, []).append(instance)
    for kind, instances in kinds.items():
        for instance, response in zip(instances, getattr(lm, kind)(instances), strict=True):
            instance.resps.append(response)


def outcomes(name: str, task: Any) -> Outcomes:
    """What lm-eval's metrics say of the answers that ``task`` has been given."""
    task.apply_filters()
    examples: dict[int, list[Any]] = {}
    for instance in task.instances:
        examples.setdefault(instance.doc_id, []).append(instance)
    found: dict[str, list[Any]] = {}
    for way in task.instances[0].filtered_resps:
        for instances in examples.values():
            given = [one.filtered_resps[way] for one in sorted(instances, key=lambda one: one.idx)]
            for metric, value in task.process_results(instances[0].doc, given).items():
                found.setdefault(metric if way == "none" else f"{metric},{way}", []).append(value)
    with _quiet():
        others = {metric: float(_total(task, metric)(values)) for metric, values in found.items()}
    if _PERPLEXITY in found:
        likely, words = zip(*found[_PERPLEXITY], strict=True)
        return Outcomes(name, tuple(map(float, likely)), words=tuple(map(float, words)), others=others)
    metric = _judged_by(name, found)
    chance = _chance(task, list(examples.values())) if task.OUTPUT_TYPE == "multiple_choice" else 0.0
    return Outcomes(name, tuple(float(value) for value in found[metric]), chance, others=others)


def _chance(task: Any, examples: Sequence[Sequence[Any]]) -> float:
    """How often guessing is right; or always the same, where all questions have the same choices, if that is more."""
    guessed = fmean(1 / len(instances) for instances in examples)
    kinds = {tuple(one.args[1] for one in instances) for instances in examples}
    if len(kinds) > 1 or len(examples) == 1:
        return guessed
    golds = Counter(str(task.doc_to_target(instances[0].doc)) for instances in examples)
    return max(guessed, golds.most_common(1)[0][1] / len(examples))


def _judged_by(name: str, found: Mapping[str, Any]) -> str:
    """Of a task's metrics, by which filter ever, that which says whether an example was answered rightly."""
    if name in _BY_LENGTH and "acc_norm" in found:
        return "acc_norm"
    first = [_PREFERRED] if _PREFERRED in found else []
    return [*first, *(metric for metric in found if metric.partition(",")[0] in _ACCURACY)][0]


def _total(task: Any, metric: str) -> Any:
    """As lm-eval adds up a metric; the mean of one that does not say how."""
    return task.aggregation().get(metric.partition(",")[0], fmean)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
