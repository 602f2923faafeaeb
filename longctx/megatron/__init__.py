"""The adapters to megatron-core: the only room that imports it."""

import logging
import warnings

# megatron-core warns a dozen times at import that it will use torch's own norms and optimizers where Transformer
# Engine and Apex are missing. A recipe says which layers it took in one line of its own.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch.jit, which it decorates with
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

logging.getLogger("megatron").setLevel(logging.ERROR)
