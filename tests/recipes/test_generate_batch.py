"""recipes.generate prompts=FILE: a batch gives each prompt the answer that it gets alone; bad lines are refused."""

import json
import re

import pytest

from longctx.parallel.launch import run_ranks
from recipes import generate

BATCH = [
    {"text": "The quick brown fox, as ever.", "max_new_tokens": 5},
    {"text": "Jumps"},
    {"text": "over\u2028the", "max_new_tokens": 0},
    {"text": "the lazy dog, which lies there, and does not wake.", "max_new_tokens": 11},
    {"text": "!", "max_new_tokens": 1},
]
LENGTHS = [29, 5, 10, 50, 1]  # bytes; 95 in all


@pytest.fixture
def batch(tmp_path):
    """A file of prompts, with empty lines, and a Unicode line separator inside one of the strings."""
    file = tmp_path / "a batch, of sorts.jsonl"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in BATCH))
    return file


@pytest.fixture(scope="module")
def each_alone(prepared):
    """Token ids of each prompt of the batch when it is run alone, on one rank."""
    settings = [
        (f"prompt.text='{line['text']}'", f"max_new_tokens={line.get('max_new_tokens') or 7}") for line in BATCH
    ]
    ids = [run_ranks(1, generate.run_rank, prepared(*one, "verify=false"))[0].token_ids[0] for one in settings]
    return [tokens[: line.get("max_new_tokens", 7)] for tokens, line in zip(ids, BATCH, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        "mesh.ring=2",
        "mesh.ulysses=3 context.strategy=pass_q context.layout=striped",
        "mesh.tp=3 mesh.ring=2 context.chunk=13",
    ],
)
def test_batch_gives_each_prompt_the_tokens_that_it_gets_alone(cli, tiny, tmp_path, batch, each_alone, settings):
    out = tmp_path / "out.json"
    words = (f"model={tiny}", f"prompts={batch}", "max_new_tokens=7", f"out={out}", *settings.split())
    code, printed, err = cli(generate, generate.task, *words)
    assert code == 0, err
    result = json.loads(out.read_text())
    answers = result["answers"]
    assert [answer["token_ids"] for answer in answers] == each_alone
    assert [answer["prompt_tokens"] for answer in answers] == LENGTHS
    assert [len(answer["prompt_token_ids"]) for answer in answers] == LENGTHS
    assert printed == "".join(answer["text"] + "\n" for answer in answers)
    assert (result["tokens"], result["new_tokens"]) == (95, 5 + 7 + 0 + 11 + 1)
    assert 0 <= result["max_logit_diff"] < 1e-5
    assert result["ttit_s"] > 0
    # 10 steps after the first tokens give 4 + 6 + 10 tokens.
    assert result["tokens_per_s"] == pytest.approx(20 / (10 * result["ttit_s"]))
    assert "95 in 5 prompts, 24 new" in err and "against one rank, over all 5 prompts" in err


def test_batch_is_sent_once_and_cached_once(prepared, batch):
    job = prepared(f"prompts={batch}", "max_new_tokens=7", "mesh.ring=2", "verify=false")
    figures = run_ranks(2, generate.run_rank, job)[0]
    row = 2 * 2 * 3 * 4 * 4  # layers; keys and values; heads; width; bytes
    # 50 and 10 tokens divide evenly. The larger shares of 29, 5 and 1 go to the rank with fewer tokens so far.
    assert figures.prefill_bytes_sent_per_rank == [48 * row, 47 * row]
    assert sum(figures.kv_cache_bytes_per_rank) == (95 + 4 + 6 + 10) * row  # an answer's last token is not run


@pytest.mark.parametrize(
    ("line", "settings", "words"),
    [
        ("", "", r"prompts=\S+ has no prompts: give it lines like"),
        ("{", "", r"prompts=\S+, line 2 is not JSON"),
        ('{"text": " "}', "", r'prompts=\S+, line 2 needs some "text"'),
        ('{"text": "a", "max_new_tokens": -1}', "", r"prompts=\S+, line 2: .* is -1, use a number of tokens"),
        (json.dumps({"text": "x" * 93}), "", r"prompts=\S+, line 2: the prompt has 93 tokens, .* to 92 tokens$"),
        (
            json.dumps({"text": "x" * 96, "max_new_tokens": 2}),
            "",
            r"line 2: .* context of 97: cut its text to 95 tokens$",
        ),
        ('{"text": "a", "max_new_tokens": 97}', "", r"line 2: max_new_tokens=97 fills the model's context of 97"),
        ('{"text": "abc"}', "mesh.ring=2 mesh.ulysses=3", "6 ranks for a prompt of 3 tokens: use at most 3 ranks"),
        ('{"text": "a"}', "prompt.text=b", r"prompts=\S+ and prompt\.text are both given: use one"),
        ('{"text": "a"}', "prompt.tokens=5", r"and prompt\.tokens are both given"),
        ('{"text": "a"}', "prompts=/nowhere.jsonl", r"prompts=/nowhere\.jsonl cannot be read"),
    ],
)
def test_bad_line_of_a_batch_is_refused_by_its_number(refusal, tmp_path, line, settings, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n" + line)
    assert re.search(words, refusal(f"prompts={file}", "max_new_tokens=5", *settings.split()))
