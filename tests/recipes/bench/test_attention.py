"""recipes.bench attention: exact variants are timed, others are not, and unfit peers are refused before ranks start."""

import json
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
import torch

from longctx.config import Mesh, ModelSource, Run
from longctx.parallel.comm import SingleRankComm
from longctx.parallel.threads import run_threads
from recipes.bench import attention, te_peer


def test_exact_variants_are_timed_forward_and_backward(cli, tiny, tmp_path):
    out, names = tmp_path / "attention.json", ["pass_kv", "pass_q", "all_gather_kv", "ulysses"]
    argv = (f"model={tiny}", "lengths=[61]", "checked=45", "rounds=1", "window=17", f"out={out}", "mesh.ring=3")
    code, _, err = cli(attention, attention.task, *argv, f"variants=[{','.join(names)}]")
    assert code == 0, err
    result = json.loads(out.read_text())
    assert [(row["variant"], row["tokens"]) for row in result["times"]] == [(name, 61) for name in names]
    assert all(len(row[part]) == 1 and row[part][0] > 0 for row in result["times"] for part in ("forward", "backward"))
    assert result["checked"] == 48 and not result["refused"]
    assert [*result["errors"]] == names and max(result["errors"].values()) < 2e-6
    assert "all_gather_kv" in err


def test_variant_that_is_inexact_or_fails_on_a_rank_is_not_timed(monkeypatch):
    right = attention.attention_of

    def attention_of(name, job, runtime, *args):
        function = right("pass_kv", job, runtime, *args)
        if name == "pass_q":
            return lambda q, k, v: function(q, k, v.flip(1))
        return function

    def exact_attention(*args):
        checks[0] += 1
        return exact(*args) if checks[0] < 6 else 1 / 0  # on the last rank that checks the last variant

    exact, checks = attention.exact_attention, [0]
    monkeypatch.setattr(attention, "attention_of", attention_of)
    monkeypatch.setattr(attention, "exact_attention", exact_attention)
    settings = attention.AttentionSettings((12,), ("pass_q", "pass_kv", "ulysses"), checked=9, rounds=1)
    shape = SimpleNamespace(heads=3, kv_heads=3, head_dim=5)

    def run(world, rank):
        one, every = SingleRankComm(), world.group(rank)
        runtime = SimpleNamespace(context=every, ring=every, ulysses=one, tp=one, device=torch.device("cpu"))
        runtime.slowest = lambda seconds: seconds
        target = SimpleNamespace(
            mesh=Mesh(ring=2), model=ModelSource("m", "m"), shape=shape, runtime=lambda rank: nullcontext(runtime)
        )
        return attention.run_rank(SimpleNamespace(rank=rank), attention.AttentionJob(settings, target))

    results = run_threads(2, run)
    for result in results:
        assert [each.variant for each in result.times] == ["pass_kv"]
        assert "above 2.0e-06" in result.refused["pass_q"] and result.errors["pass_q"] > 0.1
        assert {*result.errors} == {"pass_q", "pass_kv"}
    reasons = {result.refused["ulysses"] for result in results}
    assert reasons == {"failed on another rank", "ZeroDivisionError: division by zero"}


def test_rank_that_fails_says_why_before_it_waits_for_the_others(monkeypatch, capsys):
    def wait(*args):
        raise TimeoutError  # the other ranks are still in the variant

    monkeypatch.setattr(attention, "gather_numbers", wait)
    monkeypatch.setattr(attention, "attention_of", lambda *args: 1 / 0)
    target = SimpleNamespace(model=ModelSource("m", "m"), shape=SimpleNamespace(heads=3, kv_heads=3, head_dim=5))
    runtime = SimpleNamespace(context=SingleRankComm(), device=torch.device("cpu"))
    with pytest.raises(TimeoutError):
        attention.check("pass_q", attention.AttentionJob(attention.AttentionSettings(), target), runtime, None, 8)
    assert "rank 0: pass_q failed: ZeroDivisionError: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mesh.ring=1"], "has one rank: use mesh.ring=2 or more"),
        (["variants=[ulysses]"], "mesh.ulysses=2 cannot share 9 query heads"),
        (["variants=[hybrid]"], "variants=hybrid needs mesh.ulysses and mesh.ring of 2 or more, not 1 and 2"),
        (["variants=[te_p2p]"], "variants.0=te_p2p"),
        (["peers=[te_ring]"], "peers.0=te_ring"),
        (["peers=[te_p2p]"], "peers=[te_p2p] needs a GPU for each rank (run=gpu)"),
        (["kernel=cudnn"], "kernel=cudnn does not take float32 on cpu"),
    ],
    ids=str,
)
def test_unfit_settings_are_refused(refused, tiny, words, says):
    assert says in refused(attention, attention.task, f"model={tiny}", *words)


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs and Transformer Engine, as far as refusals can see."""
    package = ModuleType("transformer_engine")
    package.__spec__ = ModuleSpec("transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def refuse(*peers, ulysses=2, ring=2, heads=(8, 4), dtype="bfloat16", lengths=(56,), window=None, device="cuda"):
    mesh, shape = Mesh(ulysses=ulysses, ring=ring), SimpleNamespace(heads=heads[0], kv_heads=heads[1])
    target = SimpleNamespace(
        mesh=mesh, shape=shape, model=ModelSource("m", "m", dtype=dtype), run=Run(device=device, threads=1)
    )
    te_peer.refuse_unfit_peers(peers, target, lengths, window)


def test_fitting_peers_are_accepted(four_gpus):
    refuse(*get_args(te_peer.TEPeer))
    refuse("te_all_gather", "te_a2a", window=9)
    refuse("te_a2a+p2p", heads=(2, 2))
    refuse(device="cpu", dtype="float32", lengths=(55,))


@pytest.mark.parametrize(
    ("peers", "given", "says"),
    [
        (["te_p2p"], {"ulysses": 4}, r"a GPU for each of the 8 ranks .* has 4: use a mesh of 4 ranks, or peers=\[\]"),
        (["te_p2p", "te_a2a"], {"dtype": "float32"}, r"peers=\[te_p2p,te_a2a\] .* use model.dtype=bfloat16"),
        (["te_p2p"], {"lengths": (56, 57)}, "lengths=57 is not a multiple of twice the 4 context ranks, .* use 64"),
        (["te_p2p"], {"window": 9}, r"te_p2p does not take window=9; use peers=\[te_all_gather,te_a2a\]"),
        (["te_a2a+p2p"], {"window": 9}, r"te_a2a\+p2p does not take window=9"),
        (["te_a2a"], {"heads": (8, 2)}, "te_a2a cannot divide 8 query heads and 2 KV heads evenly among 4 ranks"),
        (["te_a2a+p2p"], {"heads": (9, 3)}, "cannot divide 9 query heads and 3 KV heads evenly among 2 ranks"),
        (["te_a2a+p2p"], {"ulysses": 1}, "needs mesh.ulysses and mesh.ring of 2 or more, not 1 and 2"),
    ],
    ids=str,
)
def test_unfit_peers_are_refused_with_what_to_use(four_gpus, peers, given, says):
    with pytest.raises(ValueError, match=says):
        refuse(*peers, **given)


def test_missing_transformer_engine_is_named(four_gpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ValueError, match=r"needs Transformer Engine \(make gpu\); use peers=\[\]"):
        refuse("te_p2p")


def test_peers_are_no_strategies_of_a_model():
    from longctx.config.run import Context
    from longctx.parallel.strategy import STRATEGIES

    assert not {*get_args(te_peer.TEPeer)} & {*STRATEGIES}
    assert "te_" not in str(Context.__annotations__)
