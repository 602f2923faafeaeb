"""A mesh that does not fit is refused before any rank starts, and the refusal says what to write instead."""

import re

import pytest

from longctx.config import Mesh
from longctx.model_shape import ModelShape, Rotary
from longctx.parallel.validate import refuse_unfit, refuse_unused


def model(heads: int, kv_heads: int, ffn: int) -> ModelShape:
    return ModelShape(
        layers=2, hidden=heads * 8, heads=heads, kv_heads=kv_heads, head_dim=8, ffn=ffn, vocab_size=101,
        positions=512, norm_eps=1e-5, tied=True, qkv_bias=False, rotary=Rotary((1.0,)),
    )  # fmt: skip


SMOLLM2 = model(9, 3, 1536)
LLAMA_8B = model(32, 8, 14336)


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (Mesh(), SMOLLM2),
        (Mesh(tp=3), SMOLLM2),
        (Mesh(ulysses=3, ring=5), SMOLLM2),
        (Mesh(tp=2, ulysses=4, ring=3, dp=2), LLAMA_8B),
        (Mesh(tp=8, ring=7), LLAMA_8B),
    ],
)
def test_meshes_that_fit(mesh, shape):
    refuse_unfit(mesh, shape)


@pytest.mark.parametrize(
    ("mesh", "shape", "message"),
    [
        (
            Mesh(tp=2),
            SMOLLM2,
            "mesh.tp=2 does not divide 9 query heads, 3 KV heads and an FFN of 1536: use mesh.tp=1 (possible: 1, 3)",
        ),
        (
            Mesh(tp=16),
            LLAMA_8B,
            "mesh.tp=16 does not divide 32 query heads, 8 KV heads and an FFN of 14336: "
            "use mesh.tp=8 (possible: 1, 2, 4, 8)",
        ),
        (
            Mesh(tp=3),
            model(9, 3, 100),  # the heads would do
            "mesh.tp=3 does not divide 9 query heads, 3 KV heads and an FFN of 100: use mesh.tp=1 (possible: 1)",
        ),
        (
            Mesh(ulysses=2),
            SMOLLM2,
            "mesh.ulysses=2 cannot share 9 query heads and 3 KV heads evenly: "
            "use mesh.ulysses=1 (possible: 1, 3, 9), and mesh.ring for the rest",
        ),
        (
            Mesh(tp=4, ulysses=16),  # 16 divides the model's heads, but not what tensor parallelism leaves of them
            LLAMA_8B,
            "with mesh.tp=4 each rank has 8 query heads: mesh.ulysses=16 cannot share 8 query heads and "
            "2 KV heads evenly: use mesh.ulysses=8 (possible: 1, 2, 4, 8), and mesh.ring for the rest",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_the_nearest_that_does(mesh, shape, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refuse_unfit(mesh, shape)


@pytest.mark.parametrize("axis", ["dp", "pp"])
def test_ranks_that_a_recipe_has_no_use_for(axis):
    message = (
        f"generate has no use for mesh.{axis}=2: use mesh.{axis}=1, and mesh.ring or mesh.ulysses or mesh.tp "
        "to share one prompt between ranks"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refuse_unused(Mesh(ring=3, **{axis: 2}), "generate", ("dp", "pp"))


def test_no_axis_is_advised_that_is_refused_as_well():
    with pytest.raises(ValueError, match=r"use mesh\.tp=1, and mesh\.ring to share one prompt between ranks$"):
        refuse_unused(Mesh(tp=2), "prefill", ("tp", "ulysses", "dp", "pp"))


def test_heads_are_shared_among_what_tensor_parallelism_leaves():
    """7 of 14 query heads and one of 2 KV heads on each: seven ranks do, though 7 shares no 2 KV heads."""
    refuse_unfit(Mesh(tp=2, ulysses=7), model(14, 2, 4864))


def test_axes_that_a_recipe_does_use():
    refuse_unused(Mesh(tp=2, ulysses=3, ring=5), "generate", ("dp", "pp"))
    refuse_unused(Mesh(dp=2), "pretrain", ("pp",))
