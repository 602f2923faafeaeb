"""Adapters to megatron-core; no other package of longctx imports it."""

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longctx.without_compiler import without_compiler


@contextmanager
def _import_less() -> Iterator[None]:
    """Make megatron-core skip two slow imports inside the block: torch's compiler, on CPU, and Weights & Biases.

    They take half the load time.  longctx compiles nothing on CPU, and megatron-core uses W&B for its inference logs
    only.  An import of W&B fails inside the block; a module that is loaded already stays.

    After the block, tensors are pickled as torch pickles them.  megatron-core 0.19 would put one of its functions into
    the pickles, and a process that reads a rank's result would import megatron-core.
    """
    hides_wandb, reader = "wandb" not in sys.modules, torch.storage._load_from_bytes
    if hides_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        with without_compiler():
            yield
    finally:
        torch.storage._load_from_bytes = reader
        if hides_wandb:
            del sys.modules["wandb"]


def hide_if_broken(package: str, mend: str) -> None:
    """Hide ``package`` from imports, and warn, if its submodule ``pytorch`` raises another error than ImportError.

    Later imports of the package then raise ImportError, as if it were not installed.  megatron-core expects this error,
    and does without Transformer Engine.  An incomplete installation raises others: RuntimeError without its core,
    FileNotFoundError without its extension.  ``mend`` ends the warning: how to repair the installation.
    """
    try:
        importlib.import_module(f"{package}.pytorch")
    except ImportError:
        return
    except Exception as error:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None  # type: ignore[assignment]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"{package} is not used, since it cannot be imported ({reason}): {mend}", stacklevel=2)


# On import megatron-core warns a dozen times that Transformer Engine and Apex are missing and that it uses torch's
# norms and optimizers instead.  A recipe prints the layers that it uses in one line.
with warnings.catch_warnings(), _import_less():
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # megatron-core decorates with torch.jit
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # escapes in its docstrings, when first compiled
    hide_if_broken("transformer_engine", "make gpu installs it whole; or run pip uninstall transformer-engine")
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

logging.getLogger("megatron").setLevel(logging.ERROR)
