"""Tensor types with named axes, for signatures.  Tests check them (jaxtyping with beartype).

``b`` batch; ``s`` rows that this rank holds, ``sq`` / ``sk`` rows of queries / keys if they differ; ``hq`` / ``hk``
query heads / KV heads; ``d`` head dimension.  `AnyShape` is for functions that accept every shape and dtype.
"""

from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

Queries = Float[Tensor, "b sq hq d"]
Keys = Float[Tensor, "b sk hk d"]
LogSumExp = Float[Tensor, "b sq hq"]
Tokens = Int[Tensor, "b s"]
Positions = Int[Tensor, " s"]
AnyShape = Shaped[Tensor, "..."]

__all__ = [
    "AnyShape", "Bool", "Float", "Int", "Keys", "LogSumExp", "Positions", "Queries", "Shaped", "Tensor", "Tokens",
    "UInt8",
]  # fmt: skip
