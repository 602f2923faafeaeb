"""recipes.bench train and convergence: saved activations, results of a run, refusals, and the peers' stand-in."""

import json
from types import SimpleNamespace

import pytest
import torch

from longctx.config import Context, ModelSource, Run
from recipes.bench import convergence, peers, train
from recipes.bench.train import SavedActivations

QUICK = (
    "data.length=256",
    "model.config.hidden_size=96",
    "model.config.head_dim=16",
    "model.config.intermediate_size=256",
)


def test_activations_are_counted_once_and_parameters_not():
    layer, x = torch.nn.Linear(7, 5, bias=False), torch.randn(3, 7, requires_grad=True)
    saved = SavedActivations()
    with saved.counting(layer):
        y = layer(x)  # saves x, and its weight
        (y * y).sum()  # saves y, twice
    assert saved.bytes == 4 * (3 * 7 + 3 * 5)


def test_activations_are_those_of_the_first_micro_batch_s_forward():
    layer, micro_batches = torch.nn.Linear(7, 5, bias=False), torch.randn(2, 3, 7)
    saved, outputs = SavedActivations(), []
    with saved.counting(layer):
        for x in micro_batches.unbind():
            outputs.append(layer(x.clone()))
            (outputs[-1] * outputs[-1]).sum().backward()
    assert saved.bytes == 4 * (3 * 7 + 3 * 5), "of the first, and nothing of its backward"


def test_activations_fall_with_the_number_of_ranks(cli, tmp_path):
    command = (
        *QUICK,
        f"out={tmp_path}",
        f"json={tmp_path / 'train.json'}",
        "rounds=1",
        "meshes=[{ring:2},{ulysses:2}]",
        "compared_loss_rows=[null,32]",
    )
    code, _, err = cli(train, train.task, *command, "peers=[]")
    assert code == 0, err
    result = json.loads((tmp_path / "train.json").read_text())
    assert [list(row) for row in result["steps"]] == [["mesh", "seconds", "activation_bytes", "compared"]] * 3
    assert [{rows: len(seconds) for rows, seconds in row["compared"].items()} for row in result["steps"]] == [
        {"all": 1, "32": 1}
    ] * 3
    one, ring, ulysses = (row["activation_bytes"] for row in result["steps"])
    # 2 of 130 rows are padding.  Ulysses saves its exchanged q, k and v as one tensor, where one rank saves three.
    assert one / 2 < ring < one / 2 * 1.04
    assert one / 2 * 0.9 < ulysses < one / 2 * 1.04
    assert set(result["attention"]["seconds"]) == {"ours, pass-KV ring", "ours, Ulysses"}
    assert "of one rank's" in err and err.count("loss_rows=all") == err.count("loss_rows=32") == 3


def test_heads_that_ulysses_cannot_divide_leave_its_attention_out(cli, tmp_path):
    heads = ("model.config.num_attention_heads=3", "model.config.num_key_value_heads=3")
    command = (
        *QUICK,
        *heads,
        f"out={tmp_path}",
        f"json={tmp_path / 'train.json'}",
        "rounds=1",
        "meshes=[]",
        "peers=[]",
    )
    code, _, err = cli(train, train.task, *command)
    assert code == 0, err
    attention = json.loads((tmp_path / "train.json").read_text())["attention"]
    assert [*attention["seconds"]] == ["ours, pass-KV ring"]
    assert "mesh.ulysses=2 cannot share 3 query heads" in attention["refused"]["ours, Ulysses"]
    assert "ours, Ulysses" in err


def test_loss_curves_of_a_mesh_and_of_one_rank_agree(cli, tmp_path):
    files = (f"json={tmp_path / 'curves.json'}", f"picture={tmp_path / 'curves.svg'}")
    code, _, err = cli(convergence, convergence.task, "data.length=61", "steps=3", f"out={tmp_path}", *files)
    assert code == 0, err
    result = json.loads((tmp_path / "curves.json").read_text())
    assert result["mesh"] == "ulysses=2 ring=2"
    assert len(result["one_rank"]) == len(result["mesh_loss"]) == 3
    assert result["largest_difference"] == max(
        abs(a - b) for a, b in zip(result["one_rank"], result["mesh_loss"], strict=True)
    )
    assert 0 < result["largest_difference"] < 1e-5
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_a_mesh_of_one_rank_is_refused(refused, tmp_path):
    says = refused(convergence, convergence.task, "mesh.ulysses=1", "mesh.ring=1", f"out={tmp_path}")
    assert "the mesh has one rank" in says


