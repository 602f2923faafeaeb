"""recipes.bench gpu_check, rehearsed on a CPU: every part, its time limit, and what is written after each."""

import json
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from longctx.attention.kernel import reference
from longctx.attention.layout import zigzag
from longctx.parallel.launch import run_ranks
from recipes.bench import gpu_check, gpu_model_parts
from recipes.bench.gpu_check import TimeIsUp, draw_tiles, prepare, run_parts, time_limit
from recipes.bench.gpu_parts import _time_attention
from tests import oracle

REHEARSAL = (
    "run=local", "model=tiny", "model.dtype=float32", "context.kernel=auto", "context.chunk=31", "lengths=[67]",
    "ranks=[2,3]", "logits=67", "prefill=[41]", "new_tokens=3", "rounds=1",
)  # fmt: skip


@pytest.fixture
def job(config_of, tmp_path):
    return prepare(config_of("bench/gpu_check", *REHEARSAL, f"out={tmp_path}/check"))


def test_every_part_is_rehearsed_and_written(job, tmp_path):
    [results] = run_ranks(1, gpu_check.run_rank, job)
    written = json.loads((tmp_path / "check" / "gpu_check.json").read_text())
    assert list(written["parts"]) == list(gpu_check.PARTS) == list(results)
    assert not [part["error"] for part in written["parts"].values() if "error" in part]
    kernels, tiles, logits, training, dropped, model, decode = (part["rows"] for part in written["parts"].values())
    assert {row["kernel"]: row["verdict"] for row in kernels} == {"reference": "exact", "flash_cpu": "exact"}
    assert [(row["tokens"], row["ranks"]) for row in tiles] == [(67, 2), (67, 3)]
    assert all(0 < row["error_out"] < 1e-6 and 0 < row["error_gradients"] < 2e-6 for row in tiles)
    assert logits == [{"tokens": 67, "model_layers": 2, "layers": "local", "error": 0.0}]
    assert training[0]["error_loss"] < 1e-6 and training[0]["error_grad_norm"] < 1e-5 and training[0]["step_s"] > 0
    assert [row["offload"] for row in training] == [None, "host"] and training[1]["offloaded_bytes"] > 0
    assert training[0]["loss"] == training[1]["loss"] and training[0]["grad_norm"] == training[1]["grad_norm"]
    assert [(row["dropped"], row["error"]) for row in dropped] == [("1 of 2 blocks", 0.0), ("2 of 2 blocks", 0.0)]
    assert all(row["change"] > 1e-4 for row in dropped)
    assert model[0]["tokens"] == 41 and model[0]["ttit_s"] > 0
    assert [row["variant"] for row in decode[:2]] == ["growing cache", "fixed shapes"]
    assert all(row["error"] < 1e-5 and row["step_s"] > 0 for row in decode[:2])
    assert decode[2]["variant"] == "CUDA graph: left out, needs device=cuda" and decode[2]["step_s"] == "-"
    picture = (tmp_path / "check" / "gpu_check.svg").read_text()
    assert "forward, 67 tokens" in picture and "ranks of the ring" in picture
    page = (tmp_path / "check" / "gpu_check.md").read_text()
    assert "| kernel | dtype | verdict |\n|---|---|---|\n| reference | float32 | exact |" in page


def test_part_that_fails_or_takes_too_long_does_not_end_the_others(job, tmp_path):
    seen = []

    def fail(*_):
        raise RuntimeError("CUDA out of memory\nwith advice")

    def read(*_):
        seen.append(json.loads((tmp_path / "check" / "gpu_check.json").read_text())["parts"])
        return []

    results = run_parts(job, None, {"failing": fail, "later": read})
    draw_tiles(job, {"tiles": results["failing"]})
    assert not (tmp_path / "check" / "gpu_check.svg").exists()
    assert seen[0]["failing"]["error"] == "RuntimeError: CUDA out of memory"
    assert "RuntimeError: CUDA out of memory" in (tmp_path / "check" / "gpu_check.md").read_text()
    assert results["later"]["rows"] == []
    with pytest.raises(TimeIsUp, match=r"after 0\.05 s"), time_limit(0.05), suppress(Exception):
        time.sleep(60)


def test_each_row_has_its_own_peak_of_memory(job, monkeypatch):
    """A stand-in for a GPU, on which each turn needs as many bytes as it has tokens."""
    peak, turns = [9_000], []  # bytes of an earlier part; tokens of each turn

    class Session:
        def __init__(self, *_):
            pass

        def turn(self, prompts, _):
            turns.append(len(prompts[0]))
            peak[0] = max(peak[0], turns[-1])
            return SimpleNamespace(ttft_s=1.0, ttit_s=1.0)

    monkeypatch.setattr("longctx.infer.session.Session", Session)
    monkeypatch.setattr(gpu_model_parts, "_random_engine", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.__setitem__(0, 0))
    job = replace(job, settings=replace(job.settings, prefill=(61, 41)))
    table_rows = gpu_model_parts.time_model(job, SimpleNamespace(device=torch.device("cuda")))
    assert [row["peak_bytes"] for row in table_rows] == [61, 41]
    assert turns == [41, 61, 41], "the first turn warms up"


def test_tiles_of_a_ring_are_exact():
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(1, 23, h, 5, dtype=torch.float64, generator=generator) for h in (6, 2, 2, 6))
    rows = oracle.pack_rows([23])
    mask = oracle.visible(rows, rows)
    exact = (oracle.attention(q, k, v, mask)[0], *oracle.gradients(q, k, v, mask, dout))
    ring = _time_attention([q, k, v, dout], zigzag(23, 3), reference, 1)
    for x, expected in zip(ring.tensors, exact, strict=True):
        oracle.assert_close(x, expected, 1e-6)


def test_prompts_beyond_the_model_are_refused(config_of, tmp_path):
    with pytest.raises(ValueError, match=r"prefill=5,000 and new_tokens=3 .* model's 4,096 positions"):
        prepare(config_of("bench/gpu_check", *REHEARSAL, "prefill=[5000]", f"out={tmp_path}/check"))
    assert gpu_check.PARTS and not (tmp_path / "check").exists()
