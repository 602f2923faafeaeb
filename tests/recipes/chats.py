"""Conversations of recipes.chat for tests: three turns, and the figures of their answers."""

import json

from recipes import chat

TURNS = [
    {"text": "Hello, you.", "max_new_tokens": 3},
    {"text": "And then?", "max_new_tokens": 0},
    {"text": "So.", "max_new_tokens": 5},
]


def converse(cli, tiny, tmp_path, *settings) -> list[dict]:
    """Run recipes.chat and return the figures of each turn."""
    out = tmp_path / "out.json"
    code, _, err = cli(chat, chat.task, f"model={tiny}", f"out={out}", *settings)
    assert code == 0, err
    return json.loads(out.read_text())["turns"]


def tokens(figures: list[dict]) -> list[list[int]]:
    return [turn["token_ids"] for turn in figures]
