"""Ring attention of other projects on the same kernel as ours: yunchang and ring-flash-attn, where installed.

Both call the flash-attn package, which needs CUDA.  On a CPU, a stand-in package has the two functions
that they call.  It runs the kernel that our rings run on, so the algorithms alone differ.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from longctx.attention.flash_cpu import flash_cpu
from longctx.shapes import Keys, Queries, Tensor

Ring = Callable[[Tensor, Tensor, Tensor], Tensor]


def installed_version(name: str) -> str | None:
    """Return the version of the package ``name``; None if it is not installed."""
    return importlib.metadata.version(name) if importlib.util.find_spec(name) else None


def zigzag_ring(name: str, ranks: int, rank: int) -> Ring:
    """Return a peer's causal ring attention: a function of this rank's zigzag shards q, k and v [b s h d].

    ``name`` is "yunchang" or "ring_flash_attn".  This rank is number ``rank`` of ``ranks``.  The call adds modules to
    sys.modules: a stand-in for flash-attn if that is not installed, and an empty one for ring_flash_attn's adapters.
    """
    _install_stand_in()
    if name == "yunchang":
        yunchang = importlib.import_module("yunchang")
        yunchang.set_seq_parallel_pg(1, ranks, rank, ranks)
        kind = importlib.import_module("yunchang.kernels").AttnType.FA
        layer = yunchang.LongContextAttention(ring_impl_type="zigzag", attn_type=kind)
        return lambda q, k, v: layer(q, k, v, causal=True)
    # ring_flash_attn imports its adapters, which need an older transformers, but never calls them: use an empty module.
    adapters = ModuleType("ring_flash_attn.adapters")
    adapters.__getattr__ = lambda _: None  # type: ignore[method-assign]
    sys.modules.setdefault("ring_flash_attn.adapters", adapters)
    ring = importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn")
    return lambda q, k, v: ring.zigzag_ring_flash_attn_func(q, k, v, causal=True)


def _install_stand_in() -> None:
    """Register a module ``flash_attn`` with the two functions that the rings call, unless the package is installed."""
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
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, *_: object, **__: object
) -> tuple[Tensor, Tensor, None, None]:
    assert not dropout_p and (not causal or q.shape[1] == k.shape[1])
    partial = flash_cpu.forward(q, k, v, causal)
    return partial.out.to(q.dtype), partial.lse.transpose(1, 2).contiguous(), None, None


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, *_: object, **__: object,
) -> Tensor:  # fmt: skip
    gradients = flash_cpu.backward(dout, q, k, v, out, softmax_lse.transpose(1, 2), causal)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient)
    return softmax_lse


def try_ring(make: Callable[[], Ring], q: Queries, k: Keys, v: Keys) -> tuple[Ring | None, str]:
    """Return (ring, "") if the ring that ``make`` returns runs forward and backward on ``q``, ``k`` and ``v``.

    Otherwise return (None, reason); the reason is the error, cut to 120 characters.
    """
    try:
        ring = make()
        ring(*(x.detach().clone().requires_grad_() for x in (q, k, v))).sum().backward()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:120]
    return ring, ""
