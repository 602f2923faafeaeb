"""Time of prefill, decoding and training steps on meshes and networks: measured, and predicted by the cost model.

python -m recipes.bench times hardware=laptop.yaml json=times.json
python -m recipes.bench times hardware=laptop.yaml json=times.json only=[networks]   # adds a group to the file
python -m recipes.bench times hardware=laptop.yaml only=[prefill,decode,train] record=true   # errors for recipes.plan
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig
from pydantic import PositiveInt

from longctx.config import Context
from longctx.cost.forward import Numbers, decode_cost, prefill_cost
from longctx.cost.machine import Accuracy, Machine, strategies_differ
from longctx.cost.step import step_cost
from longctx.parallel.validate import refuse_unfit
from longctx.text_file import write_text
from recipes.bench.host_call import call_on_hosts
from recipes.bench.hosts import bits_per_s, refuse_hosts
from recipes.bench.timed_run import TimedRun, dropped_share, first_batch, measure, measure_all
from recipes.bench.times_report import Row, covering_error, draw_times, errors, merge, page_of, show
from recipes.bench.timing import refuse_gpu, refuse_set_by_runs
from recipes.common.cli import is_first, on_ranks, say, warm_up_ranks, write_result
from recipes.common.hardware_file import read_machine, record_errors, refuse_more_ranks, refuse_other_threads
from recipes.common.overrides import choices
from recipes.common.places import refuse_unwritable
from recipes.common.predicted import ELEMENT_BYTES
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, sections, top_level
from recipes.common.train_job import TrainJob, refuse_unsplit, resolve_train_job
from recipes.common.train_memory import step_work
from recipes.common.train_task import WARM

RECIPE = "recipes.bench times"
ENOUGH = 4  # runs of a kind of work from which an error is recorded


@dataclass(frozen=True)
class TimesSettings:
    """Settings of configs/bench/times.yaml beyond those of a training run, without the list ``runs``."""

    hardware: str
    only: tuple[str, ...] = ()
    rounds: PositiveInt = 3
    record: bool = False
    json: str | None = None
    markdown: str | None = None
    picture: str | None = None


@dataclass(frozen=True)
class TimesJob:
    """Training jobs, one for each run, and the machine that predictions are for.

    ``length`` is data.length, for runs that do not set their number of new tokens.
    """

    settings: TimesSettings
    machine: Machine
    runs: tuple[TimedRun, ...]
    jobs: tuple[TrainJob, ...]
    length: int


def prepare(config: DictConfig) -> TimesJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    values = as_dict(config)
    own = ("hardware", "only", "rounds", "record", "json", "markdown", "picture")
    settings = top_level(as_config({name: values[name] for name in own}), TimesSettings)
    for name, suffixes in (("json", (".json",)), ("markdown", (".md",)), ("picture", (".svg", ".png", ".pdf"))):
        refuse_unwritable(getattr(settings, name), name, suffixes)
    if settings.record and settings.hardware in choices("machine"):
        raise ValueError(
            f"record=true writes to a file, and hardware={settings.hardware} is a name of configs/machine: use "
            "hardware=FILE.yaml, which recipes.calibrate wrote"
        )
    runs = sections(config, "runs", TimedRun)
    groups = sorted({run.group for run in runs})
    if unknown := [name for name in settings.only if name not in groups]:
        raise ValueError(f"only={list(settings.only)}: there is no group {unknown[0]}; use {', '.join(groups)}")
    without_hosts = dict.fromkeys(run.group for run in runs if not run.rate)
    runs = tuple(run for run in runs if run.group in (settings.only or groups))
    refuse_no_hosts(runs, tuple(without_hosts))
    plain = {name: value for name, value in values.items() if name not in (*own, "runs")}
    job = resolve_train_job(as_config({**plain, "hardware": None}), RECIPE, from_scratch=True)
    if job.target.shape.mixture:
        raise ValueError(f"{RECIPE} does not support mixtures of experts: use a dense model")
    refuse_gpu(job.target, RECIPE)
    if job.target.context.layout != "zigzag":
        raise ValueError(f"context.layout={job.target.context.layout}: {RECIPE} measures zigzag only; leave it out")
    decode = job.target.context.decode
    refuse_set_by_runs(job, RECIPE, {"context.decode": decode if decode != Context().decode else None})
    if settings.json:
        merge(settings.json, (), dict.fromkeys(run.group for run in runs))  # raises for a file of an older version
    if job.settings.offload:
        raise ValueError(f"offload={job.settings.offload}: the time of offload has no prediction; use offload=null")
    jobs, machine = tuple(_job_of(job, run) for run in runs), read_machine(settings.hardware)
    refuse_more_ranks(settings.hardware, machine, max((run.mesh.ranks for run in runs), default=1), "other runs")
    return TimesJob(settings, machine, runs, jobs, job.data.length)


def refuse_no_hosts(runs: Sequence[TimedRun], without_hosts: Sequence[str]) -> None:
    """Raise ValueError if this machine cannot emulate the hosts of ``runs``.

    The message names ``without_hosts``, the groups of the configuration that need none.
    """
    for run in runs:
        try:
            if run.rate:
                refuse_hosts(run.mesh.ranks, run.rate, run.mesh)
        except ValueError as error:
            others = f"use only=[{','.join(without_hosts)}]" if without_hosts else "give runs without rate"
            raise ValueError(f"group {run.group} needs emulated hosts; {others} ({error})") from error


def _job_of(job: TrainJob, run: TimedRun) -> TrainJob:
    """Return ``job`` with the mesh, strategy and length of ``run``, and one sequence for each data-parallel rank.

    Raises ValueError if the mesh does not fit the model or the length.
    """
    data = replace(job.data, batch=run.dp, length=run.new or job.data.length)
    refuse_unfit(run.mesh, job.target.shape)
    refuse_unsplit(run.mesh, job.target.shape, data)
    chosen: dict[str, Any] = {"decode" if run.work == "decode" else "strategy": run.strategy}
    context = replace(job.target.context, **chosen)
    return replace(job, target=replace(job.target, mesh=run.mesh, context=context), data=data)


def predict(machine: Machine, job: TrainJob, run: TimedRun) -> Mapping[str, float]:
    """Return the predicted seconds of ``run`` by part.

    A training step is predicted for the documents of the batch on which it is timed (`first_batch`).
    On emulated hosts, the links have the nominal rate; the latency of a message on loopback is added to theirs.  That
    is two one-way latencies, because gloo sends a message only when the receiver's notice has arrived.
    """
    target, size = job.target, ELEMENT_BYTES[job.target.model.dtype]
    shape, mesh, numbers = target.shape, target.mesh, Numbers(size, size, dropped_share(job, run), run.reduce)
    if run.rate:
        machine = machine.with_links(2 * run.latency_us * 1e-6, bits_per_s(run.rate) / 8)
    if run.work == "decode":
        return decode_cost(shape, mesh, machine, [run.cached], run.strategy, numbers).parts
    if run.work == "prefill":
        return prefill_cost(shape, mesh, machine, [job.data.length], [run.cached], run.strategy, numbers).parts
    return step_cost(shape, mesh, machine, step_work(job, first_batch(job).documents), run.strategy, numbers).parts


def task(config: DictConfig) -> None:
    """Measure every run on its mesh and network; show and write the seconds with the prediction.

    With ``record``, also write the errors of the predictions to the hardware file.
    """
    warm_up_ranks([*WARM, "recipes.common.train_loop", "longctx.infer.session", "longctx.train.step"])
    job, results = prepare(config), list[dict[str, Any]]()
    pairs = zip(job.runs, job.jobs, strict=True)
    for (_, rate, _), same in groupby(pairs, key=lambda pair: pair[0].network):
        runs, jobs = zip(*same, strict=True)
        for run, one in zip(runs, jobs, strict=True):
            refuse_other_threads(job.settings.hardware, one.target.run.threads, run.mesh)
        of_runs = measure_on_hosts(runs, jobs, job.settings.rounds) if rate else measure_here(job, runs, jobs)
        for run, one, seconds in zip(runs, jobs, of_runs, strict=True):
            if is_first():  # the other ranks of a launcher have no seconds
                results.append(result_of(job, run, one, seconds))
                say(f"{run}: {median(seconds) * 1e3:,.1f} ms")
    if results:
        report(job, results)
        if job.settings.record:
            recorded = accuracies(job, results)
            record_errors(job.settings.hardware, recorded)
            kinds = [f"{work} {one.share:.0%}" for work, one in recorded.items()] or [f"none has {ENOUGH} runs"]
            say(f"prediction errors for recipes.plan, written to {job.settings.hardware}: {', '.join(kinds)}")


def measure_here(job: TimesJob, runs: Sequence[TimedRun], jobs: Sequence[TrainJob]) -> Iterator[list[float]]:
    """Yield, for each of ``runs``, its seconds in every round, on ranks of this machine.

    On a launcher's ranks other than the first, the lists are empty.
    """
    for run, one in zip(runs, jobs, strict=True):
        yield on_ranks(run.mesh, measure, one, run, job.settings.rounds) or []


def measure_on_hosts(runs: Sequence[TimedRun], jobs: Sequence[TrainJob], rounds: int) -> list[list[float]]:
    """Return, for each of ``runs``, its seconds in every round, on emulated hosts, one host for each rank.

    ``jobs`` has the training job of each run.  All runs must have the same `TimedRun.network`, with a rate.
    """
    hosts, rate, latency_us = runs[0].network
    assert rate
    return call_on_hosts(hosts, rate, latency_us, measure_all, jobs, runs, rounds)


def result_of(job: TimesJob, run: TimedRun, one: TrainJob, seconds: Sequence[float]) -> dict[str, Any]:
    """Return a row of the result: what ran, its "measured" seconds by round and its "predicted" seconds by part.

    ``one`` is the training job of ``run``, and ``seconds`` has the measured seconds by round.
    """
    points = {"new": one.data.length, "cached": run.cached, "strategy": run.strategy, "network": run.network}
    predicted = predict(job.machine, one, run)
    return {
        "run": str(run),
        "group": run.group,
        "work": run.work,
        **points,
        "measured": seconds,
        "predicted": predicted,
    }


def accuracies(job: TimesJob, results: Sequence[Row]) -> dict[str, Accuracy]:
    """Return the accuracy of predictions for each kind of work with at least `ENOUGH` runs.

    ``results`` are in the order of the job's runs.  Runs with emulated links, dropped or rounded reductions do not
    count.  Emulated links are not those of the machine; recipes.plan states no error for dropped reductions.
    """
    element = ELEMENT_BYTES[job.jobs[0].target.model.dtype]
    plain = [
        (run, error)
        for run, error in zip(job.runs, errors(results), strict=True)
        if not (run.rate or run.drop) and run.reduce == "float32"
    ]
    by_work: dict[str, Accuracy] = {}
    for work in dict.fromkeys(run.work for run, _ in plain):
        meshes = [run.mesh for run, _ in plain if run.work == work]
        axes = tuple(axis for axis in vars(meshes[0]) if any(getattr(mesh, axis) > 1 for mesh in meshes))
        if len(meshes) >= ENOUGH:
            share = covering_error([error for run, error in plain if run.work == work])
            compared = {
                run.strategy: None for run, _ in plain if run.work == work and strategies_differ(work, run.mesh)
            }
            by_work[work] = Accuracy(share, axes, max(mesh.ranks for mesh in meshes), element, tuple(compared))
    return by_work


def report(job: TimesJob, results: Sequence[Row]) -> None:
    """Show ``results``; write the files ``json``, ``markdown`` and ``picture`` that the settings name.

    In the file ``json``, ``results`` replace earlier ones of their groups.  The page and the picture then show all
    groups of this file.
    """
    settings, one = job.settings, job.jobs[0]
    metadata = {"model": one.target.model.name, "length": job.length, "loss_rows": one.settings.loss_rows}
    metadata |= {"hardware": settings.hardware, "rounds": settings.rounds, **provenance()}
    show(results)
    merged: Sequence[Row] = results
    if settings.json:
        groups = dict.fromkeys(dict.fromkeys(result["group"] for result in results), metadata)
        merged, groups = merge(settings.json, results, groups)
        write_result(settings.json, {**provenance(), **metadata, "groups": groups, "runs": merged})
    if settings.markdown:
        write_text(Path(settings.markdown), "\n".join(page_of(merged)) + "\n")
    if settings.picture:
        draw_times(settings.picture, merged)
