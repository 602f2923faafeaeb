"""Local files become lm-eval's own tasks: its prompts to the letter, its metrics, all of the real sets."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval.harness.lm import EngineLM
from eval.harness.local import LOCAL
from eval.harness.tasks import answered, ask, load, outcomes

FOUR = ["a stone", "a cloud", "a boat", "a song"]
# A row of a file as eval/README.md describes it; what lm-eval asks of it; which of that is right.
ROWS = {
    "arc_easy": (
        {"query": "Question: What floats on a lake?", "choices": FOUR, "gold": 2},
        [("Question: What floats on a lake?\nAnswer:", f" {choice}") for choice in FOUR],
        2,
    ),
    "openbookqa": (
        {"query": "On a lake floats", "choices": FOUR, "gold": 2},
        [("On a lake floats", f" {choice}") for choice in FOUR],
        2,
    ),
    "piqa": (
        {"query": "Question: dry a boat\n", "choices": ["in the sun", "in a lake"], "gold": 0},
        [("Question: dry a boat\nAnswer:", " in the sun"), ("Question: dry a boat\nAnswer:", " in a lake")],
        0,
    ),
    "boolq": (
        {"query": "Passage: Boats float.\nQuestion: do boats sink?", "choices": ["no", "yes"], "gold": 0},
        [("Boats float.\nQuestion: do boats sink?\nAnswer:", f" {word}") for word in ("no", "yes")],
        0,
    ),
    "copa": (
        {"query": "The boat had a hole, therefore", "choices": ["it sank.", "it sang."], "gold": 0},
        [("The boat had a hole therefore", "  it sank."), ("The boat had a hole therefore", "  it sang.")],
        0,
    ),
    "hellaswag": (
        {"query": "Rowing: A man rows. he", "choices": FOUR, "gold": 3},  # as lm-eval's process_docs writes it
        [("Rowing: A man rows. He", f" {choice}") for choice in FOUR],
        3,
    ),
    "winogrande": (
        {
            "context_options": ["The boat hit the stone because the boat", "The boat hit the stone because the stone"],
            "continuation": "was fast.",
            "gold": 0,
        },
        [(f"The boat hit the stone because the {word}", " was fast.") for word in ("boat", "stone")],
        0,
    ),
    "wsc273": (
        {"context_options": ["Ann left as Ann", "Ann left as Eve"], "continuation": "rowed.", "gold": 1},
        [(f"Ann left as {word}", "  rowed.") for word in ("Ann", "Eve")],
        1,
    ),
    "lambada_openai": (
        {"context": "Down the river went the", "continuation": "boat"},
        [("Down the river went the", " boat")],
        0,
    ),
    "blimp": (
        {"uid": "x", "term": "y", "good": "Boats float.", "bad": "Boats floats."},
        [("", " Boats float."), ("", " Boats floats.")],
        0,
    ),
    "mmlu": (
        {"subject": "naval_history", "question": "What floats?", "choices": FOUR, "answer": 2},
        [
            (
                "The following are multiple choice questions (with answers) about naval history.\n\nWhat floats?\n"
                "A. a stone\nB. a cloud\nC. a boat\nD. a song\nAnswer:",
                f" {letter}",
            )
            for letter in "ABCD"
        ],
        2,
    ),
}  # fmt: skip


def written(folder: Path, name: str, rows: list[dict]) -> Path:
    file = folder / LOCAL[name].file
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        import gzip

        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


class Letters:
    """A tokenizer of a token a letter, for requests that are read back."""

    name_or_path = "letters"

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def who_knows(right: str) -> EngineLM:
    """A model to which only ``right`` is likely."""

    def answer(requests):
        said = ["".join(map(chr, request.tokens)).lstrip("\0") for request in requests]
        return [(-1.0, True) if text.endswith(right) else (-99.0, False) for text in said]

    return EngineLM(Letters(), 4096, 0, answer)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_asked_as_lm_eval_asks_it(name, tmp_path):
    row, wanted, right = ROWS[name]
    written(tmp_path, name, [row])
    task = load([name], tmp_path, None, None)[name]
    ask({name: task}, {name: None})
    assert [instance.args for instance in task.instances] == wanted
    for choice, (context, continuation) in enumerate(wanted):
        answered({name: task}, who_knows(context + continuation))
        made = outcomes(name, task)
        assert made.values == (float(choice == right),)
        assert made.chance == (0 if name == "lambada_openai" else 1 / len(wanted))


def test_wikitext_is_pages_and_their_words(tmp_path):
    file = tmp_path / LOCAL["wikitext"].file
    file.parent.mkdir(parents=True)
    file.write_text(
        " \n = Boats = \n \n Boats float , mostly . \n = = Sails = = \n \n = Songs = \n \n A song @-@ book .\n"
    )
    task = load(["wikitext"], tmp_path, None, None)["wikitext"]
    ask({"wikitext": task}, {"wikitext": None})
    texts = [instance.args[0] for instance in task.instances]
    assert len(texts) == 2 and "float, mostly." in texts[0] and "== Sails ==" in texts[0] and "song-book" in texts[1]
    answered(
        {"wikitext": task}, EngineLM(Letters(), 4096, 0, lambda asked: [(-float(len(a.tokens)), False) for a in asked])
    )
    made = outcomes("wikitext", task)
    assert made.chance == 0 and len(made.values) == len(made.words) == 2
    assert made.others["word_perplexity"] == pytest.approx(np.exp(-sum(made.values) / sum(made.words)))


def test_sorted_sets_are_mixed_always_alike(tmp_path):
    rows = [{"uid": str(i), "good": f"good {i}", "bad": f"bad {i}"} for i in range(41)]
    written(tmp_path, "blimp", rows)
    orders = []
    for _ in range(2):
        task = load(["blimp"], tmp_path, None, None)["blimp"]
        orders.append([doc["sentence_good"] for doc in task.eval_docs])
    assert orders[0] == orders[1] != [row["good"] for row in rows]
    assert sorted(orders[0]) == sorted(row["good"] for row in rows)


def test_a_wsc_sentence_that_ends_behind_the_pronoun_keeps_its_full_stop_close(tmp_path):
    row = {"context_options": ["Ann rowed past Ann", "Ann rowed past Eve"], "continuation": ".", "gold": 1}
    written(tmp_path, "wsc273", [row])
    task = load(["wsc273"], tmp_path, None, None)["wsc273"]
    ask({"wsc273": task}, {"wsc273": None})
    assert [one.args for one in task.instances] == [(f"Ann rowed past {word}", " .") for word in ("Ann", "Eve")]


def test_of_the_same_choices_always_the_commonest_is_a_guess_too(tmp_path):
    rows = [{"query": f"Passage: It is {i}.\nQuestion: is it {i}?", "gold": int(i > 0)} for i in range(5)]
    written(tmp_path, "boolq", rows)
    task = load(["boolq"], tmp_path, None, None)["boolq"]
    ask({"boolq": task}, {"boolq": None})
    answered({"boolq": task}, who_knows("yes"))
    made = outcomes("boolq", task)
    assert (sum(made.values), made.chance) == (4, 0.8)


def test_a_metric_that_does_not_say_how_it_adds_up_is_the_mean(tmp_path):
    written(tmp_path, "copa", [{"query": "It rains, therefore", "choices": ["they row.", "they sink."], "gold": 0}])
    task = load(["copa"], tmp_path, None, None)["copa"]
    ask({"copa": task}, {"copa": None})
    answered({"copa": task}, who_knows("row."))
    plain = task.process_results
    task.process_results = lambda doc, given: plain(doc, given) | {"mine": 0.25}
    assert outcomes("copa", task).others["mine"] == 0.25


def test_a_task_that_says_it_shows_none_shows_none(tmp_path):
    """As in lm-eval: TruthfulQA's prompt has its examples, BLiMP's sentences stand alone."""
    written(tmp_path, "truthfulqa_mc1", [{"question": "What floats?", "best": "a boat", "incorrect": ["a stone"]}] * 3)
    task = load(["truthfulqa_mc1"], tmp_path, 2, None)["truthfulqa_mc1"]
    assert task.config.num_fewshot == 0


def test_more_shots_than_there_are_are_refused_by_their_setting(tmp_path):
    written(tmp_path, "copa", [{"query": "It rains, therefore", "choices": ["they row.", "they sink."], "gold": 0}] * 3)
    task = load(["copa"], tmp_path, 100, None)["copa"]
    with pytest.raises(ValueError, match=r"copa with 100 examples shown \(eval.num_fewshot\)"):
        ask({"copa": task}, {"copa": None})


def test_shots_are_shown_and_never_the_question_itself(tmp_path):
    rows = [{"query": f"Question: What is {i}?", "choices": ["a number", "a name"], "gold": 0} for i in range(5)]
    written(tmp_path, "arc_easy", rows)
    task = load(["arc_easy"], tmp_path, 3, None)["arc_easy"]
    ask({"arc_easy": task}, {"arc_easy": 2})
    prompts = [instance.args[0] for instance in task.instances[::2]]
    for i, prompt in enumerate(prompts):
        assert prompt.count("Answer: a number") == 3 and prompt.endswith(f"What is {i}?\nAnswer:")
        assert prompt.count(f"What is {i}?") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "which is not there"),
        ("", "arc_easy has no examples"),
        ('{"query": "What?", "gold": 0}\n', "record 1, is not as eval/README.md describes it (KeyError: 'choices')"),
        ("one\n", "is not a file of JSON lines"),
    ],
)
def test_a_file_that_will_not_do_is_refused(text, words, tmp_path):
    if text is not None:
        written(tmp_path, "arc_easy", []).write_text(text)
    with pytest.raises(ValueError, match=r"\w") as refused:
        load(["arc_easy"], tmp_path, None, None)
    assert words in str(refused.value)


def test_what_a_hub_does_not_give_is_refused(monkeypatch, tmp_path):
    import lm_eval.tasks

    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: /no/such/set\noutput_type: loglikelihood\n")
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path: manager(include_path=include_path, include_defaults=False)
    )
    with pytest.raises(ValueError, match=r"mine cannot be fetched from the hub"):
        load(["mine"], None, None, str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no task nobody: from files there are arc_easy, "):
        load(["nobody"], None, None, str(tmp_path))


def test_a_task_in_lm_evals_own_format_is_one_like_others(tmp_path):
    """Two metrics by other names: one that says whether an answer is right is compared, the other refused at once."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    common += "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    for name, metric in (("mine", "exact_match"), ("theirs", "bleu")):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}metric_list: [{{metric: {metric}}}]\n")
    tasks = load(["mine", "theirs"], None, None, str(tmp_path))
    with pytest.raises(ValueError, match="theirs has bleu, none of acc, exact_match, word_perplexity"):
        ask(tasks, {"mine": None, "theirs": None})
    (right, *wrong) = tasks["mine"].instances
    for instance, text in ((right, "It is 0"), *((one, "no") for one in wrong)):
        instance.resps = [text]
    assert outcomes("mine", tasks["mine"]).values == (1.0, 0.0, 0.0)


