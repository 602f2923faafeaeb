"""RULER's tasks: lm-eval's definitions, the requested length, no point for guessing."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lm_eval.tasks.ruler import common_utils

from eval.harness.generated import depth_of, make_generated_tasks
from eval.harness.ruler import _NEEDLES, QUESTIONS, RULER, make_ruler_examples, make_ruler_tasks, score_answer
from eval.harness.ruler_fillers import RulerSource, niah
from eval.harness.tasks import build_requests, collect_outcomes
from longctx.hf.scratch import bytes_tokenizer

LENGTH = 2999
tokenizer = bytes_tokenizer()
WORDS = [f"word{i}{'.' * (i % 7 == 6)}" for i in range(9000)]
FACTS = [f"The river of town {i} is the {name}." for i, name in enumerate(["Rhine", "Ems", "Po", "Inn", "Lek"] * 30)]
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {"context": fact, "qas": [{
                    "question": f"Which river?{i}", "is_impossible": i % 3 == 2,
                    "answers": [{"text": fact.split()[-1][:-1]}, {"text": "the river"}],
                }]}
                for i, fact in enumerate(FACTS[start : start + 50])
            ]
        }
        for start in range(0, 150, 50)
    ]
}  # fmt: skip
HOTPOT = [
    {
        "question": f"Which rivers are in {i}?",
        "answer": FACTS[i].split()[-1][:-1],
        "context": [[f"Town {k}", [FACTS[k]]] for k in (i, i + 50)],
    }
    for i in range(50)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for file, content in {"squad/dev-v2.0.json": SQUAD, "hotpotqa/hotpot_dev_distractor_v1.json": HOTPOT}.items():
        (data / file).parent.mkdir()
        (data / file).write_text(json.dumps(content))
    return RulerSource(WORDS, data, tokenizer, LENGTH)


def yaml_of(name: str) -> str:
    return (Path(common_utils.__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")


def test_tasks_are_those_of_lm_eval_s_group():
    assert sorted(RULER) == sorted(re.findall(r"^  - (\w+)$", yaml_of("ruler"), re.MULTILINE))


@pytest.mark.parametrize("name", RULER)
def test_settings_are_lm_eval_s(name):
    """They are read from its YAML files: the tokens of an answer, and what stands before its beginning."""
    included = "qa_squad" if "qa" in name else "niah_single_1"
    texts = [yaml_of(file) for file in (name.removeprefix("ruler_"), included, "niah_single_1")]
    (tokens, *_) = (int(one) for text in texts for one in re.findall(r"max_gen_toks: (\d+)", text))
    (delimiter, *_) = (one for text in texts for one in re.findall(r'target_delimiter: "(.*)"', text))
    assert (RULER[name].answer_tokens, RULER[name].delimiter) == (tokens, delimiter.replace("\\n", "\n"))


@pytest.mark.parametrize("name", _NEEDLES)
def test_needles_are_lm_eval_s(name, monkeypatch):
    niah()
    from lm_eval.tasks.ruler import niah_utils

    asked = {}
    monkeypatch.setattr(niah_utils, "get_haystack", lambda type_haystack: type_haystack)
    monkeypatch.setattr(niah_utils, "get_tokenizer", lambda name: name)
    monkeypatch.setattr(niah_utils, "download_dataset", list)
    monkeypatch.setattr(niah_utils, "generate_samples", lambda haystack, **settings: asked.update(settings))
    getattr(niah_utils, name)(max_seq_lengths=[LENGTH])
    needles = _NEEDLES[name]
    assert asked["template"] == niah_utils.TEMPLATE and asked["type_haystack"] == needles.haystack
    assert (asked["type_needle_k"], asked["type_needle_v"]) == (needles.keys, needles.values)
    queries = asked.get("num_needle_q", 1)
    assert (max(asked.get("num_needle_k", 1), queries), queries) == (needles.keys_hidden, needles.keys_asked)
    assert asked.get("num_needle_v", 1) == needles.values_per_key


@pytest.mark.parametrize("name", RULER)
def test_example_contains_its_answers_and_has_the_requested_length(name, source):
    examples = make_ruler_examples(name, source, 5, seed=3)
    task = RULER[name]
    for row in examples:
        tokens = len(tokenizer(row["input"] + task.delimiter + row["gen_prefix"])["input_ids"]) + task.answer_tokens
        assert 0.97 * LENGTH < tokens <= LENGTH
        found = [answer for answer in row["outputs"] if answer in row["input"]]
        assert found == row["outputs"] or (name == "ruler_qa_squad" and found == row["outputs"][:1])
        assert score_answer(row, [f" {', '.join(row['outputs']).upper()}."]) == {"recall": 1.0}
        half = {"recall": len(row["outputs"][1:]) / len(row["outputs"])}
        assert score_answer(row, [" ".join(row["outputs"][1:])]) == half
    assert len({row["input"] for row in examples}) == 5
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    assert examples[:3] == make_ruler_examples(name, source, 3, seed=3)
    assert (state, numpy_state) == (random.getstate(), np.random.get_state()[1].tolist())
    assert "qa" in name or examples != make_ruler_examples(name, source, 5, seed=4)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_3", "niah_multikey_2", "association"])
def test_depth_is_the_share_of_the_text_before_the_fact(name, source):
    lines = [f"line {i} of 10." for i in range(9)]
    for at in range(0, 9, 4):
        text = "\n".join([*lines[:at], "its is 4711 .", *lines[at:], "of 10."])
        assert depth_of(f"{name}_99", {"input": text, "outputs": ["4711"]}) == pytest.approx(at / 10, abs=0.06)
    assert depth_of("niah_multivalue_99", {"input": text, "outputs": ["4711", "4712"]}) is None
    assert depth_of("arc_easy", {}) is None
    if name != "association":  # whose test has another text
        depths = [depth_of(f"{name}_99", row) for row in make_ruler_examples(name, source, 9, 0)]
        assert min(depths) < 0.4 and max(depths) > 0.6 and len(set(depths)) > 5


@pytest.mark.parametrize("text", ["", "Rhine \x07 EMS", "po", "the lek and the inn"])
def test_score_is_lm_eval_s(text):
    row = {"input": "", "gen_prefix": "", "outputs": ["Ems", "Rhine", "lek"], "max_length": 4096}
    for process in (common_utils.process_results, common_utils.process_results_part):
        assert score_answer(row, [text])["recall"] == process(row, [text])["4096"]


def test_shown_chain_of_variables_leads_to_its_answer(source):
    (row,) = make_ruler_examples("ruler_vt", source, 1, 0)
    asked = re.search(r"assigned the value (\d+) in the text above\. *$", row["input"])[1]
    assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", row["input"]))
    chain = [asked, *row["outputs"]]
    assert all(assigned[one] == before for before, one in pairwise(chain)) and len(chain) == 6


@pytest.mark.parametrize(("name", "begins"), [("ruler_cwe", "most often.\n"), ("ruler_fwe", "coded words. ")])
def test_asked_words_are_the_most_common(name, begins, source):
    (row,) = make_ruler_examples(name, source, 1, 0)
    text = row["input"].partition(begins)[2].partition("\nQuestion:")[0]
    counts = Counter(word for word in text.split() if not re.fullmatch(r"\d+\.|\.\.\.", word)).most_common()
    assert {word for word, _ in counts[: len(row["outputs"])]} == set(row["outputs"])
    assert counts[len(row["outputs"]) - 1][1] > counts[len(row["outputs"])][1] > 0


def test_prompt_is_joined_as_lm_eval_joins_it_and_fits(source):
    counts = {"niah_multiquery": 2, "ruler_cwe": 1, "ruler_qa_hotpot": 3, "needle": 2}
    tasks = make_generated_tasks(counts, [1501, LENGTH], "pydoc", tokenizer, 4096, source.data, 0)
    build_requests(tasks, dict.fromkeys(tasks))
    for name, task in tasks.items():
        kind, _, length = name.rpartition("_")
        assert [instance.doc_id for instance in task.instances] == list(range(counts[kind]))
        for instance in task.instances:
            context, settings = instance.args
            assert len(tokenizer(context)["input_ids"]) + settings["max_gen_toks"] <= int(length)
            if kind in RULER:
                assert context == f"{instance.doc['input']}{RULER[kind].delimiter}{instance.doc['gen_prefix']}"
            instance.resps = [" ".join(instance.doc["outputs"][1:])] if kind in RULER else ["?"]
        outcomes = collect_outcomes(name, task)
        assert outcomes.length == int(length)
        assert (outcomes.available is None) == (kind not in QUESTIONS), "the sets of questions end"
        assert len(outcomes.depths) == (counts[kind] if kind == "needle" else 0)
        assert set(outcomes.values) == {{"niah_multiquery": 0.75, "ruler_cwe": 0.9}.get(kind, 0.0)}


@pytest.mark.parametrize(
    ("name", "length", "words"),
    [
        ("niah_single_1", 101, "eval.lengths=101: too short for niah_single_1"),
        ("ruler_vt", 307, "eval.lengths=307: too short for ruler_vt"),
        ("niah_multivalue", 99991, "eval.text has 9,000 words, too few for eval.lengths=99991"),
        ("ruler_qa_hotpot", LENGTH, "has 50 questions: use eval.limit=50 or fewer"),
    ],
)
def test_impossible_example_is_refused(name, length, words, source):
    with pytest.raises(ValueError, match=words):
        make_ruler_examples(name, replace(source, length=length), 51, 0)


def test_question_keeps_its_document_whatever_the_length(source):
    """The search for the size tries all documents, of which not all fit."""
    for length in (1201, 7307):
        rows = make_ruler_examples("ruler_qa_squad", replace(source, length=length), 20, 0)
        for row in rows:
            town = re.search(r"Which river\?(\d+)", row["input"])[1]
            assert f"The river of town {town} is the {row['outputs'][0]}." in row["input"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "dev-v2.0.json does not exist"),
        ("{}", "not in the data set's own format"),
        ("{", "data set's own format"),
        ('{"data": []}', "dev-v2.0.json has no questions: give the file as it was published"),
    ],
)
def test_wrong_file_of_questions_is_refused(content, words, tmp_path):
    if content is not None:
        (tmp_path / "squad").mkdir()
        (tmp_path / "squad" / "dev-v2.0.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        make_ruler_examples("ruler_qa_squad", RulerSource(WORDS, tmp_path, tokenizer, LENGTH), 1, 0)


def test_more_lengths_than_questions_are_refused(source):
    """No eval.limit is small enough."""
    few = RulerSource(WORDS, source.data.parent / "few", tokenizer, LENGTH)
    (few.data / "hotpotqa").mkdir(parents=True)
    (few.data / "hotpotqa" / "hotpot_dev_distractor_v1.json").write_text(json.dumps(HOTPOT[:2]))
    with pytest.raises(ValueError, match=r"ruler_qa_hotpot has 2 questions for 3 lengths: use at most 2 eval\.lengths"):
        make_ruler_tasks({"ruler_qa_hotpot": 1}, [1501, 1502, LENGTH], few, 0)


def test_lengths_ask_different_questions(source):
    tasks = make_generated_tasks({"ruler_qa_hotpot": 5}, [1501, LENGTH], "pydoc", tokenizer, 4096, source.data, 0)
    asked = [{row["input"].rpartition("Question:")[2] for row in task.eval_docs} for task in tasks.values()]
    assert len(asked[0]) == len(asked[1]) == 5 and not asked[0] & asked[1], "intervals take examples for independent"
    assert {task.config.metadata["available"] for task in tasks.values()} == {25}
    with pytest.raises(ValueError, match=r"has 50 questions for 2 lengths: use eval\.limit=25"):
        make_generated_tasks({"ruler_qa_hotpot": 26}, [1501, LENGTH], "pydoc", tokenizer, 4096, source.data, 0)
