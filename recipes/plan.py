"""Plan a run: list the feasible meshes, the fastest first, with time, memory per GPU and the part that takes longest.

    python -m recipes.plan model=llama3_405b hardware=h100_gtt gpus=128 work=prefill work.context=1000000 out=P.json

Nothing is run, and the model needs no weights.  longctx/cost/README.md compares predicted with published times.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, prod
from pathlib import Path
from typing import Literal

import torch
import yaml
from omegaconf import DictConfig
from pydantic import PositiveFloat, PositiveInt
from rich.table import Table

from longctx.config import ModelSource
from longctx.cost.numerals import three_digits
from longctx.hf.config import refuse_untrainable, shape_of
from longctx.hf.locate import locate
from longctx.text_file import write_text
from recipes.common.cli import console, main, say
from recipes.common.hardware_file import (
    is_measured_on_cpus,
    measured_mesh,
    measured_threads,
    read_machine,
    refuse_more_ranks,
    refuse_other_rates,
)
from recipes.common.places import refuse_unwritable
from recipes.common.plan_question import Question, WorkSettings
from recipes.common.planning import Plan, best_by_strategy, plans_of
from recipes.common.plots import draw_plan
from recipes.common.settings import section, top_level
from recipes.common.spd_report import axes_of, read_allowed_drop


@dataclass(frozen=True)
class PlanSettings:
    """Top-level settings of configs/plan.yaml, which explains each in a comment.

    ``lengths`` are values of work.context: the best mesh for each is printed, and ``picture`` draws them.  ``export``
    prints the plans to standard output.
    """

    hardware: str
    gpus: PositiveInt
    strategy: str | None = None
    allowed_drop: float | str = 0.0
    max_ttft_s: PositiveFloat | None = None
    max_memory_gb: PositiveFloat | None = None
    show: PositiveInt = 8
    lengths: tuple[PositiveInt, ...] = ()
    picture: str | None = None
    export: Literal["csv"] | None = None
    settings: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class PlanJob:
    """A planning task: the question to answer, the recipe's settings, and the model."""

    question: Question
    settings: PlanSettings
    model: ModelSource


