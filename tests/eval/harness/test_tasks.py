"""Tasks over local files and included ones: lm-eval's prompts to the letter, its metrics, and every real data set."""

import json
from functools import partial

import numpy as np
import pytest

from eval.harness.lm import EngineLM
from eval.harness.local import LOCAL
from eval.harness.tasks import answer_tasks, build_requests, collect_outcomes, load_tasks
from tests.eval.harness.records import ROWS, Letters, model_that_prefers, write_file


@pytest.mark.parametrize("name", ROWS)
def test_row_gives_lm_evals_prompts(name, tmp_path):
    row, pairs, correct = ROWS[name]
    write_file(tmp_path, name, [row])
    task = load_tasks([name], tmp_path, None, None)[name]
    build_requests({name: task}, {name: None})
    assert [instance.args for instance in task.instances] == pairs
    for choice, (context, continuation) in enumerate(pairs):
        answer_tasks({name: task}, model_that_prefers(context + continuation))
        result = collect_outcomes(name, task)
        assert result.values == (float(choice == correct),)
        assert result.chance == (0 if name == "lambada_openai" else 1 / len(pairs))


def test_wikitext_is_split_into_pages(tmp_path):
    file = tmp_path / LOCAL["wikitext"].file
    file.parent.mkdir(parents=True)
    file.write_text(
        " \n = Boats = \n \n Boats float , mostly . \n = = Sails = = \n \n = Songs = \n \n A song @-@ book .\n"
    )
    task = load_tasks(["wikitext"], tmp_path, None, None)["wikitext"]
    build_requests({"wikitext": task}, {"wikitext": None})
    texts = [instance.args[0] for instance in task.instances]
    assert len(texts) == 2 and "float, mostly." in texts[0] and "== Sails ==" in texts[0] and "song-book" in texts[1]
    answer_tasks(
        {"wikitext": task},
        EngineLM(Letters(), 4096, 0, lambda requests: [(-float(len(one.tokens)), False) for one in requests]),
    )
    result = collect_outcomes("wikitext", task)
    assert result.chance == 0 and len(result.values) == len(result.words) == 2
    assert result.others["word_perplexity"] == pytest.approx(np.exp(-sum(result.values) / sum(result.words)))


def test_sorted_sets_are_shuffled_in_a_fixed_order(tmp_path):
    rows = [{"uid": str(i), "good": f"good {i}", "bad": f"bad {i}"} for i in range(41)]
    write_file(tmp_path, "blimp", rows)
    orders = []
    for _ in range(2):
        task = load_tasks(["blimp"], tmp_path, None, None)["blimp"]
        orders.append([doc["sentence_good"] for doc in task.eval_docs])
    assert orders[0] == orders[1] != [row["good"] for row in rows]
    assert sorted(orders[0]) == sorted(row["good"] for row in rows)


def test_wsc_sentence_that_ends_with_the_pronoun_has_no_space_before_its_full_stop(tmp_path):
    row = {"context_options": ["Ann rowed past Ann", "Ann rowed past Eve"], "continuation": ".", "gold": 1}
    write_file(tmp_path, "wsc273", [row])
    task = load_tasks(["wsc273"], tmp_path, None, None)["wsc273"]
    build_requests({"wsc273": task}, {"wsc273": None})
    assert [one.args for one in task.instances] == [(f"Ann rowed past {word}", " .") for word in ("Ann", "Eve")]


def test_task_configured_without_shots_shows_none(tmp_path):
    """As in lm-eval: TruthfulQA's prompt has its examples, BLiMP's sentences stand alone."""
    write_file(
        tmp_path, "truthfulqa_mc1", [{"question": "What floats?", "best": "a boat", "incorrect": ["a stone"]}] * 3
    )
    task = load_tasks(["truthfulqa_mc1"], tmp_path, 2, None)["truthfulqa_mc1"]
    assert task.config.num_fewshot == 0


