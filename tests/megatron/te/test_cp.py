"""Transformer Engine's context parallelism, as recipes.bench attention calls it, equals dense float64 attention.

Its own Python code runs on gloo ranks: layouts, messages, merges and the backward.  `attention_stand_in` computes each
pair of blocks, so nothing here says anything about kernels.  All checks run in one separate process (`cp_checks`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.te.conftest import of_ranks
from tests.megatron.te.cp_checks import BACKENDS, MESHES, PEERS, cases_of


@pytest.fixture(scope="module")
def results(run_checks: Callable[[str, Path], None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("cp") / "results.pt"
    run_checks("cp_checks", file)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_output_and_gradients_equal_dense_attention(results, mesh):
    cases = cases_of(mesh)
    assert {(case.peer, case.backend) for case in cases} >= {(peer, each) for peer in PEERS[:3] for each in BACKENDS}
    for rank in of_ranks(results, str(mesh)):
        wrong = {
            case: each["errors"] for case, each in zip(cases, rank, strict=True) if not max(each["errors"]) < 1e-13
        }
        assert not wrong


def test_every_peer_is_compared_on_both_axes():
    assert {case.peer for case in cases_of(MESHES[-1])} == {*PEERS}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_numbers_that_travel_are_those_of_each_kind_of_communication(results, mesh):
    """For n ranks: a ring sends k and v n - 1 times in the forward; in the backward also their gradients."""
    ranks = mesh.context
    for rank in of_ranks(results, str(mesh)):
        for case, each in zip(cases_of(mesh), rank, strict=True):
            kv, q = each["kv"], each["q"]
            assert (
                each["sent"]
                == {
                    "te_p2p": {"p2p": 3 * (ranks - 1) * kv},
                    "te_all_gather": {"all_gather_into_tensor": 2 * kv, "reduce_scatter_tensor": ranks * kv},
                    "te_a2a": {"all_to_all_single": 2 * (2 * q + kv)},
                    "te_a2a+p2p": {"all_to_all_single": 2 * (2 * q + kv), "p2p": 3 * (mesh.ring - 1) * kv},
                }[case.peer]
            ), case


def test_mutations_are_noticed(results):
    ranks = of_ranks(results, "mutations")
    assert len(ranks[0]) >= 8
    for name in ranks[0]:
        expected = {"none": "equal", "a2a+p2p: the two groups exchanged": "raised"}.get(name, "differs")
        assert expected in {rank[name] for rank in ranks}, name
        assert name != "none" or {rank[name] for rank in ranks} == {"equal"}


def test_bench_times_all_peers_beside_our_variants(results):
    names = ["pass_kv", "ulysses", "hybrid", *PEERS]
    for result in of_ranks(results, "bench"):
        assert not result.refused
        assert [*result.errors] == names and max(result.errors.values()) < 1e-14
        assert [(each.variant, each.tokens) for each in result.times] == [(name, 56) for name in names]
