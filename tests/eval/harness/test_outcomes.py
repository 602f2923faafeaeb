"""Outcomes of a task's examples: the accuracy of guessing, margins, and metrics without an aggregation."""

import math

from eval.harness.tasks import answer_tasks, build_requests, collect_outcomes, load_tasks, make_task
from tests.eval.harness.records import model_that_prefers, write_file


def test_chance_of_equal_choices_is_the_most_common_answer(tmp_path):
    rows = [{"query": f"Passage: It is {i}.\nQuestion: is it {i}?", "gold": int(i > 0)} for i in range(5)]
    write_file(tmp_path, "boolq", rows)
    task = load_tasks(["boolq"], tmp_path, None, None)["boolq"]
    build_requests({"boolq": task}, {"boolq": None})
    answer_tasks({"boolq": task}, model_that_prefers("yes"))
    result = collect_outcomes("boolq", task)
    assert (sum(result.values), result.chance) == (4, 0.8)


def test_chance_does_not_depend_on_the_number_of_examples(tmp_path):
    """It is that of the first 200, by which tasks are chosen: of these, 150 are right with yes."""
    rows = [{"query": f"Passage: It is {i}.\nQuestion: is it?", "gold": int(i < 150 or i >= 200)} for i in range(400)]
    write_file(tmp_path, "boolq", rows)
    chances = []
    for limit in (200, None):
        task = load_tasks(["boolq"], tmp_path, None, None)["boolq"]
        build_requests({"boolq": task}, {"boolq": limit})
        answer_tasks({"boolq": task}, model_that_prefers("yes"))
        chances.append(collect_outcomes("boolq", task).chance)
    assert chances == [0.75, 0.75]


def test_task_with_several_right_answers_has_their_share_as_chance_and_no_margin():
    """It computes its own results; the score is the probability of the right answers."""
    config = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
              "doc_to_target": 0, "process_results": share_of_right, "metric_list": [{"metric": "acc"}]}  # fmt: skip
    task = make_task("many", config, [{"q": "?", "choices": list("abcdefgh"), "right": 4}] * 3)
    build_requests({"many": task}, {"many": None})
    answer_tasks({"many": task}, model_that_prefers("a"))
    result = collect_outcomes("many", task)
    assert (result.chance, result.margins) == (0.5, ())


def share_of_right(doc: dict, answers: list) -> dict[str, float]:
    weights = [math.exp(value) for value, _ in answers]
    return {"acc": sum(weights[: doc["right"]]) / sum(weights)}


def test_metric_without_aggregation_is_averaged(tmp_path):
    write_file(tmp_path, "copa", [{"query": "It rains, therefore", "choices": ["they row.", "they sink."], "gold": 0}])
    task = load_tasks(["copa"], tmp_path, None, None)["copa"]
    build_requests({"copa": task}, {"copa": None})
    answer_tasks({"copa": task}, model_that_prefers("row."))
    plain = task.process_results
    task.process_results = lambda doc, given: plain(doc, given) | {"mine": 0.25}
    assert collect_outcomes("copa", task).others["mine"] == 0.25


def test_margins_are_one_per_example_with_several_filters(tmp_path):
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("none", "other")]
    config = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
              "doc_to_target": 0, "metric_list": [{"metric": "acc"}], "filter_list": filters}  # fmt: skip
    task = make_task("filtered", config, [{"q": "?", "choices": ["a", "b"]}] * 3)
    build_requests({"filtered": task}, {"filtered": None})
    answer_tasks({"filtered": task}, model_that_prefers("a"))
    result = collect_outcomes("filtered", task)
    assert len(result.margins) == len(result.values) == 3
