"""Prompts in a chat template: lm-eval, which makes the conversations itself, gives its own model the same scores."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator

from eval.harness.lm import render_chat
from eval.harness.tasks import answer_tasks, load_tasks
from longctx.config import Mesh
from longctx.parallel.launch import run_ranks
from tests.eval.ranks import answer_on_rank
from tests.float64 import KeepFloat64
from tests.tiny import tiny_tokenizer

TEMPLATE = (
    "<s>{% for one in messages %}[{{ one.role }}] {{ one.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TASKS = ["arc_easy", "lambada_openai"]


@pytest.fixture(scope="module")
def chatty(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_scores_equal_those_of_lm_eval_example_by_example(chatty: Path, sets: Path, prepared: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    words = [f"model.source={chatty}", "eval.chat=true", "eval.num_fewshot=2", f"eval.tasks=[{','.join(TASKS)}]"]
    job = prepared(*words, "eval.limit=5")
    prompt = job.tasks["arc_easy"].instances[0].args[0]
    assert prompt.count("[user] Question: What is number") == 3 and prompt.count("[assistant]") == 3
    answers = run_ranks(1, answer_on_rank, Mesh(), chatty, job.requests, 400)[0]
    job.lm.answer = lambda requests: [answers[request] for request in requests]
    answer_tasks(job.tasks, job.lm)

    hf = HFLM(str(chatty), device="cpu", dtype="float64", prefix_token_id=256)
    settings = {"apply_chat_template": True, "fewshot_as_multiturn": True, "limit": 5, "bootstrap_iters": 0}
    with KeepFloat64():
        samples = evaluator.evaluate(lm=hf, task_dict=load_tasks(TASKS, sets, 2, None), **settings)["samples"]
    for name in TASKS:
        found = [instance.resps[0] for instance in job.tasks[name].instances]
        theirs = [
            (float(score), str(greedy) == "True") for sample in samples[name] for ((score, greedy),) in sample["resps"]
        ]
        assert len(found) == len(theirs) == (20 if name == "arc_easy" else 5)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in theirs], abs=1e-9)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in theirs]


def test_template_that_refuses_system_messages_gets_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    user = {"role": "user", "content": "hi"}
    assert render_chat(tokenizer, [{"role": "system", "content": "x"}, user]) == "<s>[user] hi\n[assistant] "


@pytest.mark.parametrize(
    ("template", "error"),
    [("{{ raise_exception('never') }}", "TemplateError: never"), ("{{ tools | length }}", "TypeError: .*")],
)
def test_template_that_refuses_the_question_is_named(
    template: str, error: str, chatty: Path, prepared: Any, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    words = [f"model.source={chatty}", f"model.chat_template={tmp_path / 't.jinja'}", "eval.chat=true"]
    refusal = rf"refuses the task's messages \({error}\) with eval.chat=true: leave arc_easy out"
    with pytest.raises(ValueError, match=refusal):
        prepared(*words, "eval.tasks=[arc_easy]", "eval.limit=1")


def test_template_with_todays_date_is_refused(chatty: Path, prepared: Any, tmp_path: Path) -> None:
    """Its prompts, and so the keys of stored answers, would be others on the next day."""
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + TEMPLATE)
    words = [f"model.source={chatty}", f"model.chat_template={tmp_path / 't.jinja'}", "eval.chat=true"]
    with pytest.raises(ValueError, match=r"today's date .* set the day .* such as model.date=2"):
        prepared(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.chat=true"], "tiny has no chat template; give one with model.chat_template=FILE"),
        (["eval.tasks=[needle]", "eval.chat=true", "eval.lengths=[300]"], "needle sizes its texts without"),
    ],
)
def test_chat_without_a_template_or_with_long_texts_is_refused(
    words: list[str], message: str, chatty: Path, prepared: Any
) -> None:
    model = [] if "no chat" in message else [f"model.source={chatty}"]
    with pytest.raises(ValueError, match=message):
        prepared(*model, *words)
