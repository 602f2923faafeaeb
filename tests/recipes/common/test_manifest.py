"""A manifest records what was run; a run can be repeated from it, and compared with other runs."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from longctx.hf.checkpoint import fingerprint
from longctx.parallel.launch import RankFailed
from recipes import compare, generate, reproduce
from recipes.common import cli as recipe_cli
from recipes.common import manifest


@pytest.fixture
def run(cli, tiny, tmp_path, monkeypatch):
    """``run(name, *settings)``: run recipes.generate and return the folder of the run."""
    (tmp_path / "prompt.txt").write_text("Thirteen words")
    monkeypatch.chdir(tmp_path)

    def run(name, *settings):
        out = tmp_path / name / "result.json"
        words = (f"model={tiny}", "prompt.file=prompt.txt", "max_new_tokens=3", f"out={out}", *settings)
        code, _, err = cli(generate, generate.task, *words)
        assert code == 0, err
        assert sorted(file.name for file in out.parent.iterdir()) == ["result.json", "result.manifest.json"]
        return out.parent

    return run


def test_manifest_records_settings_inputs_and_machine(run, tiny, tmp_path):
    folder = run("a", "sampling.seed=7", "mesh.ring=2")
    manifest_values = json.loads((folder / "result.manifest.json").read_text())
    assert manifest_values["module"] == "recipes.generate" and "prompt.file=prompt.txt" in manifest_values["command"]
    assert manifest_values["config"]["sampling"]["seed"] == 7 and manifest_values["seeds"] == {"sampling.seed": 7}
    assert manifest_values["mesh"] == {"tp": 1, "ulysses": 1, "ring": 2, "dp": 1, "pp": 1, "ep": 1}
    expected = hashlib.sha256(b"Thirteen words").hexdigest()
    assert manifest_values["data"] == {str(tmp_path / "prompt.txt"): f"sha256:{expected}"}
    assert manifest_values["weights"] == {str(tiny): fingerprint(tiny)}
    assert manifest_values["packages"]["torch"].partition("+")[0] == manifest_values["torch"].partition("+")[0]
    assert manifest_values["commit"] and manifest_values["hardware"]["memory_bytes"] > 2**28
    assert manifest_values["diff"] == "" or manifest_values["diff"].startswith(("diff ", "# not in git"))


def test_run_without_out_writes_no_manifest(cli, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(generate, generate.task, f"model={tiny}", "prompt.text=a b", "max_new_tokens=1")[0] == 0
    assert not list(tmp_path.iterdir())


def test_reproduced_run_is_written_beside_it_and_a_difference_is_printed(run, capsys):
    """The run's paths are relative to the folder that it ran in."""
    folder = run("a")
    reproduce.reproduce([str(folder)])
    assert re.search(r"(\d+) of \1 final figures are the same", capsys.readouterr().err)
    result = folder / "result.json"
    result.write_text(result.read_text().replace('"new_tokens": 3', '"new_tokens": 4'))
    with pytest.raises(SystemExit) as exited:
        reproduce.reproduce([str(folder)])
    assert exited.value.code == 1
    assert re.search(r"new_tokens\s+4\s+3", capsys.readouterr().err)
    assert (folder.parent / "a-again-2" / "result.json").is_file()


def test_run_of_a_sweep_is_reproduced_with_the_code_of_the_sweep(run, tmp_path, monkeypatch):
    """slurm.submit leaves the code in the sweep's folder, beside the runs."""
    folder = run("sweep/0")
    (tmp_path / "sweep" / "code" / "recipes").mkdir(parents=True)
    (tmp_path / "sweep" / "code" / "recipes" / "__init__.py").write_text("raise SystemExit(7)\n")
    with pytest.raises(RankFailed, match="ended with 7"):
        reproduce.reproduce([str(folder)])


def test_comparison_shows_settings_that_differ_and_final_figures(run, capsys):
    folders = [str(run("a")), str(run("b", "context=pass_q", "mesh.ring=2"))]
    file = Path(folders[1], "result.json")
    file.write_text(file.read_text().replace('"new_tokens"', '"only_here": 7, "new_tokens"'))
    compare.compare(folders)
    out = capsys.readouterr().out
    settings, figures = out.split("final figures")
    assert re.search(r"context\.strategy\s+pass_kv\s+pass_q", settings) and re.search(r"mesh\.ring\s+1\s+2", settings)
    assert "sampling" not in settings and "max_new_tokens" not in settings
    assert re.search(r"\bnew_tokens\s+3\s+3", figures) and "ttft_s" in figures
    assert re.search(r"only_here\s+7", figures), "a figure that the first run lacks"


