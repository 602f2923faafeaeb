"""A session that cannot be read whole leaves the session that it is added to unchanged."""

from pathlib import Path

import pytest

from longctx.config import Context, Mesh, Sampling
from longctx.infer import store
from longctx.infer.engine import Engine
from longctx.infer.session import Session
from longctx.infer.session_index import read_index
from tests.infer.thread_ranks import run_engines, single_rank
from tests.tiny import tiny_model


def test_file_that_vanishes_while_it_is_read(tmp_path, monkeypatch):
    """The first of two sequences has been read by then."""
    folder, saved, read_rows = tiny_model(tmp_path / "tiny", max_positions=97), tmp_path / "talk", store._read_rows

    def vanish(folder, index, name, i, positions, heads):
        if i == "4":
            (saved / "ring0-heads0.safetensors").unlink(missing_ok=True)
        return read_rows(folder, index, name, i, positions, heads)

    def load(engine: Engine) -> None:
        session = Session(engine, Context(), Sampling())
        session.turn({0: [3, 1, 4], 4: [1, 5]}, {0: 2, 4: 1})
        store.save(session, saved, "test")
        before = dict(session.sequences)
        monkeypatch.setattr(store, "_read_rows", vanish)
        with pytest.raises(ValueError, match=r"session\.load=.*talk is corrupt or incomplete .*No such file"):
            store.load(session, saved, read_index(saved, "test", "torch.float32", engine.shape))
        assert session.sequences.keys() == before.keys()
        assert all(session.sequences[i] is sequence for i, sequence in before.items())

    with single_rank(tmp_path) as runtime:
        run_engines(runtime, folder, Mesh(), load)


def test_session_that_is_replaced_while_it_is_read(tmp_path):
    """Its files have other keys and values than those of the index that was read."""
    folder, saved = tiny_model(tmp_path / "tiny", max_positions=97), tmp_path / "talk"

    def load(engine: Engine) -> None:
        for prompt in ([3, 1, 4], [2, 7, 1, 8]):
            session = Session(engine, Context(), Sampling())
            session.turn({0: prompt}, {0: 2})
            store.save(session, saved, "test")
            if prompt[0] == 3:
                index = read_index(saved, "test", "torch.float32", engine.shape)
        fresh = Session(engine, Context(), Sampling())
        with pytest.raises(ValueError, match=r"session\.load=.*talk was replaced while it was read"):
            store.load(fresh, saved, index)
        assert not fresh.sequences
        store.load(fresh, saved, read_index(saved, "test", "torch.float32", engine.shape))

    with single_rank(tmp_path) as runtime:
        run_engines(runtime, folder, Mesh(), load)


@pytest.mark.parametrize("ending", [".coming", ".going"])
def test_other_folder_with_the_name_of_a_temporary_one_is_not_deleted(tmp_path, ending):
    beside = tmp_path / f"talk{ending}"
    beside.mkdir()
    for name in ("ring0-heads0.safetensors", ".tmpXy12"):
        (beside / name).touch()
    store.refuse_place(tmp_path / "talk")  # a killed process may leave this
    (beside / "thesis.txt").touch()
    with pytest.raises(ValueError, match=f"talk{ending} exists and is not a session, and saving to .* would delete it"):
        store.refuse_place(tmp_path / "talk")


def test_folder_with_other_files_than_a_session_is_not_replaced(tmp_path):
    talk = tmp_path / "talk"
    talk.mkdir()
    store.refuse_place(talk)
    (talk / "session.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="is not a session, or has other files too, and saving would delete it"):
        store.refuse_place(talk)
    (talk / "session.json").write_text('{"version": 2, "model": "a", "tokens": {}}')
    store.refuse_place(talk)
    (talk / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not a session, or has other files too, and saving would delete it"):
        store.refuse_place(talk)


def test_session_that_a_killed_save_moved_away_is_found(tmp_path, monkeypatch):
    """The process is killed after the old session was renamed, and before the new one is in its place."""
    talk, new = tmp_path / "talk", tmp_path / "talk.coming"
    for folder, version in ((talk, "old"), (new, "new")):
        folder.mkdir()
        (folder / "session.json").write_text(version)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store._replace(talk, new)
    monkeypatch.undo()
    assert (store.whole_session(talk) / "session.json").read_text() == "old" and not talk.exists()
    store._replace(talk, new)
    assert store.whole_session(talk) == talk and [file.name for file in tmp_path.iterdir()] == ["talk"]
    assert (talk / "session.json").read_text() == "new"
