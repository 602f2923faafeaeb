"""recipes.chat: a conversation is the same on any mesh and across a save; bad input is refused and loses nothing."""

import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longctx.config import Context, Mesh, Sampling
from longctx.data.turns import UserTurn
from longctx.hf.checkpoint import fingerprint
from longctx.hf.config import tokenizer_of
from longctx.infer.session_index import write_index
from longctx.parallel.launch import RankFailed, run_ranks
from longctx.parallel.threads import ThreadComm, ThreadWorld, run_threads
from recipes import chat, reproduce
from recipes.common import conversation
from recipes.common.conversation import take_turn, typed_turns
from recipes.common.lock import hold, lock_beside
from tests.infer.talk import Save, Say, Segment, play
from tests.recipes.conftest import SAVED

TURNS = [
    {"text": "Hello, you.", "max_new_tokens": 3},
    {"text": "And then?", "max_new_tokens": 0},
    {"text": "So.", "max_new_tokens": 5},
]


@pytest.fixture
def turns(tmp_path: Path) -> Path:
    """A file with the three turns of `TURNS`, and an empty line, which is not a turn."""
    file = tmp_path / "turns.jsonl"
    file.write_text("\n".join(map(json.dumps, TURNS)) + "\n\n")
    return file


def converse(cli, tiny, tmp_path, *settings) -> list[dict]:
    """Run recipes.chat and return the figures of each turn."""
    out = tmp_path / "out.json"
    code, _, err = cli(chat, chat.task, f"model={tiny}", f"out={out}", *settings)
    assert code == 0, err
    return json.loads(out.read_text())["turns"]


def tokens(figures: list[dict]) -> list[list[int]]:
    return [turn["token_ids"] for turn in figures]


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


def test_conversation_with_the_default_settings_is_reproduced(cli, tiny, turns, tmp_path, monkeypatch, capsys):
    """The second run, in this process here, decodes by the way that ``context.decode=auto`` chose in the first."""

    def run_here(command, *, stdin, **_):
        assert stdin == subprocess.DEVNULL
        return SimpleNamespace(returncode=cli(chat, chat.task, *command[3:])[0])

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=run_here, DEVNULL=subprocess.DEVNULL))
    converse(cli, tiny, tmp_path, f"turns={turns}")
    reproduce.reproduce([str(tmp_path / "out.json")])
    assert "context.decode" in (err := capsys.readouterr().err) and "figures that differ" not in err


def test_log_probabilities_are_written(cli, tiny, turns, tmp_path):
    figures = converse(cli, tiny, tmp_path, f"turns={turns}", "sampling.logprobs=2")
    assert [[one["token"] for one in turn["logprobs"]] for turn in figures] == tokens(figures)
    assert all(len(one["top"]) == 2 and one["logprob"] < 0 for turn in figures for one in turn["logprobs"])


def test_session_behind_a_link_is_saved_after_every_turn(cli, tiny, turns, tmp_path):
    place, link = tmp_path / "elsewhere" / "talk", tmp_path / "talk"
    place.mkdir(parents=True)
    link.symlink_to(place)
    figures = converse(cli, tiny, tmp_path, f"turns={turns}", f"session.save={link}")
    assert link.is_symlink() and len(figures) == len(TURNS)
    tokens_of = json.loads((place / "session.json").read_text())["tokens"]["0"]
    assert len(tokens_of) == figures[-1]["new"] + figures[-1]["cached"] + len(figures[-1]["token_ids"])


def test_saved_session_resumes_on_another_mesh(cli, tiny, tmp_path, turns):
    whole = converse(cli, tiny, tmp_path, f"turns={turns}")
    session, figures = tmp_path / "talk", []
    # Nine ranks share three KV heads; one of the three ranks with the same head writes it.
    for turn, mesh in zip(TURNS, ("mesh.ring=2", "mesh.ulysses=9", "mesh.tp=3"), strict=True):
        file = tmp_path / "turn.jsonl"
        file.write_text(json.dumps(turn))
        load = [f"session.load={session}"] if figures else []
        figures += converse(cli, tiny, tmp_path, f"turns={file}", mesh, f"session.save={session}", *load)
    assert tokens(figures) == tokens(whole)


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


class LostTerminal(tuple):
    """Turns that end in an error, as those of a terminal that is closed."""

    def __iter__(self):
        yield from super().__iter__()
        raise OSError("the terminal is gone")


def test_conversation_is_saved_after_every_turn(config_of, tiny, tmp_path):
    folder, out = tmp_path / "talk", tmp_path / "out.json"
    file = tmp_path / "turns.jsonl"
    file.write_text(json.dumps(TURNS[0]))
    words = (f"model={tiny}", f"turns={file}", f"out={out}", f"session.save={folder}")
    job = chat.prepare(config_of("chat", *words))
    job = replace(job, turns=LostTerminal(UserTurn(turn["text"], turn["max_new_tokens"]) for turn in TURNS[:2]))
    with pytest.raises(RankFailed, match="raised OSError: the terminal is gone") as failed:
        run_ranks(1, chat.run_rank, job)
    assert failed.value.details == "", "one line, without a traceback"
    turns = json.loads(out.read_text())["turns"]
    assert [turn["text"] for turn in turns] == [turn["text"] for turn in TURNS[:2]]
    resumed = chat.prepare(config_of("chat", *words[:2], f"session.load={folder}"))
    assert resumed.index["cached"] == {"0": turns[1]["new"] + turns[1]["cached"]}
    with pytest.raises(ValueError, match=r"of another model .* reduce attention int8, mlp int8, groups of 64 at tp=3"):
        chat.prepare(config_of("chat", *words[:2], f"session.load={folder}", "mesh.tp=3", "reduce=int8"))


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


