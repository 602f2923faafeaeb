"""Speed beside transformers (sdpa): prefill and decoding by one rank, by several ranks and by transformers, in turn.

python -m recipes.bench rivals
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt

from longctx.config import Sampling
from longctx.parallel.launch import Rank
from longctx.text_file import write_text
from recipes.bench import timing
from recipes.bench.decode import DecodeSettings, decode_steps, start_session
from recipes.common.cli import console, on_ranks, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable_folder
from recipes.common.plots import draw_bars
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.megatron.runtime import Runtime

Work = Callable[[], object]
Part = Literal["prefill", "decode"]
Variant = Literal["one_rank", "transformers", "ranks", "one_rank_one_thread", "transformers_one_thread"]
VARIANTS: tuple[Variant, ...] = (
    "one_rank",
    "transformers",
    "ranks",
    "one_rank_one_thread",
    "transformers_one_thread",
)
# The first variant's speed is reported relative to the second one's.
PAIRS: tuple[tuple[Variant, Variant], ...] = (
    ("one_rank", "transformers"),
    ("one_rank_one_thread", "transformers_one_thread"),
    ("ranks", "transformers"),
    ("ranks", "one_rank"),
    ("ranks", "one_rank_one_thread"),
)


@dataclass(frozen=True)
class RivalSettings:
    """Top-level settings of configs/bench/rivals.yaml."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = ("prefill", "decode")
    variants: Annotated[tuple[Variant, ...], Field(min_length=2)] = VARIANTS
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (5270,)
    cached: PositiveInt = 4096
    batch: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 4)
    tokens: PositiveInt = 8
    rounds: PositiveInt = 5
    out: str | None = None


@dataclass(frozen=True)
class RivalJob:
    """The inputs of every rank; ``prompt`` is the longest prompt, or empty if prefill is not timed."""

    settings: RivalSettings
    target: Target
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Rivals:
    """One model, loaded three times.

    ``sharded`` runs it on all ranks together, ``alone`` all of it on this rank.  ``transformers`` is transformers'
    model on the first rank, and None on the others.
    """

    sharded: Engine
    alone: Engine
    transformers: Any


@dataclass(frozen=True)
class WorkTimes:
    """Seconds of the piece of work that ``work`` names, by variant and round; it reads or writes ``tokens`` tokens."""

    work: str
    tokens: int
    seconds: dict[str, list[float]]

    def relative_speeds(self) -> dict[str, list[float]]:
        """Return, for each pair (a, b) of variants in `PAIRS`, how many times faster a was than b, by round.

        The keys are "a / b".  Pairs with a variant that was not measured are left out.
        """
        return {
            f"{a} / {b}": [y / x for x, y in zip(self.seconds[a], self.seconds[b], strict=True)]
            for a, b in PAIRS
            if {a, b} <= {*self.seconds}
        }


def prepare(config: DictConfig) -> RivalJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(config, RivalSettings)
    if settings.out:
        refuse_unwritable_folder(settings.out)
    recipe = "recipes.bench rivals"
    target = resolve_target(config, recipe, unused_axes=("tp", "ulysses", "dp", "pp"), spd="refuse")
    timing.refuse_gpu(target, recipe)
    if target.mesh.ring < 2:
        raise ValueError(f"mesh.ring={target.mesh.ring} has no second rank to compare with: use mesh.ring=2 or more")
    if "decode" in settings.parts:
        steps = decode_settings(settings)
        decoded = {"(2 x rounds + 2) x tokens": (steps.rounds + 1) * steps.tokens}
        timing.refuse_beyond_model(target, cached=settings.cached, **decoded)
    if "prefill" not in settings.parts:
        return RivalJob(settings, target, ())
    timing.refuse_beyond_model(target, lengths=max(settings.lengths))
    return RivalJob(settings, target, timing.read_tokens(target, "lengths", max(settings.lengths)))


