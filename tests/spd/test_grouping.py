"""Which rank gets which heads and neurons: against all partitions, matchings and placements of small cases."""

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.spd.grouping import matched, placed, scattered


def inside(features: torch.Tensor, sets: object) -> float:
    return sum(float((features[a] - features[b]).norm()) for one in sets for a, b in combinations(one, 2))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_no_exchange_would_bring_more_distance_inside(seed: int) -> None:
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sets = scattered(features, 3)
    assert sorted(head for one in sets for head in one) == list(range(9)) and [len(one) for one in sets] == [3, 3, 3]
    found = inside(features, sets)
    for one, other in combinations(range(3), 2):
        for a in sets[one]:
            for b in sets[other]:
                swapped = [[{a: b, b: a}.get(head, head) for head in each] for each in sets]
                assert inside(features, swapped) <= found + 1e-9


def test_heads_that_do_the_same_go_to_different_ranks() -> None:
    alike = torch.tensor([[0.0], [0.01], [10.0], [10.01], [20.0], [20.01]])
    for one in scattered(alike, 2):
        assert sorted(head // 2 for head in one) == [0, 1, 2]


def test_shards_go_to_the_heads_that_move_them_most() -> None:
    norms = torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
    best = max(permutations(range(4)), key=lambda shards: sum(float(norms[s, m]) for s, m in enumerate(shards)))
    assert matched(norms) == best


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_neurons_go_to_where_they_miss_least_as_many_on_every_rank(seed: int) -> None:
    errors = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed))
    order = placed(errors)
    assert sorted(order) == list(range(6))

    def cost(of: tuple[int, ...]) -> float:
        return sum(float(errors[neuron, seat // 2]) for seat, neuron in enumerate(of))

    assert cost(order) == pytest.approx(min(map(cost, permutations(range(6)))))
