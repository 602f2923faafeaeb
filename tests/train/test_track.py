"""What was logged is read back: JSON lines from their file, W&B's from its own offline files by its own reader."""

import base64
import hashlib
import json
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

from longctx.schema import Track
from longctx.train.track import Tracker, start_tracking
from tests.conftest import CONFIGS

NONE = Track()
WANDB = Track("wandb", project="long", group="sweep", name="first", tags=("cp", "8k"), notes="a, (note)")
CONFIG = {"mesh": {"ring": 2, "tp": 3}, "commit": "abc123", "optim": {"lr": 3e-4}, "python": "3.11"}

KEY = "0123456789" * 4  # what a W&B key looks like


def figures(step: int) -> dict[str, float | None]:
    return {"loss": 7.0 / (step + 1), "tokens": 11 * step, "comm/exposed_s": 0.25, "mem/peak_bytes": 2**40, "mfu": None}


def lines(folder: Path, name: str = "metrics") -> list[dict]:
    text = (folder / f"{name}.jsonl").read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def start(folder: Path, track: Track = NONE, **more) -> tuple[Tracker, str | None, list[str]]:
    said: list[str] = []
    tracker, run_id = start_tracking(track, folder, CONFIG, first=True, say=said.append, **more)
    return tracker, run_id, said


@pytest.fixture(scope="module", autouse=True)
def wandb_at_home(tmp_path_factory):
    """W&B without an account, with all that it writes under one folder."""
    home = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(home / "none"))
        patch.setenv("WANDB_X_DISABLE_STATS", "true")
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name))
        yield
        torn_down()


@pytest.fixture
def fresh_wandb():
    """W&B reads its environment once: here anew, before the test and after it."""
    torn_down()
    yield
    torn_down()


def torn_down() -> None:
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


# --- JSON lines


def test_a_line_a_step_as_soon_as_it_is_logged(tmp_path):
    tracker, run_id, said = start(tmp_path)
    for step in (0, 1, 5):
        tracker.log(figures(step), step)
        assert lines(tmp_path)[-1] == {"step": step, **figures(step)}
    tracker.table("eval/answers", ["question", "right"], [["a, b?", True], ["c", math.inf]], 5)
    tracker.finish()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 5]
    table = {"table": "eval/answers", "columns": ["question", "right"], "rows": [["a, b?", True], ["c", "inf"]]}
    assert lines(tmp_path, "tables") == [{"step": 5, **table}]
    assert run_id and not said


