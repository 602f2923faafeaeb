"""Target of a recipe: a model, its mesh and how it runs, resolved from the configuration and checked once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from omegaconf import DictConfig
from rich.markup import escape

from longctx.config import Context, Mesh, ModelSource, Reduce, Run, Sampling
from longctx.hf.checkpoint import fingerprint
from longctx.hf.config import shape_of
from longctx.hf.generation import generation_file, unapplied_settings, unread_end_tokens
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan, saved_plan
from recipes.common.cli import refuse_other_world, say, threads_for
from recipes.common.settings import section
from recipes.common.spd_plan import plan_of, refuse_adapted

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.megatron.runtime import Runtime


@dataclass(frozen=True)
class Target:
    """A model and the mesh it runs on: plain values, checked before any rank starts.

    ``folder`` holds its config.json, tokenizer and weights; for training from scratch it may lack weights.  ``plan``
    lists blocks that drop a reduction (None: none).  ``reduce`` has the dtypes of rounded reductions (None: all are
    exact).
    """

    model: ModelSource
    folder: Path
    shape: ModelShape
    mesh: Mesh
    context: Context
    run: Run
    plan: SPDPlan | None = None
    reduce: Reduce | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the model's weights and configuration; computed on first use."""
        return fingerprint(self.folder, self.model.cache)

    @property
    def inexact(self) -> bool:
        """True if reductions are dropped or rounded, so that the model's function depends on the number of ranks."""
        return self.plan is not None or self.reduce is not None

    def threads(self, rank: Rank) -> int:
        """Return the CPU threads of ``rank``."""
        return threads_for(self.run.threads, rank)

    @contextmanager
    def runtime(self, rank: Rank, *, training: bool = False) -> Iterator[Runtime]:
        """Set up the process groups of the mesh on ``rank`` until the block ends, and yield them.

        Every rank must enter it.  ``training`` also lets megatron-core's training code run without CUDA.
        """
        from longctx.megatron.runtime import open_runtime

        with open_runtime(
            rank,
            self.mesh,
            threads=self.threads(rank),
            timeout_minutes=self.run.timeout_minutes,
            device=self.run.device,
            training=training,
        ) as groups:
            yield groups

    def load_engine(self, runtime: Runtime, plan: SPDPlan | None = None) -> Engine:
        """Load the model on the ranks of ``runtime``; its blocks follow ``plan`` (None: the target's plan).

        Every rank calls this.
        """
        from longctx.infer.engine import load_engine

        plan = self.plan if plan is None else plan
        return load_engine(runtime, self.model, self.shape, self.folder, self.context.kernel, plan, self.reduce)


