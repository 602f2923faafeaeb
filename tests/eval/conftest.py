"""Fixtures of the evaluation's tests: real data sets if there are any, a small data set, a tiny model, the recipe."""

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from eval.harness.local import LOCAL
from eval.job import EvalJob, prepare
from recipes.common import cli as recipe_cli
from recipes.common.overrides import CONFIGS
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
CHOICES = ["a stone", "a cloud", "a boat", "a song"]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real evaluation sets: $LONGCTX_DATA, or shared/data next to the checkout."""
    folder = Path(os.environ.get("LONGCTX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no evaluation sets in {folder}: set LONGCTX_DATA to a folder as eval/README.md describes it")
    return folder


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of data: two tasks of accuracy, one of perplexity."""
    folder = tmp_path_factory.mktemp("sets")

    def write(name: str, rows: list[dict]) -> None:
        file = folder / LOCAL[name].file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "arc_easy", [{"query": f"Question: What is number {i}?", "choices": CHOICES, "gold": i % 4} for i in range(13)]
    )
    write("lambada_openai", [{"context": f"Down the river went {i}", "continuation": "men"} for i in range(11)])
    pages = folder / LOCAL["wikitext"].file
    pages.parent.mkdir()
    pages.write_text(" = Boats = \n \n Boats float .\n = Songs = \n \n A song is sung .\n")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama of 9 query and 3 KV heads, 397 positions; one token per byte, and an end token."""
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


@pytest.fixture(scope="session")
def base_config(tiny: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    """The composed configuration of the tiny model on the small data set; composed once, since Hydra is slow."""
    out = tmp_path_factory.mktemp("out") / "run"
    words = ["model=folder", f"model.source={tiny}", "model.name=tiny", f"out={out}", f"eval.data={sets}"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return hydra.compose("evaluate", words)


@pytest.fixture
def prepared(base_config: DictConfig) -> Callable[..., EvalJob]:
    """``prepared(*settings)``: the job of `base_config` with ``settings`` changed."""
    return lambda *settings: prepare(OmegaConf.merge(base_config, OmegaConf.from_dotlist(list(settings))))


def run_eval(*argv: str) -> tuple[object, str, str]:
    """Run ``python -m eval.run argv`` in this process; return exit code, stdout and stderr."""
    from eval import run

    code: object = 0
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"):
            patch.delenv(name, raising=False)
        patch.setattr("sys.argv", [str(run.__file__), *argv])
        patch.setattr("sys.orig_argv", [sys.executable, "-m", "eval.run", *argv])
        try:
            recipe_cli.main("evaluate", run.task)
        except SystemExit as leaving:
            code = leaving.code
        finally:
            GlobalHydra.instance().clear()
    return code, out.getvalue(), err.getvalue()
