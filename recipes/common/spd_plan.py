"""Which blocks drop their first reduction: what the command line and the model's folder say, checked together."""

from pathlib import Path

from omegaconf import DictConfig

from longctx.config import SPD, Mesh, ModelSource
from longctx.hf.checkpoint import fingerprint
from longctx.model_shape import ModelShape
from longctx.spd.plan import SavedPlan, SPDPlan, order_from, saved_plan, within
from recipes.common.settings import section


def plan_of(config: DictConfig, mesh: Mesh, model: ModelSource, folder: Path, shape: ModelShape) -> SPDPlan | None:
    """The plan that ``config`` asks for with the model in ``folder``; None if no block drops and none could.

    Raises ValueError, with what to do instead, for a plan that is not of this model, mesh or kind of layers.
    """
    spd, saved = section(config, "spd", SPD), saved_plan(folder)
    plan = planned(spd, mesh, folder, shape, saved)
    if plan.dropped and model.layers == "te":
        raise ValueError("model.layers=te with spd has not been tested: use model.layers=local")
    return plan if plan.dropped else None


def refuse_adapted(folder: Path, recipe: str) -> None:
    """ValueError if the model in ``folder`` has dropped reductions, which ``recipe`` would not see."""
    if saved_plan(folder):
        raise ValueError(
            f"{folder} has dropped reductions, which {recipe} does not know of: give the model it is made from"
        )


def planned(spd: SPD, mesh: Mesh, folder: Path, shape: ModelShape, saved: SavedPlan | None) -> SPDPlan:
    """`plan_of`, once the settings are read."""
    if spd.drop == "none":
        return SPDPlan(shape.layers, mesh.tp)
    if spd.drop == "saved" and spd.blocks is None and spd.budget is None and saved is None:
        return SPDPlan(shape.layers, mesh.tp)
    if saved and saved.plan.tp != mesh.tp:
        raise ValueError(
            f"{folder} was made for mesh.tp={saved.plan.tp}, this is mesh.tp={mesh.tp}: use that, "
            "or spd=none for the model without dropped reductions"
        )
    plan = saved.plan if saved else SPDPlan(shape.layers, mesh.tp)
    return SPDPlan(shape.layers, mesh.tp, _blocks(spd, mesh, folder, shape, saved), plan.own_norms)


def _blocks(spd: SPD, mesh: Mesh, folder: Path, shape: ModelShape, saved: SavedPlan | None) -> tuple[int, ...]:
    if spd.blocks is not None:
        return spd.blocks
    if spd.drop == "all":
        return tuple(range(shape.layers))
    if spd.budget is None:
        if spd.drop == "ranked":
            raise ValueError("spd=ranked: say with spd.budget which share of the blocks drops, such as spd.budget=0.5")
        assert saved
        return saved.plan.dropped
    if spd.sensitivity:
        source = saved.source if saved else fingerprint(folder)
        return within(order_from(Path(spd.sensitivity).expanduser(), shape.layers, mesh.tp, source), spd.budget)
    if saved is None:
        raise ValueError(
            f"spd.budget={spd.budget} needs an order of blocks: measure it with "
            f"`python -m recipes.spd_sensitivity mesh.tp={mesh.tp} out=DIR`, "
            "and give spd.sensitivity=DIR/sensitivity.json"
        )
    return within(saved.order, spd.budget)
