"""Recipes run in this process on a tiny random model; what they print, and how they leave, is what a user sees."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from recipes import start

Cli = Callable[..., tuple[Any, str, str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama of 9 query and 3 KV heads, 97 positions, no end token; a token a byte."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=of_bytes).save_pretrained(folder)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "hidden_size": 36}
    sizes = {"vocab_size": 256, "intermediate_size": 51, "num_hidden_layers": 2, "max_position_embeddings": 97}
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**heads, **sizes, bos_token_id=None, eos_token_id=None))
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def nobody_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a rank fails the test."""
    monkeypatch.setattr(start, "run_ranks", lambda *_: pytest.fail("ranks were started"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli(recipe, task, *argv)``: run ``python -m recipe argv``; exit code, stdout, stderr."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def run(recipe: ModuleType, task: Callable[..., None], *argv: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", [str(recipe.__file__), *argv])
        monkeypatch.setattr("sys.orig_argv", [sys.executable, "-m", recipe.__name__, *argv])
        name = recipe.__name__.rpartition(".")[2]
        code = 0
        try:
            start.main(name, task, positional="subject" if name == "bench" else None)
        except SystemExit as leaving:
            code = leaving.code
        finally:
            GlobalHydra.instance().clear()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(cli: Cli, nobody_starts: None) -> Callable[..., str]:
    """What a recipe says when it refuses its command line: one line, with exit code 2 and no rank started."""

    def run(*command: Any) -> str:
        code, out, err = cli(*command)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run
