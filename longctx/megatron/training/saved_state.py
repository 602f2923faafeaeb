"""State of a training run as megatron-core's checkpoints hold it, with repairs to loading the optimizer's state."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

from longctx.config import Optim
from longctx.megatron.training.state import TrainState
from longctx.shapes import Tensor

# Optimizer state is saved per parameter, not per bucket, so that another mesh can load it.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_EXPERTS = "experts"  # key, in the optimizer's state, of the state of a separate optimizer of the experts


def sharded_state(train_state: TrainState, *, loading: bool) -> dict[str, Any]:
    """Return weights, optimizer and schedule as megatron-core saves them, by the keys model, optimizer and schedule.

    With ``loading``, return the same structure in the form that megatron-core fills from a checkpoint.
    """
    model = {"model": train_state.net.sharded_state_dict(metadata=dict(METADATA))}
    state, *of_experts = (
        optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(METADATA))
        for optimizer in train_state.optimizer.chained_optimizers
    )
    if of_experts:  # with expert parallelism
        state[_EXPERTS] = dict_list_map_outplace(_without_values, of_experts[0])
    return {**model, "optimizer": state, "schedule": train_state.schedule.state_dict()}


def _without_values(leaf: Any) -> Any:
    """Return ``leaf`` if it is a tensor of a checkpoint; otherwise wrap it, so that the checkpoint leaves it out.

    The experts' optimizer saves tensors only.  A run with one optimizer for all weights can then load them, and vice
    versa.
    """
    return leaf if isinstance(leaf, ShardedBase | LocalNonpersistentObject) else LocalNonpersistentObject(leaf)


def optimizer_states(loaded: dict[str, Any]) -> list[dict[str, Any]]:
    """Split the ``loaded`` optimizer state, in place, into a list with one state for each optimizer.

    With expert parallelism there are two optimizers, the experts' last.  The number of steps is saved only once, so the
    experts' optimizer gets a copy of it.
    """
    of_experts = loaded.pop(_EXPERTS, None)
    if of_experts is None:
        return [loaded]
    source, target = (state.get("optimizer", state) for state in (loaded, of_experts))
    if step := source.get("state", {}).get("common_step"):
        target["state"]["common_step"] = step
    if "step" in source["param_groups"][0]:  # ZeRO-1, and Transformer Engine's optimizer
        for group in target["param_groups"]:
            group["step"] = source["param_groups"][0]["step"]
    return [loaded, of_experts]


def match_groups(state: dict[str, Any], optim: Optim) -> None:
    """Set the learning rates in the saved parameter groups of an optimizer's ``state`` to this run's, in place.

    megatron-core 0.19 looks up a saved group by its settings, which include the learning rates.
    """
    for group in state.get("optimizer", state)["param_groups"]:
        group |= {"max_lr": optim.lr, "min_lr": optim.final_lr}


def make_loadable(optimizer: Any) -> None:
    """Make megatron-core's distributed optimizer load into torch's AdamW, which it otherwise fails to do.

    megatron-core's loading has three faults.
    1) It expects optimizer state before the first step.
    2) It looks up AdamW's ``step`` in a parameter's saved tensors, which lack it.
    3) It gives all parameters one shared ``step`` tensor, which every parameter's update would increment.
    Other optimizers are left unchanged.
    """
    adamw = optimizer.optimizer
    if not hasattr(optimizer, "model_param_group_index_map") or not isinstance(adamw, torch.optim.AdamW):
        return
    # 1) Create the state that the first step would create.
    for parameter in (p for group in adamw.param_groups for p in group["params"]):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[parameter] = {"step": torch.tensor(0.0), **moments}
    original: Callable[[Any, dict[str, Tensor]], None] = optimizer._set_main_param_and_optimizer_states

    def set_with_separate_step(parameter: Any, tensors: dict[str, Tensor]) -> None:
        group, index = optimizer.model_param_group_index_map[parameter]
        state = adamw.state[adamw.param_groups[group]["params"][index]]
        state["step"] = state["step"].clone()  # 3)
        original(parameter, {**tensors, "step": state["step"]})  # 2)

    optimizer._set_main_param_and_optimizer_states = set_with_separate_step