def decode_settings(settings: RivalSettings) -> DecodeSettings:
    """Return the settings of the sessions that decode, with room for the tokens of two variants.

    The variants "one_rank" and "one_rank_one_thread" decode in the same session.
    """
    return DecodeSettings(cached=settings.cached, tokens=settings.tokens, rounds=2 * settings.rounds + 1)


def run_rank(rank: Rank, job: RivalJob) -> list[WorkTimes]:
    """Time prefill by length, then decoding by batch, in every variant; all ranks return the same seconds."""
    from longctx.infer.engine import load_alone

    settings, target, times = job.settings, job.target, []
    with target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress, torch.inference_mode():
        engine = target.load_engine(runtime)
        alone = load_alone(runtime, engine, target.model, target.folder)
        rivals = Rivals(engine, alone, None if rank.rank else load_transformers(target))

        def measure(name: str, tokens: int, works: Mapping[Variant, Work]) -> None:
            progress.start(f"{name}, runs", len(works) * (settings.rounds + 1))
            threads = target.threads(rank)
            times.append(
                WorkTimes(name, tokens, time_variants(runtime, threads, works, settings.rounds, progress.step))
            )

        for length in settings.lengths if "prefill" in settings.parts else ():
            works = prefill_works(job, rivals, job.prompt[:length])
            measure(f"prefill of {length:,} tokens", length, works)
        for batch in settings.batch if "decode" in settings.parts else ():
            works = decode_works(job, rivals, batch)
            measure(f"decode after {settings.cached:,} tokens, batch {batch}", batch * settings.tokens, works)
    return times


def load_transformers(target: Target) -> Any:
    """Return the target's model, on the CPU, as transformers loads it with PyTorch's attention (sdpa)."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its lock would outlive the rank, with a warning
    dtype = getattr(torch, target.model.dtype)
    return AutoModelForCausalLM.from_pretrained(target.folder, dtype=dtype, attn_implementation="sdpa").eval()


def prefill_works(job: RivalJob, rivals: Rivals, prompt: Sequence[int]) -> dict[Variant, Work]:
    """Return, by variant, a function that prefills ``prompt`` and takes the first new token."""
    from longctx.infer.session import Session

    def by(engine: Engine) -> Work:
        return lambda: Session(engine, job.target.context, Sampling()).turn({0: prompt}, {0: 1})

    def by_transformers() -> None:
        rivals.transformers(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits[0, -1].argmax()

    return by_variant(job, by(rivals.sharded), by(rivals.alone), by_transformers)


def decode_works(job: RivalJob, rivals: Rivals, batch: int) -> dict[Variant, Work]:
    """Return, by variant, a function that decodes ``job.settings.tokens`` tokens of each of ``batch`` sequences.

    The sequences begin with random cached keys and values; each call continues them.  On ranks other than the first,
    the function of transformers does nothing.
    """
    settings = decode_settings(job.settings)

    def by(engine: Engine) -> Work:
        session = start_session(engine, job.target.context, settings, batch)
        return lambda: decode_steps(session, settings.tokens, batch)

    theirs = TransformersDecoder(rivals.transformers, job.target, batch, job.settings) if rivals.transformers else None
    return by_variant(job, by(rivals.sharded), by(rivals.alone), theirs or (lambda: None))


class TransformersDecoder:
    """Greedy decode steps of transformers' model, over its default cache filled with random keys and values."""

    def __init__(self, net: Any, target: Target, batch: int, settings: RivalSettings) -> None:
        from transformers import DynamicCache

        self.net, self.steps, self.cache = net, settings.tokens, DynamicCache(config=net.config)
        shape, dtype = target.shape, getattr(torch, target.model.dtype)
        size = (batch, shape.kv_heads, settings.cached, shape.head_dim)
        for layer in range(shape.layers):
            self.cache.update(torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype), layer)
        self.last = torch.ones(batch, 1, dtype=torch.long)

    def __call__(self) -> None:
        """Decode the next ``settings.tokens`` tokens of every sequence; the next call continues after them."""
        for _ in range(self.steps):
            logits = self.net(self.last, past_key_values=self.cache, use_cache=True).logits
            self.last = logits[:, -1:].argmax(-1)


