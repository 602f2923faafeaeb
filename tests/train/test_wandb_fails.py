"""A failing or offline W&B stops no run: the failure is reported once, and the JSON lines continue."""

import sys

import pytest

from longctx.train import track
from tests.tracking import WANDB, figures, history, lines, records, start

pytestmark = pytest.mark.usefixtures("wandb_at_home")

KEY = "0123456789" * 4  # the form of a W&B key


def test_missing_wandb_is_reported_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker, run_id, messages = start(tmp_path, WANDB)
    for step in range(3):
        tracker.log(figures(step), step)
    tracker.finish()
    assert len(lines(tmp_path)) == 3 and run_id
    assert len(messages) == 1 and messages[0].startswith("wandb failed (ModuleNotFoundError: ")


def test_wandb_without_a_folder_is_reported_once(tmp_path):
    (tmp_path / "wandb").write_text("in the way")
    tracker, _, messages = start(tmp_path, WANDB)
    tracker.log(figures(0), 0)
    assert len(lines(tmp_path)) == 1
    assert len(messages) == 1 and messages[0].startswith("wandb failed (FileExistsError: ")


def test_wandb_error_is_reported_once_and_wandb_continues(tmp_path, fresh_wandb):
    tracker, _, messages = start(tmp_path, WANDB)
    tracker.log(figures(0), 0)
    for _ in range(2):
        tracker.image("eval/picture", tmp_path / "not-there.png", 0)
    tracker.log(figures(1), 1)
    tracker.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["step"] for row in history(records(run))] == [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert len(messages) == 2 and messages[1].startswith("wandb failed (")


@pytest.mark.parametrize("key", ["environment", "netrc"])
def test_run_is_recorded_offline_if_the_server_cannot_be_reached(tmp_path, monkeypatch, fresh_wandb, key):
    """With a key W&B goes online; the key is in the environment or in netrc."""
    if key == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
        (tmp_path / "netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(track, "_CONNECT_S", 2.0)
    tracker, _, messages = start(tmp_path, WANDB)
    tracker.log(figures(0), 0)
    tracker.finish()
    assert len(messages) == 2 and messages[0].startswith("W&B cannot be reached (") and "127.0.0.1" in messages[0]
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["step"] for row in history(records(run))] == [line["step"] for line in lines(tmp_path)] == [0]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_mode_of_the_environment_is_respected(tmp_path, monkeypatch, fresh_wandb, mode):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker, *_ = start(tmp_path, WANDB)
    tracker.log(figures(0), 0)
    tracker.finish()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == (mode == "offline")


@pytest.mark.parametrize(("seconds", "waits"), [({}, (30.0, 45.0)), ({"INIT": "90", "FINISH": "300"}, (90.0, 300.0))])
def test_longest_waits_of_the_environment_are_respected(tmp_path, monkeypatch, fresh_wandb, seconds, waits):
    """W&B's own default of the first is 90 seconds."""
    for name, value in seconds.items():
        monkeypatch.setenv(f"WANDB_{name}_TIMEOUT", value)
    tracker, *_ = start(tmp_path, WANDB)
    settings = tracker._trackers["wandb"]._run.settings
    assert (settings.init_timeout, settings.finish_timeout) == waits
    tracker.finish()