def resolve_target(
    config: DictConfig,
    recipe: str,
    *,
    unused_axes: Sequence[str] = (),
    needs_weights: bool = True,
    strategy_by_turn: bool = False,
    decode_by_batch: bool = False,
    proves_schedule: bool = False,
    spd: Literal["follow", "refuse", "ignore"] = "follow",
    fp8: tuple[str, ...] = (),
) -> Target:
    """Return the target that ``config`` names.  Writes nothing but the model cache.

    ``unused_axes`` of the mesh must be 1.  ``needs_weights`` refuses a folder without weights.  ``strategy_by_turn``
    allows ``context.strategy=auto`` and the other rules; ``decode_by_batch`` allows ``context.decode=auto``,
    ``proves_schedule`` allows ``context.check_schedule``.  ``spd`` says whether a plan of dropped reductions is
    followed, refused or ignored.  ``fp8`` lists the values of ``model.fp8`` that the recipe allows.

    Raises ValueError, with what to set instead, for a model, mesh, kernel, strategy or plan that ``recipe`` cannot run.
    """
    from longctx.attention.backends import kernel_for
    from longctx.parallel.validate import refuse_no_te, refuse_other_than_te, refuse_unfit, refuse_unused

    # 1. Check the settings by themselves.
    mesh = section(config, "mesh", Mesh) if "mesh" in config else Mesh()
    model = section(config, "model", ModelSource)
    context = section(config, "context", Context) if "context" in config else Context()
    run = section(config, "run", Run) if "run" in config else Run(threads=1)
    refuse_other_world(mesh)
    # Only training has pipeline stages, and only training sends tokens between ranks that divide the experts.
    refuse_unused(mesh, recipe, (*unused_axes, *(("ep",) if "pp" in unused_axes else ())))
    if not strategy_by_turn:
        refuse_strategy_by_turn(context, recipe)
    refuse_decode(context, model, recipe, by_batch=decode_by_batch)
    kernel_for(context.kernel, run.device, model.dtype)
    if model.layers == "te":
        refuse_no_te(run.device)
    # 2. Locate the model, and check it against the mesh and the plan.
    folder = locate(model, say)
    shape = shape_of(folder)
    if model.layers == "te":
        refuse_other_than_te(shape)
    if needs_weights:
        refuse_damaged(model, folder, shape)
    refuse_unfit(mesh, shape)
    refuse_unproved(context, mesh, shape, recipe, proves=proves_schedule)
    if spd == "refuse":
        refuse_adapted(folder, recipe)
    plan = plan_of(config, mesh, model, folder, shape, context.decode) if spd == "follow" and "spd" in config else None
    reduce = section(config, "reduce", Reduce) if "reduce" in config else Reduce()
    refuse_rounded(reduce, mesh, model, context, shape)
    target = Target(model, folder, shape, mesh, context, run, plan, None if reduce.exact else reduce)
    refuse_fp8(target, recipe, fp8, config.get("hardware"))
    return target


def refuse_decode(context: Context, model: ModelSource, recipe: str, *, by_batch: bool) -> None:
    """Raise ValueError for a ``context.decode`` that ``recipe`` or the model's layers do not support.

    ``by_batch`` says whether the recipe supports ``auto``.
    """
    from longctx.parallel.strategy import STRATEGIES

    if context.decode == "auto" and not by_batch:
        raise ValueError(
            f"context.decode=auto works in recipes.generate, chat and serve; {recipe} takes one of "
            f"gather_merge, sharded, {', '.join(STRATEGIES)}"
        )
    if context.decode == "sharded" and model.layers == "te":
        raise ValueError(
            "context.decode=sharded is not implemented for model.layers=te: use model.layers=local, or "
            "context.decode=gather_merge"
        )


def refuse_fp8(target: Target, recipe: str, allowed: tuple[str, ...], hardware: str | None) -> None:
    """Raise ValueError if ``model.fp8`` is set and ``recipe``, the model or another setting does not support it.

    ``allowed`` has the values that ``recipe`` supports.
    """
    from longctx.parallel.validate import refuse_fp8_widths

    model = target.model
    if not model.fp8:
        return
    if model.fp8 not in allowed:
        instead = f"model.fp8={allowed[0]}, or model.fp8=null" if allowed else "model.fp8=null"
        raise ValueError(f"model.fp8={model.fp8} is not supported in {recipe}: use {instead}")
    for fits, instead in (
        (model.layers == "te", "model.layers=te"),
        (model.dtype == "bfloat16", "model.dtype=bfloat16"),
        (target.plan is None, "spd=none"),
        (hardware is None, "hardware=null, since predictions are for 16 bits"),
    ):
        if not fits:
            raise ValueError(f"model.fp8={model.fp8} is supported only with {instead}")
    refuse_fp8_widths(target.mesh, target.shape)


