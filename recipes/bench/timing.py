"""Parts that several benchmarks share: rounds of timed variants, random caches, and real text of a given length."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.distributed as dist

from longctx.attention.layout import Layout, zigzag
from longctx.config import Context, Mesh, PromptSource
from longctx.data.prompt import prompt_tokens
from longctx.hf.config import tokenizer_of
from longctx.parallel.comm import Comm
from longctx.parallel.dist_comm import DistComm
from longctx.parallel.validate import refuse_unused
from recipes.common.target import Target

if TYPE_CHECKING:
    from longctx.infer.cache import KVCache
    from longctx.infer.engine import Engine
    from recipes.common.train_job import TrainJob

Variant = TypeVar("Variant")
Figure = TypeVar("Figure")


def refuse_set_by_runs(job: TrainJob, recipe: str, more: Mapping[str, object] | None = None) -> None:
    """Raise ValueError, naming ``recipe``, if ``job`` sets what each of the benchmark's ``runs`` sets itself.

    These are the mesh, the batch and the strategy.  ``more`` has the values of other such settings by name, each of
    which must be None, False or "none".
    """
    refuse_unused(job.target.mesh, recipe, tuple(vars(Mesh())))
    strategy = job.target.context.strategy
    given = {"data.batch": job.data.batch != 1, "context.strategy": strategy != Context().strategy}
    given |= {name: value not in (None, False, "none") for name, value in (more or {}).items()}
    if unused := [name for name, is_set in given.items() if is_set]:
        raise ValueError(f"{unused[0]} is not used by {recipe}, whose runs each have their own: leave it out")


def refuse_gpu(target: Target, recipe: str) -> None:
    """Raise ValueError, naming ``recipe``, if the run is on a GPU: this benchmark does not wait for a GPU's work."""
    if target.run.device != "cpu":
        raise ValueError(f"run.device={target.run.device}: {recipe} measures cpu only; use run=local")


@dataclass(frozen=True)
class Rounds(Generic[Figure]):
    """Figures of one variant: that of the warm-up round, whose seconds are not reported, and one per timed round."""

    warm_up: Figure
    timed: list[Figure]


def measure_in_rounds(
    variants: Sequence[Variant],
    rounds: int,
    measure: Callable[[Variant], Figure],
    done: Callable[[], None] = lambda: None,
) -> list[Rounds[Figure]]:
    """Measure each variant in a warm-up round and ``rounds`` timed rounds; return the figures in order of ``variants``.

    The variants take turns within a round, so that all of them see the same state of the machine.  Variants (a, b) in
    two rounds are called in the order a b, a b, a b, of which the first pair is the warm-up.  ``done`` is called
    after each measurement.
    """
    figures: list[list[Figure]] = [[] for _ in variants]
    for _ in range(rounds + 1):
        for variant, of_variant in zip(variants, figures, strict=True):
            of_variant.append(measure(variant))
            done()
    return [Rounds(warm_up, timed) for warm_up, *timed in figures]


def barrier(group: Comm) -> None:
    """Wait until every rank of ``group`` has called this function."""
    group.all_gather(torch.zeros(1, device=_device_of(group)), [(1,)] * group.size)


def _device_of(group: Comm) -> torch.device:
    """Return the device of the tensors that ``group`` sends: NCCL sends only tensors on a GPU."""
    is_nccl = isinstance(group, DistComm) and dist.get_backend(group.group) == "nccl"
    return torch.device("cuda" if is_nccl else "cpu")


def gather_numbers(group: Comm, *numbers: float) -> list[list[float]]:
    """Return, for each of ``numbers``, its values on all ranks of ``group`` in rank order.

    Rank 0 with (1, 2) and rank 1 with (3, 4) both get [[1, 3], [2, 4]].
    """
    mine = torch.tensor(numbers, dtype=torch.float64, device=_device_of(group))
    of_all = torch.stack(group.all_gather(mine, [(len(numbers),)] * group.size))
    by_number: list[list[float]] = of_all.T.tolist()
    return by_number


def measure_seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds of ``work`` on this rank's CPU; a GPU is not synchronized."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_on_ranks(group: Comm, work: Callable[[], object], *, only_first: bool = False) -> float:
    """Start ``work`` on all ranks of ``group`` at once and return the slowest rank's seconds, on every rank.

    With ``only_first`` rank 0 works alone and the other ranks wait for it.
    """
    barrier(group)
    seconds = 0.0 if only_first and group.rank else measure_seconds(work)
    (of_all,) = gather_numbers(group, seconds)
    return max(of_all)


def append_random_rows(
    cache: KVCache, layout: Layout, *, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Extend ``cache`` by the positions of ``layout``, with random keys and values in each of ``layers`` layers.

    ``layout`` counts the new positions from 0 and spans the ring; this rank appends its own rows of it.  ``kv_heads``
    is the number of this rank's heads.
    """
    before = cache.rows
    cache.extend(layout.after(cache.layout))
    shape = (1, cache.rows - before, kv_heads, head_dim)
    for layer in range(layers):
        cache.append(layer, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


def make_random_cache(engine: Engine, tokens: int, reserve: int) -> KVCache:
    """Return a cache of random keys and values of ``tokens`` positions, sharded zigzag over the ring.

    It has room for ``reserve`` positions on all ring ranks together.
    """
    cache, shape = engine.cache(reserve), engine.shape
    append_random_rows(
        cache,
        zigzag(tokens, engine.ring.size),
        layers=shape.layers,
        kv_heads=max(1, shape.kv_heads // engine.tp.size // engine.ulysses.size),
        head_dim=shape.head_dim,
        dtype=next(engine.model.parameters()).dtype,
    )
    return cache


def read_tokens(target: Target, setting: str, tokens: int) -> tuple[int, ...]:
    """Return the first ``tokens`` token ids of Python's language reference.

    Raises ValueError, naming ``setting``, if the text has fewer.
    """
    # A cut text ends between characters: ask for more tokens than the last character can have.
    ids, available = prompt_tokens(PromptSource(pydoc="all", tokens=tokens + 8), tokenizer_of(target.folder))
    if available < tokens:
        raise ValueError(f"{setting}={tokens}: Python's documentation has {available:,} tokens; use at most that")
    target.shape.refuse_unknown_token(max(ids))
    return tuple(ids[:tokens])


def refuse_beyond_model(target: Target, **tokens: int) -> None:
    """Raise ValueError if ``tokens``, settings by name, are together more than the model's positions."""
    if sum(tokens.values()) > target.shape.max_positions:
        settings = " and ".join(f"{name}={value}" for name, value in tokens.items())
        limit = f"{target.shape.max_positions:,}"
        raise ValueError(f"{settings}: {target.model.name} has {limit} positions; use at most {limit} tokens")
