"""Write the API pages of the longctx package, generated from its docstrings: ``python -m docs.build_api FOLDER``."""

import sys
import warnings
from pathlib import Path

import pdoc

import longctx
import longctx.shapes

# longctx.shapes also re-exports types of torch and jaxtyping, which have documentation of their own.
OWN_SHAPES = ["Keys", "LogSumExp", "Positions", "Queries", "Tokens"]


def build(folder: Path) -> None:
    """Write one HTML page per public module to ``folder``, with a search index; needs no network."""
    longctx.shapes.__all__ = OWN_SHAPES  # type: ignore[misc]
    pdoc.render.configure(docformat="markdown", footer_text=f"longctx {longctx.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\.")
        pdoc.pdoc("longctx", output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
