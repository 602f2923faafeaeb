"""Import this module to install Transformer Engine's stand-in, from the folder that LONGCTX_TE names."""

import os
from pathlib import Path

from tests.megatron.te.stand_in import install

install(Path(os.environ["LONGCTX_TE"]))

import longctx.infer.prefill  # noqa: E402
import longctx.megatron.hf_io.export  # noqa: E402
import longctx.megatron.te_modules  # noqa: E402
import longctx.megatron.training.checkpoint  # noqa: E402
import longctx.train.step  # noqa: E402, F401
