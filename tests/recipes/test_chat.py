"""recipes.chat: a conversation is the same on any mesh; unusable turns and settings are refused, and lose nothing."""

import json
import os
import shutil
import threading
import time
from functools import partial
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longctx.config import Sampling
from longctx.data.turns import UserTurn
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import RankFailed, run_ranks
from longctx.parallel.threads import ThreadComm, ThreadWorld, run_threads
from recipes import chat
from recipes.common import conversation
from recipes.common.conversation import take_turn, typed_turns
from tests.recipes.chats import TURNS, converse, tokens
from tests.recipes.conftest import SAVED


def test_answers_are_the_same_on_every_mesh_and_strategy(cli, tiny, turns, tmp_path):
    one_rank = converse(cli, tiny, tmp_path, f"turns={turns}")
    assert [(t["new"], t["cached"]) for t in one_rank] == [(11, 0), (9 + 1, 13), (3, 23)]
    assert [len(t["token_ids"]) for t in one_rank] == [3, 0, 5]
    assert one_rank[0]["ttit_s"] > 0 and one_rank[1]["ttit_s"] is None
    for settings in (
        ["mesh.ring=2", "context.strategy=auto"],
        ["mesh.ring=2", "mesh.ulysses=3", "context.strategy=pass_q", "context.chunk=4"],
    ):
        figures = converse(cli, tiny, tmp_path, f"turns={turns}", *settings)
        assert tokens(figures) == tokens(one_rank)
        assert all(turn["bytes_sent"] > 0 for turn in figures)
    assert all(turn["why"] == "as asked" for turn in figures)


def test_log_probabilities_are_written(cli, tiny, turns, tmp_path):
    figures = converse(cli, tiny, tmp_path, f"turns={turns}", "sampling.logprobs=2")
    assert [[one["token"] for one in turn["logprobs"]] for turn in figures] == tokens(figures)
    assert all(len(one["top"]) == 2 and one["logprob"] < 0 for turn in figures for one in turn["logprobs"])


def test_turn_over_the_context_is_refused_and_the_next_is_answered(cli, tiny, tmp_path):
    file, out = tmp_path / "turns.jsonl", tmp_path / "out.json"
    file.write_text("\n".join(map(json.dumps, [TURNS[0], {"text": "x" * 90}, TURNS[2]])))
    code, _, err = cli(chat, chat.task, f"model={tiny}", f"out={out}", f"turns={file}", "mesh.ring=2")
    assert code == 1 and "refused: turn 2 of 3" in err
    figures = json.loads(out.read_text())["turns"]
    assert "the model's context is 97" in figures[1]["error"]
    file.write_text("\n".join(map(json.dumps, [TURNS[0], TURNS[2]])))
    assert [tokens(figures)[0], tokens(figures)[2]] == tokens(converse(cli, tiny, tmp_path, f"turns={file}"))


STRICT = """{% for message in messages %}{% if "[stop]" in message.content %}{{ raise_exception("not [stop]") }}
{% endif %}{{ message.content }}{% endfor %}"""


@pytest.fixture(scope="module")
def strict(tiny, tmp_path_factory) -> Path:
    """The tiny model with a chat template that refuses a text with "[stop]"."""
    folder = tmp_path_factory.mktemp("models") / "strict"
    shutil.copytree(tiny, folder)
    tokenizer = tokenizer_of(folder)
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(folder)
    return folder


def test_turn_that_the_template_refuses_is_forgotten(cli, strict, tmp_path):
    file, out = tmp_path / "turns.jsonl", tmp_path / "out.json"
    file.write_text("\n".join(map(json.dumps, [TURNS[0], {"text": "please [stop]"}, TURNS[2]])))
    code, _, err = cli(chat, chat.task, f"model={strict}", f"out={out}", f"turns={file}", "mesh.ring=2")
    assert code == 1 and f"saved after every turn: {out}" in err and "Traceback" not in err
    figures = json.loads(out.read_text())["turns"]
    assert figures[1] == {"text": "please [stop]", "error": "TemplateError: not [stop]", "token_ids": []}
    assert [len(turn["token_ids"]) for turn in figures] == [3, 0, 5] and figures[2]["cached"] == figures[0]["new"] + 2


def run_with_shown_turns_in(file, rank, job):
    chat.show_turn = lambda number, _: file.write_text(f"turn {number}")
    chat.run_rank(rank, job)


def test_turn_that_cannot_be_saved_is_printed(config_of, tiny, turns, tmp_path):
    (tmp_path / "turns.json.partial").mkdir()  # in the way of the file to write
    job = chat.prepare(config_of("chat", f"model={tiny}", f"turns={turns}", f"out={tmp_path}/turns.json"))
    with pytest.raises(RankFailed, match=r"raised IsADirectoryError: .*turns\.json'"):
        run_ranks(1, partial(run_with_shown_turns_in, tmp_path / "shown"), job)
    assert (tmp_path / "shown").read_text() == "turn 1"


