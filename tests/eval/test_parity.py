"""Parity: on real data sets, scores equal those of lm-eval's own model, on every mesh."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from eval.answers.requests import Continue, Request, Score
from eval.harness.lm import EngineLM, make_recorder
from eval.harness.tasks import answer_tasks, build_requests, collect_outcomes, load_tasks
from longctx.config import Mesh, ModelSource
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import run_ranks
from tests.eval.ranks import answer_on_rank
from tests.float64 import KeepFloat64, float64_model

TASKS = ("arc_easy", "blimp", "hellaswag", "lambada_openai", "mmlu", "winogrande")
MESHES = (Mesh(), Mesh(ring=2), Mesh(tp=3))
PREFIX = 0  # <|endoftext|>
WINDOW = 29  # tokens of a window of rolling scores
TEXT = " ".join(f"{i} men rowed past the {i + 1} boats, and nobody sang." for i in range(5))


@pytest.fixture(scope="module")
def hf(smollm2: tuple[ModelSource, Path]) -> Any:
    """lm-eval's own model, in float64: in float32, a CPU's libraries decide how far two scores are apart."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(smollm2[1]), device="cpu", dtype="float64", prefix_token_id=PREFIX)


@pytest.fixture(scope="module")
def tasks(data: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Tasks with their requests; those of gsm8k are greedy texts."""
    loaded = load_tasks([*TASKS, "gsm8k"], data, 0, None)
    loaded["gsm8k"].config.generation_kwargs["max_gen_toks"] = 5
    examples = request.config.getoption("--examples")
    build_requests(loaded, dict.fromkeys(TASKS, examples) | {"gsm8k": 1})
    return loaded


def rolling_request() -> Instance:
    return Instance("loglikelihood_rolling", {}, (TEXT,), 0, (None, 0, 1))


@pytest.fixture(scope="module")
def ours(tasks: Any, smollm2: tuple[ModelSource, Path]) -> dict[Mesh, dict[Request, Any]]:
    """Answers by mesh and request: those of the tasks, and of a text in windows."""
    requests: list[Request] = []
    tokenizer = tokenizer_of(smollm2[1])
    answer_tasks(tasks, EngineLM(tokenizer, 8192, PREFIX, make_recorder(requests)))
    EngineLM(tokenizer, WINDOW, PREFIX, make_recorder(requests)).loglikelihood_rolling([rolling_request()])
    return {mesh: run_ranks(mesh.ranks, answer_on_rank, mesh, smollm2[1], requests, 512)[0] for mesh in MESHES}


def lm_on(mesh: Mesh, ours: Any, tokenizer: Any, max_length: int = 8192) -> EngineLM:
    """An lm-eval model that gives the answers of ``mesh``."""
    return EngineLM(tokenizer, max_length, PREFIX, lambda requests: [ours[mesh][request] for request in requests])


def test_scores_and_texts_equal_lm_evals(tasks: Any, ours: Any, hf: Any) -> None:
    with KeepFloat64():
        answer_tasks(tasks, hf)
    theirs = {name: [instance.resps[0] for instance in task.instances] for name, task in tasks.items()}
    expected = {name: collect_outcomes(name, task).values for name, task in tasks.items()}
    for mesh in MESHES:
        answer_tasks(tasks, lm_on(mesh, ours, hf.tokenizer))
        for name, task in tasks.items():
            answers = [instance.resps[0] for instance in task.instances]
            if name == "gsm8k":
                assert answers == theirs[name]
            else:
                log_probs, is_greedy = zip(*theirs[name], strict=True)
                assert [log_prob for log_prob, _ in answers] == pytest.approx(log_probs, abs=1e-9), (name, mesh)
                assert [greedy for _, greedy in answers] == list(is_greedy)
            assert collect_outcomes(name, task).values == expected[name]


def test_rolling_scores_over_several_windows_equal_lm_evals(
    ours: Any, hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "_max_length", WINDOW)
    with KeepFloat64():
        expected = hf.loglikelihood_rolling([rolling_request()], disable_tqdm=True)
    for mesh in MESHES:
        lm = lm_on(mesh, ours, hf.tokenizer, WINDOW)
        assert len(lm._make_windows(TEXT)) > 2
        assert lm.loglikelihood_rolling([rolling_request()]) == pytest.approx(expected, abs=1e-9)


TINY = (Mesh(), Mesh(ring=2), Mesh(ring=4), Mesh(ulysses=3), Mesh(tp=3), Mesh(ulysses=3, ring=2))


def test_every_mesh_gives_the_same_answers_as_transformers(tiny: Path) -> None:
    """Choices with prefixes of several lengths, without a prefix, one the prefix of another; and greedy text."""
    tokens = torch.randint(256, (997,), generator=torch.Generator().manual_seed(3)).tolist()
    prefix = tokens[:31]
    requests: list[Request] = [
        *(Score((*prefix, *tokens[a:b]), 31, "q0") for a, b in ((40, 41), (41, 42), (50, 57), (60, 73))),
        Score((*prefix, *tokens[50:53]), 31, "q0"),
        *(Score((*tokens[100:107], one, *tokens[108:113]), 9, "q1") for one in (5, 6)),
        *(Score((one, *tokens[120:131]), 5, "q2") for one in (7, 8)),
        Score(tuple(tokens[200:203]), 1, ""),
        Score(tuple(tokens[200:491]), 3, ""),
        Continue(tuple(tokens[500:523]), ("\n",), 11),
        Continue(tuple(tokens[600:607]), (), 5),
    ]
    model = float64_model(tiny)
    answers = {mesh: run_ranks(mesh.ranks, answer_on_rank, mesh, tiny, requests, 101)[0] for mesh in TINY}
    for request in requests:
        by_mesh = {mesh: answers[mesh][request] for mesh in TINY}
        if isinstance(request, Continue):
            assert len(set(by_mesh.values())) == 1 and len(next(iter(by_mesh.values()))) > 0
            continue
        with torch.inference_mode(), KeepFloat64():
            predicted = model(torch.tensor([request.tokens[:-1]])).logits[0, request.begin - 1 :].log_softmax(-1)
        targets = torch.tensor(request.tokens[request.begin :])
        log_prob = float(predicted.gather(1, targets[:, None]).sum())
        greedy = bool((predicted.argmax(-1) == targets).all())
        for mesh, answer in by_mesh.items():
            assert answer == (pytest.approx(log_prob, abs=1e-9), greedy), mesh
