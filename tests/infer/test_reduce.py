"""Models with rounded reductions match transformers with the same rounding, and send the bytes of the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longctx.config import Mesh, Reduce
from longctx.cost.reduction import message_bytes, two_step_bytes
from longctx.parallel.launch import run_ranks
from tests.infer.spd_ranks import generate_in_cases
from tests.megatron.kinds import random_model
from tests.tiny import tiny_model
from tests.train.spd_oracle import drop

LAYERS, HIDDEN = 2, 36
TOKENS = [(7 * i * i + 3 * i) % 211 for i in range(23)]
Case = tuple[Path, tuple[int, ...], Reduce]


def rounded(x: Tensor, dtype: str, group: int) -> Tensor:
    """Return ``x`` as its message is read, in float64, a group at a time."""
    if dtype == "bfloat16":
        return x.bfloat16().double()
    levels, out = {"int8": 127, "int6": 31}[dtype], torch.empty_like(x)
    for begin in range(0, x.shape[-1], group):
        part = x[..., begin : begin + group]
        scale = (part.abs().amax(-1, keepdim=True) / levels).bfloat16().double()
        out[..., begin : begin + group] = (part / scale).round().clamp(-levels, levels) * scale
    return out


def round_reductions(net: Any, dropped: tuple[int, ...], tp: int, reduce: Reduce) -> Any:
    """Make ``net`` sum the outputs of ``tp`` ranks in two rounded steps; ``dropped`` blocks keep one sum."""

    def total_in(dtype: str) -> Any:
        def total(parts: list[Tensor]) -> Tensor:
            if dtype == "float32":
                return torch.stack(parts).sum(0)
            return rounded(torch.stack([rounded(x, dtype, reduce.group) for x in parts]).sum(0), dtype, reduce.group)

        return total

    def sum_in(linear: Any, dtype: str) -> None:
        def forward(x: Tensor) -> Tensor:
            shares = zip(x.chunk(tp, -1), linear.weight.chunk(tp, 1), strict=True)
            out: Tensor = total_in(dtype)([part @ weight.T for part, weight in shares])
            return out if linear.bias is None else out + linear.bias

        linear.forward = forward

    for layer in net.model.layers:
        sum_in(layer.self_attn.o_proj, reduce.attention)
        sum_in(getattr(layer.mlp, "down_proj", None) or layer.mlp.c_proj, reduce.mlp)
    return drop(net, dropped, tp, total_in(reduce.mlp))


def assert_as_rounded(case: Case, tp: int, result: dict[str, Any]) -> Any:
    """Compare logits and tokens with transformers'; float32 may tip a few values to the neighbouring step."""
    folder, dropped, reduce = case
    exact = drop(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), dropped, tp)
    net = round_reductions(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), dropped, tp, reduce)
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        expected, without = net(ids).logits[0], exact(ids).logits[0]
        for _ in range(3):
            ids = torch.cat([ids, net(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    effect = float((expected - without).norm())
    assert 0 < float((result["logits"].double() - expected).norm()) < 0.05 * effect, case
    assert result["tokens"] == ids[0, len(TOKENS) :].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights so large that rounded reductions change the logits."""
    return tiny_model(tmp_path_factory.mktemp("model"), max_positions=97, std=0.3)


@pytest.mark.parametrize("mesh", [Mesh(tp=3), Mesh(tp=3, ring=2)], ids=str)
def test_logits_tokens_and_bytes_of_rounded_reductions(folder: Path, mesh: Mesh) -> None:
    reduces: list[tuple[tuple[int, ...], Reduce]] = [
        ((), Reduce("int8", "int8", 8)),
        ((1,), Reduce("int6", "int6", 20)),
        *([((), Reduce("bfloat16", "bfloat16")), ((0,), Reduce("float32", "int8"))] * (mesh.ring == 1)),
        *([((), Reduce("int6", "float32", 12))] * (mesh.ring == 1)),
    ]
    cases = [(folder, *each) for each in reduces]
    ranks = run_ranks(mesh.ranks, generate_in_cases, mesh, TOKENS, cases)
    for number, case in enumerate(cases):
        assert_as_rounded(case, mesh.tp, ranks[0][number])
        _, dropped, reduce = case
        dtypes = [reduce.attention] * (LAYERS - len(dropped)) + [reduce.mlp] * LAYERS
        for result in (rank[number] for rank in ranks):
            assert torch.equal(result["logits"], ranks[0][number]["logits"]), "all ranks have the same bits"
            assert result["tokens"] == ranks[0][number]["tokens"]
            # The one exact sum is the embedding's.
            sizes = [message_bytes(1, HIDDEN, dtype, reduce.group) for dtype in ("float32", *dtypes)]
            assert result["prefill"] == (len(sizes), result["rows"] * sum(sizes))
            assert result["decode"] == (2 * len(sizes), 2 * sum(sizes)) or mesh.ring > 1
            sent = [
                two_step_bytes(result["rows"], HIDDEN, result["tp_rank"], mesh.tp, dtype, reduce.group)
                for dtype in dtypes
                if dtype != "float32"
            ]
            assert result["sent"] == sum(sent)


def test_other_families_match_transformers(tmp_path: Path) -> None:
    """Biases after the sum, scaled outputs, norms of outputs, a network without gate."""
    kinds = ("llama with all biases", "granite", "gemma3", "olmo2", "starcoder2")
    folders = [random_model(kind, tmp_path / kind, eos_token_id=None) for kind in kinds]
    cases: list[Case] = [(folder, (), Reduce("int6", "int8", 12)) for folder in folders]
    cases.append((folders[2], (1,), Reduce("int8", "int8", 12)))
    results, others = run_ranks(2, generate_in_cases, Mesh(tp=2), TOKENS, cases)
    for case, result, other in zip(cases, results, others, strict=True):
        assert torch.equal(result["logits"], other["logits"])
        assert_as_rounded(case, 2, result)
