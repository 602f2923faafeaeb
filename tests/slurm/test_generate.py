"""Generation on two nodes: four ranks give the text of one rank."""

import json

import pytest

from recipes import generate

# The time limit is far above what the test needs, because other work may occupy the cores.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
PROMPT = ("model=smollm2_135m", "prompt.text=The capital of France, (they say) is", "max_new_tokens=5", "run.threads=1")


def test_four_ranks_on_two_nodes_give_the_text_of_one(submit_job, cli, tmp_path):
    """The one rank runs without Slurm, while the job waits and runs."""
    two_nodes = ("nodes=2", "ranks_per_node=2", "mesh.ring=4", "time=30", f"folder={tmp_path / 'two, (2) nodes'}")
    four = submit_job("recipe=generate", *PROMPT, *two_nodes)
    code, _, err = cli(generate, generate.task, *PROMPT, "verify=false", f"out={tmp_path / 'one.json'}")
    assert code == 0, err
    four.wait_for_end()
    result, single = (json.loads(file.read_text()) for file in (four.folder / "result.json", tmp_path / "one.json"))
    assert result["ranks"] == 4
    assert result["text"] == single["text"] and result["token_ids"] == single["token_ids"]
    assert result["max_logit_diff"] < 1e-3
    assert [(four.folder / "ranks" / f"{rank}.log").exists() for rank in range(4)] == [True] * 4
