"""Benchmarks from files: the file of each task, and the conversion of its records to the rows of lm-eval's task.

Prompts and metrics stay lm-eval's; only the rows come from another place.
"""

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

from eval.harness.long_files import infinitebench_choice_row, infinitebench_row, longbench2_row
from longctx.data.files import BROKEN
from longctx.data.records import error_line

Row = Mapping[str, object]  # an example in the form that lm-eval's task takes


class TaskRecord(TypedDict, total=False):
    """A record of a file; each benchmark's records have some of these fields.

    ``gold`` is the number of the correct choice.  ``answer`` is that number too (MMLU), or the answer (GSM8K).
    ``best`` is the correct answer, ``incorrect`` are the others (TruthfulQA).
    """

    query: str
    choices: list[str]
    gold: int
    context: str
    continuation: str
    context_options: list[str]
    good: str
    bad: str
    subject: str
    question: str
    answer: int | str
    best: str
    incorrect: list[str]
    chain_of_thought: str
    page: str


_KINDS = get_type_hints(TaskRecord)


@dataclass(frozen=True)
class LocalTask:
    """A benchmark whose rows come from a file.

    ``config_file`` is lm-eval's configuration of the task, relative to its folder of tasks; ``changes`` override
    some of its fields.  ``file`` is relative to the folder of data.  ``convert`` turns a record of the file into a row.
    With ``sorted``, the file is sorted by subject: its rows are shuffled with a fixed seed, so that the first rows
    cover all subjects.
    """

    config_file: str
    file: str
    convert: Callable[[Any], Row]
    changes: Mapping[str, object] = field(default_factory=dict)
    sorted: bool = False


def read_rows(task: LocalTask, path: Path) -> list[Row]:
    """Return the rows of ``path`` as lm-eval's task takes them.

    Raises ValueError, with the number of the record, for one that lacks a field or has another form, and for a file
    that cannot be read.
    """
    read = {".raw": _read_pages, ".json": _read_json_list}.get(path.suffix, _read_json_lines)
    rows = []
    for number, record in enumerate(read(path), 1):
        try:
            if not isinstance(record, dict):
                raise TypeError("it is no JSON object")
            checked = _Checked(record)
            _refuse_no_choice(checked)
            rows.append(task.convert(checked))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}, record {number}, is not as eval/README.md describes it ({type(error).__name__}: {error}): "
                "correct the record, or give the file as it was published"
            ) from error
    return rows


