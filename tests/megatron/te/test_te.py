"""Transformer Engine's layers equal megatron-core's own, with GEMM and norms of torch: wiring, not kernels.

The checks run in one separate process (`checks`); each test below asserts the results of one check.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.megatron.kinds import random_model
from tests.megatron.spd.spd_ranks import unshard
from tests.megatron.spd.test_layer import oracle
from tests.megatron.te.capabilities import BEGIN, END, PAGE, table
from tests.megatron.te.checks import FP8, LAYER_CASES, PROMPT
from tests.megatron.te.conftest import of_ranks
from tests.oracle import assert_close

# One of each block that Transformer Engine's layers can express; heads and neurons that 2 and 3 ranks can share.
NAMES = (
    "tied llama", "llama with all biases", "mistral, a window in all layers", "qwen2, with biases", "qwen3", "smollm3",
    "olmo2", "olmo3", "phi3", "gemma3", "granite", "starcoder2", "glm4",
)  # fmt: skip
SIZES = {"hidden_size": 168, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 90}

# Widths of several blocks of 128 values, on 2 ranks, too.
WIDE = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 288,
}  # fmt: skip
# Heads of 8 fit every kernel.
SMALL = {
    "num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 40,
}  # fmt: skip
# Llama 3 70B
LARGE = {
    "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 28672, "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture(scope="session")
def results(run_checks: Callable[[str, Path], None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("te")
    for kind in NAMES:
        random_model(kind, folder / "models" / kind, **SIZES)
    for kind in ("tied llama", "llama with all biases", "starcoder2"):
        random_model(kind, folder / "wide" / kind, **WIDE)
    random_model("tied llama", folder / "small", **SMALL)
    LlamaConfig(**LARGE, tie_word_embeddings=False).save_pretrained(folder / "large")
    run_checks("checks", folder)
    return torch.load(folder / "results.pt", weights_only=False)


def test_logits_of_one_rank_are_bit_equal_to_those_of_local_layers_and_exports_to_the_source(results):
    (rank,) = of_ranks(results, "logits tp=1")
    assert len(rank) == len(NAMES) and set(rank.values()) == {(0.0, True)}, rank


@pytest.mark.parametrize("check", ["tp=2", "tp=3", "dropped"])
def test_logits_of_several_ranks_equal_those_of_local_layers_in_float64(results, check):
    """In float32 the two kinds of layers round differently (7e-7)."""
    for rank in of_ranks(results, f"logits {check}"):
        assert rank and all(error < 1e-12 for error, _ in rank.values()), rank


@pytest.mark.parametrize("fp8", FP8)
def test_logits_with_products_in_8_bits_equal_an_oracle(results, fp8):
    (rank,) = of_ranks(results, f"logits fp8={fp8}")
    assert len(rank) == 3
    assert all(error < 1e-12 and exported for error, exported in rank.values()), rank


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2", "ring=2 pp=2"])
def test_training_with_products_in_8_bits_equals_an_oracle(results, mesh):
    """Loss, every gradient, and the loss after the weights have changed."""
    for rank in of_ranks(results, f"training fp8 {mesh}"):
        for errors in rank:
            assert set(errors) == {"loss", "gradient", "changed"}
            assert all(error < 1e-12 for error in errors.values()), rank


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2", "tp=3", "tp=2 pp=2", "ring=2 dp=2"])
def test_training_equals_that_of_local_layers(results, mesh):
    """Loss and every gradient; in float32, as megatron-core's optimizers demand, also the loss after a step."""
    for rank in of_ranks(results, f"training {mesh}"):
        for errors in rank:
            bound = 1e-6 if "next" in errors else 1e-12
            assert all(error < bound for error in errors.values()), rank


def test_checkpoint_goes_from_local_to_te_to_local_layers_unchanged(results):
    assert of_ranks(results, "checkpoint") == [{"weights": True, "next": True}] * 2


@pytest.mark.parametrize("case", range(len(LAYER_CASES)), ids=lambda i: str(LAYER_CASES[i]))
@pytest.mark.parametrize("tp", [2, 3])
def test_dropped_layer_equals_the_equations_of_the_paper(results, tp, case):
    _, biases, sequence_parallel, own_norms = LAYER_CASES[case]
    ranks = [rank[case] for rank in of_ranks(results, f"layer tp={tp}")]
    out, x, gradients, norms = oracle(tp, biases)
    join_rows = torch.cat if sequence_parallel else (lambda parts: parts[-1])
    assert_close(join_rows([rank["out"] for rank in ranks]), out, 1e-12)
    assert_close(join_rows([rank["x"] for rank in ranks]), x, 1e-12)
    for name, gradient in gradients.items():
        assert_close(unshard(name, [rank["gradients"][name] for rank in ranks]), gradient, 1e-12)
    for i, name in enumerate(("input_layernorm.weight", "pre_mlp_layernorm.weight")):
        for rank, own in zip(ranks, norms, strict=True):
            expected = own[i] if own_norms else sum(each[i] for each in norms)
            assert_close(rank["gradients"][name], expected, 1e-12)


def test_every_mutation_is_noticed(results):
    first, second = of_ranks(results, "mutations")
    assert len(first) >= 16
    # A gradient that is not summed over ranks may be noticed on one rank only.
    assert not [name for name in first if not (first[name] or second[name])]


def test_shapes_of_a_large_model_pass_through_without_memory(results):
    (large,) = of_ranks(results, "meta")
    heads, hidden, vocab = LARGE["num_key_value_heads"], LARGE["hidden_size"], LARGE["vocab_size"]
    assert large["passes"] == {
        "prompt": (PROMPT, 1, hidden),
        "logits": (1, 1, vocab),
        "token": (1, 1, hidden),
        "cached": (1, PROMPT + 1, heads, LARGE["head_dim"]),
    }
    assert large["gradients"] == 0
    assert large["weights"] > 140e9 and large["bytes"] < 1e9
    assert large["noticed"] and all(large["noticed"].values()), large["noticed"]


def test_table_of_capabilities_lists_what_was_run(results, pytestconfig):
    (errors,) = of_ranks(results, "kernels")
    lines = table(errors)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    if pytestconfig.getoption("--write-table"):
        written = "\n".join(line for each in lines.values() for line in each) + "\n"
        PAGE.write_text(f"{before}{BEGIN}{written}{END}{after}")
    comparable = [line for line in written.splitlines() if not line.startswith("| triton") or "triton" in lines]
    assert comparable == [line for each in lines.values() for line in each], "rewrite the table with --write-table"
