"""A decoder block with one tensor-parallel reduction instead of two (Sync-Point-Drop, SPD, arXiv 2502.20727).

Notation: N tensor-parallel ranks.  Rank r has the heads Attn_r and the neurons MLP_r.  P_r = Attn_r(norm(x)) is its
partial attention output, without bias.  b and b_mlp are the biases of the two output projections.

Stock block, two reductions:

    u   = x + sum_r P_r + b                        all ranks have the same u
    out = u + sum_r MLP_r(norm(u)) + b_mlp

SPD block, the first reduction dropped (4.1.1 without biases, 4.1.2 with):

    u_r = x + P_r + b                              rank r sees its own heads only
    out = x + sum_r (P_r + MLP_r(norm(u_r))) + b + b_mlp

The attention output is not lost: the one remaining reduction adds all P_r to the residual stream.  The approximation is
that MLP_r reads u_r instead of u.

Some models, such as Gemma 3, apply norms N_a and N_m to the outputs of attention and MLP, before the residual
connection.  Their projections have no biases.  In models without a norm before the MLP, read norm below as the
identity.  These equations are an extension of the paper:

    stock block             u   = x + N_a(sum_r P_r)         out = u + N_m(sum_r MLP_r(norm(u)))
    first reduction dropped u_r = x + N_a(P_r)               out = x + N_a(sum_r P_r) + N_m(sum_r MLP_r(norm(u_r)))

One all-reduce computes both sums, as two halves of one tensor.  Again only the input of MLP_r is approximate.

The N ranks may also be the context ranks of sharded decoding (`longctx.megatron.sharded`).  Each then multiplies a
share of the weights in decoding.  In prefill, each of them computes all N terms for its own rows.  It holds all
weights, and the N terms cost as many FLOPs as the stock block.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from longctx.megatron.modules import NormedOutput
from longctx.megatron.sharded import WeightShare, all_shares
from longctx.shapes import Float, Tensor
from longctx.spd.plan import SPDPlan


class SPDTransformerLayer(TransformerLayer):
    """megatron-core's decoder layer with a switch: while ``dropped``, it runs the SPD block of the module docstring.

    With sequence parallelism, the SPD block gathers x once and scatters the sum once, instead of twice each.  The
    parameters, and therefore the checkpoints, are those of the stock layer.

    Linear layers of Transformer Engine apply the norms themselves.  `input_layernorm` and `pre_mlp_layernorm` are then
    identities.

    With ``own_norms``, each tensor-parallel rank trains separate weights of the norms before attention and MLP.
    ``shares`` are the weight shares of the N ranks if these are context ranks; it is empty for tensor-parallel ranks.
    """

    dropped = False
    own_norms = False
    shares: tuple[WeightShare, ...] = ()
    _hooks: tuple[RemovableHandle, ...] = ()

    def drop(self, *, dropped: bool, own_norms: bool = False) -> None:
        """Switch the first reduction off (``dropped``) or back on, from the next forward pass on.

        With ``own_norms``, each tensor-parallel rank trains its own weights of the norms before attention and MLP.
        Without it, their gradients are summed, so that all ranks have equal norms.  It has no effect while the
        reduction is on.
        """
        assert not self.config.hidden_dropout, "dropout between the two halves is not part of the equations"
        self.dropped, self.own_norms = dropped, dropped and own_norms
        attention, mlp = self.self_attention, self.mlp
        for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
            linear.explicit_expert_comm = dropped  # megatron-core's flag for "the caller communicates"
        fused = self._fused_norm_parameters()
        for parameter in (*self.input_layernorm.parameters(), *self.pre_mlp_layernorm.parameters(), *fused):
            # megatron-core sums a weight's gradient over ranks if sequence_parallel is set.  `names` reads the other
            # two attributes: a norm per rank is saved as a tensor sharded along dim 0.
            parameter.sequence_parallel = self.config.sequence_parallel and not self.own_norms
            parameter.tensor_model_parallel, parameter.partition_dim = self.own_norms, 0
        for hook in self._hooks:
            hook.remove()
        sums = dropped and not (self.own_norms or self.config.sequence_parallel)
        self._hooks = tuple(parameter.register_hook(self._sum_over_ranks) for parameter in fused if sums)

    def _fused_norm_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the norms that Transformer Engine's linear layers apply to their input."""
        linears = (self.self_attention.linear_qkv, self.mlp.linear_fc1)
        return [p for each in linears for name, p in each.named_parameters() if name.startswith("layer_norm_")]

    def _sum_over_ranks(self, gradient: Tensor) -> Tensor:
        """Return the sum of ``gradient`` over tensor-parallel ranks.

        A norm inside Transformer Engine's linear layer sees only the gradient of its rank's part.
        """
        total = gradient.clone()
        dist.all_reduce(total, group=self.tp_group)
        return total

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not self.dropped:
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        if self.shares and not self._share_in_use:
            return self._forward_all_shares(*args, **kwargs)
        return self._forward_dropped(*args, **kwargs)

    @property
    def _share_in_use(self) -> WeightShare | None:
        """This rank's share of the weights in sharded decoding; None in any other pass."""
        share = getattr(self.mlp.linear_fc2, "share", None)  # Transformer Engine's layers have none
        return share if share and share.active else None

    def _forward_all_shares(
        self, hidden_states: Float[Tensor, "s b hidden"], attention_mask: None = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "s b hidden"], None]:
        """Run the SPD block on this rank alone: compute the terms of all N ranks one after the other, and sum them."""
        mlp, own = self.mlp, self.mlp.linear_fc1.share

        def mlp_of(share: WeightShare, normed: Tensor) -> tuple[Tensor, Tensor | None]:
            mlp.linear_fc1.share = mlp.linear_fc2.share = share
            try:
                return mlp(normed)  # type: ignore[no-any-return]
            finally:
                mlp.linear_fc1.share = mlp.linear_fc2.share = own

        partials, bias = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask, packed_seq_params=kwargs["packed_seq_params"]
        )
        total: Tensor = torch.zeros_like(hidden_states)
        for share, partial in zip(self.shares, partials, strict=True):
            normed, run = self.mlp_input(hidden_states, partial, bias), functools.partial(mlp_of, share)
            z, mlp_bias = tensor_parallel.checkpoint(run, False, normed) if self.recompute_mlp else run(normed)
            total = total + z
        out = hidden_states + self._add(partials.sum(0), total)
        for b in (bias, mlp_bias):
            out = out if b is None else out + b
        return out, None

    def _forward_dropped(
        self, hidden_states: Float[Tensor, "s b hidden"], attention_mask: None = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "s b hidden"], None]:
        x = self._enter_region(hidden_states)
        partial, bias = self.self_attention(
            self._norm(self.input_layernorm, x), attention_mask, packed_seq_params=kwargs["packed_seq_params"]
        )
        normed = self.mlp_input(x, partial, bias)
        z, mlp_bias = tensor_parallel.checkpoint(self.mlp, False, normed) if self.recompute_mlp else self.mlp(normed)
        out = hidden_states + self._reduce_both(partial, z)
        for b in (bias, mlp_bias):
            out = out if b is None else out + b
        return out, None

    def mlp_input(self, x: Tensor, partial: Tensor, bias: Tensor | None) -> Tensor:
        """Return norm(u_r), the input of this rank's MLP; the module's docstring defines u_r.

        ``x`` is the block's input, ``partial`` is P_r, this rank's partial output of attention, and ``bias`` is that of
        the output projection.
        """
        output_norm = getattr(self.self_attention.linear_proj, "norm", None)
        u = x + (partial if output_norm is None else self._norm_replicated(output_norm, partial))
        return self._norm(self.pre_mlp_layernorm, u if bias is None else u + self._replicated(bias))

    def _reduce_both(self, partial: Tensor, z: Tensor) -> Tensor:
        """Sum the partial outputs of attention (``partial``) and of the MLP (``z``) over ranks, with one reduction.

        Returns what attention and MLP add to the residual stream.  If the model normalises the two outputs after their
        sums, they travel as two halves of one tensor.
        """
        if not self._normalises_outputs:
            return self._reduce(partial + z)
        return self._add(*self._reduce(torch.cat([partial, z], -1)).chunk(2, -1))

    @property
    def _normalises_outputs(self) -> bool:
        """True if the model applies norms to the outputs of attention and MLP."""
        return isinstance(self.mlp.linear_fc2, NormedOutput)

    def _add(self, attention: Tensor, mlp: Tensor) -> Tensor:
        """Return the sum of the two reduced outputs, after their norms if the model has these."""
        if not self._normalises_outputs:
            return attention + mlp
        added: Tensor = self.self_attention.linear_proj.norm(attention) + self.mlp.linear_fc2.norm(mlp)
        return added

    def _enter_region(self, x: Tensor) -> Tensor:
        """Return ``x`` for computation that differs by rank; backward sums its gradient over ranks.

        With sequence parallelism, forward also gathers the rows of all ranks.
        """
        gather = tensor_parallel.gather_from_sequence_parallel_region
        enter = gather if self.config.sequence_parallel else tensor_parallel.copy_to_tensor_model_parallel_region
        entered: Tensor = enter(x, group=self.tp_group)
        return entered

    def _reduce(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over ranks; with sequence parallelism, only this rank's rows of the sum."""
        if share := self._share_in_use:
            return share.sum(x)
        if reduction := self.mlp.linear_fc2.reduction:
            return reduction(x)  # type: ignore[no-any-return]
        scatter = tensor_parallel.reduce_scatter_to_sequence_parallel_region
        reduce = scatter if self.config.sequence_parallel else tensor_parallel.reduce_from_tensor_model_parallel_region
        reduced: Tensor = reduce(x, group=self.tp_group)
        return reduced

    def _replicated(self, weight: Tensor) -> Tensor:
        """Return a replicated ``weight`` for computation that differs by rank; its gradient is summed over ranks.

        With sequence parallelism megatron-core sums it after backward, by the weight's sequence_parallel attribute.
        """
        if self.config.sequence_parallel:
            return weight
        copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return copied

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Return ``norm(x)`` with this rank's parameters if ``own_norms``, otherwise with replicated ones."""
        normed: Tensor = norm(x) if self.own_norms else self._norm_replicated(norm, x)
        return normed

    def _norm_replicated(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Return ``norm(x)`` with parameters whose gradients are summed over ranks."""
        parameters = {name: self._replicated(parameter) for name, parameter in norm.named_parameters()}
        normed: Tensor = functional_call(norm, parameters, (x,))
        return normed


def follow_plan(model: GPTModel, plan: SPDPlan) -> None:
    """Make the blocks of ``model`` that ``plan`` names drop a reduction, and all others keep it.

    `build_model` must have built ``model`` with a plan.  On a pipeline stage, this switches the stage's blocks.  The
    plan's N ranks are the model's tensor-parallel ranks.  If the model has one tensor-parallel rank, they are the
    context ranks of sharded decoding.
    """
    tp = model.pg_collection.tp.size()
    assert tp in (plan.tp, 1) and not (plan.own_norms and tp != plan.tp), f"the plan is for tp={plan.tp}"
    shares = all_shares(plan.tp) if tp != plan.tp else ()
    for layer in model.decoder.layers:
        dropped = layer.layer_number - 1 in plan.dropped
        layer.drop(dropped=dropped, own_norms=plan.own_norms)
        layer.shares, layer.self_attention.linear_proj.parts = shares, len(shares) if dropped else 0
