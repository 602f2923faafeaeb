"""A model taken block by block, on many sequences of one length: what SPD measures and repairs blocks with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import build_module

from longctx.attention.kernel import Kernel
from longctx.attention.layout import documents
from longctx.attention.mask import causal_within
from longctx.megatron.attention import Pass
from longctx.megatron.hf_io.export import gather_whole
from longctx.megatron.hf_io.load import fill
from longctx.megatron.hf_io.names import tensor_views_of_layer
from longctx.megatron.model import local_layer, losses_of, rotary_angles
from longctx.megatron.spd.layer import SPDTransformerLayer
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm, SingleRankComm
from longctx.parallel.hybrid import hybrid
from longctx.parallel.ring import pass_kv
from longctx.shapes import Float, Tensor, Tokens
from longctx.spd.least_squares import LeastSquares
from longctx.spd.text import PackedText

Hidden = Float[Tensor, "b s hidden"]
_TOGETHER = 8  # sequences, where many are looked at


@dataclass(frozen=True)
class Blocks:
    """``model`` was built with a plan, whole on the tensor-parallel ranks of ``tp``; states are on every one."""

    model: GPTModel
    shape: ModelShape
    kernel: Kernel
    tp: Comm

    def embedded(self, tokens: Tokens) -> Hidden:
        """What enters the first block."""
        return self.model.embedding(tokens.reshape(1, -1), None).reshape(*tokens.shape, -1)

    def run(self, layer: Any, x: Hidden) -> Hidden:
        """What leaves ``layer``, one of the model's or a `copy_of` one, each sequence attending to itself."""
        out, _ = layer(_one_row(x), None, **self.attending(layer, x))
        return out.reshape(x.shape)

    def attending(self, layer: Any, x: Hidden) -> dict[str, Any]:
        """What a layer wants to know besides its input, if that is ``x``."""
        sequences, length, _ = x.shape
        mask = causal_within(self.shape.windows[layer.layer_number - 1])
        shared = hybrid(SingleRankComm(), SingleRankComm(), documents([length] * sequences, 1), mask).attention(
            self.kernel, pass_kv
        )
        angles = rotary_angles(self.shape, torch.arange(length, device=x.device).repeat(sequences))
        return {"rotary_pos_emb": angles, "packed_seq_params": Pass(attend=lambda _, q, k, v: shared(q, k, v))}

    def loss(self, x: Hidden, text: PackedText) -> float:
        """Sum of the cross-entropies (nats) of ``text``'s targets, from what leaves the last block."""
        total = 0.0
        for rows, targets, mask in zip(x, text.targets, text.mask, strict=True):
            final = self.model.decoder.final_layernorm(_one_row(rows[None]))
            losses = losses_of(self.model, final, targets[:, None], self.shape.vocab_size)[:, 0]
            total += float((losses * mask).double().sum())
        return total

    def copy_of(self, block: int, *, own_norms: bool) -> Any:
        """A layer like block ``block``, with weights of its own, that drops its reduction and can be trained."""
        theirs = self.model.decoder.layers[block]
        spec = local_layer(SPDTransformerLayer)
        mine = build_module(spec, config=theirs.config, layer_number=block + 1, pg_collection=self.model.pg_collection)
        mine.to(next(theirs.parameters()).device).load_state_dict(theirs.state_dict())
        mine.drop(dropped=True, own_norms=own_norms)
        return mine.train()

    def tensors_of(self, layer: Any) -> dict[str, Tensor]:
        """``layer``'s weights as Hugging Face has them, whole, on every rank; norms of ranks' own one by one."""
        with torch.no_grad():
            return {part.name: gather_whole(part, self.tp).clone() for part in tensor_views_of_layer(layer, self.shape)}

    def fill(self, layer: Any, tensors: Mapping[str, Tensor]) -> None:
        """The other way."""
        fill(tensor_views_of_layer(layer, self.shape), tensors.__getitem__, self.tp.rank)

    @torch.no_grad()
    def guesses(self, layer: Any, x: Hidden) -> list[Float[Tensor, "hidden hidden"]]:
        """Of every rank, what makes of its MLP's input the best guess of what that were with all heads, both normed.

        ``layer`` drops its reduction.
        """
        guess = LeastSquares(x.shape[-1], x.device)
        for rows in x.split(_TOGETHER):
            partials = self.partials(layer, rows)
            mine, whole = (self._normed(layer, rows + y) for y in (partials[self.tp.rank], sum(partials)))
            guess.update(mine.flatten(0, 1), whole.flatten(0, 1))
        matrix = guess.matrix()
        return self.tp.all_gather(matrix, [tuple(matrix.shape)] * self.tp.size)

    @torch.no_grad()
    def neuron_errors(
        self, layer: Any, x: Hidden, guesses: Sequence[Tensor] | None = None
    ) -> Float[Tensor, "neurons ranks"]:
        """Of every neuron, its mean squared error on each rank, weighted by its column of the down projection.

        On a rank, a neuron sees that rank's heads instead of all, or what the rank ``guesses``.  Relative to the square
        of the block's output.  ``layer`` drops its reduction.
        """
        weight = layer.mlp.linear_fc2.weight.square().sum(0)
        sums = torch.zeros(len(weight), self.tp.size, device=x.device)
        for rows in x.split(_TOGETHER):
            partials = self.partials(layer, rows)
            wanted = self.run(layer, rows).square().sum(-1, keepdim=True)
            exact = self._activations(layer, self._normed(layer, rows + sum(partials)))
            seen = [self._normed(layer, rows + one) for one in partials]
            if guesses:
                seen = [one @ guess.T for one, guess in zip(seen, guesses, strict=True)]
            each = [(self._activations(layer, one) - exact).square() / wanted for one in seen]
            sums += torch.stack([one.sum((0, 1)) for one in each], 1)
        mine = sums * weight[:, None] / x.shape[:2].numel()
        return torch.cat(self.tp.all_gather(mine, [tuple(mine.shape)] * self.tp.size))

    @torch.no_grad()
    def shard_norms(self, layer: Any, x: Hidden) -> Float[Tensor, "sets shards"]:
        """Norm of each shard of the MLP's output where it sees each rank's heads (arXiv 2502.20727, Eq. 3)."""
        squares = torch.zeros(self.tp.size, device=x.device)
        for rows in x.split(_TOGETHER):
            each = [self.mlp_of(layer, rows + one) for one in self.partials(layer, rows)]
            squares += torch.stack([one.square().sum() for one in each])
        mine = squares.sqrt()
        return torch.stack(self.tp.all_gather(mine, [tuple(mine.shape)] * self.tp.size), 1)

    @torch.no_grad()
    def group_features(self, layer: Any, x: Hidden) -> Float[Tensor, "groups features"]:
        """Of each KV group its query heads' mean attention scores, one vector (arXiv 2502.20727, 4.2.4).

        Of the first few sequences of ``x``: it has length^2 entries of each.
        """
        x, seen = x[:_TOGETHER], list[Tensor]()
        known, length = self.attending(layer, x), x.shape[1]
        attend = known["packed_seq_params"].attend

        def looking(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            keys = k[0].unflatten(0, (-1, length))
            queries = q[0].unflatten(0, (-1, length)).unflatten(2, (k.shape[2], -1))
            scores = torch.einsum("bqghd,bkgd->gbhqk", queries, keys) / self.shape.head_dim**0.5
            seen.append(scores.masked_fill(later, -torch.inf).softmax(-1).mean(2).flatten(1))
            return attend(number, q, k, v)

        known["packed_seq_params"] = Pass(attend=looking)
        layer(_one_row(x), None, **known)
        return torch.cat(self.tp.all_gather(seen[0], [tuple(seen[0].shape)] * self.tp.size))

    def partials(self, layer: Any, x: Hidden) -> list[Hidden]:
        """Every rank's part of the attention's output, of a ``layer`` that drops its reduction."""
        assert layer.dropped, "else it is reduced"
        normed = layer.input_layernorm(_one_row(x))
        mine, _ = layer.self_attention(normed, None, **self.attending(layer, x))
        mine = mine.reshape(x.shape)
        return self.tp.all_gather(mine, [tuple(mine.shape)] * self.tp.size)

    def mlp_of(self, layer: Any, u: Hidden) -> Hidden:
        """This rank's part of the MLP's output, where ``u`` enters its norm."""
        return self._activations(layer, self._normed(layer, u)) @ layer.mlp.linear_fc2.weight.T

    def _normed(self, layer: Any, u: Hidden) -> Hidden:
        """What enters the MLP, where ``u`` enters its norm."""
        return layer.pre_mlp_layernorm(_one_row(u)).reshape(u.shape)

    def _activations(self, layer: Any, normed: Hidden) -> Float[Tensor, "b s neurons"]:
        """Of this rank's neurons, which ``normed`` enters."""
        both, _ = layer.mlp.linear_fc1(_one_row(normed))
        gate, up = both.reshape(*normed.shape[:2], -1).chunk(2, -1)
        return F.silu(gate) * up


def _one_row(x: Hidden) -> Float[Tensor, "rows 1 hidden"]:
    """Sequences one behind the other, as megatron-core has them."""
    return x.reshape(-1, 1, x.shape[-1])
