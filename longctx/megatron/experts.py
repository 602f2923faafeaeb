"""Mixtures of experts: megatron-core's MoE layer, on CPU and GPU, in training and inference.

Each tensor-parallel rank has a share of every expert's neurons, as in a dense feed-forward network.  In training,
expert-parallel ranks also divide the experts among them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from longctx.megatron.modules import BiasedColumnParallelLinear, BiasedRowParallelLinear
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm
from longctx.parallel.experts import Routes, return_rows, routes_of, send_rows
from longctx.parallel.router_loss import RouterLoss
from longctx.shapes import Float, Int, Tensor


class Router(TopKRouter):
    """megatron-core's router, with a bias if ``bias`` is set; its weights stay on the model's device.

    In training, ``router_loss`` gets the logits of every pass (None: the model has no such loss).
    """

    router_loss: RouterLoss | None = None

    def __init__(self, *args: Any, bias: bool, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        if bias:
            self.bias = nn.Parameter(torch.empty(config.num_moe_experts, dtype=config.params_dtype))
            setattr(self.bias, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def gating(self, x: Float[Tensor, "s b hidden"]) -> Float[Tensor, "s b experts"]:
        """Return the router's logits for the hidden states ``x``.

        megatron-core's method, which this replaces, moves weights from the CPU to a GPU.
        """
        logits = F.linear(x, self.weight, self.bias)
        if self.router_loss and self.training:
            self.router_loss.watch(logits)
        return logits

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Do nothing: no family has a load-balancing bias.  megatron-core's method would call torch.compile."""


class SequentialExperts(SequentialMLP):
    """megatron-core's experts, run one after the other.

    Inference skips experts that no token chose.  Training runs all of them, so that every weight has a gradient.
    """

    def forward(
        self,
        hidden: Float[Tensor, "chosen hidden"],
        tokens_per_expert: Int[Tensor, " experts"],
        probs: Float[Tensor, " chosen"],
    ) -> tuple[Float[Tensor, "chosen hidden"], None]:
        if self.training:
            out, _ = super().forward(hidden, tokens_per_expert, probs)
            return out, None
        if not len(hidden):
            return hidden, None  # no token of any rank chose one of this rank's experts
        counts = tokens_per_expert.tolist()
        inputs = zip(self.local_experts, hidden.split(counts), probs.split(counts), strict=True)
        return torch.cat([expert(x, weights)[0] for expert, x, weights in inputs if len(x)]), None


class ExpertRowParallelLinear(BiasedRowParallelLinear):
    """An expert's output projection: returns this tensor-parallel rank's partial output, not summed, and the bias.

    The bias is 0 on all ranks but the first, since outputs are summed later.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Skip the sum even with one rank: megatron-core's MLP adds the bias in place, which autograd refuses after a
        # sum.
        self.explicit_expert_comm = True

    def forward(self, x: Float[Tensor, "tokens n"]) -> tuple[Float[Tensor, "tokens hidden"], Tensor]:
        out, bias = super().forward(x)
        return out, bias * (self.tp_group.rank() == 0)


class ReplicatedTokens(MoEAllGatherTokenDispatcher):
    """Dispatcher for inference, where every tensor-parallel rank has all tokens: it only sums the outputs.

    megatron-core's own dispatcher first gathers the tokens of all ranks.  This is needed only under sequence
    parallelism, where ranks have different tokens.
    """

    def token_dispatch(self, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, probs

    def token_combine(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        summed: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return summed


class ExchangedTokens(MoEAllGatherTokenDispatcher):
    """Dispatcher that sends each token to the ranks that hold its experts, once to each, and sums their outputs.

    megatron-core's own dispatchers send every token to all ranks, or once for each of its experts.
    """

    routing_map: Tensor

    def __init__(self, experts: int, config: TransformerConfig, groups: ProcessGroupCollection, ep: Comm, tp: Comm):
        super().__init__(experts, list(range(experts)), config, groups)  # indices in the arriving tokens' map
        self._ep, self._tp = ep, tp
        self._routes: Routes | None = None

    def token_dispatch(
        self, hidden: Float[Tensor, "tokens hidden"], probs: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "received hidden"], Float[Tensor, "received n"]]:
        self._routes = routes_of(self._ep, self._tp, self.routing_map)
        self.routing_map = self._routes.chosen
        return send_rows(self._routes, hidden, probs)

    def token_combine(self, hidden: Float[Tensor, "received hidden"]) -> Float[Tensor, "tokens hidden"]:
        assert self._routes is not None
        routes, self._routes = self._routes, None
        return return_rows(routes, hidden)


class MixtureOfExperts(MoELayer):
    """megatron-core's MoE layer; without sequence and expert parallelism, its dispatcher is `ReplicatedTokens`."""

    def __init__(self, config: TransformerConfig, *args: Any, groups: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs | {"pg_collection": groups})
        self.groups = groups
        if not config.sequence_parallel and self.ep_group.size() == 1:
            self.token_dispatcher = ReplicatedTokens(
                self.num_local_experts, self.local_expert_indices, config, self.groups
            )


def connect_experts(model: nn.Module, ep: Comm, tp: Comm) -> None:
    """Make the MoE layers of ``model`` exchange tokens over ``ep`` and ``tp``; does nothing if ``ep`` has one rank."""
    for layer in (module for module in model.modules() if isinstance(module, MixtureOfExperts)):
        if ep.size > 1:
            layer.token_dispatcher = ExchangedTokens(layer.num_local_experts, layer.config, layer.groups, ep, tp)


def connect_router_loss(model: nn.Module, shape: ModelShape, tp_context: Comm) -> RouterLoss | None:
    """Give the routers of ``model`` the load-balancing loss of ``shape`` and return it; None if ``shape`` has none.

    The loss covers the rows of all ranks of ``tp_context``.  megatron-core's own loss has another definition: it
    balances each layer alone.
    """
    if not shape.mixture or not shape.mixture.router_loss:
        return None
    router_loss = RouterLoss(shape.mixture, tp_context)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.router_loss = router_loss
    return router_loss


def mixture_config(shape: ModelShape, ep: int) -> Mapping[str, Any]:
    """Return the fields of megatron-core's TransformerConfig that describe the experts of ``shape``; empty without.

    ``ep`` is the number of ranks that divide the experts among them.
    """
    if shape.mixture is None:
        return {}
    return {
        "num_moe_experts": shape.mixture.count,
        "expert_model_parallel_size": ep,
        "moe_ffn_hidden_size": shape.mixture.ffn,
        "moe_router_topk": shape.mixture.per_token,
        "moe_router_pre_softmax": not shape.mixture.renormalised,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_layer_freq": [int(experts is not None) for experts in shape.experts],  # for the keys of checkpoints
    }


def mixture_spec(shape: ModelShape, groups: ProcessGroupCollection) -> ModuleSpec:
    """Return the spec of the module that takes the place of a layer's MLP: router and experts."""
    experts = MLPSubmodules(
        linear_fc1=BiasedColumnParallelLinear if shape.mlp_bias else ColumnParallelLinear,
        linear_fc2=ExpertRowParallelLinear if shape.mlp_bias else RowParallelLinear,
    )
    router = partial(Router, bias=shape.mlp_bias)
    return ModuleSpec(
        module=MixtureOfExperts,
        params={"groups": groups},
        submodules=MoESubmodules(experts=ModuleSpec(module=SequentialExperts, submodules=experts), router=router),
    )
