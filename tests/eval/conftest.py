"""What the tests of evaluation share: real sets where they are, a tiny model, one run of ranks for many claims."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from recipes.common import cli as recipe_cli
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
Cli = Callable[..., tuple[Any, str, str]]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real evaluation sets: $LONGCTX_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("LONGCTX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no evaluation sets in {folder}: set LONGCTX_DATA to a folder as eval/README.md describes it")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama of 9 query and 3 KV heads, 397 positions; a token a byte, and one that ends a text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(folder)
    widths = {"head_dim": 4, "hidden_size": 36, "intermediate_size": 51, "num_attention_heads": 9}
    torch.manual_seed(7)
    sizes = {"vocab_size": 257, "num_hidden_layers": 2, "max_position_embeddings": 397, "num_key_value_heads": 3}
    logging.disable_progress_bar()
    LlamaForCausalLM(LlamaConfig(**widths, **sizes, bos_token_id=None, eos_token_id=256)).save_pretrained(folder)
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli(*argv)``: run ``python -m eval.run argv`` in this process; exit code, stdout, stderr."""
    from eval import run

    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def call(*argv: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", [str(run.__file__), *argv])
        monkeypatch.setattr("sys.orig_argv", [sys.executable, "-m", "eval.run", *argv])
        code: Any = 0
        try:
            recipe_cli.main("evaluate", run.task)
        except SystemExit as leaving:
            code = leaving.code
        finally:
            GlobalHydra.instance().clear()
        return code, *capsys.readouterr()

    return call
