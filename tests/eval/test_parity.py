"""The main claim: on real sets each score is that of lm-eval's own model, on every mesh."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from eval.answers.requests import Continue, Request, Score
from eval.harness.lm import EngineLM, recorder
from eval.harness.tasks import answered, ask, load, outcomes
from longctx.config import Mesh, ModelSource
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import run_ranks
from tests.eval.ranks import answers

TASKS = ("arc_easy", "blimp", "hellaswag", "lambada_openai", "mmlu", "winogrande")
MESHES = (Mesh(), Mesh(ring=2), Mesh(tp=3))
PREFIX = 0  # <|endoftext|>
WINDOW = 29  # tokens, of rolling scores
TEXT = " ".join(f"{i} men rowed past the {i + 1} boats, and nobody sang." for i in range(5))


@pytest.fixture(scope="module")
def hf(smollm2: tuple[ModelSource, Path]) -> Any:
    """lm-eval's own model, its softmax in float64: torch's in float32 is itself 1e-4 off, summed over an answer."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(smollm2[1]), device="cpu", dtype="float32", softmax_dtype="float64", prefix_token_id=PREFIX)


@pytest.fixture(scope="module")
def tasks(data: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Tasks with their requests; of one of them greedy text."""
    made = load([*TASKS, "gsm8k"], data, 0, None)
    made["gsm8k"].config.generation_kwargs["max_gen_toks"] = 5
    each = request.config.getoption("--examples")
    ask(made, dict.fromkeys(TASKS, each) | {"gsm8k": 1})
    return made


def rolling() -> Instance:
    return Instance("loglikelihood_rolling", {}, (TEXT,), 0, (None, 0, 1))


@pytest.fixture(scope="module")
def ours(tasks: Any, smollm2: tuple[ModelSource, Path]) -> dict[Mesh, dict[Request, Any]]:
    """All answers, by mesh: of the tasks, and of a text in windows."""
    requests: list[Request] = []
    tokenizer = tokenizer_of(smollm2[1])
    answered(tasks, EngineLM(tokenizer, 8192, PREFIX, recorder(requests)))
    EngineLM(tokenizer, WINDOW, PREFIX, recorder(requests)).loglikelihood_rolling([rolling()])
    return {mesh: run_ranks(mesh.ranks, answers, mesh, smollm2[1], requests, 512)[0] for mesh in MESHES}


def lm_on(mesh: Mesh, ours: Any, tokenizer: Any, longest: int = 8192) -> EngineLM:
    return EngineLM(tokenizer, longest, PREFIX, lambda asked: [ours[mesh][request] for request in asked])


def test_scores_are_lm_evals_own(tasks: Any, ours: Any, hf: Any) -> None:
    answered(tasks, hf)
    theirs = {name: [instance.resps[0] for instance in task.instances] for name, task in tasks.items()}
    right = {name: outcomes(name, task).values for name, task in tasks.items()}
    for mesh in MESHES:
        answered(tasks, lm_on(mesh, ours, hf.tokenizer))
        for name, task in tasks.items():
            got = [instance.resps[0] for instance in task.instances]
            if name == "gsm8k":
                assert got == theirs[name]
            else:
                wanted, greedy = zip(*theirs[name], strict=True)
                assert [likely for likely, _ in got] == pytest.approx(wanted, abs=1e-4), (name, mesh)
                assert [likeliest for _, likeliest in got] == list(greedy)
            assert outcomes(name, task).values == right[name]


def test_rolling_scores_are_lm_evals_own(ours: Any, hf: Any) -> None:
    """Over several windows."""
    hf._max_length = WINDOW
    wanted = hf.loglikelihood_rolling([rolling()], disable_tqdm=True)
    for mesh in MESHES:
        lm = lm_on(mesh, ours, hf.tokenizer, WINDOW)
        assert len(lm._windows(TEXT)) > 2
        assert lm.loglikelihood_rolling([rolling()]) == pytest.approx(wanted, abs=1e-4)


TINY = (Mesh(), Mesh(ring=2), Mesh(ring=4), Mesh(ulysses=3), Mesh(tp=3), Mesh(ulysses=3, ring=2))


def test_every_mesh_answers_alike(tiny: Path) -> None:
    """Questions with a common beginning of any length, none at all, one inside the other; and greedy text."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(256, (997,), generator=torch.Generator().manual_seed(3)).tolist()
    stem = tokens[:31]
    asked: list[Request] = [
        *(Score((*stem, *tokens[a:b]), 31, "q0") for a, b in ((40, 41), (41, 42), (50, 57), (60, 73))),
        Score((*stem, *tokens[50:53]), 31, "q0"),
        *(Score((*tokens[100:107], one, *tokens[108:113]), 9, "q1") for one in (5, 6)),
        *(Score((one, *tokens[120:131]), 5, "q2") for one in (7, 8)),
        Score(tuple(tokens[200:203]), 1, ""),
        Score(tuple(tokens[200:491]), 3, ""),
        Continue(tuple(tokens[500:523]), ("\n",), 11),
        Continue(tuple(tokens[600:607]), (), 5),
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    found = {mesh: run_ranks(mesh.ranks, answers, mesh, tiny, asked, 101)[0] for mesh in TINY}
    for request in asked:
        got = {mesh: found[mesh][request] for mesh in TINY}
        if isinstance(request, Continue):
            assert len(set(got.values())) == 1 and len(next(iter(got.values()))) > 0
            continue
        with torch.inference_mode():
            predicted = model(torch.tensor([request.tokens[:-1]])).logits[0, request.begin - 1 :].log_softmax(-1)
        targets = torch.tensor(request.tokens[request.begin :])
        wanted = float(predicted.gather(1, targets[:, None]).sum())
        greedy = bool((predicted.argmax(-1) == targets).all())
        for mesh, (likely, likeliest) in got.items():
            assert likely == pytest.approx(wanted, abs=1e-4), mesh
            assert likeliest == greedy, mesh
