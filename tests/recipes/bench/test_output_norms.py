"""recipes.bench output_norms: the split of a Gemma 3 block over ranks, and its figures on a small random model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.bench import output_norms
from recipes.common.cli import compose_config
from tests.megatron.kinds import random_model
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_model("gemma3", tmp_path_factory.mktemp("models") / "gemma3", vocab_size=257)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_block_is_unchanged_if_every_rank_reads_the_whole_attention(gemma):
    net = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32)
    errors = []

    def measure(_, layer, x, known, out):
        sums = output_norms.partial_attention(layer, x, known, 3)
        errors.append(output_norms.relative_squared_error(output_norms.output(layer, sums, [sums.full] * 3), out))

    with output_norms.blocks_replaced(net, measure):
        net.model(torch.tensor([[5, 250, 3, 77, 6, 200, 41]]), use_cache=False)
    assert len(errors) == net.config.num_hidden_layers and max(errors) < 1e-10


@torch.no_grad()
def test_block_that_raises_leaves_no_hook(gemma):
    net = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32)
    layer, tokens = net.model.layers[0], torch.tensor([[5, 250, 3]])

    def fail(*_):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"), output_norms.blocks_replaced(net, fail):
        net.model(tokens, use_cache=False)
    with pytest.raises(TypeError):
        output_norms.partial_attention(layer, net.model.embed_tokens(tokens), {"no_such_argument": 1}, 3)
    assert not [module for module in net.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_perplexities_are_those_of_transformers_and_rise_with_dropped_blocks(cli, gemma, tmp_path):
    out = tmp_path / "norms.json"
    words = (f"model={gemma}", "ranks=3", "shares=[0.01,1]", "length=31", "sequences=2", f"out={out}")
    code, _, err = cli(output_norms, output_norms.task, *words)
    assert code == 0, err
    figures = json.loads(out.read_text())
    overrides = ("model=folder", f"model.source={gemma}", "model.name=gemma3", *words[1:])
    text = output_norms.prepare(compose_config("bench/output_norms", overrides)).held_out
    net = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32)
    with torch.no_grad():
        logits = net(text.tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[text.mask], text.targets[text.mask])
    assert figures["unchanged_loss"] == pytest.approx(float(loss), rel=1e-5)
    for losses in figures["losses"].values():
        assert losses[0] == pytest.approx(float(loss), rel=1e-5), "no block of two is dropped"
        assert abs(losses[1] - float(loss)) > 1e-4


def test_other_families_and_uneven_heads_are_refused(refused, tiny, gemma):
    assert "use model=gemma3_270m" in refused(output_norms, output_norms.task, f"model={tiny}")
    assert "query heads: use one of " in refused(output_norms, output_norms.task, f"model={gemma}", "ranks=4")
