"""Transformer Engine's context parallelism as a peer: its own attention, on the same ranks and rows as ours.

Only `recipes.bench attention` uses it, to measure it.  It is not a strategy of training or inference.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from longctx.parallel.dist_comm import DistComm
from longctx.parallel.launcher import current_rank
from longctx.parallel.ulysses import Attention
from recipes.common.target import Target

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime
    from longctx.model_shape import ModelShape

# Transformer Engine's cp_comm_type, after "te_".
TEPeer = Literal["te_p2p", "te_all_gather", "te_a2a", "te_a2a+p2p"]
_WITH_WINDOW = ("te_all_gather", "te_a2a")


def refuse_unfit_peers(peers: Sequence[TEPeer], target: Target, lengths: Sequence[int], window: int | None) -> None:
    """Raise ValueError, with what to set instead, for peers that cannot run here or not with these settings.

    Transformer Engine 2.20 takes 16-bit tensors only.  Every rank holds two chunks of each sequence, in zigzag order,
    so ``lengths`` must be multiples of twice the ranks.  Its all-to-all divides query and KV heads evenly.  Only
    `te_all_gather` and `te_a2a` take a ``window`` (attn_forward_func_with_cp in its context_parallel.py).
    """
    if not peers:
        return
    named, ranks = f"peers=[{','.join(peers)}]", target.mesh.context
    _refuse_machine(named, target)
    if target.model.dtype == "float32":
        raise ValueError(f"{named} does not take model.dtype=float32; use model.dtype=bfloat16")
    if odd := [length for length in lengths if length % (2 * ranks)]:
        nearest = -(-odd[0] // (2 * ranks)) * 2 * ranks
        raise ValueError(
            f"lengths={odd[0]} is not a multiple of twice the {ranks} context ranks, as {named} needs; use {nearest}, "
            "or peers=[]"
        )
    for peer in peers:
        refuse_unfit_peer(peer, target, window)


def _refuse_machine(named: str, target: Target) -> None:
    """Raise ValueError, with what is missing, unless each rank has a GPU and Transformer Engine is installed."""
    missing = [] if target.run.device == "cuda" else ["a GPU for each rank (run=gpu)"]
    if importlib.util.find_spec("transformer_engine") is None:
        missing.append("Transformer Engine (make gpu)")
    if missing:
        raise ValueError(f"{named} needs {' and '.join(missing)}; use peers=[] without it")
    rank, gpus = current_rank(), torch.cuda.device_count()
    if (ranks := rank.local_world_size if rank else target.mesh.ranks) > gpus:
        raise ValueError(
            f"{named} needs a GPU for each of the {ranks} ranks of this machine, which has {gpus}: use a mesh of "
            f"{gpus} ranks, or peers=[]"
        )


def refuse_unfit_peer(peer: TEPeer, target: Target, window: int | None) -> None:
    """Raise ValueError, with what to set instead, if ``peer`` does not take the mesh, the heads or the ``window``."""
    mesh, shape = target.mesh, target.shape
    if window is not None and peer not in _WITH_WINDOW:
        raise ValueError(f"peers={peer} does not take window={window}; use peers=[{','.join(_WITH_WINDOW)}]")
    if peer == "te_a2a+p2p" and min(mesh.ulysses, mesh.ring) < 2:
        raise ValueError(
            f"peers=te_a2a+p2p needs mesh.ulysses and mesh.ring of 2 or more, not {mesh.ulysses} and {mesh.ring}; "
            "use te_p2p or te_a2a on one axis"
        )
    exchanging = {"te_a2a": mesh.context, "te_a2a+p2p": mesh.ulysses}.get(peer, 1)
    if shape.heads % exchanging or shape.kv_heads % exchanging:
        raise ValueError(
            f"peers={peer} cannot divide {shape.heads} query heads and {shape.kv_heads} KV heads evenly among "
            f"{exchanging} ranks; use te_p2p or te_all_gather"
        )


def te_attention(peer: str, runtime: Runtime, shape: ModelShape, window: int | None) -> Attention:
    """Return Transformer Engine's differentiable causal attention by ``peer``, over the context ranks of ``runtime``.

    The returned function takes this rank's rows q, k and v [b s h d], which are those of `zigzag` over all context
    ranks, and returns out [b s hq d] in their dtype.  A query sees the last ``window`` positions (None: all).
    Transformer Engine chooses flash-attn or cuDNN, as its environment variables say.

    "te_a2a+p2p" exchanges heads among the Ulysses ranks, and keys and values around the ring.  Its context rank is
    ring rank * ulysses size + ulysses rank, as ours is.
    """

    def group_of(comm: object) -> dist.ProcessGroup:
        assert isinstance(comm, DistComm), "a group of one rank"
        return comm.group

    kind, context = peer.removeprefix("te_"), group_of(runtime.context)
    attention = importlib.import_module("transformer_engine.pytorch").DotProductAttention(
        shape.heads,
        shape.head_dim,
        num_gqa_groups=shape.kv_heads,
        qkv_format="bshd",
        attn_mask_type="causal",
        window_size=None if window is None else (window - 1, 0),
        cp_group=[group_of(runtime.ulysses), group_of(runtime.ring)] if kind == "a2a+p2p" else context,
        cp_global_ranks=dist.get_process_group_ranks(context),
        cp_stream=torch.cuda.Stream(),
        cp_comm_type=kind,
    )
    out_heads = (shape.heads, shape.head_dim)
    return lambda q, k, v: attention(q, k, v).unflatten(2, out_heads)
