"""recipes.bench memory: predicted and measured bytes of single runs."""

import json

import pytest

from recipes.bench import memory
from recipes.bench.memory import errors

RUNS = "runs=[{work:prefill},{work:decode},{work:train},{work:train,recompute:full,mlp_rows:64}]"


def test_prediction_is_close_to_the_measured_bytes(cli, tmp_path):
    file = tmp_path / "memory.json"
    command = ("model=tiny", "data.length=512", "loss_rows=64", RUNS, f"json={file}", f"out={tmp_path / 'run'}")
    code, _, err = cli(memory, memory.task, *command)
    assert code == 0, err
    for run in json.loads(file.read_text())["runs"]:
        of_sum, of_part = errors(run)
        assert abs(of_sum) <= 0.05 and abs(of_part) <= 0.1, run


@pytest.mark.parametrize("model_type", ["qwen3", "glm4", "gemma3_text"])
@pytest.mark.parametrize(("ffn", "tp"), [(32, 1), (512, 1), (512, 2)])
def test_prediction_for_norms_of_outputs_and_of_queries_and_keys(cli, tmp_path, model_type, ffn, tp):
    """With a small FFN, the peak is in attention; with a large one, at the output of the feed-forward network."""
    file, fields = tmp_path / "memory.json", (f"model_type={model_type}", f"intermediate_size={ffn}")
    words = ("model=tiny", *(f"++model.config.{one}" for one in fields), "data.length=1024")
    runs = f"runs=[{{work:prefill,tp:{tp}}}]"
    code, _, err = cli(memory, memory.task, *words, runs, f"json={file}", f"out={tmp_path / 'run'}")
    assert code == 0, err
    for run in json.loads(file.read_text())["runs"]:
        of_sum, of_part = errors(run)
        assert abs(of_sum) <= 0.02 and abs(of_part) <= 0.05, run


@pytest.mark.parametrize("chosen", [2, 3])
def test_prediction_for_a_mixture_of_experts(cli, tmp_path, chosen):
    file = tmp_path / "memory.json"
    fields = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": chosen, "intermediate_size": 512}
    words = ("model=tiny", *(f"++model.config.{name}={value}" for name, value in fields.items()), "data.length=512")
    runs = "runs=[{work:train},{work:train,recompute:full}]"
    code, _, err = cli(memory, memory.task, *words, "loss_rows=64", runs, f"json={file}", f"out={tmp_path / 'run'}")
    assert code == 0, err
    for run in json.loads(file.read_text())["runs"]:
        of_sum, of_part = errors(run)
        assert abs(of_sum) <= 0.05 and abs(of_part) <= 0.1, run


def test_prediction_counts_the_bytes_of_the_dtype(cli, tmp_path):
    """A kernel's float32 copies of 16-bit inputs are not predicted: only the parts that last are compared."""
    file, runs = tmp_path / "memory.json", "runs=[{work:prefill},{work:decode}]"
    words = ("model=tiny", "model.dtype=bfloat16", "data.length=512", f"json={file}", f"out={tmp_path / 'run'}")
    code, _, err = cli(memory, memory.task, *words, runs)
    assert code == 0, err
    for run in json.loads(file.read_text())["runs"]:
        for part in ("weights", "kv_cache"):
            assert run["predicted"][part] == pytest.approx(run["measured"][part], rel=0.02), part


def test_windows_shrink_buffers_and_not_the_cache(cli, tmp_path):
    """With as many KV heads as query heads and a small FFN, the peak is in attention.

    Attention's float32 partials of a tile are predicted for all rows; a window's tiles have fewer, so 7 % are allowed.
    """
    file, ring = tmp_path / "memory.json", "work:prefill,ring:2"
    fields = ("model_type=mistral", "intermediate_size=32", "num_key_value_heads=6")
    words = ("model=tiny", *(f"model.config.{one}" for one in fields), "+model.config.sliding_window=64")
    runs = f"runs=[{{{ring}}},{{{ring},strategy:pass_q}}]"
    code, _, err = cli(memory, memory.task, *words, "data.length=1020", runs, f"json={file}", f"out={tmp_path / 'run'}")
    assert code == 0, err
    for run in json.loads(file.read_text())["runs"]:
        measured, predicted = run["measured"], run["predicted"]
        assert sum(predicted.values()) == pytest.approx(sum(measured.values()), rel=0.07), run
        assert predicted["kv_cache"] == pytest.approx(measured["kv_cache"], rel=0.01)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mesh.ring=2"], "recipes.bench memory has no use for mesh.ring=2"),
        (
            ["data.batch=3"],
            "data.batch is not used by recipes.bench memory, whose runs each have their own: leave it out",
        ),
        (["context.strategy=pass_q"], "context.strategy is not used"),
        (["recompute=full"], "recompute is not used"),
        (["context.decode=sharded"], "context.decode=sharded is not measured by recipes.bench memory"),
        (
            ["runs=[{work:decode,ring:2,strategy:pass_q}]"],
            "strategy=pass_q is of prefill: with work=decode, set context.d",
        ),
        (["runs=[{work:prefill,ep:2}]"], "work=prefill has no dp, pp, ep, sequences, zero1, recompute"),
        (["context.layout=striped"], "context.layout=striped: recipes.bench memory measures zigzag only"),
        (
            ["++model.config.model_type=mixtral", "++model.config.num_local_experts=4"],
            "recipes.bench memory predicts mixtures of experts in training only",
        ),
    ],
)
def test_settings_that_each_run_has_are_refused(refused, words, says):
    assert says in refused(memory, memory.task, "model=tiny", *words)


def test_an_unpredicted_part_counts_as_an_error():
    assert errors({"measured": {"weights": 100}, "predicted": {"weights": 90}}) == pytest.approx((-0.1, -0.1))
    assert errors({"measured": {"weights": 1000, "logits": 1}, "predicted": {"weights": 1000}})[1] == 0
