"""The training loss: cross-entropy of a model's final hidden states."""

from megatron.core import tensor_parallel

from longctx.megatron.model import GPTModel, tied_weight
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm
from longctx.parallel.cross_entropy import ROWS, cross_entropy
from longctx.shapes import Float, Int, Tensor


def loss_of(
    model: GPTModel,
    hidden: Float[Tensor, "rows 1 hidden"],
    targets: Int[Tensor, " s"],
    counts: Float[Tensor, " s"],
    tp: Comm,
    shape: ModelShape,
    rows: int | None = ROWS,
) -> tuple[Float[Tensor, ""], Float[Tensor, " s"]]:
    """Return the cross-entropy (nats) of ``targets``: its sum weighted by ``counts``, and each row's loss.

    Every rank of ``tp`` calls this, and gets the same values.  Only the sum has a gradient.  ``hidden`` has the final
    hidden states (see `run_stage`).  Logits of at most ``rows`` rows exist at a time (None: all).
    """
    gather = tensor_parallel.gather_from_sequence_parallel_region
    enter = gather if model.config.sequence_parallel else tensor_parallel.copy_to_tensor_model_parallel_region
    whole = enter(hidden, group=model.pg_collection.tp).squeeze(1)
    weight = model.output_layer.weight if (tied := tied_weight(model)) is None else tied
    return cross_entropy(whole, weight, targets, counts, tp, shape.vocab_size, scale=shape.logit_scale, rows=rows)
