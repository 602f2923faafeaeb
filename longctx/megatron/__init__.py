"""Adapters to megatron-core; no other package of longctx imports it."""

import logging
import warnings

# On import megatron-core warns a dozen times that Transformer Engine and Apex are missing and that it uses torch's
# norms and optimizers instead.  A recipe prints the layers that it uses in one line.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # megatron-core decorates with torch.jit
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

logging.getLogger("megatron").setLevel(logging.ERROR)
