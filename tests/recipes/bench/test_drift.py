"""recipes.bench drift: the captured attention inputs, the float64 reference, the errors and the verdict."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from longctx.attention.flash_cpu import flash_cpu
from longctx.config import Mesh, ModelSource
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank, run_ranks
from longctx.parallel.strategy import STRATEGIES
from recipes.bench import drift
from tests import oracle

TOKENS = list(range(3, 3 + 2 * 41, 2))


def inputs(rows: int, d: int = 5) -> drift.Inputs:
    q, k, v = (torch.randn(2, rows, heads, d).bfloat16() for heads in (6, 2, 2))
    return q, k, v


def capture(rank: Rank, folder: Path) -> dict[int, drift.Inputs]:
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, Mesh()) as runtime:
        engine = load_engine(runtime, ModelSource("tiny", str(folder)), shape_of(folder), folder, "auto")
        return drift.capture_attention_inputs(engine, torch.tensor(TOKENS), [1])


def test_captured_inputs_are_those_of_transformers(tiny):
    """The last layer's inputs match only if attention in the layers before it does."""
    references = []

    def keep(module, query, key, value, mask, scaling, **_):
        references.append((query, key, value))
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("keep", keep)
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="keep", dtype=torch.float32)
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    captured = run_ranks(1, capture, tiny)[0]
    assert list(captured) == [1]
    for x, reference in zip(captured[1], references[1], strict=True):
        oracle.assert_close(x, reference.transpose(1, 2).double(), 1e-5)


def test_exact_attention_and_its_gradients_match_the_oracle():
    qkv, rows = inputs(23), oracle.pack_rows([23])
    mask, dout = oracle.visible(rows, rows), torch.randn(2, 23, 6, 5)
    oracle.assert_close(drift.exact(*qkv), oracle.attention(*qkv, mask)[0], 1e-12)
    for x, reference in zip(drift.exact_gradients(qkv, dout), oracle.gradients(*qkv, mask, dout), strict=True):
        oracle.assert_close(x, reference, 1e-12)


def test_errors_of_every_strategy_and_number_of_ranks():
    qkv, runs = inputs(101), []
    errors, unrounded = drift.output_errors(qkv, (1, 3), flash_cpu, lambda: runs.append(1))
    assert list(errors) == list(unrounded) == [*STRATEGIES, drift.CONTROL]
    for name in STRATEGIES:
        assert all(1e-3 < error < 2**-9 for error in errors[name]), "bfloat16 is 2**-9 off, at most"
        assert all(0 < error < 1e-6 for error in unrounded[name])
    assert errors[drift.CONTROL][1] > drift.BAR * errors[drift.CONTROL][0], "the control drifts"
    gradients = drift.gradient_errors(qkv, 0, (1, 3), flash_cpu, lambda: runs.append(1))
    assert list(gradients) == ["dq", "dk", "dv"]
    assert all(1e-3 < error < 2**-9 for of_ranks in gradients.values() for error in of_ranks)
    assert len(runs) == 2 * len(errors) + 2


def layers_with(ratios: dict[int, float]) -> list[drift.LayerErrors]:
    """Layers whose error on three ranks is the given multiple of one rank's, for every strategy."""

    def errors(ratio: float, names: tuple[str, ...]) -> drift.Errors:
        return {name: [1e-3, ratio * 1e-3] for name in names}

    names = (*STRATEGIES, drift.CONTROL)
    return [
        drift.LayerErrors(layer, errors(ratio, names), errors(ratio, names), errors(1.0, ("dq", "dk", "dv")))
        for layer, ratio in ratios.items()
    ]


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ({0: 1.01, 5: 1.05, 7: 1.02}, "no drift: at most 1.050000 (layer 5)"),
        ({0: 1.01, 5: 0.9, 7: 1.06}, "DRIFT: at most 1.060000 (layer 7)"),
    ],
)
def test_the_verdict_names_the_worst_layer(ratios, verdict, capsys):
    drift.show(layers_with(ratios), drift.DriftSettings(9, None, (1, 3), (1, 3), None, None))
    assert verdict in capsys.readouterr().err


def test_a_tiny_model_is_measured_written_and_drawn(cli, tiny, tmp_path):
    out, picture = tmp_path / "drift.json", tmp_path / "drift.svg"
    argv = (f"model={tiny}", "tokens=61", "layers=[1]", "ranks=[1,3]", "gradient_ranks=[]")
    code, _, err = cli(drift, drift.task, *argv, f"out={out}", f"picture={picture}")
    assert code == 0, err
    result = json.loads(out.read_text())
    assert (result["model"], result["tokens"], result["ranks"]) == ("tiny", 61, [1, 3])
    assert [row["layer"] for row in result["rows"]] == [1]
    assert [len(errors) for errors in result["rows"][0]["errors"].values()] == [2] * 4
    assert list(result["rows"][0]) == ["layer", "errors", "unrounded", "gradients"]
    assert "no drift" in err and "processor" in result
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.dtype=float32"], "use model.dtype=bfloat16"),
        (["ranks=[2,8]"], "ranks=[2, 8] does not begin with the baseline: put 1 first"),
        (["gradient_ranks=[2]"], "gradient_ranks=[2] does not begin with the baseline: put 1 first"),
        (["ranks=[]"], "ranks="),
        (["layers=[]"], "layers="),
        (["tokens=97", "layers=[0,2]"], "layers=2: no such layer; use 0 to 1 of tiny"),
        (["layers=[-1]"], "layers.0=-1"),
        (["tokens=0"], "tokens=0"),
        (["tokens=98"], "tokens=98: tiny has 97 positions; use at most 97"),
        (["picture=/dev/null/a.svg"], "/dev/null/a.svg cannot be written"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(drift, drift.task, *settings, f"model={tiny}")
