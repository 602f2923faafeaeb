"""Guards on tensor-parallel ranks: losses, norms and copied tokens are those of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.parallel.launch import run_ranks
from tests.megatron.kinds import random_model
from tests.megatron.spd.repair_ranks import measure_guards_on_rank
from tests.oracle import assert_close


def test_figures_equal_those_of_transformers(tmp_path):
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 90}
    folder = random_model("qwen3", tmp_path, **sizes, tie_word_embeddings=True)
    ranks = run_ranks(2, measure_guards_on_rank, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    first_norms: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *args: first_norms.append(args[2][:, 0].norm(dim=-1)))
    ids = torch.randint(211, (5, 24), generator=torch.Generator().manual_seed(31))
    with torch.inference_mode():
        logits = model(ids[:, :-1]).logits
        norms = torch.stack(first_norms).amax(0)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for figures, repeated in ranks:
            assert repeated.shape == (8, 22) and torch.equal(repeated[:, :11], repeated[:, 11:])
            assert set(repeated.flatten().tolist()) <= set(ids.flatten().tolist())
            assert_close(figures.losses, losses, 1e-5)
            assert_close(figures.first_norms, norms, 1e-5)
            likeliest = model(repeated).logits.argmax(-1)
            # Tokens 13 to 22 follow a token that has occurred before.
            assert figures.copied == pytest.approx(float((likeliest[:, 11:21] == repeated[:, 12:]).double().mean()))
