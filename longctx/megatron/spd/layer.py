"""A decoder block that reduces once instead of twice over tensor-parallel ranks (Sync-Point-Drop, arXiv 2502.20727)."""

from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

from longctx.shapes import Float, Tensor
from longctx.spd.plan import SPDPlan


class SPDTransformerLayer(TransformerLayer):
    """megatron-core's layer, or, where ``dropped``, of rank r, with P the bias-free product of its own heads:

        u_r = x + P_r + b          out = x + all_reduce(P_r + MLP_r(norm(u_r))) + b + b_mlp

    Under sequence parallelism x is gathered once, and the sum scattered once.  Parameters, and so checkpoints, are
    the stock layer's.  ``own_norms``: the norms' weights are this rank's alone, and so are their gradients.

    Source: arXiv 2502.20727, 4.1.1 (without biases) and 4.1.2 (with).
    """

    dropped = False
    own_norms = False

    def drop(self, *, dropped: bool, own_norms: bool = False) -> None:
        """From now on leave the first reduction out, or do not."""
        assert not self.config.hidden_dropout, "dropout between the two halves is not part of the equations"
        self.dropped, self.own_norms = dropped, dropped and own_norms
        attention, mlp = self.self_attention, self.mlp
        for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
            linear.explicit_expert_comm = dropped  # megatron-core's word for: the caller communicates
        for norm in (self.input_layernorm, self.pre_mlp_layernorm):
            # What sums a replicated weight's gradient over ranks, and what tells `names` how a weight is shared.
            norm.weight.sequence_parallel = self.config.sequence_parallel and not self.own_norms
            norm.weight.tensor_model_parallel, norm.weight.partition_dim = self.own_norms, 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self._forward_dropped(*args, **kwargs) if self.dropped else super().forward(*args, **kwargs)

    def _forward_dropped(
        self, hidden_states: Float[Tensor, "s b hidden"], attention_mask: None = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "s b hidden"], None]:
        known = {name: kwargs[name] for name in ("rotary_pos_emb", "packed_seq_params") if name in kwargs}
        x = self._entered(hidden_states)
        partial, bias = self.self_attention(self._normed(self.input_layernorm, x), attention_mask, **known)
        u = x + partial if bias is None else x + partial + self._replicated(bias)
        normed = self._normed(self.pre_mlp_layernorm, u)
        z, mlp_bias = tensor_parallel.checkpoint(self.mlp, False, normed) if self.recompute_mlp else self.mlp(normed)
        out = hidden_states + self._summed(partial + z)
        for b in (bias, mlp_bias):
            out = out if b is None else out + b
        return out, None

    def _entered(self, x: Tensor) -> Tensor:
        """``x`` for computing that differs by rank: its gradient is summed over them."""
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _summed(self, x: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=self.tp_group)

    def _replicated(self, weight: Tensor) -> Tensor:
        """A weight that every rank has, in computing that differs by rank; by its mark megatron-core may sum later."""
        if self.config.sequence_parallel:
            return weight
        return tensor_parallel.copy_to_tensor_model_parallel_region(weight, group=self.tp_group)

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        weight = norm.weight if self.own_norms else self._replicated(norm.weight)
        return F.rms_norm(x, norm.normalized_shape, weight, norm.eps)


def follow_plan(model: GPTModel, plan: SPDPlan) -> None:
    """Let ``model``'s blocks (those of its pipeline stage) drop their reductions as ``plan`` says, from now on."""
    assert plan.tp == model.pg_collection.tp.size(), f"a plan for {plan.tp} ranks"
    for layer in model.decoder.layers:
        layer.drop(dropped=layer.layer_number - 1 in plan.dropped, own_norms=plan.own_norms)
