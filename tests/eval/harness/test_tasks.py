"""Tasks over local files: lm-eval's prompts to the letter, its metrics, and every real data set."""

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from eval.harness.lm import EngineLM
from eval.harness.local import LOCAL, read_rows
from eval.harness.tasks import answer_tasks, build_requests, collect_outcomes, load_tasks

FOUR = ["a stone", "a cloud", "a boat", "a song"]
# A record of a file as eval/README.md describes it; the pairs that lm-eval asks of it; the correct one.
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


def write_file(folder: Path, name: str, rows: list[dict]) -> Path:
    file = folder / LOCAL[name].file
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


class Letters:
    """A tokenizer with one token per letter, so that a test can read requests as text."""

    name_or_path, bos_token = "letters", None

    def __call__(self, text: str, add_special_tokens: bool = False, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def model_that_prefers(text: str) -> EngineLM:
    """An lm-eval model to which only requests that end in ``text`` are likely."""

    def answer(requests):
        texts = ["".join(map(chr, request.tokens)).lstrip("\0") for request in requests]
        return [(-1.0, True) if each.endswith(text) else (-99.0, False) for each in texts]

    return EngineLM(Letters(), 4096, 0, answer)


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


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("piqa", {"query": "Question: a\n", "choices": ["b", "c"], "gold": "1"}),
        ("boolq", {"query": "Passage: a\nQuestion: b?", "gold": -1}),
        ("hellaswag", {"query": "a", "choices": ["b", "c", "d", "e"], "gold": 7}),
        ("arc_easy", {"query": "a", "choices": ["b", "c"], "gold": -1}),
        ("copa", {"query": "a because", "choices": ["b", "c"], "gold": True}),
        ("mmlu", {"subject": "a", "question": "b", "choices": ["c", "d", "e", "f"], "answer": "B"}),
    ],
)
def test_right_answer_must_be_the_number_of_a_choice(name, record, tmp_path):
    with pytest.raises(ValueError, match=r"record 1, is not as .* is .*, and not the number of one of \d choices"):
        read_rows(LOCAL[name], write_file(tmp_path, name, [record]))


GSM8K = {"context": "a", "chain_of_thought": "b", "answer": "3"}


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("lambada_openai", {"context": "I said it to", "continuation": None}, "field continuation is None, not a text"),
        (
            "truthfulqa_mc1",
            {"question": "a", "best": "b", "incorrect": "nope"},
            "field incorrect is 'nope', not a list",
        ),
        (
            "truthfulqa_mc1",
            {"question": "a", "best": "b", "incorrect": []},
            r"field incorrect is \[\], not a list of one",
        ),
        ("winogrande", ROWS["winogrande"][0] | {"continuation": None}, "field continuation is None"),
        (
            "winogrande",
            ROWS["winogrande"][0] | {"context_options": ["a", 1]},
            "field context_options is .*, not a list",
        ),
        ("gsm8k", GSM8K | {"answer": None}, "field answer is None, not a text or a number"),
        ("gsm8k", GSM8K | {"answer": ["3"]}, "field answer is .*, not a text or a number"),
        ("gsm8k", GSM8K | {"chain_of_thought": 3}, "field chain_of_thought is 3, not a text"),
        ("arc_easy", {"query": None, "choices": FOUR, "gold": 2}, "field query is None"),
        ("arc_easy", {"query": "a", "choices": "ab", "gold": 1}, "field choices is 'ab', not a list"),
        ("arc_easy", {"query": "a", "choices": ["\ud83d", "b"], "gold": 1}, "surrogates not allowed"),
        ("mmlu", ROWS["mmlu"][0] | {"subject": 5}, "field subject is 5"),
        ("mmlu", ROWS["mmlu"][0] | {"choices": [*FOUR, "a sea"], "answer": 4}, "field choices has 5 entries, not 4"),
        ("blimp", {"good": None, "bad": "a"}, "field good is None"),
    ],
)
def test_field_of_another_kind_is_refused(name, record, words, tmp_path):
    with pytest.raises(ValueError, match=rf"record 2, is not as eval/README.md describes it .*{words}"):
        read_rows(LOCAL[name], write_file(tmp_path, name, [ROWS[name][0] if name in ROWS else record_of(name), record]))


def test_fields_that_a_task_does_not_read_may_be_of_any_type(tmp_path):
    record = ROWS["arc_easy"][0] | {"context": None, "subject": 5, "best": []}
    assert read_rows(LOCAL["arc_easy"], write_file(tmp_path, "arc_easy", [record]))


def record_of(name: str) -> dict:
    """A valid record of a task that `ROWS` lacks."""
    return GSM8K if name == "gsm8k" else {"question": "a", "best": "b", "incorrect": ["c"]}


MMLU = gzip.compress(json.dumps(ROWS["mmlu"][0]).encode())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("mmlu", MMLU[:-9], "cannot be read .EOFError: "),
        ("mmlu", MMLU[:20] + b"\xff\xff\xff" + MMLU[23:], "cannot be read "),
        ("mmlu", b"not gzip", "cannot be read .BadGzipFile: "),
        ("arc_easy", b'{"query": "\xff"}', "cannot be read .UnicodeDecodeError: "),
        ("wikitext", b" = A = \n\xff", "cannot be read .UnicodeDecodeError: "),
        ("longbench2", b"[\xff]", "cannot be read .UnicodeDecodeError: "),
        ("arc_easy", b"{}x", "is not JSON that can be read .Extra data"),
        ("arc_easy", b"[" * 99999, "is not JSON that can be read "),
    ],
)
def test_file_that_cannot_be_read_is_named(name, content, words, tmp_path):
    path = write_file(tmp_path, "boolq", []).with_name(Path(LOCAL[name].file).name)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} {words}.*: give the file that eval/README.md describes"):
        read_rows(LOCAL[name], path)


def test_byte_order_mark_is_not_part_of_the_first_record(tmp_path):
    path = write_file(tmp_path, "arc_easy", [ROWS["arc_easy"][0]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_rows(LOCAL["arc_easy"], path)) == 1


@pytest.mark.parametrize("line", ["[1, 2]", '"x"', "3", "null"])
def test_line_that_is_no_object_is_refused(line, tmp_path):
    path = write_file(tmp_path, "piqa", [])
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"record 1, is not as eval/README.md describes it"):
        read_rows(LOCAL["piqa"], path)


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "which does not exist"),
        ("", "arc_easy has no examples"),
        ('{"query": "What?", "gold": 0}\n', "record 1, is not as eval/README.md describes it (KeyError: 'choices')"),
        ("one\n", "arc_easy.jsonl is not JSON that can be read (Expecting value"),
    ],
)
def test_missing_or_malformed_file_is_refused(text, words, tmp_path):
    if text is not None:
        write_file(tmp_path, "arc_easy", []).write_text(text)
    with pytest.raises(ValueError, match=r"\w") as refused:
        load_tasks(["arc_easy"], tmp_path, None, None)
    assert words in str(refused.value)


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
