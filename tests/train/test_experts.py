"""Training with experts divided among ranks equals training without, and transformers' loss and gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from longctx.config import Mesh, Optim
from longctx.parallel.launch import run_ranks
from tests.float64 import KeepFloat64, float64_model
from tests.megatron.kinds import EVEN_EXPERTS, SMALL, random_model
from tests.tiny import tiny_tokenizer
from tests.train.against_transformers import assert_steps_equal, exact, written_gradients
from tests.train.ranks import Run, sequences, train_each

LENGTHS = ((37, 24), (61,))
COEFFICIENT = 0.7  # router_aux_loss_coef


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("experts")
    for kind, changed in EVEN_EXPERTS.items():
        random_model(kind, folder / kind, **changed)
        tiny_tokenizer().save_pretrained(folder / kind)
    return {kind: Run(Mesh(), folder / kind, LENGTHS, tokens=SMALL["vocab_size"]) for kind in EVEN_EXPERTS}


@pytest.fixture(scope="module")
def right(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("right")
    return {kind: exact(run, folder / kind) for kind, run in runs.items()}


MESHES: list[tuple[Mesh, dict[str, Any]]] = [
    (Mesh(tp=2, ring=2, ep=2), {"strategy": "pass_q", "layout": "striped"}),
    (Mesh(ulysses=2, pp=2, ep=2), {"recompute": "full", "offload": True}),
    (Mesh(ring=2, dp=2, ep=4), {}),  # a single expert a rank
]


@pytest.mark.parametrize(("mesh", "settings"), MESHES, ids=str)
def test_loss_and_every_gradient_equal_those_of_transformers_in_float64(
    mesh: Mesh, settings: dict[str, Any], runs: dict[str, Run], right: Any, tmp_path: Path
) -> None:
    assert_steps_equal(mesh, settings, runs, right, tmp_path)


def test_step_and_its_bytes(runs: dict[str, Run], right: Any) -> None:
    """Gradient norm: megatron-core must know which gradients other ranks hold.  Bytes: hidden states there and back."""
    jobs = [replace(run, mesh=Mesh(tp=2, dp=2, ep=2), recompute="selective") for run in runs.values()]
    jobs.append(replace(runs["gpt_oss"], mesh=Mesh(ring=2, dp=2, ep=2), optim=Optim(zero1=True)))
    results = run_ranks(4, train_each, jobs)[0]
    for kind, (step,) in zip([*runs, "gpt_oss"], results, strict=True):
        loss, gradients = right[kind]
        assert step.loss == pytest.approx(loss, rel=1e-6), kind
        assert step.norm == pytest.approx(float(torch.stack([x.norm() for x in gradients.values()]).norm()), rel=1e-5)
    rows, hidden, experts = -(-61 // 2) + 2, SMALL["hidden_size"], 4
    forward = rows * (hidden + experts // 2) + rows * hidden  # to the other rank, and the other rank's rows back
    assert results[-1][0].experts_bytes == SMALL["num_hidden_layers"] * (2 * forward * 4 + rows * experts)


@pytest.mark.parametrize("zero1", [True, False])
def test_checkpoints_resume_with_and_without_expert_parallelism(
    zero1: bool, runs: dict[str, Run], tmp_path: Path
) -> None:
    meshes = (Mesh(ring=2, ep=2), Mesh(tp=2)) if zero1 else (Mesh(tp=2), Mesh(dp=2, ep=2))
    begin, end = meshes
    first = [
        replace(run, mesh=begin, checkpoints=tmp_path / kind, steps=3, optim=Optim(zero1=zero1))
        for kind, run in runs.items()
    ]
    whole = run_ranks(2, train_each, [replace(run, save_at=1) for run in first])[0]
    resumed = run_ranks(2, train_each, [replace(run, mesh=end, begin=1) for run in first])[0]
    for (_, *expected), got in zip(whole, resumed, strict=True):
        assert [step.loss for step in got] == pytest.approx([step.loss for step in expected], rel=1e-6)
        assert [step.norm for step in got] == pytest.approx([step.norm for step in expected], rel=1e-5)


def balancing(run: Run, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean over sequences of transformers' load-balancing loss, and its gradients by name in files."""
    net, batch, losses = float64_model(run.folder), sequences(run, 0), []
    with KeepFloat64():
        for tokens, lengths in zip(batch.tokens, batch.lengths, strict=True):
            documents = [net(ids[None], output_router_logits=True).router_logits for ids in tokens.split(list(lengths))]
            layers = tuple(torch.cat(of_documents) for of_documents in zip(*documents, strict=True))
            losses.append(load_balancing_loss_func(layers, layers[0].shape[1], net.config.num_experts_per_tok))
    mean = torch.stack(losses).mean()
    mean.backward()
    return float(mean.detach()), written_gradients(net, folder)


@pytest.fixture(scope="module")
def balanced(runs: dict[str, Run], right: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By kind of model: a run with a router loss; the exact router loss; the exact cross-entropy and gradients.

    The gradients are those of cross-entropy + `COEFFICIENT` * router loss.
    """
    folder, out = tmp_path_factory.mktemp("balanced"), {}
    for kind, run in runs.items():
        set_both = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
        model = random_model(kind, folder / kind, **EVEN_EXPERTS[kind], **set_both)
        tiny_tokenizer().save_pretrained(model)
        loss, gradients = balancing(run, folder / "right" / kind)
        total = {name: gradient + COEFFICIENT * gradients[name] for name, gradient in right[kind][1].items()}
        out[kind] = replace(run, folder=model), loss, (right[kind][0], total)
    return out


BALANCED: list[tuple[Mesh, dict[str, Any]]] = [
    (Mesh(), {}),
    (Mesh(tp=2, ring=2, ep=2), {"recompute": "full"}),
    (Mesh(ulysses=2, dp=2), {"recompute": "selective"}),
]


@pytest.mark.parametrize(("mesh", "settings"), BALANCED, ids=str)
def test_router_loss_and_its_gradients_equal_those_of_transformers_in_float64(
    mesh: Mesh, settings: dict[str, Any], balanced: Any, tmp_path: Path
) -> None:
    runs, exact_steps = ({kind: case[i] for kind, case in balanced.items()} for i in (0, 2))
    steps = assert_steps_equal(mesh, settings, runs, exact_steps, tmp_path)
    for (_, loss, _), step in zip(balanced.values(), steps, strict=True):
        assert step.router_loss == pytest.approx(loss, rel=1e-12)
