"""Import this module to install Transformer Engine's stand-ins, from the folder that LONGCTX_TE names."""

import os
from pathlib import Path

from tests.megatron.te import attention_stand_in, stand_in

stand_in.install(Path(os.environ["LONGCTX_TE"]))
attention_stand_in.install()

import longctx.megatron.runtime  # noqa: E402, F401
import recipes.bench.attention  # noqa: E402, F401
