"""A pass that prefills some sequences and decodes others has the logits of transformers for both."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from longctx.config import Context, Mesh, Sampling
from longctx.infer.continuous import ContinuousSession
from longctx.infer.engine import Engine
from longctx.infer.sample import TokenLogprob
from longctx.megatron.runtime import Runtime
from tests.float64 import KeepFloat64, float64_model
from tests.infer.thread_ranks import run_engines, single_rank
from tests.megatron.kinds import random_model

PROMPTS = {0: 31, 1: 2, 2: 53, 3: 17, 4: 1}
TOP = 3


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with single_rank(tmp_path_factory.mktemp("store")) as runtime:
        yield runtime


def prompt_of(sequence: int) -> list[int]:
    return [(37 * sequence + 11 * i) % 89 for i in range(PROMPTS[sequence])]


def answer(engine: Engine, strategy: str) -> tuple[dict[int, tuple[list[int], list[TokenLogprob]]], int]:
    """Prefill two sequences, then decode them while the others are prefilled in pieces.

    Returns the tokens and log-probabilities of each sequence, and the number of passes over the first layer.
    """
    with KeepFloat64() if engine.shape.mixture else nullcontext():  # megatron-core's router rounds to float32
        return _answer(engine, strategy)


def _answer(engine: Engine, strategy: str) -> tuple[dict[int, tuple[list[int], list[TokenLogprob]]], int]:
    session = ContinuousSession(engine, Context(strategy=strategy), Sampling(logprobs=TOP))
    for i, length in PROMPTS.items():
        session.add(i, length, 7).append_prompt(prompt_of(i))
    session.prefill({0: 31, 1: 2})
    passes = list[None]()
    handle = engine.model.decoder.layers[0].register_forward_hook(lambda *_: passes.append(None))
    session.prefill_and_decode({2: 29}, [0, 1])
    session.prefill_and_decode({2: 24, 3: 17}, [1])
    session.prefill_and_decode({4: 1}, [0, 2, 1])  # on several ranks, some have no prompt row
    handle.remove()
    session.decode([4, 3, 0])
    return {i: (one.tokens, one.logprobs) for i, one in session.sequences.items()}, len(passes)


MESHES = [(Mesh(), "pass_kv"), (Mesh(ring=3), "pass_q"), (Mesh(ulysses=2, ring=2), "pass_kv")]


@pytest.mark.parametrize("kind", ["tied llama", "gemma3", "gpt_oss"])
def test_tokens_and_logprobs_are_those_of_transformers(runtime, kind, tmp_path):
    folder = random_model(kind, tmp_path / "model")
    model = float64_model(folder)
    for mesh, strategy in MESHES:
        found = run_engines(runtime, folder, mesh, partial(answer, strategy=strategy), torch.float64)
        for sequences, passes in found:
            assert sequences == found[0][0] and passes == 3
            for i, (tokens, logprobs) in sequences.items():
                check(model, tokens, logprobs, PROMPTS[i])


@torch.inference_mode()
def check(model: torch.nn.Module, tokens: list[int], logprobs: list[TokenLogprob], prompt: int) -> None:
    """Compare the answer to ``prompt`` tokens with the logits of ``model``."""
    assert len(tokens) - prompt == len(logprobs) >= 1
    with KeepFloat64():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[prompt - 1 :]
    for row, token, one in zip(expected, tokens[prompt:], logprobs, strict=False):
        values, likely = row.topk(TOP)
        assert one.token == token == int(likely[0])
        assert [number for number, _ in one.top] == likely.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), rel=0, abs=1e-12)


def test_every_rank_computes_the_logits_of_some_sequences(runtime, tmp_path):
    """Each of two ranks computes two of four decoded rows."""
    folder = random_model("tied llama", tmp_path / "model")

    def rank_main(engine: Engine) -> list[int]:
        session, rows = ContinuousSession(engine, Context(), Sampling()), list[int]()
        session.turn({i: prompt_of(i) for i in range(4)}, dict.fromkeys(range(4), 1))
        engine.model.output_layer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        session.decode(range(4))
        return rows

    assert run_engines(runtime, folder, Mesh(ring=2), rank_main) == [[2], [2]]