class _Checked(dict[str, Any]):
    """A record whose fields are checked when they are read: those that a task does not read may be of any type.

    Texts must be texts, without half characters, and lists must be lists of one or more texts; otherwise, reading a
    field raises ValueError.
    """

    def __getitem__(self, name: str) -> Any:
        value, kind = super().__getitem__(name), _KINDS.get(name)
        if kind is str and not isinstance(value, str):
            raise ValueError(f"field {name} is {value!r}, not a text")
        if kind == list[str] and not (value and isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise ValueError(f"field {name} is {value!r}, not a list of one or more texts")
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which tokenizers refuse
        return value


def _refuse_no_choice(record: Mapping[str, Any]) -> None:
    """Raise ValueError unless the record's right answer is a number of one of its choices, from 0."""
    choices = record.get("choices") or record.get("context_options") or ()
    count = len(choices) or 2  # questions of yes or no list no choices
    for name in ("gold", "answer") if choices else ("gold",):  # without choices, an answer is a text
        right = record.get(name, 0)
        if type(right) is not int or not 0 <= right < count:
            raise ValueError(f"{name} is {right!r}, and not the number of one of {count} choices, from 0")


def _read_text(path: Path) -> str:
    """Return the text of ``path``, unzipped if it ends in .gz, without a byte-order mark and with newlines only."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError, *BROKEN) as error:
        raise ValueError(
            f"{path} cannot be read ({error_line(error)}): give the file that eval/README.md describes"
        ) from error


def _read_json_lines(path: Path) -> list[TaskRecord]:
    lines = [line for line in _read_text(path).split("\n") if line.strip()]
    return [_parse(line, f"record {number} of {path}") for number, line in enumerate(lines, 1)]


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets too deep
        raise ValueError(
            f"{name} is not JSON that can be read ({error}): give the file that eval/README.md describes"
        ) from error


def _read_json_list(path: Path) -> list[TaskRecord]:
    records = _parse(_read_text(path), str(path))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} is not a JSON list of objects: give the file that eval/README.md describes")
    return records


def _read_pages(path: Path) -> list[TaskRecord]:
    """Return WikiText's pages, each from its title (`` = Title = ``) to the next."""
    pages: list[str] = []
    for line in _read_text(path).split("\n"):
        if not pages or re.match(r" = [^=].* = $", line):
            pages.append("")
        pages[-1] += line + "\n"
    return [{"page": page} for page in pages if page.strip()]


def _letters(row: TaskRecord, question: str) -> Row:
    """Return ``row`` as ARC and OpenBookQA have it: choices with the letters A, B, ..., and the answer's letter.

    ``question`` is the name of the field that has the question.
    """
    labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {
        question: row["query"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _arc(row: TaskRecord) -> Row:
    query = row["query"].removeprefix("Question: ").rstrip("\n")
    return {**_letters(row, "question"), "question": query}


def _openbookqa(row: TaskRecord) -> Row:
    return _letters(row, "question_stem")


def _piqa(row: TaskRecord) -> Row:
    first, second = row["choices"]
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def _boolq(row: TaskRecord) -> Row:
    passage, separator, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
    if not separator:
        raise ValueError("query has no question")
    return {"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]}


def _copa(row: TaskRecord) -> Row:
    """Return a row of COPA for a record whose query is lm-eval's prompt, by undoing that prompt.

    The prompt is the premise without its full stop, a space, and "because" or "therefore".
    """
    premise, _, connector = row["query"].rpartition(" ")
    relation = {"because": "cause", "therefore": "effect"}[connector]
    first, second = row["choices"]
    return {
        "premise": premise.rstrip(",.") + ".",
        "question": relation,
        "choice1": first,
        "choice2": second,
        "label": row["gold"],
    }


def _hellaswag(row: TaskRecord) -> Row:
    """Return a row of HellaSwag; its unfinished sentence has a capital first and lower case after it, as in lm-eval."""
    query = re.sub(r"(?<=[.!?:] )[a-z][^.!?]*$", lambda match: match[0].capitalize(), row["query"])
    return {"query": query, "choices": row["choices"], "label": row["gold"]}


def _blank(row: TaskRecord) -> tuple[str, list[str]]:
    """Return the words with which the two ``context_options`` of ``row`` begin, and the rest of each option.

    The two options are a sentence with a blank, filled in two ways.
    """
    first, second = row["context_options"]
    common = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(min(first, second)))
    before = first[: first.rfind(" ", 0, common) + 1]
    return before, [first[len(before) :], second[len(before) :]]


def _winogrande(row: TaskRecord) -> Row:
    before, (first, second) = _blank(row)
    sentence = f"{before}_ {row['continuation']}"
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(row["gold"] + 1)}


def _wsc273(row: TaskRecord) -> Row:
    before, options = _blank(row)
    end = row["continuation"]
    text = f"{before}_{'' if end.startswith('.') else ' '}{end}"
    return {"text": text, "pronoun": "_", "pronoun_loc": len(before), "options": options, "label": row["gold"]}


def _lambada(row: TaskRecord) -> Row:
    return {"text": f"{row['context']} {row['continuation']}"}


def _blimp(row: TaskRecord) -> Row:
    return {"sentence_good": row["good"], "sentence_bad": row["bad"]}


def _mmlu(row: TaskRecord) -> Row:
    if len(row["choices"]) != 4:
        raise ValueError(f"field choices has {len(row['choices'])} entries, not 4")
    subject = row["subject"].replace("_", " ")
    return {"subject": subject, "question": row["question"], "choices": row["choices"], "answer": row["answer"]}


def _truthfulqa(row: TaskRecord) -> Row:
    return {"question": row["question"], "mc1_targets": {"choices": [row["best"], *row["incorrect"]]}}


def _gsm8k(row: TaskRecord) -> Row:
    if type(row["answer"]) not in (str, int, float):
        raise ValueError(f"field answer is {row['answer']!r}, not a text or a number")
    return {"question": row["context"], "answer": f"{row['chain_of_thought']}\n#### {row['answer']}"}


def _page(row: TaskRecord) -> Row:
    return {"page": row["page"]}


_MMLU = (
    "The following are multiple choice questions (with answers) about {{subject}}.\n\n"
    "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
)
# lm-eval's process_docs has been applied to the rows of these files already.
_PROCESSED: Mapping[str, object] = {"process_docs": None}
# lm-eval's names, the files' names, and the kind of records.
_INFINITEBENCH = (
    ("code_debug", "code_debug", infinitebench_choice_row),
    ("code_run", "code_run", infinitebench_row),
    ("kv_retrieval", "kv_retrieval", infinitebench_row),
    ("longbook_choice_en", "longbook_choice_eng", infinitebench_choice_row),
    ("longbook_qa_chn", "longbook_qa_chn", infinitebench_row),
    ("longbook_qa_en", "longbook_qa_eng", infinitebench_row),
    ("longbook_sum_en", "longbook_sum_eng", infinitebench_row),
    ("longdialogue_qa_en", "longdialogue_qa_eng", infinitebench_row),
    ("math_find", "math_find", infinitebench_row),
    ("number_string", "number_string", infinitebench_row),
    ("passkey", "passkey", infinitebench_row),
)
LOCAL: Mapping[str, LocalTask] = {
    "arc_easy": LocalTask("arc/arc_easy.yaml", "arc/arc_easy.jsonl", _arc),
    "arc_challenge": LocalTask("arc/arc_challenge.yaml", "arc/arc_challenge.jsonl", _arc),
    "blimp": LocalTask("blimp/_template_yaml", "blimp/blimp_1k.jsonl", _blimp, sorted=True),
    "boolq": LocalTask("super_glue/boolq/default.yaml", "boolq/boolq.jsonl", _boolq),
    "copa": LocalTask("super_glue/copa/default.yaml", "copa/copa.jsonl", _copa),
    "gsm8k": LocalTask("gsm8k/gsm8k.yaml", "gsm8k/gsm8k.jsonl", _gsm8k),
    "hellaswag": LocalTask("hellaswag/hellaswag.yaml", "hellaswag/hellaswag_val_1k.jsonl", _hellaswag, _PROCESSED),
    **{
        f"infinitebench_{name}": LocalTask(
            f"infinitebench/infinitebench_{name}.yaml", f"infinitebench/{file}.jsonl", convert
        )
        for name, file, convert in _INFINITEBENCH
    },
    "lambada_openai": LocalTask("lambada/lambada_openai.yaml", "lambada/lambada_openai.jsonl", _lambada),
    "longbench2": LocalTask("longbench2/_longbench_common_yaml", "longbench2/data.json", longbench2_row),
    "mmlu": LocalTask(
        "mmlu/default/_default_template_yaml", "mmlu/mmlu_test_sub.jsonl.gz", _mmlu, {"doc_to_text": _MMLU}, sorted=True
    ),
    "openbookqa": LocalTask("openbookqa/openbookqa.yaml", "openbookqa/openbook_qa.jsonl", _openbookqa),
    "piqa": LocalTask("piqa/piqa.yaml", "piqa/piqa.jsonl", _piqa),
    "truthfulqa_mc1": LocalTask("truthfulqa/truthfulqa_mc1.yaml", "truthfulqa/truthfulqa.jsonl", _truthfulqa),
    "wikitext": LocalTask("wikitext/wikitext.yaml", "wikitext2/wiki.test.raw", _page),
    "winogrande": LocalTask("winogrande/default.yaml", "winogrande/winogrande.jsonl", _winogrande),
    "wsc273": LocalTask("wsc273/default.yaml", "winograd/winograd_wsc.jsonl", _wsc273, _PROCESSED),
}


def join_names(names: Sequence[str] = tuple(LOCAL)) -> str:
    """Return ``names`` (default: the tasks of `LOCAL`) joined by commas, for messages."""
    return ", ".join(names)
