"""Other projects' rings on this machine's kernel: yunchang and ring-flash-attn, where they are installed.

Both call the flash-attn package, which needs CUDA.  On a CPU a stand-in of two functions takes its place, over the
same kernel that ours runs on, so that what differs is the algorithm.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from longctx.attention.flash_cpu import flash_cpu
from longctx.shapes import Tensor

_WAYS = ("forward", "backward")
Ring = Callable[[Tensor, Tensor, Tensor], Tensor]


def installed(name: str) -> str | None:
    """The version of the peer's package, if it is installed."""
    return importlib.metadata.version(name) if importlib.util.find_spec(name) else None


def zigzag_ring(name: str, ranks: int, rank: int) -> Ring:
    """The peer's causal attention over zigzag shards [b s h d] of the world's ranks."""
    _stand_in()
    if name == "yunchang":
        yunchang = importlib.import_module("yunchang")
        yunchang.set_seq_parallel_pg(1, ranks, rank, ranks)
        kind = importlib.import_module("yunchang.kernels").AttnType.FA
        layer = yunchang.LongContextAttention(ring_impl_type="zigzag", attn_type=kind)
        return lambda q, k, v: layer(q, k, v, causal=True)
    adapters = ModuleType("ring_flash_attn.adapters")  # to an older transformers; they are imported, and not called
    adapters.__getattr__ = lambda _: None  # type: ignore[method-assign]
    sys.modules.setdefault("ring_flash_attn.adapters", adapters)
    ring: Any = importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn")
    return lambda q, k, v: ring.zigzag_ring_flash_attn_func(q, k, v, causal=True)


def _stand_in() -> None:
    """A module ``flash_attn`` with the two functions that rings call, unless the real one is there."""
    if importlib.util.find_spec("flash_attn") or "flash_attn" in sys.modules:
        return
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = "2.8.3"  # type: ignore[attr-defined]
    package.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    package.__path__ = []
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    interface._flash_attn_forward = _forward  # type: ignore[attr-defined]
    interface._flash_attn_backward = _backward  # type: ignore[attr-defined]
    for name in (
        "flash_attn_func",
        "flash_attn_varlen_func",
        "_flash_attn_varlen_forward",
        "_flash_attn_varlen_backward",
    ):
        for module in (package, interface):
            setattr(module, name, None)
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, None, None]:
    assert not dropout_p and (not causal or q.shape[1] == k.shape[1])
    part = flash_cpu.forward(q, k, v, causal)
    return part.out.to(q.dtype), part.lse.transpose(1, 2).contiguous(), None, None


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    grads = flash_cpu.backward(dout, q, k, v, out, softmax_lse.transpose(1, 2), causal)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)
    return softmax_lse


def tried(make: Callable[[], Ring], q: Tensor, k: Tensor, v: Tensor) -> tuple[Ring | None, str]:
    """The peer's ring, if it runs forward and backward here; else why it does not."""
    try:
        ring = make()
        ring(*(x.detach().clone().requires_grad_() for x in (q, k, v))).sum().backward()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:120]
    return ring, ""