def test_folder_without_a_run_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"is not a run: its manifest cannot be read .*/manifest\.json"):
        reproduce.reproduce([str(tmp_path)])
    with pytest.raises(SystemExit) as exited:
        recipe_cli.exit_on_error(lambda: compare.compare([str(tmp_path)]))
    assert exited.value.code == 2 and "fewer than two runs to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "measured"),
    [("step_s", True), ("mem/peak_bytes", True), ("tokens_per_s", True), ("mfu", True), ("loss", False),
     ("eval/perplexity_to_61", False), ("tokens", False), ("token_ids", False), ("lr", False),
     ("python", True), ("torch", True), ("cores", True), ("turns.0.decode_why", True),
     ("depths.dropped 50% repaired.scores", False), ("lengths.baseline.scores.1024", False)],
)  # fmt: skip
def test_figures_of_the_machine_need_not_agree(name, measured):
    assert compare.is_measured(name) == measured


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"eval": {"text": "book.txt"}, "spd": {"sensitivity": None}}, ["book.txt"]),
        ({"eval": {"text": "pydoc"}, "spd": {"sensitivity": "a.json"}}, ["a.json"]),
        ({"variants": [{"name": "a"}, {"name": "b", "spd": {"budget": 0.5, "sensitivity": "b.json"}}]}, ["b.json"]),
        ({"prompt": {"file": "p.txt"}, "turns": "t.jsonl", "prompts": None}, ["t.jsonl", "p.txt"]),
    ],
    ids=str,
)
def test_files_that_settings_name_are_found(values, names):
    assert [path.name for path in manifest._read_by(values)] == names


def test_each_file_of_a_folder_has_its_own_manifest(run, tmp_path):
    folder = run("a")
    other = json.loads((folder / "result.manifest.json").read_text()) | {
        "module": "recipes.chat",
        "out": "a/other.json",
    }
    (folder / "other.manifest.json").write_text(json.dumps(other))
    (folder / "other.json").write_text("{}")
    assert manifest.manifest_of(str(folder / "result.json"))["module"] == "recipes.generate"
    assert manifest.manifest_of(str(folder / "other.json"))["module"] == "recipes.chat"
    with pytest.raises(ValueError, match=r"the folder has several runs: give one of other\.json, result\.json"):
        manifest.manifest_of(str(folder))


@pytest.fixture
def owned(tmp_path, monkeypatch):
    """The current folder: a training run, a result of generate, one of version 0.1, and notes."""
    monkeypatch.chdir(tmp_path)
    files = {
        "tiny/manifest.json": {"module": "recipes.pretrain", "out": "/x/tiny"},
        "tiny/metrics.jsonl": {},
        "new/a.json": {}, "new/a.manifest.json": {"module": "recipes.generate", "out": "/x/new/a.json"},
        "old/a.json": {}, "old/manifest.json": {"module": "recipes.generate", "out": "/x/old/a.json"},
        "notes/mine.json": {}, "work/metrics.jsonl": {}, "weights/model/mine.bin": {},
    }  # fmt: skip
    for name, values in files.items():
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text(json.dumps(values))


@pytest.mark.usefixtures("owned")
@pytest.mark.parametrize(
    ("out", "recipe", "words"),
    [
        ("tiny", "recipes.pretrain", None), ("tiny", "eval.run", "a run of recipes.pretrain"),
        ("new/a.json", "recipes.generate", None), ("new/a.json", "recipes.chat", "a run of recipes.generate"),
        ("old/a.json", "recipes.generate", None), ("old/a.json", "recipes.chat", "a run of recipes.generate"),
        ("old", "recipes.pretrain", None),  # the manifest there is that of a file
        ("notes", "recipes.pretrain", None),
        ("notes/mine.json", "recipes.generate", "exists, and was not written by recipes"),
        ("tiny/manifest.json", "recipes.generate", "exists, and was not written by recipes.generate"),
        ("tiny/metrics.jsonl", "recipes.generate", "exists, and was not written by recipes.generate"),
        ("not/yet", "recipes.generate", None), (None, "recipes.generate", None),
        ("work", "recipes.pretrain", "has metrics.jsonl, which recipes.pretrain did not write and would replace"),
        ("weights", "recipes.pretrain", "has model, which recipes.pretrain did not write and would replace"),
        ("new/a.yaml", "recipes.calibrate", "would replace the manifest of a.json, a.manifest.json: use a name"),
    ],
)  # fmt: skip
def test_place_of_another_recipe_is_refused(out, recipe, words):
    replaces = (*manifest.REPLACED_FILES, "model")
    if words is None:
        manifest.refuse_other_recipe(out, recipe, replaces)
        return
    with pytest.raises(ValueError, match=words):
        manifest.refuse_other_recipe(out, recipe, replaces)
