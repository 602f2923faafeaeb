"""A prompt on two nodes: four ranks give one rank's text."""

import json

import pytest

# Far more than they take: other work may have the cores.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
PROMPT = ("model=smollm2_135m", "prompt.text=The capital of France, (they say) is", "max_new_tokens=5")


def test_four_ranks_on_two_nodes_give_the_text_of_one(submitted, tmp_path):
    shared = ("recipe=generate", *PROMPT, "time=30", "run.threads=1")
    four = submitted(*shared, "nodes=2", "ranks_per_node=2", "mesh.ring=4", f"run={tmp_path / 'two (2) nodes'}")
    one = submitted(*shared, f"run={tmp_path / 'one'}", "verify=false")
    four.ends()
    one.ends()
    told, alone = (json.loads((job.run / "result.json").read_text()) for job in (four, one))
    assert told["ranks"] == 4 and told["text"] == alone["text"] and told["token_ids"] == alone["token_ids"]
    assert told["max_logit_diff"] < 1e-3
    hosts = [(four.run / "ranks" / f"{rank}.log").exists() for rank in range(4)]
    assert hosts == [True] * 4