def test_what_is_not_finite_is_still_json(tmp_path):
    tracker, *_ = start(tmp_path)
    tracker.log({"loss": math.nan, "grad_norm": math.inf, "least": -math.inf}, 0)
    (line,) = lines(tmp_path)
    assert (line["loss"], line["grad_norm"], line["least"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(line["loss"])) and float(line["least"]) == -math.inf


def test_a_resumed_run_reads_as_if_never_interrupted(tmp_path):
    whole, *_ = start(tmp_path / "whole")
    for step in range(13):
        whole.log(figures(step), step)
        whole.table("t", ["x"], [[step]], step)
    for begin, end in ((0, 7), (5, 6), (6, 13)):
        part, *_ = start(tmp_path / "parts", step=begin)
        for step in range(begin, end):
            part.log(figures(step), step)
            part.table("t", ["x"], [[step]], step)
    for name in ("metrics.jsonl", "tables.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["metrics.jsonl", "tables.jsonl"]


def test_a_resume_that_is_killed_has_lost_nothing(tmp_path, monkeypatch):
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
from longctx.schema import Track
from longctx.train.track import start_tracking
tracker, _ = start_tracking(Track(), Path(sys.argv[1]), {}, first=True, say=print)
for step in range(10):
    tracker.log({"x" * 2**25: 1.0}, step)
"""


def killed_while_it_writes(folder: Path) -> bool:
    """Start a process that writes long lines, and kill -9 it while one is half in the file; False if we were late."""
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


def test_a_line_that_a_kill_has_torn_is_gone_when_the_run_resumes(tmp_path):
    assert any(killed_while_it_writes(tmp_path) for _ in range(9)), "no line was ever torn"
    whole = (tmp_path / "metrics.jsonl").read_bytes().count(b"\n")
    assert whole >= 1
    tracker, *_ = start(tmp_path, step=whole)
    tracker.log(figures(whole), whole)
    assert [line["step"] for line in lines(tmp_path)] == list(range(whole + 1))
    assert lines(tmp_path)[-1] == {"step": whole, **figures(whole)}


@pytest.mark.parametrize(
    "broken", [b'{"step": 2', b'{"step": 2, "loss": 1.0}', b"\0\0\0\n", b"[2]\n", b'"step"\n', b'{"loss": 1}\n']
)
def test_what_is_no_whole_line_is_gone_when_the_run_resumes(tmp_path, broken):
    tracker, *_ = start(tmp_path)
    for step in range(2):
        tracker.log(figures(step), step)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(broken)
    tracker, *_ = start(tmp_path, step=5)
    tracker.log(figures(5), 5)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 5]


def test_a_disk_that_is_full_stops_no_run_and_tears_no_line(tmp_path):
    tracker, _, said = start(tmp_path)
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
    assert len(said) == 1 and said[0].startswith("metrics.jsonl failed (OSError: ")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="give the run a folder of yours"):
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


def test_a_step_is_logged_once(tmp_path):
    tracker, *_ = start(tmp_path)
    tracker.log(figures(3), 3)
    with pytest.raises(AssertionError, match="a step is logged once"):
        tracker.log({"eval/loss": 1.0}, 3)
    with pytest.raises(AssertionError, match="not among the figures"):
        tracker.log({"step": 4}, 4)


# --- W&B


def test_wandb_is_imported_when_it_is_asked_for_only():
    program = "import sys, longctx.train.track; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def records(folder: Path) -> list[dict]:
    """All records of the one W&B run in ``folder``, as W&B's own command reads them."""
    (file,) = folder.glob("run-*.wandb")
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(read, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(kind: str, read: list[dict]) -> list[dict]:
    return [record[kind] for record in read if record["type"] == kind]


def history(read: list[dict]) -> list[dict]:
    return [{"_step": row["step"]["num"], **row["item"]} for row in of_kind("history", read)]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, wandb_at_home):
    """A run of steps 0 to 4 and one that resumes it from step 3: the folder, the id, what was said, W&B's records."""
    from matplotlib.image import imsave

    folder = tmp_path_factory.mktemp("run")
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "weights.bin").write_bytes(bytes(1013))
    imsave(folder / "picture.png", [[0.0, 1.0], [1.0, 0.0]])
    (folder / "manifest.json").write_text('{"module": "recipes.first"}')
    tracker, run_id, said = start(folder, WANDB)
    for step in range(5):
        tracker.log(figures(step), step)
    tracker.table("eval/answers", ["question", "right"], [["a, b?", 1], ["c", 0]], 4)
    tracker.image("eval/picture", folder / "picture.png", 4)
    tracker.artifact(f"checkpoint-{run_id}", "checkpoint", checkpoint)
    tracker.finish()
    (folder / "manifest.json").write_text('{"module": "recipes.second"}')
    resumed, same_id, more = start(folder, WANDB, step=3, run_id=run_id)
    for step in range(3, 7):
        resumed.log(figures(step), step)
    resumed.finish()
    assert same_id == run_id
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    return folder, run_id, said + more, [records(run) for run in runs]


def test_wandb_has_the_run_and_its_configuration(tracked):
    folder, run_id, said, (first, _) = tracked
    run, *_ = of_kind("run", first)
    config = run.pop("config")["update"]
    assert {name: config[name] for name in CONFIG} == CONFIG
    expected = {"project": "long", "run_group": "sweep", "display_name": "first", "notes": "a, (note)"}
    expected |= {"run_id": run_id, "job_type": "train", "tags": ["cp", "8k"]}
    assert {name: run[name] for name in expected} == expected
    assert said == [f"W&B run {run_id}: offline, in {folder}/wandb"] * 2


def test_wandb_has_the_curves_by_group_over_the_step(tracked):
    *_, (first, _) = tracked
    rows = history(first)
    assert [(row["_step"], row["step"]) for row in rows] == [(step, step) for step in range(5)]
    for step, row in enumerate(rows):
        assert row["train/loss"] == 7.0 / (step + 1) and row["train/tokens"] == 11 * step
        assert row["comm/exposed_s"] == 0.25 and row["mem/peak_bytes"] == 2**40
        assert "train/mfu" not in row and "loss" not in row
    metrics = of_kind("metric", first)
    assert {(metric.get("name"), metric.get("glob_name"), metric.get("step_metric")) for metric in metrics} == {
        ("step", None, None),
        (None, "*", "step"),
    }


def test_wandb_has_the_table_and_the_picture(tracked):
    folder, *_, (first, _) = tracked
    (run, *_) = sorted((folder / "wandb").glob("offline-run-*"))
    last = history(first)[-1]
    (table,) = (run / "files").glob("media/table/eval/answers_*.table.json")
    assert json.loads(table.read_text())["data"] == [["a, b?", 1], ["c", 0]]
    assert json.loads(table.read_text())["columns"] == ["question", "right"]
    (picture,) = (run / "files").glob("media/images/eval/picture_*.png")
    assert picture.read_bytes() == (folder / "picture.png").read_bytes()
    assert last["_step"] == 4 and {name.split(".")[0] for name in last} >= {"eval/answers", "eval/picture"}


def test_wandb_has_each_start_s_manifest(tracked):
    folder, *_, read = tracked
    for name, run, records_of_it in zip(
        ("first", "second"), sorted((folder / "wandb").glob("offline-run-*")), read, strict=True
    ):
        assert json.loads((run / "files" / "manifest.json").read_text()) == {"module": f"recipes.{name}"}
        saved = [file["path"] for files in of_kind("files", records_of_it) for file in files["files"]]
        assert "manifest.json" in saved, "it is synced too"


def test_wandb_has_a_reference_to_the_checkpoint_and_no_copy(tracked):
    folder, run_id, _, (first, _) = tracked
    (artifact,) = [a for a in of_kind("artifact", first) if a["type"] == "checkpoint"]
    (content,) = artifact["manifest"]["contents"]
    assert artifact["name"] == f"checkpoint-{run_id}"
    assert content["ref"] == (folder / "checkpoint-5" / "weights.bin").as_uri()
    assert content["path"] == "weights.bin" and "local_path" not in content
    read_through = base64.b64encode(hashlib.md5(bytes(1013)).digest()).decode()
    assert content["digest"] != read_through  # gigabytes are not read either
    stored = [os.environ[f"WANDB_{name}_DIR"] for name in ("DATA", "CACHE")] + [folder / "wandb"]
    assert not [path for root in stored for path in Path(root).rglob("*") if path.is_file() and _is_copy(path)]


def _is_copy(path: Path) -> bool:
    return path.read_bytes() == bytes(1013)


def test_wandb_resumes_the_same_id_with_the_steps_going_on(tracked):
    folder, run_id, _, (_, second) = tracked
    run, *_ = of_kind("run", second)
    assert run["run_id"] == run_id
    assert [(row["_step"], row["train/loss"]) for row in history(second)] == [(s, 7.0 / (s + 1)) for s in range(3, 7)]
    assert [line["step"] for line in lines(folder)] == list(range(7))


# --- A tracker that fails


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


# --- Configuration


def test_configs_are_the_dataclass():
    none, wandb = (yaml.safe_load((CONFIGS / "track" / f"{name}.yaml").read_text()) for name in ("none", "wandb"))
    assert wandb.pop("defaults") == ["none", "_self_"]
    assert TypeAdapter(Track).validate_python(none) == Track()
    assert TypeAdapter(Track).validate_python({**none, **wandb}) == Track("wandb")


@pytest.mark.parametrize(
    ("values", "words"),
    [({"project": "a/b"}, "none of"), ({"project": ""}, "1 to 128"), ({"tags": ("a" * 65,)}, "1 to 64 characters")],
)
def test_what_wandb_would_refuse_is_refused_at_once(values, words):
    with pytest.raises(ValueError, match=words):
        Track(**values)