def test_ranks_of_a_launcher_are_refused_before_a_run_is_deleted(refused, tmp_path, under_torchrun):
    earlier = tmp_path / "one rank" / "model" / "config.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    under_torchrun(0, 4)
    assert "start it without torchrun or srun" in refused(convergence, convergence.task, *QUICK, f"out={tmp_path}")
    assert earlier.is_file()


def test_folder_that_is_no_run_is_not_emptied(refused, tmp_path):
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "thesis.txt").write_text("a year")
    assert "the folder 'mesh' in it is not a run and would be emptied" in refused(
        convergence, convergence.task, *QUICK, f"out={tmp_path}"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["recompute=full"], "recompute=full: recomputed activations are not counted; use recompute=none"),
        (["rounds=0"], "rounds=0"),
        (["run.threads=2"], "run.threads=2: this benchmark measures 1 only; use run.threads=1"),
        (["meshes=[{ring:2},{rings:2}]"], "there is no setting meshes.1.rings"),
        (["peers=[flash]"], "peers.0=flash"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(refused, tmp_path, settings, words):
    assert words in refused(train, train.task, *QUICK, f"out={tmp_path}", *settings)


def job_with(recompute="none", mlp_rows=None, offload=None, threads=None, dtype="float32", epochs=None, **context):
    """The parts of a training job that `refuse_unmeasured` reads."""
    model = ModelSource("tiny", "tiny", dtype=dtype)
    target = SimpleNamespace(run=Run(threads=threads), context=Context(**context), model=model)
    settings = SimpleNamespace(recompute=recompute, mlp_rows=mlp_rows, offload=offload)
    data = SimpleNamespace(epochs=epochs)
    return SimpleNamespace(target=target, settings=settings, data=data)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": "bfloat16"}, "model.dtype=bfloat16: this benchmark measures float32 only; use model.dtype=float32"),
        ({"strategy": "pass_q"}, "use context.strategy=pass_kv"),
        ({"layout": "striped"}, "use context.layout=zigzag"),
        ({"kernel": "reference"}, "use context.kernel=flash_cpu"),
        ({"epochs": 1}, "use data.epochs=null"),
        ({"mlp_rows": 64}, "use mlp_rows=null"),
        ({"offload": "folder"}, "use offload=null"),
    ],
    ids=str,
)
def test_settings_that_one_measurement_would_not_follow_are_refused(given, words):
    train.refuse_unmeasured(job_with(threads=1, kernel="flash_cpu"))
    with pytest.raises(ValueError, match=words):
        train.refuse_unmeasured(job_with(**given))


def test_a_peer_that_is_missing_or_fails_gives_the_reason():
    assert peers.installed_version("no_such_package_here") is None
    qkv = torch.zeros(3, 1)
    assert peers.try_ring(lambda: 1 / 0, *qkv) == (None, "ZeroDivisionError: division by zero")
    assert peers.try_ring(lambda: lambda q, k, v: q + k.missing, *qkv)[1].startswith("AttributeError")
    ring, reason = peers.try_ring(lambda: lambda q, k, v: q + k + v, *qkv)
    assert ring is not None and reason == ""


@pytest.mark.parametrize("causal", [False, True])
def test_the_stand_in_for_flash_attn_gives_the_kernel_s_results(causal):
    from longctx.attention.flash_cpu import flash_cpu

    q, k, v, dout = torch.randn(4, 1, 37, 6, 7)
    out, lse, *_ = peers._forward(q, k, v, 0.0, 7**-0.5, causal)
    partial = flash_cpu.forward(q, k, v, causal)
    assert torch.equal(out, partial.out) and torch.equal(lse, partial.lse.transpose(1, 2))
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    peers._backward(dout, q, k, v, out, lse, *gradients, 0.0, 7**-0.5, causal)
    references = flash_cpu.backward(dout, q, k, v, partial.out, partial.lse, causal)
    for x, reference in zip(gradients, references, strict=True):
        assert torch.equal(x, reference)
