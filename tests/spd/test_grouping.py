"""Assignments of heads, shards and neurons to ranks, compared with all alternatives of small cases."""

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from longctx.model_shape import ModelShape
from longctx.spd.grouping import assign_heads, assign_neurons, assign_shards, reorder_block


def inside(features: torch.Tensor, sets: object) -> float:
    """Sum of distances between heads of the same set."""
    return sum(float((features[a] - features[b]).norm()) for heads in sets for a, b in combinations(heads, 2))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_no_exchange_of_two_heads_adds_distance_inside_the_sets(seed: int) -> None:
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sets = assign_heads(features, 3)
    assert sorted(head for heads in sets for head in heads) == list(range(9))
    assert [len(heads) for heads in sets] == [3, 3, 3]
    distance = inside(features, sets)
    for one, other in combinations(range(3), 2):
        for a in sets[one]:
            for b in sets[other]:
                swapped = [[{a: b, b: a}.get(head, head) for head in heads] for heads in sets]
                assert inside(features, swapped) <= distance + 1e-9


def test_similar_heads_go_to_different_ranks() -> None:
    alike = torch.tensor([[0.0], [0.01], [10.0], [10.01], [20.0], [20.01]])
    for heads in assign_heads(alike, 2):
        assert sorted(head // 2 for head in heads) == [0, 1, 2]


def test_shards_maximize_the_sum_of_norms() -> None:
    norms = torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
    best = max(permutations(range(4)), key=lambda shards: sum(float(norms[s, m]) for s, m in enumerate(shards)))
    assert assign_shards(norms) == best


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_neurons_minimize_the_sum_of_errors_with_equal_counts(seed: int) -> None:
    errors = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed))
    order = assign_neurons(errors)
    assert sorted(order) == list(range(6))

    def cost(order: tuple[int, ...]) -> float:
        return sum(float(errors[neuron, seat // 2]) for seat, neuron in enumerate(order))

    assert cost(order) == pytest.approx(min(map(cost, permutations(range(6)))))


class OnDevice(torch.Tensor):
    """A tensor that, as one on a GPU, converts to NumPy only after `cpu`."""

    def numpy(self, *_: object, **__: object) -> object:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *_: object, **__: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_tensors_on_a_gpu_are_taken() -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for assign, more in ((assign_heads, (2,)), (assign_shards, ()), (assign_neurons, ())):
        assert assign(features.as_subclass(OnDevice), *more) == assign(features, *more)


def test_a_block_is_reordered_on_its_own_device() -> None:
    shape = ModelShape(1, 6, 6, 3, 1, 6, 11, 13, 1e-5, True, True)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU's tensors without data
        names = ("q_proj", "o_proj", "down_proj")
        tensors = {f"layer.{name}.weight": torch.empty(6, 6, device="cuda") for name in names}
        for tensor in reorder_block(tensors, shape, [2, 0, 1], [5, 0, 3, 1, 2, 4]).values():
            assert tensor.device.type == "cuda"
