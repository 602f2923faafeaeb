"""How likely given tokens are: of each row few numbers leave a tensor-parallel rank, not its logits."""

import torch

from longctx.megatron.model import GPTModel
from longctx.parallel.comm import Comm
from longctx.shapes import Float, Int, Tensor


@torch.inference_mode()
def log_likelihoods(
    model: GPTModel, hidden: Float[Tensor, "s b hidden"], targets: Int[Tensor, "s b"], tp: Comm, vocabulary: int
) -> tuple[Float[Tensor, "s b"], Int[Tensor, "s b"]]:
    """Log-probability (nats, float64) of each row's target, and the likeliest token, on every rank of ``tp``.

    Every rank has the logits of its share of the ``vocabulary``; their largest, the sum of their exponentials, the
    target's and the place of the largest are all that is exchanged.
    """
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    part, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=False)
    first = tp.rank * part.shape[-1]
    part = part[..., : max(0, vocabulary - first)].float()  # without the padding of the last rank
    largest, at = part.max(-1)
    exponentials = (part - largest.unsqueeze(-1)).exp().sum(-1)
    here = targets - first
    held = (here >= 0) & (here < part.shape[-1])
    target = part.gather(-1, here.clamp(0, part.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    target = target.masked_fill(~held, -torch.inf)
    mine = torch.stack([x.double() for x in (largest, exponentials, target, at + first)])
    largest, exponentials, target, likeliest = torch.stack(tp.all_gather(mine, [tuple(mine.shape)] * tp.size), 1)
    top, best = largest.max(0)
    total = (exponentials * (largest - top).exp()).sum(0)
    return target.amax(0) - top - total.log(), likeliest.gather(0, best.unsqueeze(0)).squeeze(0).long()