@pytest.mark.parametrize("ranks", [1, 2])
def test_error_of_the_computation_is_forgotten_on_one_rank_only(tiny, ranks):
    """Several ranks may be at different places when one fails."""

    class Session:
        def __init__(self):
            shape, tp = SimpleNamespace(end_tokens=(), layers=2), SimpleNamespace(size=ranks)
            self.sequences, self.engine = {}, SimpleNamespace(ranks=1, tp=tp, shape=shape)
            self.context = SimpleNamespace(chunk=None)
            self.sampling = Sampling()

        def refuse(self, *_):
            pass

        def turn(self, *_, **__):
            raise RuntimeError("out of\nmemory")

    if ranks > 1:
        with pytest.raises(RuntimeError, match="out of"):
            take_turn(Session(), UserTurn("a", 1), tokenizer_of(tiny), shown=False)
        return
    figures = take_turn(Session(), UserTurn("a", 1), tokenizer_of(tiny), shown=False)
    assert figures == {"text": "a", "error": "RuntimeError: out of memory", "token_ids": []}


def pipe(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(content), encoding="ascii", errors="surrogateescape"))


def test_piped_turns_are_utf8_in_any_locale_and_have_no_byte_order_mark(config_of, tiny, monkeypatch):
    pipe(monkeypatch, "\ufeffünd?\r\n\n  so \n".encode())
    assert [turn.text for turn in chat.prepare(config_of("chat", f"model={tiny}")).turns] == ["ünd?", "so"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\nhello \xff there\n", "line 2 of the piped turns is not UTF-8 text (byte 6 of the line)"),
        (b" \n", "there are no turns and no terminal"),
    ],
)
def test_unusable_piped_turns_are_refused(refused, tiny, monkeypatch, content, words):
    pipe(monkeypatch, content)
    assert words in refused(chat, chat.task, f"model={tiny}")


def test_under_a_launcher_turns_must_be_in_a_file(refused, tiny, under_torchrun):
    under_torchrun(0, 2)
    assert "under a launcher turns cannot be typed" in refused(chat, chat.task, f"model={tiny}", "mesh.ring=2")


def test_empirical_rule_without_fitted_constants_is_refused(refused, tiny, turns):
    line = refused(chat, chat.task, f"model={tiny}", f"turns={turns}", "mesh.ring=2", "context.strategy=empirical")
    assert "needs a hardware file with fitted constants" in line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "has no turns"),
        ("{", "line 1 is not JSON"),
        ('{"text": ""}', 'line 1 needs some "text"'),
        ('["text"]', 'line 1 needs some "text"'),
        ('{"text": "a", "max_new_tokens": -1}', "is -1, use a number of tokens"),
        ('{"text": "a", "max_new_tokens": true}', "is true, use a number of tokens"),
        ('{"text": "a", "tokens": 3}', 'has an unknown "tokens"'),
    ],
)
def test_malformed_turns_are_refused(refused, tiny, tmp_path, line, words):
    file = tmp_path / "turns.jsonl"
    file.write_text(line)
    assert words in refused(chat, chat.task, f"model={tiny}", f"turns={file}")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("turns=/nowhere.jsonl", "turns=/nowhere.jsonl cannot be read"),
        ("max_new_tokens=-1", "max_new_tokens=-1"),
        ("hardware=/nowhere.yaml", "hardware=/nowhere.yaml cannot be read"),
        ("mesh.dp=2", "no use for mesh.dp=2"),
        ("context.strategy=pass_the_salt", "context.strategy=pass_the_salt"),
        ("session.keep=x", "keep"),
        (f"hardware={SAVED / 'hardware' / 'calibrated.yaml'}", "is not used by context.strategy=pass_kv: leave it out"),
        ("out=turns", "out=turns is not the name of a .json file"),
        ("sampling.top_p=0.5", "sampling.top_p=0.5 has no effect at sampling.temperature=0"),
        ("sampling.stop_tokens=[999999]", "sampling.stop_tokens has token 999,999, beyond the model's vocabulary"),
    ],
)
def test_wrong_settings_are_refused(refused, tiny, turns, setting, words):
    assert words in refused(chat, chat.task, f"model={tiny}", f"turns={turns}", setting)


def test_ranks_hear_from_the_first_while_nobody_types(monkeypatch):
    """A person may think for longer than a rank waits for a message."""
    typist, terminal = os.openpty()
    monkeypatch.setattr(conversation, "_TERMINAL", Path(os.ttyname(terminal)))
    monkeypatch.setattr(conversation, "_WAIT_S", 0.05)

    def listen(ranks: ThreadWorld, rank: int) -> tuple[list[str], int]:
        world, messages = ThreadComm(ranks, rank, (0, 1, 2)), []
        counted = SimpleNamespace(
            rank=world.rank, size=world.size, all_gather=lambda *args: messages.append(1) or world.all_gather(*args)
        )
        return [turn.text for turn in typed_turns(counted, 5, torch.device("cpu"))], len(messages)

    def type_slowly() -> None:
        for line in ("hello there", "ünd?", ""):
            time.sleep(0.4)
            os.write(typist, f"{line}\n".encode())

    typing = threading.Thread(target=type_slowly)
    typing.start()
    heard = run_threads(3, listen)
    typing.join()
    assert [texts for texts, _ in heard] == [["hello there", "ünd?"]] * 3
    assert len({count for _, count in heard}) == 1 and heard[0][1] > 10
