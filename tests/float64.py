"""Keep transformers and megatron-core in float64, where norms, rotary tables, softmax and loss ask for float32."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class KeepFloat64(TorchFunctionMode):
    """Inside the block, turn every request for float32 into one for float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args)
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def float64_model(folder: Path) -> Any:
    """Return the model of transformers in float64.  Load it outside `KeepFloat64`, and call it inside.

    Outside, rotary frequencies are rounded to float32; this rounding is part of their definition.
    """
    from transformers import AutoModelForCausalLM

    # The other implementations of experts do not support float64.
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    net(torch.zeros(1, 1, dtype=torch.long))  # the first pass computes LongRoPE's long frequencies
    return net
