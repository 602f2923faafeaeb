"""recipes.chat: the same conversation on any mesh and through a save; bad input is refused and loses nothing."""

import json
import shutil
from pathlib import Path

import pytest

from recipes import chat

TURNS = [
    {"text": "Hello, you.", "max_new_tokens": 3},
    {"text": "And then?", "max_new_tokens": 0},
    {"text": "So.", "max_new_tokens": 5},
]


@pytest.fixture
def turns(tmp_path: Path) -> Path:
    file = tmp_path / "turns.jsonl"
    file.write_text("\n".join(map(json.dumps, TURNS)) + "\n\n")
    return file


def talked(cli, tiny, tmp_path, *settings) -> list[dict]:
    out = tmp_path / "out.json"
    code, _, err = cli(chat, chat.task, f"model={tiny}", f"out={out}", *settings)
    assert code == 0, err
    return json.loads(out.read_text())["turns"]


def tokens(talk: list[dict]) -> list[list[int]]:
    return [turn["token_ids"] for turn in talk]


def test_every_mesh_and_strategy_says_the_same(cli, tiny, turns, tmp_path):
    alone = talked(cli, tiny, tmp_path, f"turns={turns}")
    assert [(t["new"], t["cached"]) for t in alone] == [(11, 0), (9 + 1, 13), (3, 23)]
    assert [len(t["token_ids"]) for t in alone] == [3, 0, 5]
    assert alone[0]["ttit_s"] > 0 and alone[1]["ttit_s"] is None
    for settings in (
        ["mesh.ring=2", "context.strategy=auto"],
        ["mesh.ring=2", "mesh.ulysses=3", "context.strategy=pass_q", "context.chunk=4"],
    ):
        talk = talked(cli, tiny, tmp_path, f"turns={turns}", *settings)
        assert tokens(talk) == tokens(alone)
        assert all(turn["bytes_sent"] > 0 for turn in talk)
    assert all(turn["why"] == "as asked" for turn in talk)


def test_a_saved_session_goes_on_elsewhere(cli, tiny, tmp_path, turns):
    whole = talked(cli, tiny, tmp_path, f"turns={turns}")
    kept, gone_on = tmp_path / "talk", []
    # Nine ranks share three KV heads: of those that have the same one, one writes.
    for turn, mesh in zip(TURNS, ("mesh.ring=2", "mesh.ulysses=9", "mesh.tp=3"), strict=True):
        file = tmp_path / "turn.jsonl"
        file.write_text(json.dumps(turn))
        load = [f"session.load={kept}"] if gone_on else []
        gone_on += talked(cli, tiny, tmp_path, f"turns={file}", mesh, f"session.save={kept}", *load)
    assert tokens(gone_on) == tokens(whole)


def test_a_turn_over_the_context_is_refused_and_the_next_goes_on(cli, tiny, tmp_path):
    file, out = tmp_path / "turns.jsonl", tmp_path / "out.json"
    file.write_text("\n".join(map(json.dumps, [TURNS[0], {"text": "x" * 90}, TURNS[2]])))
    code, _, err = cli(chat, chat.task, f"model={tiny}", f"out={out}", f"turns={file}", "mesh.ring=2")
    assert code == 1 and "refused: turn 2 of 3" in err
    talk = json.loads(out.read_text())["turns"]
    assert "the model's context is 97" in talk[1]["error"]
    file.write_text("\n".join(map(json.dumps, [TURNS[0], TURNS[2]])))
    assert [tokens(talk)[0], tokens(talk)[2]] == tokens(talked(cli, tiny, tmp_path, f"turns={file}"))


def break_session(folder: Path, how: str) -> None:
    index = folder / "session.json"
    values = json.loads(index.read_text())
    part = next(folder.glob("*.safetensors"))
    if how == "none":
        shutil.rmtree(folder)
    elif how == "torn index":
        index.write_text(index.read_text()[:40])
    elif how == "torn part":
        part.write_bytes(part.read_bytes()[:-100])
    elif how == "flipped byte":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif how == "part gone":
        part.unlink()
    else:
        key, value = how.split("=")
        index.write_text(json.dumps(values | {key: value}))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*")}


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """A session on disk, made without the command line."""
    from longctx.config import Context, Mesh
    from longctx.hf.checkpoint import fingerprint
    from longctx.parallel.launch import run_ranks
    from tests.infer.talk import Save, Say, Segment, play

    folder = tmp_path_factory.mktemp("saved") / "talk"
    steps = (Say({0: [1, 2, 3]}, {0: 2}), Save(folder))
    run_ranks(2, play, tiny, Segment(Mesh(ring=2), Context(), steps), None)
    index = folder / "session.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"model": fingerprint(tiny)}))
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("none", "holds no session"),
        ("torn index", "session.json is corrupt"),
        ("torn part", "is missing or truncated"),
        ("flipped byte", "-heads0.safetensors has changed since it was saved"),
        ("part gone", "is missing or truncated"),
        ("model=0123", "is of another model (0123, not"),
        ("version=7", "is of version 7"),
        ("dtype=torch.bfloat16", "set model.dtype=bfloat16"),
    ],
)
def test_a_session_that_cannot_be_used_is_refused(refused, tiny, saved, turns, tmp_path, how, words):
    copy = tmp_path / "talk"
    shutil.copytree(saved, copy)
    break_session(copy, how)
    before = contents(copy)
    given = (f"model={tiny}", f"turns={turns}", f"session.load={copy}", f"session.save={copy}")
    assert words in refused(chat, chat.task, *given)
    assert contents(copy) == before


def test_what_is_no_session_is_not_replaced(refused, tiny, turns, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("a year")
    monkeypatch.chdir(tmp_path / "notes")
    for folder in (tmp_path / "notes", ".", "thesis.txt"):
        says = refused(chat, chat.task, f"model={tiny}", f"turns={turns}", f"session.save={folder}")
        assert "exists and is not a session; saving would delete it. Use another folder" in says
    assert contents(tmp_path / "notes") == {"thesis.txt": b"a year"}


def test_under_a_launcher_turns_are_in_a_file(refused, tiny, monkeypatch):
    of_torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in of_torchrun.items():
        monkeypatch.setenv(name, value)
    assert "under a launcher turns cannot be typed" in refused(chat, chat.task, f"model={tiny}", "mesh.ring=2")


def test_a_rule_that_nobody_has_fitted_is_refused_before_anything_starts(refused, tiny, turns):
    says = refused(chat, chat.task, f"model={tiny}", f"turns={turns}", "mesh.ring=2", "context.strategy=empirical")
    assert "needs a hardware file with fitted constants" in says


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
def test_turns_that_make_no_sense_are_refused(refused, tiny, tmp_path, line, words):
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
    ],
)
def test_what_cannot_be_done_is_refused(refused, tiny, turns, setting, words):
    assert words in refused(chat, chat.task, f"model={tiny}", f"turns={turns}", setting)
