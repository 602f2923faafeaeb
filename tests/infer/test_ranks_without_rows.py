"""Ranks that hold none of a pass's new tokens attend for the others; the answers are those of transformers."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from longctx.config import Context, Mesh, Sampling
from longctx.infer.engine import Engine
from longctx.infer.sample import TokenLogprob
from longctx.infer.session import Session
from longctx.megatron.runtime import Runtime
from tests.float64 import KeepFloat64, float64_model
from tests.infer.test_together import TOP, check
from tests.infer.thread_ranks import run_engines, single_rank
from tests.megatron.kinds import random_model

PROMPT = [53]  # one token, which one rank holds


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with single_rank(tmp_path_factory.mktemp("store")) as runtime:
        yield runtime


def answer(engine: Engine) -> tuple[list[int], list[TokenLogprob]]:
    """Prefill the prompt and decode with pass_q, which gives each decoded token to one rank; prove each pass."""
    with KeepFloat64() if engine.shape.mixture else nullcontext():  # megatron-core's router rounds to float32
        session = Session(engine, Context(decode="pass_q", check_schedule=True), Sampling(logprobs=TOP))
        session.turn({0: PROMPT}, {0: 5})
    return session.sequences[0].tokens, session.sequences[0].logprobs


@pytest.mark.parametrize("mesh", [Mesh(ring=2), Mesh(ulysses=2), Mesh(ulysses=2, ring=2)], ids=str)
@pytest.mark.parametrize("kind", ["tied llama", "gemma3", "gpt_oss"])
def test_answers_are_those_of_transformers(runtime, kind, mesh, tmp_path):
    folder = random_model(kind, tmp_path / "model")
    model = float64_model(folder)
    for tokens, logprobs in run_engines(runtime, folder, mesh, answer, torch.float64):
        check(model, tokens, logprobs, len(PROMPT))