def test_more_shots_than_examples_are_refused_by_setting(tmp_path):
    write_file(
        tmp_path, "copa", [{"query": "It rains, therefore", "choices": ["they row.", "they sink."], "gold": 0}] * 3
    )
    task = load_tasks(["copa"], tmp_path, 100, None)["copa"]
    with pytest.raises(ValueError, match=r"copa with 100 examples shown \(eval.num_fewshot\)"):
        build_requests({"copa": task}, {"copa": None})


def test_shots_never_include_the_question(tmp_path):
    rows = [{"query": f"Question: What is {i}?", "choices": ["a number", "a name"], "gold": 0} for i in range(5)]
    write_file(tmp_path, "arc_easy", rows)
    task = load_tasks(["arc_easy"], tmp_path, 3, None)["arc_easy"]
    build_requests({"arc_easy": task}, {"arc_easy": 2})
    prompts = [instance.args[0] for instance in task.instances[::2]]
    for i, prompt in enumerate(prompts):
        assert prompt.count("Answer: a number") == 3 and prompt.endswith(f"What is {i}?\nAnswer:")
        assert prompt.count(f"What is {i}?") == 1


@pytest.fixture
def only_included(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lm-eval read the included tasks alone; reading its own thousands of files takes seconds."""
    import lm_eval.tasks

    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


@pytest.mark.usefixtures("only_included")
def test_task_that_cannot_be_fetched_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: /no/such/set\noutput_type: loglikelihood\n")
    with pytest.raises(ValueError, match=r"mine cannot be fetched from the hub"):
        load_tasks(["mine"], None, None, str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"there is no task nobody: use one that is read from files \(arc_easy, .* long texts \(.*needle, ",
    ):
        load_tasks(["nobody"], None, None, str(tmp_path))


def test_included_task_needs_a_metric_that_can_be_compared(tmp_path):
    """A task with exact_match is compared; one with bleu is refused before anything is asked."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    common += "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    for name, metric in (("mine", "exact_match"), ("theirs", "bleu")):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}metric_list: [{{metric: {metric}}}]\n")
    tasks = load_tasks(["mine", "theirs"], None, None, str(tmp_path))
    with pytest.raises(ValueError, match="theirs has the metrics bleu, and none of acc, exact_match, recall"):
        build_requests(tasks, {"mine": None, "theirs": None})
    (first, *others) = tasks["mine"].instances
    for instance, text in ((first, "It is 0"), *((one, "no") for one in others)):
        instance.resps = [text]
    assert collect_outcomes("mine", tasks["mine"]).values == (1.0, 0.0, 0.0)


@pytest.mark.usefixtures("only_included")
def test_shots_of_an_included_task_are_always_the_same(tmp_path):
    """Every rank that a launcher starts draws them, and must draw the same."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "num_fewshot: 2\nfewshot_split: test\nmetric_list: [{metric: exact_match}]\n"
    )
    prompts = []
    for _ in range(2):
        tasks = load_tasks(["mine"], None, None, str(tmp_path))
        build_requests(tasks, {"mine": 5})
        prompts.append([instance.args[0] for instance in tasks["mine"].instances])
    assert prompts[0] == prompts[1] and prompts[0][0].count("It is") == 2


def test_real_sets_are_complete(data):
    sizes = {
        "arc_easy": 2376, "arc_challenge": 1172, "blimp": 1000, "boolq": 3270, "copa": 100, "gsm8k": 1319,
        "hellaswag": 1000, "lambada_openai": 5153, "mmlu": 9143, "openbookqa": 500, "piqa": 1838,
        "truthfulqa_mc1": 817, "wikitext": 62, "winogrande": 1267, "wsc273": 273,
    }  # fmt: skip
    tasks = load_tasks(list(sizes), data, None, None)
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == sizes
    build_requests(tasks, dict.fromkeys(tasks, 3))
    for name, task in tasks.items():
        assert all(one.args[-1] for one in task.instances), name