def test_shots_of_a_task_in_lm_evals_own_format_are_always_the_same(tmp_path):
    """Every rank that a launcher starts draws them by itself."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "num_fewshot: 2\nfewshot_split: test\nmetric_list: [{metric: exact_match}]\n"
    )
    prompts = []
    for _ in range(2):
        tasks = load(["mine"], None, None, str(tmp_path))
        ask(tasks, {"mine": 5})
        prompts.append([instance.args[0] for instance in tasks["mine"].instances])
    assert prompts[0] == prompts[1] and prompts[0][0].count("It is") == 2


def test_the_real_sets_are_whole(data):
    sizes = {
        "arc_easy": 2376, "arc_challenge": 1172, "blimp": 1000, "boolq": 3270, "copa": 100, "gsm8k": 1319,
        "hellaswag": 1000, "lambada_openai": 5153, "mmlu": 9143, "openbookqa": 500, "piqa": 1838,
        "truthfulqa_mc1": 817, "wikitext": 62, "winogrande": 1267, "wsc273": 273,
    }  # fmt: skip
    tasks = load(list(LOCAL), data, None, None)
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == sizes
    ask(tasks, dict.fromkeys(tasks, 3))
    for name, task in tasks.items():
        assert all(one.args[-1] for one in task.instances), name
