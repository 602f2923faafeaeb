"""Functions that the ranks of test_layer.py run: one layer, its output, gradients and collectives."""

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

S, B, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 6, 5, 12, 6, 5, 14, 18
COLLECTIVES = {
    "all_reduce": "all_reduce",
    "dist_reduce_scatter_func": "reduce_scatter",
    "dist_all_gather_func": "all_gather",
}


def weights(biases: bool, norms: str = "pre") -> dict[str, torch.Tensor]:
    """Return the whole layer's random weights (float64), by megatron-core's names; ``norms`` as in `ModelShape`."""
    generator = torch.Generator().manual_seed(23)
    shapes = {
        "input_layernorm.weight": (HIDDEN,),
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, FFN),
    }
    if biases:
        shapes |= {
            name.replace("weight", "bias"): shape[:1] for name, shape in list(shapes.items()) if "linear" in name
        }
    if norms != "pre":
        shapes |= {f"{linear}.norm.weight": (HIDDEN,) for linear in ("self_attention.linear_proj", "mlp.linear_fc2")}
    if norms == "post":
        del shapes["input_layernorm.weight"], shapes["pre_mlp_layernorm.weight"]
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def shard(name: str, whole: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """Return rank ``rank``'s shard of a weight; for fc1, its rows of the gate half and of the up half."""
    if "fc1" in name:
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    if "qkv" in name:
        return whole.chunk(tp)[rank]
    if name.endswith("weight") and "linear" in name and "norm" not in name:
        return whole.chunk(tp, 1)[rank]
    return whole


def unshard(name: str, shards: list[torch.Tensor]) -> torch.Tensor:
    """Return the whole weight from all ranks' shards; assert that replicated weights are equal on all ranks."""
    if "fc1" in name:
        return torch.cat([torch.cat([shard.chunk(2)[half] for shard in shards]) for half in range(2)])
    if "qkv" in name:
        return torch.cat(shards)
    if name.endswith("weight") and "linear" in name and "norm" not in name:
        return torch.cat(shards, 1)
    for replica in shards:
        torch.testing.assert_close(replica, shards[0], rtol=1e-12, atol=1e-12)
    return shards[0]


@contextmanager
def count_collectives() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Count megatron-core's calls of each collective, and the bytes of their largest tensors, while the block runs."""
    from megatron.core.tensor_parallel import layers, mappings

    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def counting(name: str, real: Any) -> Any:
        def call(*tensors: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            sizes[name] += max(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
            return real(*tensors, **kwargs)

        return call

    # megatron-core binds two of the functions to module attributes with other names.
    targets = [
        (dist, "all_reduce"),
        *((module, name) for module in (layers, mappings) for name in list(COLLECTIVES)[1:]),
    ]
    real = [(module, name, getattr(module, name)) for module, name in targets if hasattr(module, name)]
    for module, name, function in real:
        setattr(module, name, counting(COLLECTIVES[name], function))
    yield calls, sizes
    for module, name, function in real:
        setattr(module, name, function)


def local_name(name: str) -> str:
    """Return the name in megatron-core's layers of a parameter of Transformer Engine's."""
    fused = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}
    linear, _, rest = name.partition(".layer_norm_")
    return f"{fused[linear]}.{rest}" if rest else name


def build_layer(
    layer_class: Any, runtime: Any, *, biases: bool, sequence_parallel: bool, norms: str, layers: str
) -> Any:
    """Build one layer of ``layer_class`` with this rank's shard of `weights`; ``layers`` as in `build_model`."""
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from longctx.megatron.spec import LOCAL, layer_spec, te_linears
    from longctx.model_shape import ModelShape

    warnings.filterwarnings("ignore", message="full scope is deprecated")  # megatron-core sets it by default
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=KV_HEADS, kv_channels=HEAD_DIM,
        ffn_hidden_size=FFN, normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=biases, hidden_dropout=0.0, attention_dropout=0.0, params_dtype=torch.float64,
        tensor_model_parallel_size=runtime.mesh.tp, sequence_parallel=sequence_parallel and runtime.mesh.tp > 1,
        use_cpu_initialization=True, bias_dropout_fusion=False, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    shape = ModelShape(1, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, 11, 13, 1e-5, False, False, norms=norms)
    linears = te_linears(shape) if layers == "te" else LOCAL
    spec = layer_spec(layer_class, shape, runtime.groups, linears=linears)
    layer = build_module(spec, config=config, layer_number=1, pg_collection=runtime.groups)
    whole = weights(biases, norms)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            local = local_name(name)
            parameter.copy_(shard(local, whole[local], runtime.tp.rank, runtime.tp.size))
    return layer


def run_layer(
    rank: Rank,
    tp: int,
    kind: str,
    biases: bool,
    sequence_parallel: bool,
    own_norms: bool = False,
    norms: str = "pre",
    layers: str = "local",
) -> dict[str, Any]:
    """Run one layer forward and backward.

    ``kind`` is ``stock`` (megatron-core's layer), ``spd`` (ours, not dropped) or ``dropped``.  Returns the output, the
    gradients of the input and of the weights, and the collectives of both passes.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from longctx.attention.kernel import reference
    from longctx.attention.layout import zigzag
    from longctx.megatron.attention import Pass
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.spd.layer import SPDTransformerLayer
    from longctx.parallel.comm import SingleRankComm
    from longctx.parallel.hybrid import hybrid
    from longctx.parallel.ring import pass_kv

    with open_runtime(rank, Mesh(tp=tp), timeout_minutes=2, training=True) as runtime:
        layer = build_layer(
            TransformerLayer if kind == "stock" else SPDTransformerLayer,
            runtime, biases=biases, sequence_parallel=sequence_parallel, norms=norms, layers=layers,
        )  # fmt: skip
        if kind != "stock":
            layer.drop(dropped=kind == "dropped", own_norms=own_norms)
        attend = hybrid(SingleRankComm(), SingleRankComm(), zigzag(S, 1)).attention(reference, pass_kv)
        generator = torch.Generator().manual_seed(29)
        x, out_gradient = torch.randn(2, S, B, HIDDEN, generator=generator, dtype=torch.float64)
        rows_sharded = sequence_parallel and tp > 1

        def local_rows(rows: torch.Tensor) -> torch.Tensor:
            return rows.chunk(tp)[runtime.tp.rank] if rows_sharded else rows

        x = local_rows(x).clone().requires_grad_()
        with count_collectives() as (forward, forward_bytes):
            out, _ = layer(x, None, packed_seq_params=Pass(attend=lambda _, q, k, v: attend(q, k, v)))
        with count_collectives() as (backward, _):
            out.backward(local_rows(out_gradient))
        gradients = {}
        for name, parameter in layer.named_parameters():
            gradient = parameter.grad.clone()
            if getattr(parameter, "sequence_parallel", False):  # as megatron-core's finalize_model_grads does
                dist.all_reduce(gradient, group=runtime.groups.tp)
            gradients[local_name(name)] = gradient
    return {
        "out": out.detach(), "x": x.grad, "gradients": gradients, "rows_sharded": rows_sharded,
        "forward": dict(forward), "forward_bytes": dict(forward_bytes), "backward": dict(backward),
    }  # fmt: skip
