"""Refusals of an evaluation's settings, before any rank starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from eval.answers.requests import Request, Score
from eval.sensitivity import lacks_order
from eval.variants import BASELINE, Variant
from longctx.config import Mesh
from longctx.parallel.launcher import current_rank
from recipes.common.cli import refuse_other_world
from recipes.common.settings import section

if TYPE_CHECKING:
    from eval.settings import EvalConfig


def refuse_unknown_gate(evaluation: EvalConfig, names: Sequence[str]) -> None:
    """Raise ValueError if ``eval.gate`` names the baseline, or something that is not a variant."""
    if unknown := set(evaluation.gate) - set(names):
        raise ValueError(f"eval.gate: there is no variant {min(unknown)}: use {', '.join(names[1:]) or 'eval.gate=[]'}")
    if BASELINE in evaluation.gate:
        raise ValueError(f"eval.gate lists {BASELINE}, which variants are compared with: list variants only")


def refuse_other_sizes(configs: Sequence[tuple[str, DictConfig]]) -> None:
    """Raise ValueError if the baseline has several ranks, and a variant has another number of ranks.

    A Slurm job starts as many ranks as the baseline has.
    """
    sizes = {name: section(one, "mesh", Mesh).ranks for name, one in configs}
    world = sizes[BASELINE]
    if others := [name for name in sizes if sizes[name] != world > 1]:
        raise ValueError(
            f"the job starts {world} ranks, but variant {others[0]} has {sizes[others[0]]}: give all variants {world}, "
            "or give the baseline a mesh of one rank; the job then starts each variant's own ranks"
        )


def refuse_too_short(variant: Variant, requests: Sequence[Request]) -> None:
    """Raise ValueError unless every request fits the context of ``variant``."""
    longest = max(
        len(one.tokens) - 1 if isinstance(one, Score) else len(one.tokens) + one.max_new_tokens for one in requests
    )
    context = variant.target.shape.max_positions
    if longest > context:
        raise ValueError(
            f"variant {variant.name}: its context is {context:,}, and the baseline's requests have "
            f"up to {longest:,} tokens: use eval.max_length={context}, or shorter eval.lengths"
        )


def refuse_unknown_tokens(variant: Variant, requests: Sequence[Request]) -> None:
    """Raise ValueError for a token beyond the vocabulary of ``variant``."""
    largest = max((max(one.tokens) for one in requests), default=0)
    variant.target.shape.refuse_unknown_token(largest, f"variant {variant.name}: a request")


def refuse_other_order(base: Variant, variant: Variant, config: DictConfig) -> None:
    """Raise ValueError if ``variant`` lacks an order of blocks and its model is not the baseline's.

    A missing order is measured on the baseline.
    """
    if lacks_order(config) and variant.target.folder != base.target.folder:
        raise ValueError(
            f"variant {variant.name}: the missing order of its blocks would be measured on the baseline, but this "
            "variant has another model: set its spd.sensitivity to a file of recipes.spd_sensitivity for this model"
        )


def refuse_other_worlds(configs: Sequence[tuple[str, DictConfig]]) -> None:
    """Raise ValueError if a launcher started the ranks, and a variant has another number of ranks."""
    for name, config in configs if current_rank() else ():
        refuse_other_world(section(config, "mesh", Mesh), f"variant {name}")
