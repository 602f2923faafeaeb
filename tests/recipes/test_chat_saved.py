"""Saved conversations of recipes.chat: saved after every turn, resumed on another mesh, and never lost or replaced."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.config import Context, Mesh
from longctx.data.turns import UserTurn
from longctx.hf.checkpoint import fingerprint
from longctx.infer.session_index import write_index
from longctx.parallel.launch import RankFailed, run_ranks
from recipes import chat
from recipes.common.lock import hold, lock_beside
from tests.infer.talk import Save, Say, Segment, play
from tests.recipes.chats import TURNS, converse, tokens


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


def test_folder_without_a_session_is_not_replaced(refused, tiny, turns, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("a year")
    monkeypatch.chdir(tmp_path / "notes")
    for folder in (tmp_path / "notes", ".", "thesis.txt"):
        line = refused(chat, chat.task, f"model={tiny}", f"turns={turns}", f"session.save={folder}")
        assert "exists and is not a session, or has other files too, and saving would delete it; use another" in line
    assert contents(tmp_path / "notes") == {"thesis.txt": b"a year"}
