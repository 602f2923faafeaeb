"""Rounded reductions in a model's layers: the sums over tensor-parallel ranks by `longctx.parallel.quantised`."""

from collections.abc import Callable

from megatron.core.models.gpt import GPTModel

from longctx.config import Reduce
from longctx.parallel import quantised
from longctx.parallel.comm import Comm
from longctx.shapes import Float, Tensor


def set_reductions(model: GPTModel, tp: Comm, reduce: Reduce) -> None:
    """Make the blocks of ``model`` sum partial outputs over the ranks of ``tp`` in the dtypes of ``reduce``.

    float32 restores megatron-core's all-reduce.  Use this only for inference without sequence parallelism, in models
    with `LOCAL` linear layers and without experts.
    """
    assert not model.config.sequence_parallel, "training reduces and scatters in one step"
    for layer in model.decoder.layers:
        layer.self_attention.linear_proj.reduction = _reduction(tp, reduce.attention, reduce.group)
        layer.mlp.linear_fc2.reduction = _reduction(tp, reduce.mlp, reduce.group)


def _reduction(tp: Comm, dtype: str, group: int) -> Callable[[Tensor], Tensor] | None:
    """Return a function that sums a tensor over ``tp``, with messages rounded to ``dtype``.

    In int8 and int6, ``group`` values share a scale.  float32 returns None, which stands for megatron-core's
    all-reduce.
    """

    def reduction(x: Float[Tensor, "s b n"]) -> Float[Tensor, "s b n"]:
        return quantised.two_step_sum(tp, x, dtype, group)  # looked up at each call, so that it can be counted

    return None if dtype == "float32" else reduction
