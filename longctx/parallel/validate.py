"""Checks of a mesh against a model and a recipe, and of the device, made before any rank starts."""

import importlib.util

import torch

from longctx.config import Mesh
from longctx.model_shape import ModelShape
from longctx.parallel.ulysses import refuse_uneven_heads

FP8_MULTIPLE = 16  # rows and widths of products with 8-bit inputs are multiples of this
# Setting model.fp8 -> multiple of the rows of a rank in training.  Under sequence parallelism, Transformer Engine sends
# rows in 8 bits only if they fill blocks of 128.
FP8_ROWS = {None: 1, "current": FP8_MULTIPLE, "block": 128}


def refuse_unfit(mesh: Mesh, shape: ModelShape) -> None:
    """Raise ValueError, naming the nearest degree that fits, unless ``mesh`` can shard a model of ``shape``.

    It checks only the axes ``tp``, ``ep`` and ``ulysses``.
    """
    fit = tp_degrees(shape)
    if mesh.tp not in fit:
        widths = " and ".join(map(str, shape.ffn_sizes))
        nearest = min(fit, key=lambda n: (abs(n - mesh.tp), -n))  # the larger of two: one rank has no reductions
        raise ValueError(
            f"mesh.tp={mesh.tp} does not divide the model's {shape.heads} query heads, {shape.kv_heads} KV heads and "
            f"FFN width {widths}; use mesh.tp={nearest} (possible: {', '.join(map(str, fit))})"
        )
    _refuse_uneven_experts(mesh.ep, shape)
    try:
        refuse_uneven_heads(shape.heads // mesh.tp, shape.kv_heads // mesh.tp, mesh.ulysses)
    except ValueError as error:
        per_rank = f"with mesh.tp={mesh.tp} each rank has {shape.heads // mesh.tp} query heads: "
        raise ValueError(f"{per_rank if mesh.tp > 1 else ''}{error}") from None


def tp_degrees(shape: ModelShape) -> list[int]:
    """Return the tensor-parallel degrees that divide the heads, KV heads and FFN widths of ``shape``, from 1 on."""
    shared = (shape.kv_heads, shape.heads, *shape.ffn_sizes)
    return [n for n in range(1, shape.kv_heads + 1) if not any(size % n for size in shared)]


def _refuse_uneven_experts(ep: int, shape: ModelShape) -> None:
    """Raise ValueError unless ``ep`` ranks can divide the experts of a model of ``shape`` evenly."""
    if ep > 1 and not shape.mixture:
        raise ValueError(f"mesh.ep={ep} divides experts, and this model has none; use mesh.ep=1")
    count = shape.mixture.count if shape.mixture else 1
    if count % ep:
        fit = [n for n in range(1, count + 1) if count % n == 0]
        nearest = min(fit, key=lambda n: (abs(n - ep), n))
        raise ValueError(
            f"mesh.ep={ep} does not divide the model's {count} experts; "
            f"use mesh.ep={nearest} (possible: {', '.join(map(str, fit))})"
        )


def refuse_few_tokens(mesh: Mesh, tokens: int) -> None:
    """Raise ValueError if ``mesh`` has more context ranks (ulysses x ring) than there are prompt ``tokens``."""
    if tokens < mesh.context:
        raise ValueError(
            f"mesh.ulysses x mesh.ring = {mesh.context} ranks are more than the {tokens} prompt "
            f"tokens: use at most {tokens} ranks, or more text"
        )


def refuse_no_gpu(device: str) -> None:
    """Raise ValueError, with what is missing, if ``device`` is "cuda" and torch finds no GPU on this machine."""
    if device != "cuda":
        return
    if not torch.cuda.device_count():
        missing = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "torch finds no GPU"
        raise ValueError(
            f"run.device=cuda: {missing} here; use run.device=cpu, or, on a machine with GPUs and a CUDA build of "
            "torch, run=gpu model.dtype=bfloat16"
        )


def refuse_no_te(device: str) -> None:
    """Raise ValueError, with what is missing, unless Transformer Engine is installed and ``device`` is "cuda"."""
    missing = [] if device == "cuda" else ["a GPU (run=gpu)"]
    if importlib.util.find_spec("transformer_engine") is None:
        missing.append("Transformer Engine (make gpu)")
    if missing:
        raise ValueError(f"model.layers=te needs {' and '.join(missing)}; use model.layers=local without it")


def refuse_other_than_te(shape: ModelShape) -> None:
    """Raise ValueError for a mixture of experts, which ``model.layers=te`` does not support."""
    if shape.mixture:
        raise ValueError("model.layers=te does not support mixtures of experts; use model.layers=local")


def refuse_fp8_widths(mesh: Mesh, shape: ModelShape) -> None:
    """Raise ValueError unless a rank's widths of all linear layers are multiples that products in 8 bits need."""
    widths = {
        "hidden size": shape.hidden,
        "width of the queries": shape.heads * shape.head_dim // mesh.tp,
        "width of queries, keys and values": (shape.heads + 2 * shape.kv_heads) * shape.head_dim // mesh.tp,
        "FFN width": shape.ffn // mesh.tp,
    }
    for name, width in widths.items():
        if width % FP8_MULTIPLE:
            on_rank = f" of a rank with mesh.tp={mesh.tp}" if mesh.tp > 1 and width != shape.hidden else ""
            fewer = "a smaller mesh.tp or " if on_rank else ""
            raise ValueError(
                f"model.fp8 needs multiples of {FP8_MULTIPLE}, but the {name}{on_rank} is {width}: use {fewer}"
                "model.fp8=null"
            )


def refuse_unused(mesh: Mesh, recipe: str, axes: tuple[str, ...]) -> None:
    """Raise ValueError if ``mesh`` has more than one rank on any of ``axes``, which ``recipe`` does not use."""
    for axis in axes:
        if getattr(mesh, axis) > 1:
            usable = " or ".join(f"mesh.{other}" for other in ("ring", "ulysses", "tp") if other not in axes)
            advice = f", and {usable} to share one prompt between ranks" if usable else ""
            raise ValueError(f"{recipe} has no use for mesh.{axis}={getattr(mesh, axis)}; use mesh.{axis}=1{advice}")
