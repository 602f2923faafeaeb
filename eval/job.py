"""An evaluation as it was requested: models, tasks and requests, all checked before any rank starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from eval.answers.requests import Continue, Request
from eval.refuse import (
    refuse_other_order,
    refuse_other_sizes,
    refuse_other_worlds,
    refuse_too_short,
    refuse_unknown_gate,
    refuse_unknown_tokens,
)
from eval.sensitivity import drop_none_yet, fill_in_orders, lacks_order, make_order_jobs
from eval.settings import ROLLING, EvalConfig, EvalSettings
from eval.variants import Variant, compose_variants, refuse_other_model, refuse_other_template, resolve_variant
from longctx.config import Sampling, Track
from longctx.spd.plan import saved_plan
from recipes.common.cli import say
from recipes.common.manifest import refuse_other_recipe
from recipes.common.overrides import path_word
from recipes.common.places import refuse_unwritable_folder
from recipes.common.provenance import hardware, provenance
from recipes.common.settings import as_dict, section, top_level
from recipes.common.target import say_unapplied

if TYPE_CHECKING:
    from eval.harness.lm import EngineLM
    from eval.harness.tasks import Task


@dataclass(frozen=True)
class EvalJob:
    """The inputs of an evaluation.

    ``configs`` are the variants' names and whole configurations, the baseline first; ``variants`` are the same,
    resolved.  A variant whose order of blocks must still be measured drops no block until `with_measured_orders`.
    Every variant answers ``requests``.  ``lm`` is lm-eval's view of the model: it gives each request of ``tasks`` its
    stored answer.  ``config`` goes to the tracker.
    """

    settings: EvalSettings
    eval: EvalConfig
    track: Track
    config: Mapping[str, object]
    configs: tuple[tuple[str, DictConfig], ...]
    variants: tuple[Variant, ...]
    tasks: Mapping[str, Task]
    lm: EngineLM
    requests: tuple[Request, ...]

    @property
    def out(self) -> Path:
        """Folder of the report and of the stored answers."""
        return Path(self.settings.out)

    def requests_of(self, tasks: Mapping[str, Task]) -> tuple[Request, ...]:
        """Return the requests of ``tasks``, which are the job's or `first_examples` of them, each request once.

        Discards the answers that ``tasks`` have stored.  From then on, ``lm`` records requests, and does not answer.
        """
        from eval.harness.lm import make_recorder
        from eval.harness.tasks import answer_tasks

        requests: list[Request] = []
        self.lm.answer = make_recorder(requests)
        answer_tasks(tasks, self.lm)
        return tuple(dict.fromkeys(requests))

    def file(self, variant: Variant) -> Path:
        """Return the file of the answers of ``variant``; the one of version 0.1 if only that exists."""
        files = [self.out / "responses" / f"{digest}.jsonl" for digest in (variant.digest, variant.first_digest)]
        return next((file for file in files if file.exists()), files[0])


def prepare(config: DictConfig, recipe: str = "eval.run") -> EvalJob:
    """Return the job that ``config`` asks for; writes nothing but the model cache.

    Raises ValueError, with what to set instead, if it cannot be run.
    """
    # 1. The settings, and the names of the variants.
    settings, evaluation = top_level(config, EvalSettings), section(config, "eval", EvalConfig)
    refuse_unwritable_folder(settings.out)
    refuse_other_recipe(settings.out, recipe)
    if settings.adapted and saved_plan(Path(settings.adapted).expanduser()) is None:
        raise ValueError(
            f"adapted={settings.adapted} is not a folder that recipes.spd_adapt wrote: give the folder that was its out"
        )
    configs = compose_variants(config)
    refuse_other_worlds(configs)
    refuse_unknown_gate(evaluation, [name for name, _ in configs])
    if evaluation.until and len(configs) == 1:
        raise ValueError(f"eval.until={evaluation.until} compares variants: add some, or use eval.until=null")
    # 2. The baseline, and the tasks and requests that it is asked.
    data = evaluation.folder
    base = resolve_variant(*configs[0])
    tasks = _load_tasks(evaluation, base, data)
    sampling = read_sampling(config)
    lm, requests = _record_requests(evaluation, base, tasks, sampling)
    if any(isinstance(request, Continue) for request in requests):
        say_unapplied(base.target.folder, sampling or Sampling())
    # 3. The variants, which answer the same requests.
    variants = tuple(resolve_variant(name, drop_none_yet(one)) for name, one in configs)
    for variant in variants:
        refuse_unknown_tokens(variant, requests)
    for variant, (_, one) in zip(variants[1:], configs[1:], strict=True):
        refuse_other_model(base, variant)
        if evaluation.chat:
            refuse_other_template(base, variant)
        refuse_too_short(variant, requests)
        refuse_other_order(base, variant, one)
    # 4. The orders of blocks to measure: only checked here.
    make_order_jobs(configs, base, evaluation.sensitivity, Path(settings.out))
    job = EvalJob(
        settings=settings,
        eval=evaluation,
        track=section(config, "track", Track).of("eval"),
        config={**provenance(), "machine": hardware(), **as_dict(config)},
        configs=tuple(configs),
        variants=variants,
        tasks=tasks,
        lm=lm,
        requests=requests,
    )
    if any((job.out / "responses").glob("*.jsonl")) and not job.file(base).is_file():
        raise ValueError(f"out={job.out} has answers of another model, mesh or context: give another out=")
    return job


def with_measured_orders(job: EvalJob) -> EvalJob:
    """Measure the orders of blocks that variants lack; return ``job`` with the blocks to drop filled in.

    Starts ranks; every rank that a launcher started must call this.  If no variant lacks an order, ``job`` is returned
    unchanged.
    """
    if not any(lacks_order(config) for _, config in job.configs):
        return job
    configs = fill_in_orders(job.configs, job.variants[0], job.eval.sensitivity, job.out)
    return replace(job, variants=tuple(resolve_variant(name, config) for name, config in configs))


def pinned(config: DictConfig) -> tuple[str, ...]:
    """Return the override of ``eval.data`` that a Slurm job needs: its copy of the code has no data next to it.

    There is none for a folder that an earlier job has still to make.  Raises ValueError if a variant has another number
    of ranks than the job starts.
    """
    refuse_other_sizes(compose_variants(config))
    evaluation = section(config, "eval", EvalConfig)
    try:
        folder = evaluation.folder
    except ValueError:
        return ()
    return (path_word("eval.data", str(folder.resolve())) if folder else "eval.data=hub",)


def _load_tasks(evaluation: EvalConfig, base: Variant, data: Path | None) -> dict[str, Task]:
    """Return the tasks with their requests built, those of long texts last."""
    from eval.harness.generated import GENERATED, make_generated_tasks
    from eval.harness.lm import chat_template_for
    from eval.harness.tasks import build_requests, load_tasks
    from longctx.hf.config import tokenizer_of

    tokenizer, template = tokenizer_of(base.target.folder), None
    if evaluation.chat:
        template = chat_template_for(tokenizer, base.target.model.name, evaluation.tasks)
    # 1. Benchmarks of files and of the hub.
    benchmarks = [name for name in evaluation.tasks if name not in GENERATED]
    tasks = load_tasks(benchmarks, data, evaluation.num_fewshot, evaluation.include)
    # 2. Tasks of long texts.
    if examples := {name: evaluation.limit_of(name) for name in evaluation.tasks if name in GENERATED}:
        evaluation.refuse_unlimited(examples)
        max_length, longest = base.target.shape.max_positions, max(evaluation.lengths)
        if evaluation.max_length and longest > evaluation.max_length:
            raise ValueError(
                f"eval.lengths={longest} is over eval.max_length={evaluation.max_length}: use at most that, or a "
                "larger eval.max_length"
            )
        tasks |= make_generated_tasks(
            examples, evaluation.lengths, evaluation.text, tokenizer, max_length, data, evaluation.seed
        )
    elif (evaluation.text, evaluation.lengths) != (EvalConfig.text, EvalConfig.lengths):
        raise ValueError(
            f"eval.text and eval.lengths are for long texts: add one of {', '.join(GENERATED)}, or leave them out"
        )
    no_shots = [name for name, task in tasks.items() if task.config.num_fewshot == 0]
    if evaluation.num_fewshot and no_shots:
        say(f"eval.num_fewshot: {', '.join(no_shots)} show no examples, as lm-eval or longctx configures them")
    # 3. Their requests.
    are_rolling = all(task.OUTPUT_TYPE == ROLLING for task in tasks.values())
    if evaluation.chat and are_rolling:
        raise ValueError(f"eval.chat changes nothing in {', '.join(tasks)}: use eval.chat=false")
    if (evaluation.gate or evaluation.until) and are_rolling:
        name, off = ("gate", "[]") if evaluation.gate else ("until", "null")
        raise ValueError(
            f"eval.{name} judges accuracy, which none of eval.tasks has: add one, or use eval.{name}={off}"
        )
    evaluation.refuse_unknown_limits([*tasks])
    build_requests(tasks, {name: evaluation.limit_of(name) for name in tasks}, template)
    return tasks


def read_sampling(config: DictConfig) -> Sampling | None:
    """Return the section ``sampling``, or None if it is greedy without penalties, whatever its seed.

    Raises ValueError for ``stop`` and ``stop_tokens``, which the tasks decide, and for ``logprobs``.
    """
    sampling = section(config, "sampling", Sampling)
    for name in ("stop", "stop_tokens", "logprobs"):
        if getattr(sampling, name) not in ((), None):
            raise ValueError(
                f"sampling.{name} is not used by eval, whose tasks decide what ends a text and what is scored: "
                "leave it out"
            )
    return None if sampling == Sampling(seed=sampling.seed) else sampling


def _record_requests(
    evaluation: EvalConfig, base: Variant, tasks: Mapping[str, Task], sampling: Sampling | None
) -> tuple[EngineLM, tuple[Request, ...]]:
    """Return lm-eval's interface to the model, and all that the tasks ask of it, each request once."""
    from eval.harness.lm import EngineLM, choose_prefix_token, make_recorder
    from eval.harness.tasks import answer_tasks
    from longctx.hf.config import tokenizer_of

    max_positions = base.target.shape.max_positions
    max_length = evaluation.max_length or max_positions
    if max_length > max_positions:
        raise ValueError(
            f"eval.max_length={max_length:,}: the model's context is {max_positions:,}; use at most that, "
            "or null for all of it"
        )
    requests: list[Request] = []
    tokenizer = tokenizer_of(base.target.folder)
    prefix = choose_prefix_token(tokenizer, evaluation.prefix_token)
    lm = EngineLM(tokenizer, max_length, prefix, make_recorder(requests), sampling)
    answer_tasks(tasks, lm)
    if lm.cut:
        say(
            f"{lm.cut:,} texts are longer than {lm.max_length:,} tokens (eval.max_length): their beginning is cut off, "
            "or their middle in LongBench v2 and InfiniteBench"
        )
    return lm, tuple(dict.fromkeys(requests))
