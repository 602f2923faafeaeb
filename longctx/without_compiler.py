"""Import packages that use torch's compiler without loading it, on a CPU build of torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_compiler() -> Iterator[None]:
    """Make `torch.compile` and `torch.compiler.disable` return functions unchanged inside the block.

    As decorators they load the compiler, which takes a second and which longctx does not use on CPU.  On a CUDA build
    of torch nothing changes.
    """
    compile_, disable = torch.compile, torch.compiler.disable
    if torch.version.cuda is None:
        torch.compile = torch.compiler.disable = _decorate_nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile, torch.compiler.disable = compile_, disable


def _decorate_nothing(function: Any = None, **_: Any) -> Any:
    """Return ``function`` unchanged; without a function, return a decorator that does this."""
    return (lambda decorated: decorated) if function is None else function
