"""Write the API pages of the longctx package, generated from its docstrings: ``python -m docs.build_api FOLDER``."""

import importlib.util
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import longctx

# Packages that are not installed everywhere, and the modules that import them at once.
_NEEDED_BY = {"transformer_engine": "longctx.megatron.te_modules", "triton": "longctx.attention.triton_kernels"}


def build(folder: Path) -> None:
    """Write one HTML page per public module to ``folder``, with a search index.  Needs no network.

    Leaves out the pages of modules that need a package that is not installed.  Raises pdoc's warnings as errors.
    """
    left_out = [module for package, module in _NEEDED_BY.items() if not importlib.util.find_spec(package)]
    for module in pkgutil.walk_packages(longctx.__path__, "longctx."):
        if module.name not in left_out:
            _leave_out_other_projects(module.name)
    pdoc.render.configure(docformat="markdown", footer_text=f"longctx {longctx.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\.")
        for name in left_out:
            warnings.filterwarnings("ignore", message=f"Couldn't import {name}")
        pdoc.pdoc("longctx", *(f"!{name}" for name in left_out), output_directory=folder)


def _leave_out_other_projects(name: str) -> None:
    """Take classes of other projects (torch.Tensor, megatron-core's GPTModel) out of a module's ``__all__``."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None)
    if names is None:
        return
    own = []
    for one in names:
        value = getattr(module, one)
        # An alias of ours, such as Queries, has another name than the type that it stands for.
        if getattr(value, "__module__", "longctx").startswith("longctx") or getattr(value, "__name__", "") != one:
            own.append(one)
    module.__all__ = own  # type: ignore[attr-defined]


if __name__ == "__main__":
    build(Path(sys.argv[1]))
