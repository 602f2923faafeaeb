"""Weights to begin from: each Hugging Face tensor is drawn by its name, so that all meshes begin with one model."""

import hashlib
import math
from collections.abc import Iterable

import torch

from longctx.model_shape import ModelShape
from longctx.shapes import Tensor


class RandomInit:
    """What `weights.Weights` is for a model that has been trained: tensors by name, here drawn from ``seed``.

    Normal with the shape's deviation, of the two matrices that write to the residual stream that over sqrt(2 layers)
    (GPT-2, section 2.3); norms begin at 1, biases at 0.
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self._shape, self._seed = shape, seed
        self.taken: set[str] = set()

    def __call__(self, name: str) -> Tensor:
        self.taken.add(name)
        size = self._size(name)
        if name.endswith("norm.weight"):
            return torch.ones(size)
        if name.endswith(".bias"):
            return torch.zeros(size)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = self._shape.init_std / (math.sqrt(2 * self._shape.layers) if residual else 1)
        return torch.randn(size, generator=draw) * deviation

    def _size(self, name: str) -> tuple[int, ...]:
        s = self._shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        kind = name.split(".")[-2]
        matrices = {
            "embed_tokens": (s.vocab_size, s.hidden),
            "lm_head": (s.vocab_size, s.hidden),
            "q_proj": (q, s.hidden),
            "k_proj": (kv, s.hidden),
            "v_proj": (kv, s.hidden),
            "o_proj": (s.hidden, q),
            "gate_proj": (s.ffn, s.hidden),
            "up_proj": (s.ffn, s.hidden),
            "down_proj": (s.hidden, s.ffn),
        }
        size = matrices.get(kind, (s.hidden,))  # all others are norms
        return size[:1] if name.endswith(".bias") else size

    def refuse_unread(self, tied: bool, elsewhere: Iterable[str] = ()) -> None:
        """Nothing is left over of what is made on demand."""
