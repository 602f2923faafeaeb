"""W&B that fails or is kept offline stops no run: a failure is named once, and the JSON lines go on."""

import sys

import pytest

from tests.tracking import WANDB, figures, history, lines, records, start

pytestmark = pytest.mark.usefixtures("wandb_at_home")

KEY = "0123456789" * 4  # what a W&B key looks like


def test_wandb_that_is_not_installed_is_named_once_and_the_lines_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker, run_id, said = start(tmp_path, WANDB)
    for step in range(3):
        tracker.log(figures(step), step)
    tracker.finish()
    assert len(lines(tmp_path)) == 3 and run_id
    assert len(said) == 1 and said[0].startswith("wandb failed (ModuleNotFoundError: ")


def test_wandb_without_a_folder_is_named_once_and_the_lines_go_on(tmp_path):
    (tmp_path / "wandb").write_text("in the way")
    tracker, _, said = start(tmp_path, WANDB)
    tracker.log(figures(0), 0)
    assert len(lines(tmp_path)) == 1
    assert len(said) == 1 and said[0].startswith("wandb failed (FileExistsError: ")


def test_wandb_that_raises_is_named_once_and_goes_on_itself(tmp_path, fresh_wandb):
    tracker, _, said = start(tmp_path, WANDB)
    tracker.log(figures(0), 0)
    for _ in range(2):
        tracker.image("eval/picture", tmp_path / "not-there.png", 0)
    tracker.log(figures(1), 1)
    tracker.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["step"] for row in history(records(run))] == [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert len(said) == 2 and said[1].startswith("wandb failed (")


@pytest.mark.parametrize("key", ["environment", "netrc"])
def test_a_server_that_is_not_there_is_named_once_and_the_lines_go_on(tmp_path, monkeypatch, fresh_wandb, key):
    """With a key W&B goes online, wherever the key is from."""
    if key == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
        (tmp_path / "netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    tracker, _, said = start(tmp_path, WANDB)
    tracker.log(figures(0), 0)
    tracker.finish()
    assert len(lines(tmp_path)) == 1
    assert len(said) == 1 and said[0].startswith("wandb failed (CommError: ") and "127.0.0.1" in said[0]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_environments_mode_is_respected(tmp_path, monkeypatch, fresh_wandb, mode):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker, *_ = start(tmp_path, WANDB)
    tracker.log(figures(0), 0)
    tracker.finish()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == (mode == "offline")
