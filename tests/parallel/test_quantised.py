"""The two-step sum is within its stated bound, has the same bits on every rank, and sends what the cost model says."""

import pytest
import torch

from longctx.cost.reduction import two_step_bytes
from longctx.parallel.comm import SingleRankComm, Traffic
from longctx.parallel.quantised import LEVELS, decode, encode, two_step_sum
from longctx.parallel.threads import run_threads

DTYPES = pytest.mark.parametrize("dtype", LEVELS)
# Rows, width, group: groups that divide the width and others, fewer groups than ranks, no rows.
SIZES = [(1, 576, 64), (7, 61, 20), (5, 3, 8), (1, 1, 4), (3, 64, 64), (0, 13, 4)]


def partial_of(rank: int, rows: int, width: int) -> torch.Tensor:
    """Return values of very different magnitudes, as massive activations give."""
    generator = torch.Generator().manual_seed(100 * rows + 10 * width + rank)
    x = torch.randn(rows, 1, width, generator=generator)
    return x * torch.exp(3 * torch.randn(rows, 1, width, generator=generator)) * 10.0 ** (rank - 1)


def sum_on_threads(parts: list[torch.Tensor], dtype: str, group: int) -> list[tuple[torch.Tensor, Traffic]]:
    def rank_main(world, rank):
        comm = world.group(rank)
        return two_step_sum(comm, parts[rank], dtype, group), comm.traffic

    return run_threads(len(parts), rank_main)


def largest_in_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    """Return for each value of ``x`` [... n] the largest magnitude in its group, by a plain loop."""
    largest = torch.zeros_like(x)
    for begin in range(0, x.shape[-1], group):
        largest[..., begin : begin + group] = x[..., begin : begin + group].abs().amax(-1, keepdim=True)
    return largest


@DTYPES
@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(("rows", "width", "group"), SIZES)
def test_sum_is_within_the_bound_and_alike_on_all_ranks(rows, width, group, ranks, dtype):
    parts = [partial_of(rank, rows, width) for rank in range(ranks)]
    results = sum_on_threads(parts, dtype, group)
    exact = torch.stack(parts).double().sum(0)
    magnitudes = [largest_in_groups(x.double(), 1 if dtype == "bfloat16" else group) for x in parts]
    bound = (1 + 1 / 64) * torch.stack(magnitudes).sum(0) / LEVELS[dtype] + ranks * 2.0**-126
    for out, _ in results:
        assert out.shape == exact.shape and out.dtype == torch.float32
        assert torch.equal(out, results[0][0])
        assert bool(((out.double() - exact).abs() <= bound).all())


@DTYPES
@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(("rows", "width", "group"), SIZES)
def test_bytes_and_messages_are_those_of_the_formula(rows, width, group, ranks, dtype):
    results = sum_on_threads([partial_of(rank, rows, width) for rank in range(ranks)], dtype, group)
    groups = rows * (width if dtype == "bfloat16" else -(-width // group))
    owned = [groups * (rank + 1) // ranks - groups * rank // ranks for rank in range(ranks)]
    for rank, (_, traffic) in enumerate(results):
        assert traffic.total == two_step_bytes(rows, width, rank, ranks, dtype, group)
        owners = sum(owned[other] > 0 for other in range(ranks) if other != rank)
        assert sum(traffic.messages.values()) == owners + (ranks - 1 if owned[rank] else 0)


def test_bytes_of_one_token_of_smollm2_on_three_ranks():
    """576 values: a third of them owned by each rank, sent once and received from two ranks."""
    sent = {dtype: two_step_bytes(1, 576, 1, 3, dtype, 64) for dtype in LEVELS}
    assert sent == {"bfloat16": 4 * 192 * 2, "int8": 4 * 3 * 66, "int6": 4 * 3 * 50}


@DTYPES
def test_sum_of_a_row_does_not_depend_on_other_rows(dtype):
    parts = [partial_of(rank, 5, 61) for rank in range(3)]
    whole, _ = sum_on_threads(parts, dtype, 20)[0]
    alone = [sum_on_threads([x[row : row + 1] for x in parts], dtype, 20)[0][0] for row in range(5)]
    assert torch.equal(torch.cat(alone), whole)


@DTYPES
def test_tiny_huge_and_zero_values_stay_within_the_bound(dtype):
    for scale in (1e-45, 1e-40, 1e-37, 1e37, 0.0):
        parts = [scale * torch.tensor([[3.0, -1.0, 0.5, 2.0, 1.0]]) for _ in range(2)]
        out, _ = sum_on_threads(parts, dtype, 4)[0]
        exact = (parts[0].double() * 2).abs()
        largest = sum(largest_in_groups(x.double(), 1 if dtype == "bfloat16" else 4) for x in parts)
        bound = (1 + 1 / 64) * largest / LEVELS[dtype] + 2 * 2.0**-126
        assert bool(((out.double().abs() - exact).abs() <= bound).all())


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_not_hidden(dtype, value):
    parts = [torch.ones(1, 8), torch.tensor([[1.0, value] + [1.0] * 6])]
    for out, _ in sum_on_threads(parts, dtype, 4):
        assert not out[0, 1].isfinite() and out[0, 4:].isfinite().all()


def test_every_whole_number_survives_packing():
    values = torch.arange(-31.0, 33).clamp_max(31).view(4, 16) * 0.5
    values[:, 0] = 15.5  # so that each scale is 0.5
    message = encode(values, "int6")
    assert message.shape == (4, 2 + 12) and torch.equal(decode(message, "int6", 16), values)


@DTYPES
def test_sum_keeps_the_dtype_of_the_model(dtype):
    parts = [partial_of(rank, 3, 61).bfloat16() for rank in range(2)]
    exact = parts[0].double() + parts[1].double()
    for out, _ in sum_on_threads(parts, dtype, 20):
        assert out.dtype == torch.bfloat16
        assert float((out.double() - exact).norm() / exact.norm()) < 0.05


def test_one_rank_has_nothing_to_send():
    x = torch.randn(3, 5)
    assert two_step_sum(SingleRankComm(), x, "int6", 4) is x