def test_session_that_another_process_saves_to_is_refused(refused, tiny, turns, tmp_path):
    with hold(lock_beside(tmp_path / "talk"), "session.save"):
        line = refused(chat, chat.task, f"model={tiny}", f"turns={turns}", f"session.save={tmp_path / 'talk'}")
    assert "talk is in use by process" in line


def damage_session(folder: Path, damage: str) -> None:
    """Damage a saved session; ``damage`` is one of the names below, or ``key=value`` to write to its index."""
    index = folder / "session.json"
    values = json.loads(index.read_text())
    part = next(folder.glob("*.safetensors"))
    if damage == "none":
        shutil.rmtree(folder)
    elif damage == "cut index":
        index.write_text(index.read_text()[:40])
    elif damage == "cut part":
        part.write_bytes(part.read_bytes()[:-100])
    elif damage == "flipped byte":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "part gone":
        part.unlink()
    else:
        key, value = damage.split("=")
        write_index(folder, values | {key: type(values[key])(value)})


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in ``folder``."""
    return {file.name: file.read_bytes() for file in folder.glob("*")}


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """Folder of a saved session, written without the command line."""
    folder = tmp_path_factory.mktemp("saved") / "talk"
    steps = (Say({0: [1, 2, 3]}, {0: 2}), Save(folder))
    run_ranks(2, play, tiny, Segment(Mesh(ring=2), Context(), steps), None)
    index = folder / "session.json"
    write_index(folder, json.loads(index.read_text()) | {"model": fingerprint(tiny)})
    return folder


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("none", "holds no session"),
        ("cut index", "session.json is corrupt"),
        ("cut part", "is missing or truncated"),
        ("flipped byte", "-heads0.safetensors has changed since it was saved"),
        ("part gone", "is missing or truncated"),
        ("model=0123", "is of another model (0123, not"),
        ("version=7", "is of version 7"),
        ("dtype=torch.bfloat16", "set model.dtype=bfloat16"),
    ],
)
def test_unusable_session_is_refused_and_left_unchanged(refused, tiny, saved, turns, tmp_path, damage, words):
    copy = tmp_path / "talk"
    shutil.copytree(saved, copy)
    damage_session(copy, damage)
    before = contents(copy)
    settings = (f"model={tiny}", f"turns={turns}", f"session.load={copy}", f"session.save={copy}")
    assert words in refused(chat, chat.task, *settings)
    assert contents(copy) == before


@pytest.mark.parametrize("killed", [False, True])
def test_saved_conversation_is_replaced_only_by_its_continuation(
    refused, config_of, tiny, saved, turns, tmp_path, killed, monkeypatch
):
    """A process that is killed while it saves leaves the conversation beside its folder."""
    folder = tmp_path / "talk"
    shutil.copytree(saved, tmp_path / "talk.going" if killed else folder)
    words = (f"model={tiny}", f"turns={turns}", f"session.save={folder}")
    for load in ([], [f"session.load={saved}"]):
        line = refused(chat, chat.task, *words, *load)
        assert (
            "talk has a conversation, which would be lost: give another folder, or, outside of slurm.submit, " in line
        )
        assert f"set session.load={folder} to go on with it" in line
    chat.prepare(config_of("chat", *words, f"session.load={tmp_path}/other/../talk"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    chat.prepare(config_of("chat", *words))


def test_session_of_other_sequences_is_refused(refused, tiny, turns, tmp_path):
    steps = (Say({3: [1, 2, 3]}, {3: 2}), Save(tmp_path / "talk"))
    run_ranks(1, play, tiny, Segment(Mesh(), Context(), steps), None)
    index = tmp_path / "talk" / "session.json"
    write_index(tmp_path / "talk", json.loads(index.read_text()) | {"model": fingerprint(tiny)})
    line = refused(chat, chat.task, f"model={tiny}", f"turns={turns}", f"session.load={tmp_path / 'talk'}")
    assert "talk has the sequences 3, but a conversation is sequence 0 alone: give a folder that recipes.chat" in line


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


def test_folder_without_a_session_is_not_replaced(refused, tiny, turns, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("a year")
    monkeypatch.chdir(tmp_path / "notes")
    for folder in (tmp_path / "notes", ".", "thesis.txt"):
        line = refused(chat, chat.task, f"model={tiny}", f"turns={turns}", f"session.save={folder}")
        assert "exists and is not a session, or has other files too, and saving would delete it; use another" in line
    assert contents(tmp_path / "notes") == {"thesis.txt": b"a year"}


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
