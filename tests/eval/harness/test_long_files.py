"""LongBench v2 and InfiniteBench from files: lm-eval's prompts and scores, and refusals that name the field."""

import json
from types import SimpleNamespace

import pytest

from eval.answers.requests import Continue
from eval.harness.lm import EngineLM, make_recorder
from eval.harness.local import LOCAL
from eval.harness.tasks import answer_tasks, build_requests, collect_outcomes, load_tasks
from tests.eval.harness.records import Letters

LONGBENCH2 = {
    "_id": "66f36490821e116aacb2cc22", "domain": "Single-Document QA", "sub_domain": "Financial", "difficulty": "easy",
    "length": "short", "question": "Who pays? ", "choice_A": "a man", "choice_B": "a boat", "choice_C": "a bank",
    "choice_D": "no one", "answer": "C", "context": "A bank pays.",
}  # fmt: skip
BOOK = {"id": 3, "context": "A man rowed.", "input": "Who rowed?", "answer": ["a man"], "options": []}
# The file in eval.data, a record, a part of the prompt, texts with full score and with none, the most new tokens.
INFINITEBENCH = {
    "passkey": ("passkey", BOOK | {"answer": ["71432"]}, "A man rowed.\n\nWho rowed?", "It is 71432.", "7143", 6),
    "number_string": ("number_string", BOOK | {"answer": [11223]}, "rowed.\n\nWho rowed?", " 11223", "1122", 12),
    "kv_retrieval": ("kv_retrieval", BOOK | {"answer": ["a-b"]}, "A man rowed.\n\nWho rowed?", '"a-b"', "a-bc", 50),
    "code_run": (
        "code_run", BOOK | {"input": "What is func_1(-3)?", "answer": [-12]}, "value of func_1(-3).", "-12", "12", 5
    ),
    "math_find": ("math_find", BOOK | {"input": "The largest of all:", "answer": [3.5]}, "the largest", "3.5", "5", 3),
    "code_debug": (
        "code_debug", BOOK | {"answer": ["f"], "options": ["e", "f", "g", "h"]}, "A. e\nB. f\nC. g\nD. h", "B", "C", 5
    ),
    "longbook_choice_en": (
        "longbook_choice_eng", BOOK | {"options": ["a dog", "a cat", "no", "a man"]}, "D. a man", "D. a man", "A", 40
    ),
    "longdialogue_qa_en": ("longdialogue_qa_eng", BOOK | {"answer": ["ANN"]}, "A man rowed.", "Ann", "Eve", 40),
    "longbook_qa_en": ("longbook_qa_eng", BOOK, "Question: Who rowed?", "A man", "Eve", 40),
    "longbook_qa_chn": ("longbook_qa_chn", BOOK | {"answer": ["船"]}, "Who rowed?\n请尽量", "船", "海", 40),
    "longbook_sum_en": ("longbook_sum_eng", BOOK, "A man rowed.", "a man", "Eve", 1200),
}  # fmt: skip


def load(name: str, records: object, folder) -> dict:
    file = folder / LOCAL[name].file
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(records) if file.suffix == ".json" else "".join(json.dumps(one) + "\n" for one in records)
    file.write_text(lines, encoding="utf-8")
    tasks = load_tasks([name], folder, None, None)
    build_requests(tasks, {name: None})
    return tasks


def test_longbench2_is_a_choice_of_letters(tmp_path):
    tasks = load("longbench2", [LONGBENCH2, LONGBENCH2 | {"answer": "A"}], tmp_path)
    contexts, letters = zip(*(one.args for one in tasks["longbench2"].instances), strict=True)
    assert letters == (" A", " B", " C", " D") * 2
    assert contexts[0].startswith("Please read") and "<text>\nA bank pays.\n</text>" in contexts[0]
    assert contexts[0].endswith(
        "question: Who pays?\nChoices:\n(A) a man\n(B) a boat\n(C) a bank\n(D) no one\n\nAnswer:"
    )
    answer_tasks(
        tasks, EngineLM(Letters(), 4096, 0, lambda asked: [(-1.0 * (one.tokens[-1] != 67), True) for one in asked])
    )
    outcomes = collect_outcomes("longbench2", tasks["longbench2"])
    assert (outcomes.values, outcomes.available) == ((1.0, 0.0), 2) and outcomes.chance == 0.5


