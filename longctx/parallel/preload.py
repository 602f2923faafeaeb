"""Import modules in the server process that ranks are forked from; `launch` preloads this module there.

The modules are those that the environment variable ``LONGCTX_PRELOAD`` names, separated by commas.  Garbage collection
waits until they are imported, and ignores their objects in every rank.  A rank's first full collection would otherwise
copy the memory of all of them, 120 MB and 0.3 s for those of a recipe.
"""

import gc
import importlib
import os
from contextlib import suppress

VARIABLE = "LONGCTX_PRELOAD"

if names := os.environ.pop(VARIABLE, ""):
    gc.disable()
    for name in names.split(","):
        with suppress(ImportError):  # the rank that needs the module raises it
            importlib.import_module(name)
    gc.freeze()
    gc.enable()
