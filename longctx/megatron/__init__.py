"""Adapters to megatron-core; no other package of longctx imports it."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _import_less() -> Iterator[None]:
    """Skip, inside the block, two imports of megatron-core that longctx does not use: half of its CPU time to load.

    On a CPU build of torch, `torch.compile` decorates nothing: every fusion is off, and a compiler may be missing.
    W&B is hidden, since megatron-core uses it for its own inference logs only.
    """
    compile_, hides_wandb = torch.compile, "wandb" not in sys.modules
    if torch.version.cuda is None:
        torch.compile = _decorate_nothing  # type: ignore[assignment]
    if hides_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_
        if hides_wandb:
            del sys.modules["wandb"]


def _decorate_nothing(function: Any = None, **_: Any) -> Any:
    """Return ``function`` unchanged, or such a decorator."""
    return (lambda decorated: decorated) if function is None else function


# On import megatron-core warns a dozen times that Transformer Engine and Apex are missing and that it uses torch's
# norms and optimizers instead.  A recipe prints the layers that it uses in one line.
with warnings.catch_warnings(), _import_less():
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # megatron-core decorates with torch.jit
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

logging.getLogger("megatron").setLevel(logging.ERROR)
