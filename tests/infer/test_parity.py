"""Parity on a real model and real text: greedy tokens equal those of transformers, on every mesh."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config import Context, Mesh, ModelSource, PromptSource, Run, Sampling
from longctx.data.prompt import prompt_tokens
from longctx.hf.config import shape_of, tokenizer_of
from longctx.parallel.launch import Rank, run_ranks
from recipes.common.target import Target
from recipes.generate import GenerateJob, GenerateSettings, Prompt, run_rank

MESHES = [
    (Mesh(), "pass_kv", "gather_merge"),
    (Mesh(ring=2), "pass_kv", "sharded"),
    (Mesh(ring=2), "pass_q", "gather_merge"),
    (Mesh(ring=4), "pass_kv", "sharded"),
    (Mesh(ulysses=3), "pass_kv", "sharded"),
    (Mesh(ulysses=3, ring=2), "pass_kv", "gather_merge"),
    (Mesh(tp=3), "pass_kv", "gather_merge"),
    (Mesh(tp=3, ring=2), "pass_kv", "sharded"),
]


@pytest.fixture(scope="session")
def prompt(smollm2: tuple[ModelSource, Path], pytestconfig: pytest.Config) -> tuple[int, ...]:
    """A prompt of a prime number of tokens by default, so that no chunk divides evenly."""
    source = PromptSource(pydoc="all", tokens=pytestconfig.getoption("--prompt-tokens"))
    return tuple(prompt_tokens(source, tokenizer_of(smollm2[1]))[0])


@pytest.fixture(scope="session")
def expected(smollm2: tuple[ModelSource, Path], prompt: tuple[int, ...], pytestconfig: pytest.Config) -> list[int]:
    """Greedy tokens of transformers' generate with the same float32 weights."""
    return run_ranks(1, generate_with_transformers, smollm2[1], prompt, pytestconfig.getoption("--new-tokens"))[0]


def generate_with_transformers(_: Rank, folder: Path, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("mesh", "strategy", "decode"), MESHES, ids=str)
def test_greedy_tokens_equal_transformers(
    mesh: Mesh,
    strategy: Any,
    decode: Any,
    smollm2: tuple[ModelSource, Path],
    prompt: tuple[int, ...],
    expected: list[int],
) -> None:
    model, folder = smollm2
    new = len(expected)
    context, run = Context(strategy=strategy, decode=decode), Run(threads=1, timeout_minutes=5)
    target = Target(model, folder, shape_of(folder), mesh, context, run)
    settings = GenerateSettings(max_new_tokens=new, verify=False)
    job = GenerateJob(target, Sampling(), (Prompt(prompt, new),), settings)
    figures = run_ranks(mesh.ranks, run_rank, job)[0]
    assert figures.token_ids == [expected]
    assert figures.prefill_bytes_sent_per_rank == prefill_bytes(mesh, strategy, len(prompt))


def prefill_bytes(mesh: Mesh, strategy: str, prompt: int) -> list[int]:
    """Return each context rank's attention bytes (arXiv 2411.01783, Table 3): 9 / 3 heads of 64, float32, 30 layers."""
    u, n, row = mesh.ulysses, mesh.ring, 64 * 4
    hq, hk = 9 // mesh.tp // u, 3 // mesh.tp // u
    # The first rank takes the largest zigzag pair of chunks.
    ring_rows = sorted((chunk(prompt, r, n) + chunk(prompt, 2 * n - 1 - r, n) for r in range(n)), reverse=True)
    sent = []
    for r in range(n):
        others = prompt - ring_rows[(r + 1) % n]  # every rank's block passes through, except for the next rank's
        if n == 1:
            over_ring = 0
        elif strategy == "pass_kv":
            over_ring = 2 * others * hk * row
        else:
            over_ring = others * hq * row + (prompt - ring_rows[r]) * hq * (row + 4)
        for member in range(u):
            rows = ring_rows[r] * (member + 1) // u - ring_rows[r] * member // u
            to_members = (u - 1) * rows * (hq + 2 * hk) * row  # q, k, v to the other members
            back_to_members = (ring_rows[r] - rows) * hq * row  # their rows of the output
            sent.append(30 * (over_ring + to_members + back_to_members))
    return sent


def chunk(prompt: int, i: int, ring: int) -> int:
    return prompt * (i + 1) // (2 * ring) - prompt * i // (2 * ring)
