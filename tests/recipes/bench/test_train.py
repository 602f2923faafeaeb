"""recipes.bench train and convergence: what they measure is what they say."""

import json
from types import SimpleNamespace

import pytest
import torch

from longctx.config import Context, ModelSource
from recipes.bench import convergence, peers, train
from recipes.bench.train import SavedActivations

QUICK = (
    "data.length=256",
    "model.config.hidden_size=96",
    "model.config.head_dim=16",
    "model.config.intermediate_size=256",
)


def test_saved_counts_activations_once_and_no_parameters():
    layer, x = torch.nn.Linear(7, 5, bias=False), torch.randn(3, 7, requires_grad=True)
    saved = SavedActivations()
    with saved.counting(layer):
        y = layer(x)  # keeps x, and its weight
        (y * y).sum()  # keeps y, twice
    assert saved.bytes == 4 * (3 * 7 + 3 * 5)


def test_saved_counts_the_forward_of_one_micro_batch():
    layer, micro = torch.nn.Linear(7, 5, bias=False), torch.randn(2, 3, 7)
    saved, kept = SavedActivations(), []
    with saved.counting(layer):
        for x in micro.unbind():
            kept.append(layer(x.clone()))
            (kept[-1] * kept[-1]).sum().backward()
    assert saved.bytes == 4 * (3 * 7 + 3 * 5), "of the first, and nothing of its backward"


def test_activations_fall_with_the_ranks(cli, tmp_path):
    command = (
        *QUICK,
        f"out={tmp_path}",
        f"json={tmp_path / 'train.json'}",
        "rounds=1",
        "meshes=[{ring:2},{ulysses:2}]",
    )
    code, _, err = cli(train, train.task, *command, "peers=[]")
    assert code == 0, err
    told = json.loads((tmp_path / "train.json").read_text())
    one, ring, ulysses = (row["activation_bytes"] for row in told["steps"])
    # 2 of 130 rows fill up. Ulysses keeps what it has exchanged in one piece, where one rank has three.
    assert one / 2 < ring < one / 2 * 1.04
    assert one / 2 * 0.9 < ulysses < one / 2 * 1.04
    assert set(told["attention"]["seconds"]) == {"ours, pass-KV ring", "ours, Ulysses"}
    assert "of one rank's" in err


def test_a_mesh_converges_as_one_rank_does(cli, tmp_path):
    files = (f"json={tmp_path / 'curves.json'}", f"picture={tmp_path / 'curves.svg'}")
    code, _, err = cli(convergence, convergence.task, "data.length=61", "steps=3", f"out={tmp_path}", *files)
    assert code == 0, err
    told = json.loads((tmp_path / "curves.json").read_text())
    assert told["mesh"] == "ulysses=2 ring=2"
    assert len(told["one_rank"]) == len(told["mesh_loss"]) == 3
    assert told["largest_difference"] == max(
        abs(a - b) for a, b in zip(told["one_rank"], told["mesh_loss"], strict=True)
    )
    assert 0 < told["largest_difference"] < 1e-5
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_one_rank_has_nothing_to_be_compared_with(refused, tmp_path):
    says = refused(convergence, convergence.task, "mesh.ulysses=1", "mesh.ring=1", f"out={tmp_path}")
    assert "mesh is one rank" in says


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["recompute=full"], "recompute=full: what it keeps is not counted; use recompute=none"),
        (["rounds=0"], "rounds=0"),
        (["run.threads=4"], "run.threads=4: this benchmark measures one only; use threads=1"),
        (["meshes=[{ring:2},{rings:2}]"], "there is no setting meshes.1.rings"),
        (["peers=[flash]"], "peers.0=flash"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(refused, tmp_path, settings, words):
    assert words in refused(train, train.task, *QUICK, f"out={tmp_path}", *settings)


def asked(recompute="none", threads=None, dtype="float32", epochs=None, **context):
    """What `refuse_unmeasured` looks at, of a job."""
    settings = SimpleNamespace(device="cpu", threads=threads, recompute=recompute)
    of_data, model = SimpleNamespace(epochs=epochs), ModelSource("tiny", "tiny", dtype=dtype)
    return SimpleNamespace(settings=settings, context=Context(**context), data=of_data, model=model)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": "bfloat16"}, "model.dtype=bfloat16: this benchmark measures one only; use model.dtype=float32"),
        ({"strategy": "pass_q"}, "use context.strategy=pass_kv"),
        ({"layout": "striped"}, "use context.layout=zigzag"),
        ({"kernel": "reference"}, "use context.kernel=flash_cpu"),
        ({"epochs": 1}, "use data.epochs=null"),
    ],
    ids=str,
)
def test_what_one_of_the_tables_would_not_follow_is_refused(given, words):
    train.refuse_unmeasured(asked(threads=1, kernel="flash_cpu"))
    with pytest.raises(ValueError, match=words):
        train.refuse_unmeasured(asked(**given))


def test_a_peer_that_is_not_installed_is_said_to_be_so():
    assert peers.installed("no_such_package_here") is None
    one = torch.zeros(3, 1)
    assert peers.tried(lambda: 1 / 0, *one) == (None, "ZeroDivisionError: division by zero")
    assert peers.tried(lambda: lambda q, k, v: q + k.missing, *one)[1].startswith("AttributeError")
    ring, why = peers.tried(lambda: lambda q, k, v: q + k + v, *one)
    assert ring is not None and why == ""


@pytest.mark.parametrize("causal", [False, True])
def test_the_stand_in_for_flash_attn_is_the_kernel(causal):
    from longctx.attention.flash_cpu import flash_cpu

    q, k, v, dout = torch.randn(4, 1, 37, 6, 7)
    out, lse, *_ = peers._forward(q, k, v, 0.0, 7**-0.5, causal)
    part = flash_cpu.forward(q, k, v, causal)
    assert torch.equal(out, part.out) and torch.equal(lse, part.lse.transpose(1, 2))
    grads = [torch.empty_like(x) for x in (q, k, v)]
    peers._backward(dout, q, k, v, out, lse, *grads, 0.0, 7**-0.5, causal)
    for got, right in zip(grads, flash_cpu.backward(dout, q, k, v, part.out, part.lse, causal), strict=True):
        assert torch.equal(got, right)