def resolve_plan_job(config: DictConfig) -> PlanJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if settings do not fit."""
    settings, work = top_level(config, PlanSettings), section(config, "work", WorkSettings)
    for name, suffixes in (("out", ()), ("picture", ()), ("settings", (".yaml", ".yml"))):
        refuse_unwritable(getattr(settings, name), name, suffixes)
    refuse_foreign_file("out", settings.out, lambda text: "mesh" in json.loads(text)[0])
    refuse_foreign_file("settings", settings.settings, lambda text: "mesh.tp" in yaml.safe_load(text))
    if settings.strategy not in (None, "auto", *work.strategies):
        raise ValueError(
            f"strategy={settings.strategy} does not apply to work={work.kind}: use "
            f"{', '.join(work.strategies)}, or auto"
        )
    if settings.max_ttft_s and work.kind not in ("prefill", "chat"):
        raise ValueError(f"max_ttft_s is for work=prefill and work=chat, not work={work.kind}: leave it out")
    machine, model = read_machine(settings.hardware), section(config, "model", ModelSource)
    refuse_more_ranks(settings.hardware, machine, settings.gpus, f"gpus={machine.gpus} or fewer")
    refuse_other_rates(settings.hardware, model.dtype)
    if model.fp8:
        raise ValueError(f"model.fp8={model.fp8} is not modelled: use model.fp8=null, for the times in {model.dtype}")
    shape = shape_of(folder := locate(model, say))
    if work.kind == "train":
        refuse_untrainable(folder)
    if shape.mixture and work.kind != "train":
        raise ValueError(f"work={work.kind} of {model.name}, a mixture of experts, is not modelled: use work=train")
    question = Question(
        shape=shape,
        machine=machine,
        gpus=settings.gpus,
        work=work,
        dtype_bytes=getattr(torch, model.dtype).itemsize,
        strategy=settings.strategy,
        allowed_drop=read_allowed_drop(str(settings.allowed_drop), model.name),
        max_ttft_s=settings.max_ttft_s,
        max_memory_gb=settings.max_memory_gb,
        operations="cpu" if is_measured_on_cpus(settings.hardware) else "cuda",
    )
    if question.allowed_drop.share and not question.drop_share:
        raise ValueError(
            f"allowed_drop={settings.allowed_drop} is less than one of the model's {shape.layers} blocks: use "
            f"allowed_drop={ceil(1e4 / shape.layers) / 1e4:g} or more, or allowed_drop=0"
        )
    return PlanJob(question, settings, model)


def refuse_foreign_file(name: str, file: str | None, is_ours: Callable[[str], bool]) -> None:
    """Raise ValueError if the setting ``name`` is an existing ``file`` that this recipe did not write."""
    if not file or not Path(file).exists():
        return
    with suppress(OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        if is_ours(Path(file).read_text(encoding="utf-8")):
            return
    raise ValueError(f"{name}={file} exists, and was not written by recipes.plan: give another file, or move it away")


def refuse_no_plan(plans: Sequence[Plan]) -> None:
    """Raise ValueError if no plan is feasible; the message says, for two meshes, why they are refused.

    The first of the two needs the least memory of the meshes that only a limit refuses; the second is the fastest.
    ``plans`` are in the order of `plans_of`.
    """
    if plans[0].refused is None:
        return
    memory = min(plans, key=lambda plan: (not plan.over_limit, plan.memory_gb))
    reasons = "; ".join(dict.fromkeys(f"{plan.mesh}: {plan.refused}" for plan in (memory, plans[0])))
    work, largest = memory.question.work, max(memory.memory_parts, key=lambda part: memory.memory_parts[part])
    spares = memory.over_limit and work.kind == "train" and work.recompute != "full" and largest == "activations"
    advice = "work.recompute=full, more GPUs" if spares else "more GPUs"
    raise ValueError(f"no mesh of {plans[0].mesh.ranks} GPUs is feasible ({reasons}): use {advice}, or other limits")


def table_of(plans: Sequence[Plan]) -> Table:
    """Return a table of ``plans``, one line each."""
    table = Table("mesh", "strategy", "time", "error", "tokens/s", "MFU", "memory", "most of the time", box=None)
    for plan in plans:
        table.add_row(
            str(plan.mesh),
            strategies_in_words(plan),
            in_words(plan.seconds),
            "extrapolated" if plan.error is None else f"{plan.error:.0%}",
            f"{plan.tokens_per_s:,.0f}",
            "" if plan.mfu is None else f"{plan.mfu:.0%}",
            f"{plan.memory_gb:,.1f} GB",
            plan.bound,
        )
    return table


def strategies_in_words(plan: Plan) -> str:
    """Return the strategy of ``plan``, and its decode strategy if that differs; empty on one context rank."""
    if plan.mesh.context == 1:
        return ""
    return plan.strategy if plan.decode in (None, plan.strategy) else f"{plan.strategy}, decode {plan.decode}"


def in_words(seconds: float) -> str:
    """Return ``seconds`` with three digits, or more from 1,000 s on, in s or ms."""
    return f"{three_digits(seconds)} s" if seconds >= 1 else f"{three_digits(seconds * 1e3)} ms"


def show(job: PlanJob, plans: Sequence[Plan]) -> None:
    """Print the best meshes, the memory of the best one by part, and why faster meshes are not feasible.

    ``plans`` are in the order of `plans_of`; at least one must be feasible.
    """
    question, feasible = job.question, [plan for plan in plans if plan.refused is None]
    work, best = question.work, feasible[0]
    meaning = {"prefill": "time to first token", "decode": "time per token", "chat": "a turn", "train": "a step"}
    console.print(f"{job.model.name}, {question.gpus} GPUs of {job.settings.hardware}: {meaning[work.kind]}")
    console.print(table_of(feasible[: job.settings.show]))
    for line in caveats(job):
        console.print(line)
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:,.1f}" for name, size in best.memory_parts.items() if size)
    if question.allowed_drop.why:
        console.print(question.allowed_drop.why)
    limit = f" of {question.memory_gb:,.{0 if question.memory_gb >= 10 else 2}f}" if question.memory_gb else ""
    console.print(f"memory of the best, GB{limit}: {parts}")
    if work.total > question.shape.max_positions:
        console.print(
            f"the model has {question.shape.max_positions:,} positions: a run of {work.total:,} tokens also needs "
            "model.max_positions and a larger model.rope_theta, or model.rope_factor"
        )
    faster = {plan.mesh: plan for plan in reversed(plans) if plan.refused and plan.seconds < best.seconds}
    for plan in sorted(faster.values(), key=lambda plan: plan.seconds)[:3]:
        console.print(f"faster, but not feasible: {plan.mesh} {in_words(plan.seconds)}: {plan.refused}")


def caveats(job: PlanJob) -> Iterator[str]:
    """Yield lines on how the constants of the machine differ from those of a run, and on errors that are not known."""
    question, hardware = job.question, job.settings.hardware
    kind, errors = question.work.kind, question.machine.errors
    # Up to 0.2.0, errors were recorded without strategies: no mesh on which strategies differ has an error.
    differ = {"ring", "ulysses"} if kind == "decode" else {"ring"}
    old = question.gpus > 1 and kind in errors and not errors[kind].strategies and differ & {*errors[kind].axes}
    if is_measured_on_cpus(hardware) and (old or kind not in {*errors, "chat"}):
        threads, where = measured_threads(hardware), " where strategies differ" if old else ""
        yield (
            f"how far predictions are off on {hardware}{where} is not known: measure it there with "
            f"python -m recipes.bench times hardware={hardware} model.dtype={job.model.dtype} "
            f"{f'run.threads={threads} ' if threads else ''}record=true only=[prefill,decode,train,four_ranks]"
        )
    mesh = measured_mesh(hardware)
    if mesh and question.gpus > max(2, prod(axes_of(mesh).values())) and not question.machine.ranks_at_once:
        yield (
            f"the links of {hardware} were measured on {mesh}: if {question.gpus} GPUs are on more nodes than those "
            "ranks, their links are slower than predicted"
        )
    if (question.machine.ffn_element_bytes or question.dtype_bytes) < question.dtype_bytes == 2:
        more = "" if question.work.kind == "train" else ", and these weights need twice the memory shown"
        yield (
            f"the rate of matrix products of {hardware} was measured with FP8 feed-forward weights: "
            f"in {job.model.dtype}, products take longer than predicted{more}"
        )


def table_by_length(question: Question, lengths: Sequence[int]) -> Table:
    """Return a table of the best mesh, if there is one, for each of ``lengths`` as work.context."""
    table = Table("work.context", "mesh", "strategy", "time", "memory", "most of the time", box=None)
    for length in lengths:
        best = plans_of(replace(question, work=replace(question.work, context=length)))[0]
        cells = ("no mesh is feasible", "", "", "", "")
        if best.refused is None:
            cells = (
                str(best.mesh),
                strategies_in_words(best),
                in_words(best.seconds),
                f"{best.memory_gb:,.1f} GB",
                best.bound,
            )
        table.add_row(f"{length:,}", *cells)
    return table


def in_settings(job: PlanJob) -> str:
    """Return the settings of a recipe, other than a plan's own, for which ``job`` plans."""
    work = job.question.work
    data = f" data.length={work.context} data.batch={work.batch}" if work.kind == "train" else ""
    return f"model.dtype={job.model.dtype}{data}"


