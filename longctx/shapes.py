"""The letters that every tensor signature is written in.

``b`` batch, ``s`` rows that this rank holds, ``sq`` / ``sk`` rows of queries / keys where they differ,
``hq`` / ``hk`` query / KV heads, ``d`` width of a head.  Tests execute them (jaxtyping with beartype).
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Queries = Float[Tensor, "b sq hq d"]
Keys = Float[Tensor, "b sk hk d"]
LogSumExp = Float[Tensor, "b sq hq"]
Tokens = Int[Tensor, "b s"]
Positions = Int[Tensor, " s"]

__all__ = ["Bool", "Float", "Int", "Keys", "LogSumExp", "Positions", "Queries", "Tensor", "Tokens"]