def by_variant(job: RivalJob, sharded: Work, alone: Work, theirs: Work) -> dict[Variant, Work]:
    """Return the work to time for each variant in the settings.

    Variants of all ranks get ``sharded``, those of one rank ``alone``, and those of transformers ``theirs``.
    """
    works = {"ranks": sharded}
    for variant in job.settings.variants:
        works.setdefault(variant, alone if variant.startswith("one_rank") else theirs)
    return {variant: works[variant] for variant in job.settings.variants}


def time_variants(
    runtime: Runtime, threads: int, works: Mapping[Variant, Work], rounds: int, done: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the seconds of each of ``works`` by variant and round, without the warm-up; every rank calls this.

    ``threads`` is the number of CPU threads of a rank.  The variants "one_rank" and "transformers" run in one process
    with the threads of all ranks together.  In all other variants, each process has ``threads``.  Only "ranks" runs on
    all ranks, the others on the first.  ``done`` is called after each measurement, also in the warm-up round.
    """

    def measure(variant: Variant) -> float:
        of_all = variant in ("one_rank", "transformers")
        torch.set_num_threads(threads * (runtime.context.size if of_all else 1))
        return timing.time_on_ranks(runtime.context, works[variant], only_first=variant != "ranks")

    by_round = timing.measure_in_rounds(list(works), rounds, measure, done)
    return {variant: of_variant.timed for variant, of_variant in zip(works, by_round, strict=True)}


def markdown(times: Sequence[WorkTimes]) -> list[str]:
    """Return the lines of two Markdown tables: median speeds; relative speeds as median, smallest and largest."""
    lines = ["| work | variant | seconds | tokens/s |", "|---|---|--:|--:|"]
    for each in times:
        for variant, seconds in each.seconds.items():
            middle = median(seconds)
            lines.append(f"| {each.work} | {variant} | {middle:.3f} | {each.tokens / middle:,.1f} |")
    lines += ["", "| work | relative speed | median (smallest to largest) |", "|---|---|--:|"]
    for each in times:
        for pair, speeds in each.relative_speeds().items():
            lines.append(f"| {each.work} | {pair} | {median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f}) |")
    return lines


def write(job: RivalJob, times: Sequence[WorkTimes], out: Path) -> None:
    """Write rivals.json, rivals.md and the picture rivals.svg to the folder ``out``."""
    import transformers

    model = job.target.model
    about = {"model": model.name, "dtype": model.dtype, "mesh": str(job.target.mesh), **provenance()}
    table_rows = [{**asdict(each), "relative_speeds": each.relative_speeds()} for each in times]
    write_result(str(out / "rivals.json"), {**about, "transformers": transformers.__version__, "rows": table_rows})
    write_text(out / "rivals.md", "\n".join([*markdown(times), ""]))
    speeds = [(pair, median(ratios)) for each in times for pair, ratios in each.relative_speeds().items()]
    draw_bars(
        str(out / "rivals.svg"),
        [speed for _, speed in speeds],
        [pair.replace("_", " ") for pair, _ in speeds],
        title=f"{model.name}, {model.dtype}: relative speed",
        x="rows of the table, in order",
        y="relative speed",
        levels=[1],
    )


def task(config: DictConfig) -> None:
    """Run the ranks and show the speeds; also write them if ``out`` is set."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.session", "recipes.common.progress"])
    job = prepare(config)
    times = on_ranks(job.target.mesh, run_rank, job)
    if times is None:
        return
    console.print("\n".join(markdown(times)))
    if job.settings.out:
        write(job, times, Path(job.settings.out))