def print_csv(plans: Sequence[Plan]) -> None:
    """Print ``plans`` to standard output as CSV, with a column for each axis and for each part of memory."""
    names = ["strategy", "seconds", "error", "tokens_per_s", "memory_gb", "mfu", "bound"]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*vars(plans[0].mesh), *names, *(f"{name}_gb" for name in plans[0].memory_parts)])
    for plan in plans:
        values = plan.as_dict()
        memory = [size / 1e9 for size in plan.memory_parts.values()]
        writer.writerow([*vars(plan.mesh).values(), *(values[name] for name in names), *memory])


def draw(job: PlanJob, feasible: Sequence[Plan]) -> None:
    """Draw to the file ``picture``: time against length for each strategy, and the best meshes' memory by part.

    ``feasible`` are the feasible plans, the fastest first.  Without ``lengths``, the lengths are work.context divided
    by 32, 16, 8, 4, 2 and 1.
    """
    question, settings = job.question, job.settings
    assert settings.picture
    lengths = settings.lengths or [max(1, question.work.context >> shift) for shift in range(5, -1, -1)]
    fastest = dict[str, dict[str, float]]()  # by mesh: the memory of its fastest strategy
    for plan in feasible:
        fastest.setdefault(str(plan.mesh), plan.memory_parts)
    draw_plan(
        settings.picture,
        lengths,
        best_by_strategy(question, lengths),
        dict(islice(fastest.items(), 4)),
        limit=question.memory_gb,
        title=f"{job.model.name}, {question.gpus} GPUs of {settings.hardware}, {question.work.kind}",
    )


def task(config: DictConfig) -> None:
    """Plan; then print, write, draw and export the plans, as the settings say."""
    job = resolve_plan_job(config)
    settings, plans = job.settings, plans_of(job.question)
    refuse_no_plan(plans)
    feasible = [plan for plan in plans if plan.refused is None]
    show(job, plans)
    if settings.lengths:
        console.print("\nthe best mesh by length:", table_by_length(job.question, settings.lengths))
    if settings.out:
        write_plans(settings.out, feasible)
    if settings.settings:
        write_text(Path(settings.settings), yaml.safe_dump(feasible[0].settings(), sort_keys=False))
        console.print(f"written to {settings.settings}: a recipe takes it as plan={settings.settings}")
        console.print(
            f"it was planned for {in_settings(job)}, which the file leaves out: add them to the recipe's words"
        )
        if share := feasible[0].question.numbers(feasible[0].mesh).spd_share:
            console.print(
                f"{share:.0%} of the blocks drop a reduction in this plan, but not in the file: add "
                f"{replace(job.question.allowed_drop, share=share).settings}"
            )
    if settings.picture:
        draw(job, feasible)
        console.print(f"drawn to {settings.picture}")
    if settings.export:
        print_csv(feasible)


def write_plans(out: str, plans: Sequence[Plan]) -> None:
    """Write ``plans`` to ``out`` as a JSON list, one plan per line."""
    lines = (json.dumps(plan.as_dict(), allow_nan=False) for plan in plans)
    write_text(Path(out), "[\n" + ",\n".join(lines) + "\n]\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    main("plan", task)
