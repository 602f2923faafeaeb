"""Loss and gradient of any mesh equal those of one rank, and of transformers in float64 document by document."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longctx.config import LoRA, Mesh, Optim
from longctx.hf.checkpoint import tensor_files
from longctx.parallel.launch import RankFailed, run_ranks
from tests.float64 import KeepFloat64, float64_model
from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.ranks import Run, Step, sequences, train, train_each
from tests.train.spd_oracle import drop

# Four packed sequences of 37 tokens: ragged documents, a single one, documents of one token, and an empty one.
LENGTHS = ((13, 0, 22, 2), (37,), (5, 11, 20, 1), (1, 1, 1, 34))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("train") / "tiny", max_positions=97, heads=8, kv_heads=4, ffn=52)


@pytest.fixture(scope="module")
def run(model: Path) -> Run:
    return Run(Mesh(), model, LENGTHS, steps=2)


def exact_model(run: Run) -> tuple[float, torch.nn.Module]:
    """Return transformers' token-weighted mean loss of the first step's sequences, and its model with the gradients."""
    net, batch = float64_model(run.folder), sequences(run, 0)
    total, net = 0.0, drop(net, run.dropped, run.mesh.tp * run.shared_by)
    with KeepFloat64():
        for tokens, targets, mask, lengths in zip(batch.tokens, batch.targets, batch.mask, batch.lengths, strict=True):
            pieces = zip(*(x.split(list(lengths)) for x in (tokens, targets, mask)), strict=True)
            for ids, wanted, counts in pieces:
                if counts.any():
                    losses = torch.nn.functional.cross_entropy(net(ids[None]).logits[0], wanted, reduction="none")
                    total = total + (losses * counts).sum()
    loss = total / batch.mask.sum()
    loss.backward()
    return float(loss.detach()), net


def exact(run: Run) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of `exact_model` and its gradients by parameter."""
    loss, net = exact_model(run)
    return loss, {name: p.grad for name, p in net.named_parameters()}


def assert_steps_are(run: Run, others: list[Step]) -> None:
    """Assert that ``run`` gives the loss and gradient norm of ``others`` to 1e-6, on the first and the last rank."""
    ranks = run_ranks(run.mesh.ranks, train, run)
    for got in (ranks[0], ranks[-1]):
        for step, right in zip(got, others, strict=True):
            assert step.tokens == right.tokens
            assert step.loss == pytest.approx(right.loss, rel=1e-6)
            assert step.norm == pytest.approx(right.norm, rel=1e-6)


@pytest.fixture(scope="module")
def one_rank(run: Run) -> list[Step]:
    return run_ranks(1, train, run)[0]


@pytest.mark.parametrize("masked", ["ends", "a rank's"])
def test_one_rank_equals_transformers(run, masked):
    run = replace(run, masked=masked, steps=1)
    (step,) = run_ranks(1, train, run)[0]
    loss, gradients = exact(run)
    assert step.tokens == sequences(run, 0).counted
    assert step.loss == pytest.approx(loss, rel=1e-6)
    assert step.norm == pytest.approx(float(torch.stack([x.norm() for x in gradients.values()]).norm()), rel=1e-6)


MESHES = [
    (Mesh(tp=2), {}),
    (Mesh(ulysses=2), {}),
    (Mesh(ring=2), {"strategy": "pass_q", "layout": "striped"}),
    (Mesh(dp=2), {"optim": Optim(zero1=True)}),
    (Mesh(pp=2), {}),
    (Mesh(ulysses=2, ring=2), {"recompute": "selective", "mlp_rows": 3}),
    (Mesh(tp=2, ring=2), {"optim": Optim(zero1=True), "mlp_rows": 3}),
    (Mesh(tp=2, dp=2), {}),
    (Mesh(tp=2, pp=2), {}),
    (Mesh(tp=2, ulysses=2), {}),
    (Mesh(ring=2, dp=2), {"recompute": "full"}),
    (Mesh(ring=2, pp=2), {"recompute": "full", "mlp_rows": 5}),
    (Mesh(ulysses=2, dp=2), {}),
    (Mesh(ulysses=2, pp=2), {}),
    (Mesh(dp=2, pp=2), {}),
    (Mesh(tp=2, ring=2, dp=2), {}),
    (Mesh(ring=3), {"strategy": "all_gather_kv", "layout": "contiguous"}),
]


@pytest.mark.parametrize(("mesh", "settings"), MESHES, ids=str)
def test_every_mesh_equals_one_rank(run, one_rank, mesh, settings):
    """Two steps: the second step's loss depends on the first step's gradients of all ranks."""
    assert_steps_are(replace(run, mesh=mesh, **settings), one_rank)


