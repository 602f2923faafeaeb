"""The families of models that this project runs, in one file for each family or for related ones.

To add a family: write its file, list it here, and add a configuration to tests/megatron/kinds.py.
"""

from longctx.models.family import Family
from longctx.models.gemma3 import GEMMA3
from longctx.models.glm4 import GLM4
from longctx.models.gpt_oss import GPT_OSS
from longctx.models.granite import GRANITE
from longctx.models.llama import LLAMA
from longctx.models.mistral import MISTRAL
from longctx.models.mixtral import MIXTRAL
from longctx.models.olmo import OLMO2, OLMO3
from longctx.models.phi3 import PHI3
from longctx.models.qwen import QWEN2, QWEN3, QWEN3_MOE
from longctx.models.smollm3 import SMOLLM3
from longctx.models.starcoder2 import STARCODER2

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, OLMO2, OLMO3, PHI3, GEMMA3, GRANITE, STARCODER2, GLM4, MIXTRAL,
        QWEN3_MOE, GPT_OSS,
    )
}  # fmt: skip

# Known model types that need more than a file here, and the features that are missing.
_MISSING = {
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "gemma2": "softcapped attention scores",
    "gemma3": "images; its text model, gemma3_text, runs alone",
    "gpt2": "learned positions",
    "mamba": "state-space layers",
    "qwen2_moe": "a shared expert, which every token passes",
    "qwen3_next": "linear attention",
}


def family_of(model_type: str) -> Family:
    """Return the `Family` of the models whose config.json has this ``model_type``.

    Raises ValueError for an unknown one, naming the nearest known family and, if known, the feature that is missing.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    from difflib import get_close_matches

    needs = f" (it needs {_MISSING[model_type]})" if model_type in _MISSING else ""
    nearest = get_close_matches(model_type, FAMILIES, 1, 0.5)
    near = f"; the nearest is {nearest[0]}" if nearest else ""
    raise ValueError(
        f"model_type={model_type} is not implemented{needs}: use one of {', '.join(sorted(FAMILIES))}{near}"
    )
