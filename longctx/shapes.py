"""Tensor types with named axes, for signatures.  Tests check them at every call (jaxtyping with beartype).

``b`` batch; ``s`` rows that this rank holds, ``sq`` / ``sk`` rows of queries / keys if they differ; ``hq`` / ``hk``
query heads / KV heads; ``d`` head dimension.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Queries = Float[Tensor, "b sq hq d"]
Keys = Float[Tensor, "b sk hk d"]
LogSumExp = Float[Tensor, "b sq hq"]
Tokens = Int[Tensor, "b s"]
Positions = Int[Tensor, " s"]

__all__ = ["Bool", "Float", "Int", "Keys", "LogSumExp", "Positions", "Queries", "Tensor", "Tokens"]
