"""Mistakes in the use of Transformer Engine's layers that the checks must notice."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from megatron.core.transformer.module import MegatronModule

from longctx.megatron import model, spec, te_modules
from longctx.megatron.hf_io import names
from longctx.megatron.spd.layer import SPDTransformerLayer
from longctx.parallel.validate import FP8_ROWS

_BLOCK = {"fp8": "block"}
_WITHOUT_SP = {"dropped": (1,), "sequence_parallel": False}


@dataclass(frozen=True)
class Mutation:
    """A mistake, the kind of model that shows it, and fields of `Training`."""

    kind: str
    apply: Callable[[], AbstractContextManager[Any]]
    training: Mapping[str, Any] = field(default_factory=dict)


def _constructed_with(**changed: Any) -> AbstractContextManager[Any]:
    """Change attributes of norms and projections after their construction."""
    construct = te_modules.TENormColumnLinear.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        for name, value in changed.items():
            setattr(self, name, value)

    return patch.object(te_modules.TENormColumnLinear, "__init__", init)


def _plain(module: type) -> AbstractContextManager[Any]:
    """Leave out what ``module`` does with the output of its projection."""
    return patch.object(module, "forward", te_modules.TERowLinear.forward)


def _always_communicates(module: type) -> AbstractContextManager[Any]:
    ignored = property(lambda self: self.parallel_mode is None, lambda self, _: None)
    return patch.object(module, "explicit_expert_comm", ignored)


def _exchanged_norms() -> AbstractContextManager[Any]:
    first, second = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
    table = names._LAYER_NAMES
    return patch.dict(table, {first: table[second], second: table[first]})


def _without_bias() -> AbstractContextManager[Any]:
    row = te_modules.TERowLinear.forward
    return patch.object(te_modules.TEBiasedRowLinear, "forward", lambda self, x: (row(self, x)[0], None))


MUTATIONS = {
    "the two norms exchanged in the table of tensors": Mutation("tied llama", _exchanged_norms),
    "no norm in front of the projections": Mutation(
        "tied llama", lambda: patch.object(te_modules, "TENormColumnLinear", te_modules.TEColumnLinear)
    ),
    "another epsilon": Mutation("tied llama", lambda: _constructed_with(eps=1e-3)),
    "weight instead of 1 + weight": Mutation("gemma3", lambda: _constructed_with(zero_centered_gamma=False)),
    "no norm of the output": Mutation("gemma3", lambda: _plain(te_modules.TENormedRowLinear)),
    "no scale of the output": Mutation("granite", lambda: _plain(te_modules.TEScaledRowLinear)),
    "no bias of the output": Mutation("llama with all biases", _without_bias),
    "norms under other names in checkpoints": Mutation(
        "tied llama", lambda: patch.dict(spec._NAMES_IN_CHECKPOINTS, clear=True)
    ),
    "a dropped reduction that is done": Mutation(
        "tied llama", lambda: _always_communicates(te_modules.TERowLinear), _WITHOUT_SP
    ),
    "gradients of the input reduced twice": Mutation(
        "tied llama", lambda: _always_communicates(te_modules.TENormColumnLinear), _WITHOUT_SP
    ),
    "gradients of norms not summed over ranks": Mutation(
        "tied llama", lambda: patch.object(SPDTransformerLayer, "_sum_over_ranks", lambda self, x: x), _WITHOUT_SP
    ),
    "weights rounded to 8 bits in the first step only": Mutation(
        "wide llama", lambda: patch.object(MegatronModule, "set_is_first_microbatch", lambda self: None), _BLOCK
    ),
    "rows that do not fill products in 8 bits": Mutation("wide llama", lambda: patch.dict(FP8_ROWS, block=1), _BLOCK),
    "no rounding to 8 bits": Mutation("wide llama", lambda: patch.dict(model._FP8, block={}), _BLOCK),
    "a scale a tensor instead of one a block": Mutation(
        "wide llama", lambda: patch.dict(model._FP8, block=model._FP8["current"]), _BLOCK
    ),
    "gradients in the format of activations": Mutation(
        "wide llama",
        lambda: patch.dict(model._FP8, current=model._FP8["current"] | {"fp8": "e4m3"}),
        {"fp8": "current"},
    ),
}
