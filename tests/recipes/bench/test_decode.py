"""recipes.bench decode: every strategy and one rank are measured, and what cannot be measured is refused."""

import json

import pytest

from recipes.bench import decode

DROPPED = "sharded, 50% dropped"
VARIANTS = [*decode.STRATEGIES, DROPPED, decode.ONE_RANK]
LAYERS = 2  # the tiny model has two


def test_every_variant_and_batch_is_measured_and_written(cli, tiny, tmp_path):
    out = tmp_path / "decode.json"
    argv = (f"model={tiny}", "cached=23", "batch=[1,3]", "tokens=2", "rounds=2", "dropped=[0.5]", f"out={out}")
    code, _, err = cli(decode, decode.task, *argv)
    assert code == 0, err
    result = json.loads(out.read_text())
    assert (result["model"], result["mesh"], result["cached"]) == ("tiny", "ring=2", 23)
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert {name: len(seconds) for name, seconds in row["seconds"].items()} == dict.fromkeys(VARIANTS, 2)
        assert list(row["bytes_sent"]) == VARIANTS
        assert row["bytes_sent"]["one rank"] == 0 < row["bytes_sent"]["gather_merge"]
        assert row["messages"]["sharded"] == 4 * LAYERS + 2, "to one other rank"
        assert row["messages"][DROPPED] == 4 * LAYERS + 2 - 1, "one of the two blocks drops a reduction"
        assert row["messages"]["one rank"] == 0
    assert "TTIT ms" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["batch=[]"], "batch="),
        (["batch=[0]"], "batch.0=0"),
        (["rounds=0"], "rounds=0"),
        (["mesh.tp=3"], "mesh.tp=3"),
        (["mesh.ulysses=2"], "mesh.ulysses=2"),
        (["dropped=[0]"], "dropped.0=0"),
        (["dropped=[0.01]"], "are [0] of 2 blocks: give shares of different numbers of blocks, from 0.25"),
        (["dropped=[0.5,0.51]"], "are [1, 1] of 2 blocks"),
        (["dropped=[0.5]", "mesh.ring=1"], "one rank has no reduction to drop"),
        (["latency_us=500"], "rate=100mbit are for links between emulated hosts: set hosts=2"),
        (["out=/dev/null/a.json"], "out=/dev/null/a.json cannot be written"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(decode, decode.task, *settings, f"model={tiny}")
