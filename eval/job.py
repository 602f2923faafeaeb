"""What eval is asked to do, checked before any rank starts: models, tasks, requests."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from eval.answers.requests import Request, Score
from eval.harness.local import LOCAL
from eval.sensitivity import lacks_order, order_jobs, with_order, without_order
from eval.variants import BASELINE, Variant, composed, refuse_other_model, resolve_variant
from longctx.config import Mesh, Track
from longctx.parallel.launch import rank_from_environment
from recipes.common.cli import refuse_unwritable_folder, say
from recipes.common.provenance import hardware, provenance
from recipes.common.settings import section, top_level

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"  # a folder of data beside the checkout


@dataclass(frozen=True)
class EvalSettings:
    """The settings of configs/evaluate.yaml that are not a section of their own."""

    out: str
    adapted: str | None = None
    variants: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class EvalConfig:
    """What is asked, of how many examples, and how variants are judged: section ``eval``."""

    tasks: tuple[str, ...]
    data: str
    include: str | None
    limit: PositiveInt | None
    limits: Mapping[str, PositiveInt] | None
    num_fewshot: NonNegativeInt | None
    lengths: tuple[PositiveInt, ...]
    text: str
    seed: NonNegativeInt
    max_length: PositiveInt | None
    prefix_token: NonNegativeInt | None
    max_batch_tokens: PositiveInt
    allowed_drop: NonNegativeFloat
    resamples: PositiveInt
    gate: tuple[str, ...]
    strict: bool
    sensitivity: PositiveInt

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("eval.tasks is empty: name at least one, such as eval.tasks=[arc_easy]")

    def refuse_unknown_limits(self, tasks: Sequence[str]) -> None:
        """ValueError if ``limits`` has a name of no task; those that are not asked may have theirs."""
        from eval.harness.long import LONG

        if groups := set(self.limits or {}).intersection(self.tasks) - {*tasks, *LONG}:
            raise ValueError(
                f"eval.limits.{min(groups)} is of a group of tasks: use eval.limit, or name the tasks in it"
            )
        if unknown := set(self.limits or {}) - {*tasks, *LOCAL, *LONG}:
            raise ValueError(f"eval.limits: there is no task {min(unknown)} among {', '.join(tasks)}")

    def limit_of(self, task: str) -> int | None:
        """How many examples of ``task`` are asked; None: all."""
        return min(filter(None, (self.limit, (self.limits or {}).get(task))), default=None)

    @property
    def folder(self) -> Path | None:
        """Where local files are; None: the hub.  Raises ValueError if it is not there."""
        if self.data == "hub" or (self.data == "auto" and not _BESIDE.is_dir()):
            return None
        folder = _BESIDE if self.data == "auto" else Path(self.data).expanduser()
        if not folder.is_dir():
            raise ValueError(f"eval.data={self.data} is no folder: give one as eval/README.md describes it, or hub")
        return folder


@dataclass(frozen=True)
class EvalJob:
    """What is to be done, checked before any rank starts; ``requests`` are all that every variant is asked.

    ``configs`` are the variants' settings.  Those that lack an order of blocks drop none before `ordered`.
    """

    settings: EvalSettings
    eval: EvalConfig
    track: Track
    config: Mapping[str, Any]
    configs: tuple[tuple[str, DictConfig], ...]
    variants: tuple[Variant, ...]
    tasks: Mapping[str, Any]
    lm: Any
    requests: tuple[Request, ...]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    def file(self, variant: Variant) -> Path:
        """Where the answers of ``variant`` are kept."""
        return self.out / "responses" / f"{variant.digest}.jsonl"


def prepare(config: DictConfig) -> EvalJob:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    from eval.harness.tasks import ask

    settings, asked = top_level(config, EvalSettings), section(config, "eval", EvalConfig)
    refuse_unwritable_folder(settings.out)
    configs = composed(config)
    names = [name for name, _ in configs]
    if strangers := set(asked.gate) - set(names):
        raise ValueError(f"eval.gate: there is no variant {min(strangers)}: there are {', '.join(names)}")
    if BASELINE in asked.gate:
        raise ValueError(f"eval.gate: {BASELINE} is what the others are compared with: name variants")
    asked_of = asked.folder
    base = resolve_variant(*configs[0])
    tasks = _tasks(asked, base, asked_of)
    if asked.gate and all(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in tasks.values()):
        raise ValueError("eval.gate judges accuracy, which none of eval.tasks has: add one, or use eval.gate=[]")
    asked.refuse_unknown_limits([*tasks, *asked.tasks])
    ask(tasks, {name: asked.limit_of(name) for name in tasks})
    lm, requests = _requests(asked, base, tasks)
    variants = tuple(resolve_variant(name, without_order(one)) for name, one in configs)
    for other, (_, one) in zip(variants[1:], configs[1:], strict=True):
        refuse_other_model(base, other)
        _refuse_too_short(other, requests)
        _refuse_other_order(base, other, one)
    _refuse_other_world(variants)
    order_jobs(configs, base, asked.sensitivity, Path(settings.out))  # refuses what cannot be measured
    values: Any = OmegaConf.to_container(config, resolve=True)
    track = section(config, "track", Track).of("eval")
    return EvalJob(
        settings,
        asked,
        track,
        {**provenance(), "machine": hardware(), **values},
        tuple(configs),
        variants,
        tasks,
        lm,
        requests,
    )


def ordered(job: EvalJob) -> EvalJob:
    """``job``; blocks that variants drop in an order that nobody has given are known then.  Ranks may be started."""
    if not any(lacks_order(config) for _, config in job.configs):
        return job
    configs = with_order(job.configs, job.variants[0], job.eval.sensitivity, job.out)
    variants = tuple(resolve_variant(name, config) for name, config in configs)
    return replace(job, variants=variants)


def pinned(config: DictConfig) -> tuple[str, ...]:
    """Settings that a job needs, because it runs another copy of the code: where the data is.

    Raises ValueError if variants want other numbers of ranks than the job starts.
    """
    _refuse_other_sizes(composed(config))
    folder = section(config, "eval", EvalConfig).folder
    return (f"eval.data={folder.resolve() if folder else 'hub'}",)


def _refuse_other_sizes(configs: Sequence[tuple[str, DictConfig]]) -> None:
    sizes = {name: section(one, "mesh", Mesh).ranks for name, one in configs}
    world = sizes[BASELINE]
    if other := [name for name in sizes if sizes[name] != world > 1]:
        raise ValueError(
            f"the job starts {world} ranks, variant {other[0]} has {sizes[other[0]]}: give all variants as many, "
            "or the baseline one rank, which starts the others' by itself"
        )


def _tasks(asked: EvalConfig, base: Variant, data: Path | None) -> dict[str, Any]:
    from eval.harness.long import LONG, long_tasks
    from eval.harness.tasks import load
    from longctx.hf.config import tokenizer_of

    long = [name for name in asked.tasks if name in LONG]
    tasks = load([name for name in asked.tasks if name not in LONG], data, asked.num_fewshot, asked.include)
    if asked.num_fewshot and (none := [name for name, task in tasks.items() if task.config.num_fewshot == 0]):
        say(f"eval.num_fewshot: {', '.join(none)} are asked without examples, as lm-eval has them")
    if long:
        most, tokenizer = asked.max_length or base.target.shape.max_positions, tokenizer_of(base.target.folder)
        examples = {name: asked.limit_of(name) or 50 for name in long}
        tasks |= long_tasks(examples, asked.lengths, asked.text, tokenizer, most, asked.seed)
    return tasks


def _requests(asked: EvalConfig, base: Variant, tasks: Mapping[str, Any]) -> tuple[Any, tuple[Request, ...]]:
    """lm-eval's side of the model, and all that it is asked."""
    from eval.harness.lm import EngineLM, prefix_token_of, recorder
    from eval.harness.tasks import answered
    from longctx.hf.config import tokenizer_of

    if asked.max_length and asked.max_length > base.target.shape.max_positions:
        raise ValueError(
            f"eval.max_length={asked.max_length:,}: the model's context is {base.target.shape.max_positions:,}"
        )
    requests: list[Request] = []
    tokenizer = tokenizer_of(base.target.folder)
    prefix = prefix_token_of(tokenizer, asked.prefix_token)
    lm = EngineLM(tokenizer, asked.max_length or base.target.shape.max_positions, prefix, recorder(requests))
    answered(tasks, lm)
    if lm.cut:
        say(f"{lm.cut:,} texts are longer than {lm.max_length:,} tokens (eval.max_length): they lose their beginning")
    return lm, tuple(dict.fromkeys(requests))


