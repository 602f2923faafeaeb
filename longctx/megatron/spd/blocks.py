"""A model's decoder blocks run one at a time, on many sequences of one length; SPD measures and repairs blocks with it.

Hidden states are [b s hidden], with the same values on every tensor-parallel rank r of N.  For a block with input x,
in the notation of `layer`:

    P_r                 rank r's partial attention output                 `partials`
    norm(x + P_r + b)   input of rank r's MLP if the block drops          (SPD block)
    norm(x + sum P + b) input of the MLP if it does not                   (stock block)

From these come the three measurements that repair needs:

    M_r                 least-squares map from the first input to the second        `linear_maps`
    E[n, r]             error of neuron n if rank r computes it                     `neuron_errors`
    S[r, t]             norm of MLP shard t's output if it sees rank r's heads      `shard_norms` (Eq. 3)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import build_module

from longctx.attention.kernel import Kernel
from longctx.attention.layout import documents
from longctx.attention.mask import causal_within
from longctx.megatron.attention import Pass, rotary_tables
from longctx.megatron.hf_io.export import gather_whole
from longctx.megatron.hf_io.load import fill
from longctx.megatron.hf_io.names import tensor_views_of_layer
from longctx.megatron.loss import loss_of
from longctx.megatron.modules import RMSNorm
from longctx.megatron.spd.layer import SPDTransformerLayer
from longctx.megatron.spec import layer_spec, record_sharding
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm, SingleRankComm
from longctx.parallel.hybrid import hybrid
from longctx.parallel.ring import pass_kv
from longctx.shapes import Float, Tensor, Tokens
from longctx.spd.least_squares import LeastSquares
from longctx.spd.text import PackedText

Hidden = Float[Tensor, "b s hidden"]
LinearMap = Float[Tensor, "hidden hidden"]
_BATCH = 8  # sequences that a measurement runs at once


@dataclass(frozen=True)
class Blocks:
    """The blocks of ``model`` on the tensor-parallel ranks of ``tp``, with attention by ``kernel``.

    ``model`` was built with a plan (see `build_model`) and without pipeline stages.  Every rank makes the same calls
    with the same hidden states.
    """

    model: GPTModel
    shape: ModelShape
    kernel: Kernel
    tp: Comm

    def embed(self, tokens: Tokens) -> Hidden:
        """Return the embeddings of ``tokens``, the input of the first block."""
        embedded: Tensor = self.model.embedding(tokens.reshape(1, -1), None)
        return embedded.reshape(*tokens.shape, -1)

    def run(self, layer: SPDTransformerLayer, x: Hidden) -> Hidden:
        """Return the output of ``layer`` for its input ``x``; each sequence attends to itself only.

        ``layer`` is a block of the model, or a `copy_of` one.
        """
        out: Tensor
        out, _ = layer(_one_row(x), None, **self._attention_kwargs(layer, x))
        return out.reshape(x.shape)

    def _attention_kwargs(self, layer: SPDTransformerLayer, x: Hidden) -> dict[str, Any]:
        """Return keyword arguments for ``layer`` on the input ``x``: a `Pass` with attention within each sequence."""
        sequences, length, _ = x.shape
        mask = causal_within(self.shape.windows[layer.layer_number - 1])
        packed = hybrid(SingleRankComm(), SingleRankComm(), documents([length] * sequences, 1), mask)
        attention = packed.attention(self.kernel, pass_kv)
        rotary = rotary_tables(self.shape, torch.arange(length, device=x.device).repeat(sequences))
        return {"packed_seq_params": Pass(attend=lambda _, q, k, v: attention(q, k, v), rotary=rotary)}

    def loss(self, x: Hidden, text: PackedText) -> float:
        """Return the summed cross-entropy (nats) of ``text``'s counted targets; ``x`` is the last block's output.

        Raises ValueError if the loss is NaN or infinite.
        """
        total = 0.0
        for rows, targets, mask in zip(x, text.targets, text.mask, strict=True):
            final = self.model.decoder.final_layernorm(_one_row(rows[None]))
            _, losses = loss_of(self.model, final, targets, mask, self.tp, self.shape)
            total += float((losses * mask).double().sum())
        if not isfinite(total):
            dropped = [block for block, layer in enumerate(self.model.decoder.layers) if layer.dropped]
            raise ValueError(
                f"the loss of the text is {total} with the reductions of blocks {dropped or 'none'} dropped: "
                "use model.dtype=float32, or a checkpoint whose weights are not damaged"
            )
        return total

    def copy_of(self, block: int, *, own_norms: bool) -> SPDTransformerLayer:
        """Return a trainable copy of block ``block`` that drops its reduction.

        With ``own_norms``, each tensor-parallel rank trains separate weights of the norms before attention and MLP.
        """
        original = self.model.decoder.layers[block]
        spec = layer_spec(SPDTransformerLayer, self.shape, self.model.pg_collection)
        layer: SPDTransformerLayer = build_module(
            spec, config=original.config, layer_number=block + 1, pg_collection=self.model.pg_collection
        )
        record_sharding(layer)
        layer.to(next(original.parameters()).device).load_state_dict(original.state_dict())
        layer.drop(dropped=True, own_norms=own_norms)
        layer.train()
        for norm in (layer.self_attention.q_layernorm, layer.self_attention.k_layernorm):
            if isinstance(norm, RMSNorm):  # replicated, but each rank normalises its own heads
                norm.weight.register_hook(self._sum_over_ranks)
        return layer

    def _sum_over_ranks(self, gradient: Tensor) -> Tensor:
        """Return the sum of ``gradient`` over tensor-parallel ranks."""
        return torch.stack(self.tp.all_gather(gradient, [tuple(gradient.shape)] * self.tp.size)).sum(0)

    def tensors_of(self, layer: SPDTransformerLayer) -> dict[str, Tensor]:
        """Return ``layer``'s weights as whole Hugging Face tensors, by name, on every rank.

        Norms that differ by rank are concatenated along dim 0.
        """
        with torch.no_grad():
            return {view.name: gather_whole(view, self.tp).clone() for view in tensor_views_of_layer(layer, self.shape)}

    def fill(self, layer: SPDTransformerLayer, tensors: Mapping[str, Tensor]) -> None:
        """Load Hugging Face tensors into ``layer``; inverse of `tensors_of`.

        Raises ValueError if a tensor has another shape than the layer's, or values that are NaN or infinite.
        """
        fill(tensor_views_of_layer(layer, self.shape), tensors.__getitem__, self.tp.rank)

    @torch.no_grad()
    def linear_maps(self, layer: SPDTransformerLayer, x: Hidden, weights: Float[Tensor, " s"]) -> list[LinearMap]:
        """Return M_r of every rank r, which maps the MLP's input with rank r's heads to its input with all heads.

        ``layer`` drops its reduction.  The fit is least squares over all rows of ``x`` (see `LeastSquares`), with
        the ``weights`` of their positions.
        """
        fit = LeastSquares(x.shape[-1], x.device)
        for rows in x.split(_BATCH):
            partials = self.partials(layer, rows)
            whole = torch.stack(partials).sum(0)
            own, full = (self._mlp_input(layer, rows, y) for y in (partials[self.tp.rank], whole))
            fit.update(own.flatten(0, 1), full.flatten(0, 1), weights.repeat(len(rows)))
        matrix = fit.matrix()
        return self.tp.all_gather(matrix, [tuple(matrix.shape)] * self.tp.size)

    @torch.no_grad()
    def neuron_errors(
        self,
        layer: SPDTransformerLayer,
        x: Hidden,
        weights: Float[Tensor, " s"],
        maps: Sequence[LinearMap] | None = None,
    ) -> Float[Tensor, "neurons ranks"]:
        """Return, for each MLP neuron of all ranks and each rank r, the mean error over rows if rank r had the neuron.

        A row's error is the squared change of the neuron's activation if its input has rank r's heads only, not all
        heads.  With ``maps``, the input is rank r's least-squares prediction of the input with all heads.  The error is
        multiplied by the squared norm of the neuron's column in the down projection.  In each row, it is divided by the
        squared norm of the block's output and multiplied by the weight of the row's position (``weights``).  ``layer``
        drops its reduction.
        """
        weight = layer.mlp.linear_fc2.weight.square().sum(0)
        sums = torch.zeros(len(weight), self.tp.size, device=x.device)
        for rows in x.split(_BATCH):
            partials = self.partials(layer, rows)
            scale = self.run(layer, rows).square().sum(-1, keepdim=True)
            exact = self._activations(layer, self._mlp_input(layer, rows, torch.stack(partials).sum(0)))
            inputs = [self._mlp_input(layer, rows, partial) for partial in partials]
            if maps:
                inputs = [y @ linear_map.T for y, linear_map in zip(inputs, maps, strict=True)]
            errors = [(self._activations(layer, y) - exact).square() * (weights[:, None] / scale) for y in inputs]
            sums += torch.stack([error.sum((0, 1)) for error in errors], 1)
        local = sums * weight[:, None] / x.shape[:2].numel()
        return torch.cat(self.tp.all_gather(local, [tuple(local.shape)] * self.tp.size))

    @torch.no_grad()
    def shard_norms(self, layer: SPDTransformerLayer, x: Hidden) -> Float[Tensor, "sets shards"]:
        """Return the norm of every MLP shard's output if it sees each rank's set of heads (arXiv 2502.20727, Eq. 3).

        Entry [r, t] is the norm, over all rows of ``x``, of rank t's shard with rank r's heads.  Every rank gets the
        same matrix.  ``layer`` drops its reduction.
        """
        squares = torch.zeros(self.tp.size, device=x.device)
        for rows in x.split(_BATCH):
            outputs = [self.mlp_of(layer, rows, partial) for partial in self.partials(layer, rows)]
            squares += torch.stack([output.square().sum() for output in outputs])
        local = squares.sqrt()
        return torch.stack(self.tp.all_gather(local, [tuple(local.shape)] * self.tp.size), 1)

    @torch.no_grad()
    def group_features(self, layer: SPDTransformerLayer, x: Hidden) -> Float[Tensor, "groups features"]:
        """Return a vector for each KV group of all ranks: its attention weights (arXiv 2502.20727, 4.2.4).

        They are averaged over the group's query heads.  A vector has
        one entry for each sequence, query and key.  That is length^2 entries a sequence, so only the first few
        sequences of ``x`` are used.
        """
        x, features = x[:_BATCH], list[Tensor]()
        kwargs, length = self._attention_kwargs(layer, x), x.shape[1]
        attend = kwargs["packed_seq_params"].attend

        def record_scores(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            window = self.shape.windows[number]
            hidden = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
            keys = k[0].unflatten(0, (-1, length))
            queries = q[0].unflatten(0, (-1, length)).unflatten(2, (k.shape[2], -1))
            scores = torch.einsum("bqghd,bkgd->gbhqk", queries, keys) / self.shape.head_dim**0.5
            features.append(scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(2).flatten(1))
            out: Tensor = attend(number, q, k, v)
            return out

        kwargs["packed_seq_params"] = replace(kwargs["packed_seq_params"], attend=record_scores)
        layer(_one_row(x), None, **kwargs)
        return torch.cat(self.tp.all_gather(features[0], [tuple(features[0].shape)] * self.tp.size))

    def partials(self, layer: SPDTransformerLayer, x: Hidden) -> list[Hidden]:
        """Return P_r of every rank r: the partial attention outputs of ``layer``, which drops its reduction."""
        assert layer.dropped, "a layer that does not drop returns the reduced output"
        normed = layer.input_layernorm(_one_row(x))
        local, _ = layer.self_attention(normed, None, **self._attention_kwargs(layer, x))
        local = local.reshape(x.shape)
        return self.tp.all_gather(local, [tuple(local.shape)] * self.tp.size)

    def mlp_of(self, layer: SPDTransformerLayer, x: Hidden, attention: Hidden) -> Hidden:
        """Return this rank's partial MLP output, without bias, of ``layer`` for its input ``x``.

        ``attention`` is the attention output that the MLP reads, of one rank or of all ranks, without bias.
        """
        out: Tensor = self._activations(layer, self._mlp_input(layer, x, attention)) @ layer.mlp.linear_fc2.weight.T
        return out

    def _mlp_input(self, layer: SPDTransformerLayer, x: Hidden, attention: Hidden) -> Hidden:
        """Return the MLP's input of ``layer``, after the norm before the MLP, for the block's input ``x``.

        ``attention`` is the attention output, of one rank or of all ranks, without bias; the bias is added here.
        """
        bias = layer.self_attention.linear_proj.bias
        return layer.mlp_input(_one_row(x), _one_row(attention), bias).reshape(x.shape)

    def _activations(self, layer: SPDTransformerLayer, normed: Hidden) -> Float[Tensor, "b s neurons"]:
        """Return the activations of this rank's neurons, activation(gate) * up, for the MLP input ``normed``."""
        both, bias = layer.mlp.linear_fc1(_one_row(normed))
        both = both if bias is None else both + bias
        gate, up = both.reshape(*normed.shape[:2], -1).chunk(2, -1)
        activated: Tensor = layer.mlp.activation_func(gate) * up
        return activated


def _one_row(x: Hidden) -> Float[Tensor, "rows 1 hidden"]:
    """Return sequences ``x`` [b s hidden] as one packed sequence [b*s 1 hidden], as megatron-core's layers take it."""
    return x.reshape(-1, 1, x.shape[-1])