def refuse_rounded(reduce: Reduce, mesh: Mesh, model: ModelSource, context: Context, shape: ModelShape) -> None:
    """Raise ValueError if ``reduce`` rounds reductions that do not exist here, or that are not tested with rounding."""
    if reduce.exact:
        return
    if mesh.tp == 1:
        raise ValueError(
            f"reduce ({reduce}): one tensor-parallel rank has nothing to reduce; use mesh.tp=2 or more, or "
            "reduce=float32"
        )
    if context.decode == "sharded":
        raise ValueError(
            f"context.decode=sharded is not tested with rounded reductions ({reduce}): use "
            "context.decode=gather_merge, or reduce=float32"
        )
    if model.layers == "te":
        raise ValueError(
            f"model.layers=te is not tested with rounded reductions ({reduce}): use model.layers=local, or "
            "reduce=float32"
        )
    if shape.mixture:
        raise ValueError("rounded reductions are not tested with mixtures of experts: use reduce=float32")


def refuse_damaged(model: ModelSource, folder: Path, shape: ModelShape) -> None:
    """Raise ValueError unless ``folder`` has all weights that a model of ``shape`` needs, and no others."""
    from longctx.hf.tensors import refuse_other_tensors

    saved = saved_plan(folder)
    refuse_other_tensors(
        folder,
        shape,
        norm_copies=saved.plan.tp if saved and saved.plan.own_norms else 1,
        rotary_changed=bool(model.rope_theta or model.rope_factor),
    )


def say_unapplied(folder: Path, sampling: Sampling) -> None:
    """Print the settings of generation that would change transformers' text and are not applied.

    Also print the end tokens of config.json that generation_config.json hides, here and in transformers.
    """
    unapplied = unapplied_settings(folder, sampled=sampling.temperature > 0)
    if others := {name: value for name, value in unapplied.items() if getattr(sampling, name, None) != value}:
        names = ", ".join(f"{name}={value}" for name, value in others.items())
        file = generation_file(folder).name
        say(f"{file} has {escape(names)}: not applied here, so the text may differ from transformers'")
    if (ends := unread_end_tokens(folder)) is not None:
        say(
            "the model has no end token: generation_config.json has no eos_token_id, and hides that of config.json, as "
            f"in transformers; to end answers, add eos_token_id={escape(str(ends))} to generation_config.json"
        )


def refuse_unproved(context: Context, mesh: Mesh, shape: ModelShape, recipe: str, *, proves: bool) -> None:
    """Raise ValueError if ``context.check_schedule`` has nothing to prove, or if no proof is implemented.

    ``proves`` says whether ``recipe`` implements a proof.
    """
    if not context.check_schedule:
        return
    if not proves:
        raise ValueError(
            "context.check_schedule=true works in recipes.generate, chat, pretrain, extend and finetune; "
            f"{recipe} takes context.check_schedule=false"
        )
    if mesh.context == 1:
        raise ValueError(
            "context.check_schedule=true has no messages to check on one context rank: use mesh.ring=2 or more, or "
            "context.check_schedule=false"
        )
    if context.decode == "sharded" and not proves_sharded(mesh, shape):
        kind = "mixtures of experts" if shape.mixture else f"norms over all heads with mesh.tp={mesh.tp}"
        raise ValueError(
            f"context.check_schedule=true is not implemented for context.decode=sharded of {kind}: use "
            "context.decode=gather_merge, or context.check_schedule=false"
        )


def proves_sharded(mesh: Mesh, shape: ModelShape) -> bool:
    """Return True if the messages of sharded decoding can be recorded without data.

    The layers of mixtures of experts read data on the CPU.  Norms of queries and keys over all heads sum over
    tensor-parallel ranks.
    """
    return not shape.mixture and (mesh.tp == 1 or shape.qk_norm != "width")


def refuse_strategy_by_turn(context: Context, recipe: str) -> None:
    """Raise ValueError unless ``context.strategy`` names one strategy, not a rule that chooses one for each turn."""
    from longctx.parallel.strategy import STRATEGIES

    if context.strategy not in STRATEGIES:
        raise ValueError(
            f"context.strategy={context.strategy} chooses a strategy for each turn of a conversation: {recipe} takes "
            f"one of {', '.join(STRATEGIES)} (recipes.chat and recipes.serve take {context.strategy})"
        )
