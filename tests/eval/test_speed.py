"""python -m eval.speed: times and log-probabilities, compared with lm-eval's own model."""

import json

from hydra.core.global_hydra import GlobalHydra

from eval import speed
from recipes.common import cli as recipe_cli


def test_speed_is_written_and_shown_beside_lm_evals_own_model(monkeypatch, capsys, tiny, sets, tmp_path):
    words = [f"model={tiny}", "eval.tasks=[arc_easy]", f"eval.data={sets}", "eval.limit=3", "run.threads=1"]
    monkeypatch.setattr("sys.argv", ["speed", *words, "speed.rounds=1", "speed.batches=[2]", f"out={tmp_path}"])
    try:
        recipe_cli.main("eval_speed", speed.task)
    finally:
        GlobalHydra.instance().clear()
    figures = json.loads((tmp_path / "speed.json").read_text())["tasks"]["arc_easy"]
    assert figures["examples"] == 3 and list(figures["seconds"]) == ["ours", "hf, batch 2"]
    assert all(seconds > 0 for rounds in figures["seconds"].values() for seconds in rounds)
    assert figures["largest_difference"] < 1e-4
    (file,) = json.loads((tmp_path / "manifest.json").read_text())["data"]
    assert file == str(sets / "arc" / "arc_easy.jsonl")
    assert "arc_easy" in capsys.readouterr().err
