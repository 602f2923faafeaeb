"""What the ranks of test_spd_layer.py run: one layer, its output and gradients, and what it sent."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from longctx.config import Mesh
from longctx.parallel.launch import Rank

S, B, HEADS, KV_HEADS, WIDTH, HIDDEN, FFN = 6, 5, 12, 6, 5, 14, 18
CALLED = {
    "all_reduce": "all_reduce",
    "dist_reduce_scatter_func": "reduce_scatter",
    "dist_all_gather_func": "all_gather",
}


def weights(biases: bool) -> dict[str, torch.Tensor]:
    """Of the whole layer, float64, by megatron-core's names."""
    draw = torch.Generator().manual_seed(23)
    shapes = {
        "input_layernorm.weight": (HIDDEN,),
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": ((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN),
        "self_attention.linear_proj.weight": (HIDDEN, HEADS * WIDTH),
        "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, FFN),
    }
    if biases:
        shapes |= {
            name.replace("weight", "bias"): shape[:1] for name, shape in list(shapes.items()) if "linear" in name
        }
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def share(name: str, whole: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """Rank ``rank``'s part; of fc1 its rows of either half."""
    if "fc1" in name:
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    if "qkv" in name:
        return whole.chunk(tp)[rank]
    if name.endswith("weight") and "linear" in name:
        return whole.chunk(tp, 1)[rank]
    return whole


def joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole, from all ranks' parts; of what every rank has, asserted to be alike."""
    if "fc1" in name:
        return torch.cat([torch.cat([part.chunk(2)[half] for part in parts]) for half in range(2)])
    if "qkv" in name:
        return torch.cat(parts)
    if name.endswith("weight") and "linear" in name:
        return torch.cat(parts, 1)
    for part in parts:
        torch.testing.assert_close(part, parts[0], rtol=1e-12, atol=1e-12)
    return parts[0]


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Calls of each collective by megatron-core's layers, and bytes of their largest tensor, while the block runs."""
    from megatron.core.tensor_parallel import layers, mappings

    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def counting(name: str, real: Any) -> Any:
        def call(*tensors: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            sizes[name] += max(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
            return real(*tensors, **kwargs)

        return call

    # It has bound two of them by names of its own.
    where = [(dist, "all_reduce"), *((module, name) for module in (layers, mappings) for name in list(CALLED)[1:])]
    real = [(module, name, getattr(module, name)) for module, name in where if hasattr(module, name)]
    for module, name, function in real:
        setattr(module, name, counting(CALLED[name], function))
    yield calls, sizes
    for module, name, function in real:
        setattr(module, name, function)


def layer_of(kind: Any, here: Any, *, biases: bool, sequence_parallel: bool) -> Any:
    """One layer of ``kind`` with its share of `weights`."""
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from longctx.megatron.model import local_layer

    warnings.filterwarnings("ignore", message="full scope is deprecated")  # its own default
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=KV_HEADS, kv_channels=WIDTH,
        ffn_hidden_size=FFN, normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=biases, hidden_dropout=0.0, attention_dropout=0.0, params_dtype=torch.float64,
        tensor_model_parallel_size=here.mesh.tp, sequence_parallel=sequence_parallel and here.mesh.tp > 1,
        use_cpu_initialization=True, bias_dropout_fusion=False, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    layer = build_module(local_layer(kind), config=config, layer_number=1, pg_collection=here.groups)
    whole = weights(biases)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(share(name, whole[name], here.tp.rank, here.tp.size))
    return layer


def one_layer(
    rank: Rank, tp: int, kind: str, biases: bool, sequence_parallel: bool, own_norms: bool = False
) -> dict[str, Any]:
    """Output, gradients of input and weights, and collectives, of a layer: ``stock``, ``spd`` or ``dropped``."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from longctx.attention.kernel import reference
    from longctx.attention.layout import zigzag
    from longctx.megatron.attention import Pass
    from longctx.megatron.runtime import runtime
    from longctx.megatron.spd.layer import SPDTransformerLayer
    from longctx.parallel.comm import SingleRankComm
    from longctx.parallel.hybrid import hybrid
    from longctx.parallel.ring import pass_kv

    with runtime(rank, Mesh(tp=tp), timeout_minutes=2, training=True) as here:
        layer = layer_of(
            TransformerLayer if kind == "stock" else SPDTransformerLayer,
            here, biases=biases, sequence_parallel=sequence_parallel,
        )  # fmt: skip
        if kind != "stock":
            layer.drop(dropped=kind == "dropped", own_norms=own_norms)
        attend = hybrid(SingleRankComm(), SingleRankComm(), zigzag(S, 1)).attention(reference, pass_kv)
        draw = torch.Generator().manual_seed(29)
        x, given = torch.randn(2, S, B, HIDDEN, generator=draw, dtype=torch.float64)
        sharing = sequence_parallel and tp > 1

        def mine(rows: torch.Tensor) -> torch.Tensor:
            return rows.chunk(tp)[here.tp.rank] if sharing else rows

        x = mine(x).clone().requires_grad_()
        with counted() as (forward, forward_bytes):
            out, _ = layer(x, None, packed_seq_params=Pass(attend=lambda _, q, k, v: attend(q, k, v)))
        with counted() as (backward, _):
            out.backward(mine(given))
        gradients = {}
        for name, parameter in layer.named_parameters():
            gradient = parameter.grad.clone()
            if getattr(parameter, "sequence_parallel", False):  # as megatron-core's finalize_model_grads does
                dist.all_reduce(gradient, group=here.groups.tp)
            gradients[name] = gradient
    return {
        "out": out.detach(), "x": x.grad, "gradients": gradients, "shared": sharing,
        "forward": dict(forward), "forward_bytes": dict(forward_bytes), "backward": dict(backward),
    }  # fmt: skip