def _refuse_too_short(variant: Variant, requests: Sequence[Request]) -> None:
    """ValueError unless every request fits the context of ``variant``."""
    longest = max(len(one.tokens) - 1 if isinstance(one, Score) else len(one.tokens) + one.most for one in requests)
    context = variant.target.shape.max_positions
    if longest > context:
        raise ValueError(
            f"variant {variant.name}: its context is {context:,}, and the baseline's requests have "
            f"up to {longest:,} tokens: use eval.max_length={context}, or shorter eval.lengths"
        )


def _refuse_other_order(base: Variant, variant: Variant, config: DictConfig) -> None:
    """ValueError if blocks of ``variant`` are to drop in an order that would be measured on another model."""
    if lacks_order(config) and variant.target.folder != base.target.folder:
        raise ValueError(
            f"variant {variant.name}: the order in which blocks drop is measured on the baseline, and this is another "
            "model: give it spd.sensitivity, of recipes.spd_sensitivity"
        )


def _refuse_other_world(variants: Sequence[Variant]) -> None:
    """ValueError if a launcher has started ranks, and a variant wants another number of them."""
    here = rank_from_environment(os.environ)
    for variant in variants:
        if here and here.world_size != variant.target.mesh.ranks:
            raise ValueError(
                f"the launcher started {here.world_size} ranks, variant {variant.name} has {variant.target.mesh.ranks} "
                f"({variant.target.mesh}): leave the launcher out, or give all variants as many"
            )
