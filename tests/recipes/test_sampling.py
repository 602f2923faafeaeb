"""Settings of sampling act alike in generate, chat and eval: several answers, texts that end one, log-probabilities."""

import json

import pytest
from omegaconf import OmegaConf

from eval.answers.generate import generate_texts
from eval.answers.requests import Continue, key
from eval.job import read_sampling
from longctx.config import Context, Mesh, Sampling
from longctx.data.turns import UserTurn
from longctx.hf.config import tokenizer_of
from longctx.infer.session import Session
from longctx.parallel.launch import run_ranks
from recipes import generate
from recipes.common.conversation import take_turn
from tests.infer.thread_ranks import run_engines, single_rank

SETTINGS = ("sampling.temperature=1.3", "sampling.top_k=90", "sampling.presence_penalty=0.5", "max_new_tokens=19")


def on_one_rank(tiny, tmp_path, work):
    """Return ``work(engine)`` on one rank, which is this process."""
    with single_rank(tmp_path) as runtime:
        return run_engines(runtime, tiny, Mesh(), work)[0]


def test_answers_of_a_prompt_have_seeds_that_follow(cli, tiny, tmp_path, prepared):
    """Answer j equals the only answer with seed + j, up to its first stop text, on another mesh."""
    alone = prepared("prompt.text=Once upon", "sampling.seed=12", "sampling.logprobs=2", *SETTINGS)
    [figures] = run_ranks(1, generate.run_rank, alone)
    [tokens], [logprobs] = figures.token_ids, figures.logprobs
    words = tokenizer_of(tiny).decode(tokens)
    stop = next(letter for letter in words[5:] if letter.isascii() and letter.isalnum())
    out = tmp_path / "out.json"
    settings = ("prompt.text=Once upon", "n=3", "mesh.ring=2", "sampling.seed=10", "sampling.logprobs=2", *SETTINGS)
    code, printed, err = cli(
        generate, generate.task, f"model={tiny}", f"out={out}", f"sampling.stop=['{stop}']", *settings
    )
    assert code == 0, err
    first, second, third = json.loads(out.read_text())["answers"]
    end = len(third["token_ids"])
    assert third["text"] == words[: words.index(stop)] and third["text"] in printed
    assert third["token_ids"] == tokens[:end] and stop in tokenizer_of(tiny).decode(tokens[:end])
    assert stop not in tokenizer_of(tiny).decode(tokens[: end - 1])
    assert first["token_ids"] != second["token_ids"]
    for one, expected in zip(third["logprobs"], logprobs, strict=False):
        assert one["token"] == expected.token and one["logprob"] == pytest.approx(expected.logprob, abs=1e-5)
        assert [token for token, _ in one["top"]] == [token for token, _ in expected.top]


def test_answers_that_would_be_equal_are_refused(refusal):
    assert "all n=2 answers would be equal at sampling.temperature=0" in refusal("prompt.text=a", "n=2")
    assert "sampling.stop_tokens has token 256" in refusal("prompt.text=a", "sampling.stop_tokens=[5,256]")


def test_turn_of_a_conversation_ends_before_a_stop_text(tiny, tmp_path, capsys):
    sampling = Sampling(1.3, seed=3, logprobs=1)
    tokenizer = tokenizer_of(tiny)

    def talk(engine, **changes):
        session = Session(engine, Context(), Sampling(**{**vars(sampling), **changes}))
        return take_turn(session, UserTurn("Hello", 11), tokenizer, shown=True)

    def work(engine):
        whole = talk(engine)
        return whole, talk(engine, stop=(whole["answer"][4:6],)), talk(engine, stop_tokens=(whole["token_ids"][4],))

    whole, stopped, at_token = on_one_rank(tiny, tmp_path, work)
    end = whole["answer"].index(whole["answer"][4:6])
    assert stopped["answer"] == whole["answer"][:end]
    assert capsys.readouterr().out.splitlines()[0].startswith(whole["answer"].splitlines()[0][:4])
    assert len(stopped["logprobs"]) == len(stopped["token_ids"]) < len(whole["token_ids"])
    first = whole["token_ids"].index(whole["token_ids"][4])
    assert at_token["token_ids"] == whole["token_ids"][: first + 1]


def test_sampled_texts_of_an_evaluation_do_not_depend_on_the_batch(tiny, tmp_path):
    """Their seeds follow from the requests, and greedy requests keep the names of their stored answers."""
    sampling = Sampling(1.2, min_p=0.01, seed=5)
    requests = [Continue((5, 6, 7 + i), ("zz",), 9, sampling) for i in range(3)]
    greedy = Continue((5, 6, 7), ("zz",), 9)
    assert key(requests[0]) != key(greedy) != key(Continue((5, 6, 7), ("zz",), 9, Sampling(1.2)))

    def texts(engine, batch):
        return generate_texts(engine, Context(), tokenizer_of(tiny), batch)

    def work(engine):
        return (
            texts(engine, requests),
            texts(engine, requests[::-1]),
            texts(engine, [requests[1]]),
            texts(engine, [greedy]),
        )

    together, reverse, alone, greedy_text = on_one_rank(tiny, tmp_path, work)
    assert together == reverse[::-1] and alone == together[1:2]
    assert len({*together, *greedy_text}) == 4


def test_settings_that_tasks_decide_are_refused_in_an_evaluation():
    def read(**settings):
        return read_sampling(OmegaConf.create({"sampling": settings}))

    assert read(seed=4) is None
    assert read(temperature=0.5, seed=4) == Sampling(0.5, seed=4)
    for settings in ({"stop": ["a"]}, {"stop_tokens": [1]}, {"logprobs": 0}):
        with pytest.raises(ValueError, match=rf"sampling\.{min(settings)} is not used by eval"):
            read(**settings)
