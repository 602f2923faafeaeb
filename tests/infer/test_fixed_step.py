"""Decode steps of fixed shapes equal a prefill of the same tokens, and read no value on the host."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.attention.kernel import reference
from longctx.attention.layout import zigzag
from longctx.hf.config import shape_of
from longctx.infer.engine import Engine, next_logits
from longctx.infer.fixed_step import FixedStep
from longctx.infer.prefill import run_pass
from longctx.megatron.hf_io import load
from longctx.megatron.model import build_model
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.recording import META, SHAPES_ONLY
from longctx.parallel.ring import pass_kv
from tests.infer.thread_ranks import single_rank
from tests.oracle import assert_close
from tests.tiny import tiny_model

PROMPT, ALL = 13, 19


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), max_positions=97, heads=6, kv_heads=2, std=0.3)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    with single_rank(tmp_path_factory.mktemp("runtime")) as runtime:
        yield runtime


def engine_on(runtime, folder, device, kernel):
    shape = shape_of(folder)
    return Engine(build_model(shape, runtime.groups, dtype=torch.float64, layers="local", device=device), shape, kernel)


def prefill(engine, tokens):
    cache = engine.cache(len(tokens))
    return cache, run_pass(engine, tokens, zigzag(len(tokens), 1), cache, engine.everywhere(pass_kv))


def test_steps_equal_a_prefill_and_transformers(runtime, folder):
    engine = engine_on(runtime, folder, runtime.device, reference)
    load.load(engine.model, load.Weights(folder), engine.shape)
    tokens = torch.randint(256, (ALL,))
    step = FixedStep(engine, prefill(engine, tokens[:PROMPT])[0], ALL)
    logits = torch.stack([step(int(token)).clone() for token in tokens[PROMPT:]])
    assert_close(logits, next_logits(engine, prefill(engine, tokens)[1])[PROMPT:, 0], 1e-12)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert_close(logits, model(tokens.unsqueeze(0)).logits[0, PROMPT:], 1e-6)  # its angles are float32
    with pytest.raises(ValueError, match="all 19 rows of the sequence are used"):
        step(1)
    with pytest.raises(ValueError, match="all 19 rows of the sequence are used"):
        step.capture()


def test_steps_read_no_value_on_the_host(runtime, folder):
    """As a graph demands; the device meta would raise."""
    engine = engine_on(runtime, folder, META, SHAPES_ONLY)
    step = FixedStep(engine, prefill(engine, torch.zeros(PROMPT, dtype=torch.long))[0], ALL)
    assert step(3).device == META and step(4).shape == (256,)


def test_what_is_not_tested_is_refused(runtime, folder):
    engine = engine_on(runtime, folder, META, SHAPES_ONLY)
    cache, _ = prefill(engine, torch.zeros(PROMPT, dtype=torch.long))
    with pytest.raises(ValueError, match="not tested with several ranks: decode with a Session"):
        FixedStep(replace(engine, tp=SingleRankComm(0, 2)), cache, ALL)
    windows = replace(engine, shape=replace(engine.shape, windows=(37, None)))
    with pytest.raises(ValueError, match="not tested with windows"):
        FixedStep(windows, cache, ALL)
    with pytest.raises(ValueError, match="a CUDA graph needs device=cuda, not meta: use run=gpu"):
        FixedStep(engine, cache, ALL).capture()
