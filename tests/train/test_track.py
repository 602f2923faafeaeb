"""Logged figures are read back from the JSON lines of runs that are resumed, killed, or out of disk space."""

import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from longctx.config import Track
from longctx.train.track import Tracker, start_tracking
from tests.conftest import CONFIGS
from tests.tracking import CONFIG, WANDB, figures, lines, start


def test_line_of_a_step_is_whole_when_log_returns(tmp_path):
    tracker, run_id, messages = start(tmp_path)
    for step in (0, 1, 5):
        tracker.log(figures(step), step)
        assert lines(tmp_path)[-1] == {"step": step, **figures(step)}
    tracker.table("eval/answers", ["question", "right"], [["a, b?", True], ["c", math.inf]], 5)
    tracker.finish()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 5]
    table = {"table": "eval/answers", "columns": ["question", "right"], "rows": [["a, b?", True], ["c", "inf"]]}
    assert lines(tmp_path, "tables") == [{"step": 5, **table}]
    assert run_id and not messages


def test_values_that_are_not_finite_are_json_strings(tmp_path):
    tracker, *_ = start(tmp_path)
    tracker.log({"loss": math.nan, "grad_norm": math.inf, "least": -math.inf}, 0)
    (line,) = lines(tmp_path)
    assert (line["loss"], line["grad_norm"], line["least"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(line["loss"])) and float(line["least"]) == -math.inf


def test_resumed_run_reads_as_if_never_interrupted(tmp_path):
    whole, *_ = start(tmp_path / "whole")
    for step in range(13):
        whole.log(figures(step), step)
        whole.table("t", ["x"], [[step]], step)
    for begin, end in ((0, 7), (5, 6), (6, 13)):
        interrupted, *_ = start(tmp_path / "parts", step=begin)
        for step in range(begin, end):
            interrupted.log(figures(step), step)
            interrupted.table("t", ["x"], [[step]], step)
    for name in ("metrics.jsonl", "tables.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["metrics.jsonl", "tables.jsonl"]


def test_killed_resume_loses_nothing(tmp_path, monkeypatch):
    tracker, *_ = start(tmp_path)
    for step in range(5):
        tracker.log(figures(step), step)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    start(tmp_path, step=3)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


WRITER = """
import sys
from pathlib import Path
from longctx.config import Track
from longctx.train.track import start_tracking
tracker, _ = start_tracking(Track(), Path(sys.argv[1]), {}, first=True, say=print)
for step in range(10):
    tracker.log({"x" * 2**25: 1.0}, step)
"""


def kill_while_writing(folder: Path) -> bool:
    """Kill -9 a process while half of a long line is in the file; False if the kill came too late."""
    path, length = folder / "metrics.jsonl", len('{"step": 0, "": 1.0}\n') + 2**25
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)])
    try:
        until = time.monotonic() + 60
        while writer.poll() is None and time.monotonic() < until:
            if path.exists() and (size := path.stat().st_size) > length and size % length:
                break
    finally:
        writer.kill()
        writer.wait()
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return writer.returncode == -signal.SIGKILL and file.read() != b"\n"


def test_partial_line_of_a_kill_is_removed_on_resume(tmp_path):
    assert any(kill_while_writing(tmp_path) for _ in range(9)), "no kill hit a partial line"
    whole = (tmp_path / "metrics.jsonl").read_bytes().count(b"\n")
    assert whole >= 1
    tracker, *_ = start(tmp_path, step=whole)
    tracker.log(figures(whole), whole)
    assert [line["step"] for line in lines(tmp_path)] == list(range(whole + 1))
    assert lines(tmp_path)[-1] == {"step": whole, **figures(whole)}


@pytest.mark.parametrize(
    "broken", [b'{"step": 2', b'{"step": 2, "loss": 1.0}', b"\0\0\0\n", b"[2]\n", b'"step"\n', b'{"loss": 1}\n']
)
def test_invalid_line_is_removed_on_resume(tmp_path, broken):
    tracker, *_ = start(tmp_path)
    for step in range(2):
        tracker.log(figures(step), step)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(broken)
    tracker, *_ = start(tmp_path, step=5)
    tracker.log(figures(5), 5)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 5]


def test_full_disk_stops_no_run_and_leaves_no_partial_line(tmp_path):
    tracker, _, messages = start(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    long = "x" * 2**23
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**22, hard))  # a line and a half
        for step in range(3):
            tracker.log({long: 1.0}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log(figures(3), 3)
    assert [line["step"] for line in lines(tmp_path)] == [0, 3]
    assert len(messages) == 1 and messages[0].startswith("metrics.jsonl failed (OSError: ")


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="give the run a writable folder"):
        start(tmp_path / "file")


def test_only_the_first_rank_tracks(tmp_path):
    tracker, run_id = start_tracking(WANDB, tmp_path / "run", CONFIG, first=False, say=pytest.fail, run_id="kept")
    assert isinstance(tracker, Tracker) and run_id == "kept"
    tracker.log(figures(0), 0)
    tracker.table("t", ["x"], [[1]], 0)
    tracker.image("i", tmp_path / "none.png", 0)
    tracker.artifact("a", "checkpoint", tmp_path)
    tracker.finish()
    assert not (tmp_path / "run").exists()


def test_step_is_logged_once(tmp_path):
    tracker, *_ = start(tmp_path)
    tracker.log(figures(3), 3)
    with pytest.raises(AssertionError, match="a step is logged once"):
        tracker.log({"eval/loss": 1.0}, 3)
    with pytest.raises(AssertionError, match="not among the figures"):
        tracker.log({"step": 4}, 4)


def test_configs_match_the_dataclass():
    none, wandb = (yaml.safe_load((CONFIGS / "track" / f"{name}.yaml").read_text()) for name in ("none", "wandb"))
    assert wandb.pop("defaults") == ["none", "_self_"]
    assert TypeAdapter(Track).validate_python(none) == Track()
    assert TypeAdapter(Track).validate_python({**none, **wandb}) == Track("wandb")


@pytest.mark.parametrize(
    ("values", "words"),
    [({"project": "a/b"}, "none of"), ({"project": ""}, "1 to 128"), ({"tags": ("a" * 65,)}, "1 to 64 characters")],
)
def test_settings_that_wandb_would_refuse_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Track(**values)


def test_disabled_wandb_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("longctx.train.track.wandb_is_disabled", lambda: True)
    messages = []
    tracker, run_id = start_tracking(Track(backend="wandb"), tmp_path, {}, first=True, say=messages.append)
    tracker.log({"loss": 1.0}, 0)
    assert run_id and messages == ["WANDB_MODE=disabled: the figures go to metrics.jsonl only"]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1 and not (tmp_path / "wandb").exists()