def test_all_tasks_of_infinitebench_are_known():
    assert {f"infinitebench_{name}" for name in INFINITEBENCH} == {one for one in LOCAL if one.startswith("infinite")}


@pytest.mark.parametrize("name", INFINITEBENCH)
def test_infinitebench_has_lm_evals_prompt_and_score(name, tmp_path):
    file, record, part, right, wrong, tokens = INFINITEBENCH[name]
    name = f"infinitebench_{name}"
    assert LOCAL[name].file == f"infinitebench/{file}.jsonl"
    tasks = load(name, [record, record | {"id": 4}], tmp_path)
    asked = []
    answer_tasks(tasks, EngineLM(Letters(), 4096, 0, lambda requests: asked.extend(requests) or [right, wrong]))
    prompt = "".join(map(chr, asked[0].tokens))
    assert part in prompt and "A man rowed." in prompt and asked[0].max_new_tokens == tokens
    outcomes = collect_outcomes(name, tasks[name])
    assert outcomes.values == (1.0, 0.0)
    assert outcomes.chance == (0.25 if record["options"] else 0.0)


@pytest.mark.parametrize(
    ("name", "record", "says"),
    [
        ("longbench2", LONGBENCH2 | {"choice_B": None}, "field choice_B is of type NoneType, not str"),
        ("longbench2", LONGBENCH2 | {"answer": "E"}, "field answer is 'E', not one of A, B, C, D"),
        ("longbench2", LONGBENCH2 | {"answer": "AB"}, "field answer is 'AB'"),
        (
            "longbench2",
            {name: LONGBENCH2[name] for name in LONGBENCH2 if name != "context"},
            "field context is missing",
        ),
        ("longbench2", LONGBENCH2 | {"image": "x"}, "field image is not one of _id, domain"),
        ("infinitebench_passkey", BOOK | {"answer": "7"}, "field answer is of type str, not list"),
        (
            "infinitebench_passkey",
            BOOK | {"answer": []},
            r"field answer is \[\], not a list of one or more texts or numbers",
        ),
        (
            "infinitebench_passkey",
            BOOK | {"answer": [None]},
            r"field answer is \[None\], not a list of one or more texts",
        ),
        ("infinitebench_passkey", BOOK | {"options": [1]}, r"field options is \[1\], not a list of texts"),
        ("infinitebench_passkey", BOOK | {"question": "x"}, "field question is not one of id, context"),
        ("infinitebench_code_debug", BOOK, "field options has 0 entries, not 4"),
        (
            "infinitebench_longbook_choice_en",
            BOOK | {"options": list("abcd")},
            "'a man', which is not one of the options",
        ),
    ],
)
def test_unknown_form_is_refused(name, record, says, tmp_path):
    good = LONGBENCH2 if name == "longbench2" else BOOK | {"options": ["a man", "a", "b", "c"]}
    with pytest.raises(ValueError, match=rf"record 2, is not as eval/README.md describes it .*{says}"):
        load(name, [good, record], tmp_path)


@pytest.mark.parametrize(
    ("records", "says"),
    [({"data": [LONGBENCH2]}, "is not a JSON list of objects"), ([[1]], "is not a JSON list of objects")],
)
def test_file_that_is_no_list_is_refused(records, says, tmp_path):
    with pytest.raises(ValueError, match=rf"data.json {says}"):
        load("longbench2", records, tmp_path)


def test_long_texts_lose_their_middle():
    """Half of the tokens that fit come from the beginning, the rest from the end; the answer has its own."""
    asked: list = []
    lm = EngineLM(Letters(), 17, 0, make_recorder(asked))
    text, settings = "abcdefghijklmnopqrstuvwxyz", {"until": [], "max_gen_toks": 6}
    choices = [SimpleNamespace(args=(text, " A"), task_name=name, doc_id=0) for name in ("longbench2", "arc_easy")]
    texts = [SimpleNamespace(args=(text, settings), task_name=name) for name in ("infinitebench_passkey", "needle_99")]
    lm.loglikelihood(choices)
    lm.generate_until(texts)
    cut = ["".join(map(chr, one.tokens)) for one in asked]
    assert cut == ["abcdefgh" + "stuvwxyz" + " A", "klmnopqrstuvwxyz A", "abcdeuvwxyz", "pqrstuvwxyz"]
    assert asked[0].begin == len("abcdefghstuvwxyz") and isinstance(asked[2], Continue) and lm.cut == 4
