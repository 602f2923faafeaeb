"""Initial weights for training from scratch, drawn by tensor name so that every mesh starts from the same model."""

import hashlib
import math
from collections.abc import Iterable

import torch

from longctx.model_shape import ModelShape
from longctx.models.tensors import tensor_shapes
from longctx.shapes import Float, Tensor


class RandomInit:
    """Random Hugging Face tensors of a model of ``shape``, by name; a `load.TensorSource` like `load.Weights`.

    Matrices and attention sinks are normal with standard deviation ``shape.init_std``.  For the two matrices that write
    to the residual stream (o_proj, down_proj), it is divided by sqrt(2 * layers) (GPT-2, section 2.3).  Norms start as
    the identity and biases at 0.

    A tensor depends on ``seed`` and its name only, not on the mesh or on the order of the calls.
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self._shape, self._seed, self._sizes = shape, seed, tensor_shapes(shape)
        self.read_names: set[str] = set()

    def __call__(self, name: str) -> Float[Tensor, "..."]:
        self.read_names.add(name)
        size = self._sizes[name]
        if name.endswith("norm.weight"):
            return torch.zeros(size) if self._shape.zero_centered else torch.ones(size)
        if name.endswith(".bias"):
            return torch.zeros(size)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = self._shape.init_std / (math.sqrt(2 * self._shape.layers) if residual else 1)
        return torch.randn(size, generator=generator) * std

    def refuse_unread(self, tied: bool, elsewhere: Iterable[str] = ()) -> None:
        """Accept every model: tensors are made on request, so none can be left unread."""
