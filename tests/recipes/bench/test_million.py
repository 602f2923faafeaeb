"""recipes.bench million: strategies take turns, and seconds, bytes and memory are those of each strategy."""

import json

from recipes.bench import million


def test_strategies_take_turns_and_memory_is_that_of_the_warm_up_round(monkeypatch):
    calls, peaks = [], iter((1000, 3000, 5000, 5000, 7000, 7000))
    monkeypatch.setattr(million, "peak_resident_bytes", lambda: next(peaks))

    def attend(name):
        calls.append(name)
        return float(len(calls)), 7 * len(name)

    assert million.time_strategies(("pass_q", "pass_kv"), 2, attend) == [
        million.StrategyTimes("pass_q", [3.0, 5.0], bytes_sent=42, peak_bytes=1000),
        million.StrategyTimes("pass_kv", [4.0, 6.0], bytes_sent=49, peak_bytes=3000),
    ]
    assert calls == ["pass_q", "pass_kv"] * 3


def test_a_few_hundred_cached_tokens_are_measured_and_written(cli, tiny, tmp_path):
    out = tmp_path / "million.json"
    code, _, err = cli(million, million.task, f"model={tiny}", "cached=301", "new=23", "rounds=2", f"out={out}")
    assert code == 0, err
    rows = json.loads(out.read_text())["rows"]
    assert list(rows[0]) == ["strategy", "seconds", "bytes_sent", "peak_bytes"]
    assert [(row["strategy"], len(row["seconds"])) for row in rows] == [("pass_q", 2), ("pass_kv", 2)]
    # Rank 0 has 162 of 324 rows, each with keys and values of 3 heads of 4 floats.
    assert rows[1]["bytes_sent"] == 162 * 2 * 3 * 4 * 4
    assert 0 < rows[0]["peak_bytes"] <= rows[1]["peak_bytes"]