@pytest.mark.parametrize("mesh", [Mesh(ring=2), Mesh(dp=2), Mesh(ulysses=2, dp=2)], ids=str)
def test_sequence_without_counted_targets_keeps_meshes_equal(run, mesh):
    """With dp=2, one rank has only sequences in which nothing counts."""
    masked = replace(run, masked="a rank's")
    assert_steps_are(replace(masked, mesh=mesh), run_ranks(1, train, masked)[0])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, which has one file per pipeline stage."""
    files = [load_file(file) for file in set(tensor_files(folder).values())]
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2, ring=2), Mesh(tp=2, pp=2), Mesh(ulysses=2, dp=2)], ids=str)
def test_every_gradient_equals_that_of_transformers(run, mesh, tmp_path):
    """Parameter by parameter, gathered from all ranks: a norm would not detect two swapped parameters."""
    run_ranks(mesh.ranks, train, replace(run, mesh=mesh, gradients=tmp_path / "gradients"))
    _, right = exact(run)
    got = tensors(tmp_path / "gradients")
    assert set(got) == set(right)
    # megatron-core divides gradient sums by the number of tokens when it finalizes them, as `exact` does.
    for name, gradient in right.items():
        assert (got[name] - gradient).norm() <= 2e-6 * gradient.norm(), name


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model with biases and a sliding window in its second layer."""
    from tests.megatron.kinds import KINDS

    torch.manual_seed(11)
    net = AutoModelForCausalLM.from_config(KINDS["qwen2, a window in the second layer"])
    folder = tmp_path_factory.mktemp("windowed")
    net.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(pp=2), Mesh(tp=2), Mesh(ulysses=2, ring=2)], ids=str)
def test_windows_and_biases_have_the_gradients_of_transformers(windowed, mesh, tmp_path):
    """Documents longer than the window; a pipeline stage's layer numbers continue those of the previous stage."""
    run = Run(mesh, windowed, ((151, 22), (173,)), tokens=211)
    run_ranks(mesh.ranks, train, replace(run, gradients=tmp_path / "gradients"))
    _, right = exact(run)
    got = tensors(tmp_path / "gradients")
    for name, gradient in right.items():
        assert (got[name] - gradient).norm() <= 5e-6 * max(gradient.norm(), 1e-3), name


SPD = [
    (Mesh(tp=2), (1,), "none"),
    (Mesh(tp=4), (0, 1), "selective"),
    (Mesh(tp=2, ring=2), (0, 1), "full"),
    (Mesh(tp=2, pp=2), (1,), "none"),
    (Mesh(tp=2, dp=2), (0,), "selective"),
    (Mesh(tp=2, ulysses=2), (0, 1), "none"),
]


@pytest.mark.parametrize(("mesh", "dropped", "recompute"), SPD, ids=str)
def test_gradients_with_dropped_reductions_equal_the_equations(run, mesh, dropped, recompute, tmp_path):
    run = replace(run, mesh=mesh, dropped=dropped, recompute=recompute, mlp_rows=4, steps=1)
    loss, right = exact(run)
    (step,) = run_ranks(mesh.ranks, train, run)[0]
    assert step.loss == pytest.approx(loss, rel=1e-6)
    run_ranks(mesh.ranks, train, replace(run, gradients=tmp_path / "gradients"))
    got = tensors(tmp_path / "gradients")
    for name, gradient in right.items():
        assert (got[name] - gradient).norm() <= 2e-6 * gradient.norm(), name


@pytest.mark.parametrize(("recompute", "mlp_rows"), [("none", 4), ("full", 4), ("selective", None), ("selective", 4)])
def test_gradients_with_reductions_dropped_between_context_ranks(run, recompute, mlp_rows, tmp_path):
    """One rank computes the terms of all ranks in turn, and with ``mlp_rows`` each again in the backward."""
    run = replace(run, mesh=Mesh(ring=2), shared_by=2, dropped=(0, 1), recompute=recompute, mlp_rows=mlp_rows)
    _, right = exact(run)
    run_ranks(2, train, replace(run, gradients=tmp_path / "gradients"))
    got = tensors(tmp_path / "gradients")
    for name, gradient in right.items():
        assert (got[name] - gradient).norm() <= 2e-6 * gradient.norm(), name


OFFLOADED = [
    (Mesh(), {"lora": LoRA(rank=3)}),
    (Mesh(ring=2), {"recompute": "full"}),
    (Mesh(ulysses=2), {"recompute": "selective"}),
    (Mesh(dp=2), {"optim": Optim(zero1=True), "dtype": "bfloat16"}),
    (Mesh(pp=2), {"mlp_rows": 3}),
    (Mesh(tp=2, ring=2), {"dropped": (1,), "recompute": "full", "mlp_rows": 5}),
    (Mesh(tp=2, pp=2), {"dropped": (0,)}),
]


@pytest.mark.parametrize(("mesh", "settings"), OFFLOADED, ids=str)
def test_offloaded_activations_change_no_bit(run, mesh, settings):
    """Two steps with and without, in the same ranks: losses and gradient norms are equal."""
    run = replace(run, mesh=mesh, **settings)
    for without, offloaded in run_ranks(mesh.ranks, train_each, [run, replace(run, offload=True)]):
        assert offloaded == without


def test_bfloat16_with_float32_masters_stays_close_to_float32(run, one_rank):
    for mesh in (Mesh(), Mesh(ring=2), Mesh(tp=2, dp=2)):
        got = run_ranks(mesh.ranks, train, replace(run, mesh=mesh, dtype="bfloat16"))[0]
        for step, right in zip(got, one_rank, strict=True):
            assert step.loss == pytest.approx(right.loss, rel=1e-3)
            assert step.norm == pytest.approx(right.norm, rel=2e-2)


def test_token_beyond_the_vocabulary_is_refused(run):
    """Under tensor parallelism it would silently be a row of zeros."""
    with pytest.raises(RankFailed, match=r"has token 2[5-9]\d, beyond the model's vocabulary of 256"):
        run_ranks(1, train, replace(run, tokens=300))
