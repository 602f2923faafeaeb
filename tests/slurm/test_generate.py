"""Generation on two nodes: four ranks give the text of one rank."""

import json

import pytest

# The time limit is far above what the test needs, because other work may occupy the cores.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
PROMPT = ("model=smollm2_135m", "prompt.text=The capital of France, (they say) is", "max_new_tokens=5")


def test_four_ranks_on_two_nodes_give_the_text_of_one(submit_job, tmp_path):
    shared = ("recipe=generate", *PROMPT, "time=30", "run.threads=1")
    four = submit_job(*shared, "nodes=2", "ranks_per_node=2", "mesh.ring=4", f"folder={tmp_path / 'two, (2) nodes'}")
    one = submit_job(*shared, f"folder={tmp_path / 'one'}", "verify=false")
    four.wait_for_end()
    one.wait_for_end()
    result, single = (json.loads((job.folder / "result.json").read_text()) for job in (four, one))
    assert result["ranks"] == 4
    assert result["text"] == single["text"] and result["token_ids"] == single["token_ids"]
    assert result["max_logit_diff"] < 1e-3
    assert [(four.folder / "ranks" / f"{rank}.log").exists() for rank in range(4)] == [True] * 4
