"""recipes.bench rivals: every variant does the same work as transformers, and relative speeds are those of a round."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.config import Context, Mesh, ModelSource, Run
from longctx.hf.config import shape_of
from recipes.bench import rivals
from recipes.common.target import Target

SECONDS = {"one_rank": [2.0, 4.0, 3.0], "transformers": [3.0, 4.0, 6.0], "ranks": [1.0, 2.0, 4.0]}


def test_relative_speeds_compare_variants_within_a_round():
    times = rivals.WorkTimes("prefill of 7 tokens", 7, SECONDS)
    assert times.relative_speeds() == {
        "one_rank / transformers": [1.5, 1.0, 2.0],
        "ranks / transformers": [3.0, 2.0, 1.5],
        "ranks / one_rank": [2.0, 2.0, 0.75],
    }
    lines = rivals.markdown([times])
    assert "| prefill of 7 tokens | one_rank | 3.000 | 2.3 |" in lines
    assert "| prefill of 7 tokens | ranks / one_rank | 2.00 (0.75 to 2.00) |" in lines


def test_transformers_decodes_after_random_keys(tiny):
    net = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    target = Target(ModelSource("tiny", str(tiny)), tiny, shape_of(tiny), Mesh(), Context(), Run())
    decoder = rivals.TransformersDecoder(net, target, 3, rivals.RivalSettings(cached=17, tokens=4))
    keys = torch.cat([layer.keys.flatten() for layer in decoder.cache.layers])
    assert decoder.cache.get_seq_length() == 17 and keys.std() > 0.9
    decoder()
    assert decoder.cache.get_seq_length() == 21
    assert decoder.last.shape == (3, 1)


def test_every_variant_is_measured_and_written(cli, tiny, tmp_path):
    out = tmp_path / "rivals"
    sizes = ("lengths=[31]", "cached=23", "batch=[1,3]", "tokens=2", "rounds=2")
    code, _, err = cli(rivals, rivals.task, f"model={tiny}", "model.dtype=bfloat16", *sizes, f"out={out}")
    assert code == 0, err
    result = json.loads((out / "rivals.json").read_text())
    assert (result["model"], result["dtype"], result["mesh"]) == ("tiny", "bfloat16", "ring=2")
    works = ["prefill of 31 tokens", "decode after 23 tokens, batch 1", "decode after 23 tokens, batch 3"]
    assert [(row["work"], row["tokens"]) for row in result["rows"]] == list(zip(works, [31, 2, 6], strict=True))
    for row in result["rows"]:
        assert {name: len(seconds) for name, seconds in row["seconds"].items()} == dict.fromkeys(rivals.VARIANTS, 2)
        assert len(row["relative_speeds"]) == len(rivals.PAIRS)
        assert all(speed > 0 for speeds in row["relative_speeds"].values() for speed in speeds)
    assert (out / "rivals.md").read_text().strip() in err
    assert "<svg" in (out / "rivals.svg").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["parts=[train]"], "parts.0=train"),
        (["variants=[ranks]"], "variants="),
        (["mesh.ring=1"], "mesh.ring=1 has no second rank to compare with: use mesh.ring=2 or more"),
        (["mesh.tp=3"], "recipes.bench rivals has no use for mesh.tp=3"),
        (["parts=[prefill]", "lengths=[98]"], "lengths=98: tiny has 97 positions"),
        (
            ["lengths=[31]", "cached=90", "tokens=1"],
            "cached=90 and (2 x rounds + 2) x tokens=12: tiny has 97 positions",
        ),
        (["lengths=[31]", "cached=9", "tokens=1", "out=/dev/null/a"], "out=/dev/null/a cannot be written"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(rivals, rivals.task, *settings, f"model={tiny}")
