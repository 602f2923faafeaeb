"""Choice of the blocks that drop their first reduction, from the settings ``spd`` and the model's folder."""

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from longctx.config import SPD, Mesh, ModelSource
from longctx.hf.checkpoint import fingerprint
from longctx.model_shape import ModelShape
from longctx.spd.plan import (
    SavedPlan,
    SPDPlan,
    order_from,
    refuse_changed_weights,
    refuse_unfit_shape,
    saved_plan,
    within,
)
from recipes.common.settings import section


def plan_of(
    config: DictConfig, mesh: Mesh, model: ModelSource, folder: Path, shape: ModelShape, decode: str
) -> SPDPlan | None:
    """Return the plan that ``config`` asks for with the model in ``folder``, or None if no block drops.

    ``decode`` is context.decode.  If it is "sharded" and ``mesh.tp=1``, context ranks take the place of the
    tensor-parallel ranks.

    Raises ValueError, with what to set instead, for a plan that does not fit the model or the mesh.
    """
    saved = saved_plan(folder)
    if saved:
        refuse_changed_weights(folder)
    shared = decode == "sharded" and mesh.context > 1
    degree = replace(mesh, tp=mesh.context, ulysses=1, ring=1) if shared and mesh.tp == 1 else mesh
    plan = choose_plan(section(config, "spd", SPD), degree, folder, shape, saved, model.cache)
    if not plan.dropped:
        return None
    refuse_unfit_shape(shape)
    if shared:
        refuse_unshared(mesh, degree, plan, shape)
    return plan


def refuse_unshared(mesh: Mesh, degree: Mesh, plan: SPDPlan, shape: ModelShape) -> None:
    """Raise ValueError unless the context ranks of ``mesh`` can drop the reductions of ``plan`` in sharded decoding.

    ``degree`` is the tensor-parallel mesh that these ranks act as.
    """
    from longctx.parallel.validate import refuse_unfit, tp_degrees  # here, since it imports torch

    refuse_shared_over_tp(mesh)
    if plan.own_norms:
        raise ValueError(
            "context.decode=sharded does not support norms per rank (repair.own_norms): use "
            f"mesh.tp={plan.tp} mesh.ring=1, or a model that was adapted without repair.own_norms"
        )
    try:
        refuse_unfit(degree, shape)
    except ValueError as error:
        fit = " or ".join(str(n) for n in tp_degrees(shape) if n > 1) or "one"
        raise ValueError(
            f"context.decode=sharded cannot drop reductions over {mesh.context} context ranks, since they cannot share "
            f"the model's heads and FFN evenly: use {fit} context ranks (mesh.ring, mesh.ulysses), or spd=none"
        ) from error


def refuse_shared_over_tp(mesh: Mesh) -> None:
    """Raise ValueError if ``mesh.tp`` is above 1, for dropped reductions with context.decode=sharded."""
    if mesh.tp > 1:
        raise ValueError(
            f"context.decode=sharded drops reductions over context ranks only, but this is mesh.tp={mesh.tp}: use "
            "context.decode=gather_merge, or mesh.tp=1"
        )


def refuse_adapted(folder: Path, recipe: str) -> None:
    """Raise ValueError if the model in ``folder`` drops reductions, which ``recipe`` does not support."""
    if saved_plan(folder):
        raise ValueError(
            f"{folder} drops reductions, and {recipe} does not support that: use the model that it was made from"
        )


def choose_plan(
    spd: SPD, mesh: Mesh, folder: Path, shape: ModelShape, saved: SavedPlan | None, cache: str | None = None
) -> SPDPlan:
    """Return the plan that the settings ``spd`` ask for; ``saved`` is the plan in the model's ``folder``.

    Without blocks to drop, the plan is empty.  ``cache`` is the folder that remembers the model's fingerprint (None: it
    is computed).

    Raises ValueError, with what to set instead, if

    * the saved plan has another tensor-parallel degree;
    * blocks are to drop with only one tensor-parallel rank;
    * spd=ranked has no spd.budget, or the settings need an order of blocks that is not known;
    * a listed block does not exist.
    """
    is_saved_plan = spd.drop == "saved" and spd.blocks is None and spd.budget is None
    if spd.drop == "none" or (is_saved_plan and saved is None):
        return SPDPlan(shape.layers, mesh.tp)
    if saved and saved.plan.tp != mesh.tp:
        ranks = "1 rank has" if mesh.tp == 1 else f"{mesh.tp} ranks share"
        raise ValueError(
            f"{folder} was made for mesh.tp={saved.plan.tp}, but here {ranks} the weights: "
            f"use mesh.tp={saved.plan.tp} context.decode=gather_merge, "
            f"or mesh.tp=1 mesh.ulysses=1 mesh.ring={saved.plan.tp} context.decode=sharded, "
            "or spd=none for the model without dropped reductions"
        )
    if mesh.tp == 1 and not is_saved_plan and spd.budget != 0:
        setting, instead = f"spd={spd.drop}", "spd=none"
        if spd.blocks is not None or spd.budget is not None:
            setting = f"spd.budget={spd.budget}" if spd.blocks is None else f"spd.blocks={list(spd.blocks)}"
            instead = "leave spd.budget and spd.blocks out"
        raise ValueError(
            f"{setting}: one tensor-parallel rank has no reduction to drop; use mesh.tp=2 or more, or {instead}"
        )
    own_norms = saved.plan.own_norms if saved else False
    return SPDPlan(shape.layers, mesh.tp, _dropped_blocks(spd, mesh, folder, shape, saved, cache), own_norms)


def _dropped_blocks(
    spd: SPD, mesh: Mesh, folder: Path, shape: ModelShape, saved: SavedPlan | None, cache: str | None
) -> tuple[int, ...]:
    # 1. Blocks that the settings list, or all of them.
    if spd.blocks is not None:
        return spd.blocks
    if spd.drop == "all":
        return tuple(range(shape.layers))
    # 2. Blocks of the saved plan.
    if spd.budget is None:
        if spd.drop == "ranked":
            raise ValueError(
                "spd=ranked has no budget: set spd.budget to the share of blocks that drop, such as spd.budget=0.5"
            )
        assert saved
        return saved.plan.dropped
    if spd.budget == 0:
        return ()
    # 3. The first blocks of an order, from a sensitivity.json or from the saved plan.
    if spd.sensitivity:
        source = saved.source if saved else fingerprint(folder, cache)
        return within(order_from(Path(spd.sensitivity).expanduser(), shape.layers, mesh.tp, source), spd.budget)
    if saved is None:
        raise ValueError(
            f"spd.budget={spd.budget} needs an order of blocks: measure it with "
            f"`python -m recipes.spd_sensitivity mesh.tp={mesh.tp} out=DIR`, "
            "and set spd.sensitivity=DIR/sensitivity.json"
        )
    return within(saved.order, spd.budget)
