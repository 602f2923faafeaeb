"""Records of the tasks' files with lm-eval's prompts; a tokenizer of letters; a model that prefers one text."""

import gzip
import json
from pathlib import Path

from eval.harness.lm import EngineLM
from eval.harness.local import LOCAL

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
