"""recipes.serve: OpenAI's own client gets the texts of recipes.generate; wrong settings are refused."""

import json
import os
import re
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoModelForCausalLM

from longctx.config import Sampling
from longctx.hf.config import tokenizer_of
from longctx.infer.answer import cut_at_stop
from longctx.parallel.launch import run_ranks
from recipes import generate, serve
from recipes.common import listening

PROMPTS = ["The quick brown fox", "Jumps", "over the lazy dog, which lies there, and does not wake."]


@contextmanager
def serving(model: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server of ``model`` in the block; yield it and its address."""
    command = [sys.executable, "-m", "recipes.serve", f"model={model}", "port=0", *words]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as one:
        lines = []
        for line in one.stderr:
            lines.append(line)
            if found := re.search(r"answers at (http://\S+/v1)", line):
                break
        else:
            pytest.fail("".join(lines))
        assert "Warning" not in "".join(lines)
        yield one, found[1]
        one.kill()


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(tiny: Path) -> Iterator[openai.OpenAI]:
    """A client of a server on two ranks, of which one prefills the short prompts; strategies by the cost model."""
    words = "mesh.ring=2", "context.chunk=13", "max_sequences=3", "cache.page=5", "one_rank_tokens=20"
    words += ("context.strategy=auto",)
    with serving(tiny, *words) as (_, address):
        yield client_of(address)


@pytest.fixture(scope="module")
def expected(prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of recipes.generate: two answers to each of `PROMPTS`."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"text": one}) for one in PROMPTS))
    job = prepared(f"prompts={file}", "n=2", "max_new_tokens=17", "sampling.temperature=1.2", "sampling.top_k=90",
                   "sampling.seed=11", "verify=false")  # fmt: skip
    return run_ranks(1, generate.run_rank, job)[0].token_ids


def complete(client: openai.OpenAI, prompt: Any = PROMPTS, **settings: Any) -> Any:
    fields = {"model": "tiny", "temperature": 1.2, "seed": 11, "max_tokens": 17, "extra_body": {"top_k": 90}}
    return client.completions.create(prompt=prompt, **{**fields, **settings})


def figures_of(client: openai.OpenAI) -> dict[str, float]:
    page = client.get("/../metrics", cast_to=httpx.Response).text
    figures = re.findall(r"^longctx_(\w+(?:\{\S+\})?) (\S+)$", page, re.MULTILINE)
    return {name: float(figure) for name, figure in figures}


def test_texts_are_those_of_generate(client, expected, tiny):
    texts = [tokenizer_of(tiny).decode(tokens) for tokens in expected]
    # 1. Six answers at once, of which three are decoded together.
    answer = complete(client, n=2, logprobs=2)
    assert [one.text for one in answer.choices] == texts
    assert {one.finish_reason for one in answer.choices} == {"length"}
    assert answer.usage.completion_tokens == 6 * 17
    assert all(len(one.logprobs.token_logprobs) == 17 for one in answer.choices)
    # 2. Streams beside each other, with stop texts.
    stop = texts[0][4:6]

    def stream(i: int) -> str:
        pieces = complete(client, PROMPTS[i], seed=11 + 2 * i, stream=True, stop=[stop])
        return "".join(one.choices[0].text for one in pieces)

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(stream, range(3))] == [cut_at_stop(texts[2 * i], [stop]) for i in range(3)]
    # 3. A client that leaves early holds up nobody.
    leaving = complete(client, PROMPTS[1], max_tokens=80, stream=True)
    next(iter(leaving))
    leaving.close()
    assert complete(client, PROMPTS[0]).choices[0].text == texts[0]


def test_tensor_parallel_ranks_prefill_and_decode_in_one_pass(expected, tiny):
    with serving(tiny, "mesh.tp=3", "context.chunk=13", "max_sequences=3") as (_, address):
        answer = complete(client_of(address), n=2)
    assert [one.text for one in answer.choices] == [tokenizer_of(tiny).decode(tokens) for tokens in expected]


def test_prompts_reuse_the_pages_of_earlier_ones(client, expected, tiny):
    for _ in range(2):
        assert complete(client, PROMPTS[2], seed=15).choices[0].text == tokenizer_of(tiny).decode(expected[4])
    figures = figures_of(client)
    assert figures["prefix_reused_tokens"] >= 5 * (len(PROMPTS[2]) // 5 - 1)
    assert 0 < figures["prefix_hit_rate"] < 1
    assert all(figures[f'page_bytes{{ring_rank="{rank}"}}'] > 0 for rank in range(2))


def test_lm_eval_scores_through_the_server_what_transformers_scores(client, tiny):
    """Three requests at a time, whose prompts of different lengths share the passes."""
    tokenizer, model = tokenizer_of(tiny), AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)

    @torch.inference_mode()
    def most_likely(letter: str) -> tuple[str, str]:
        token = int(model(tokenizer(letter, return_tensors="pt")["input_ids"]).logits[0, -1].argmax())
        return letter, tokenizer.decode([token])

    lm = LocalCompletionsAPI(
        base_url=f"{client.base_url}completions", model="tiny", tokenizer=str(tiny), tokenizer_backend="huggingface",
        batch_size=3, max_length=model.config.max_position_embeddings,
    )  # fmt: skip
    context, likely = next(pair for pair in map(most_likely, string.ascii_letters) if pair[1] in string.ascii_letters)
    pairs = [(context, likely), (PROMPTS[1], " the fence"), (PROMPTS[2], " No."), (PROMPTS[2], " It sleeps on.")]
    scores = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    assert scores[0][1], "the most likely one"
    for (context, continuation), (logprob, is_greedy) in zip(pairs, scores, strict=True):
        tokens, begin = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
        with torch.inference_mode():
            rows = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[begin - 1 : -1]
        targets = torch.tensor(tokens[begin:])
        assert logprob == pytest.approx(float(rows.gather(1, targets[:, None]).sum()), abs=1e-4)
        assert is_greedy == bool((rows.argmax(-1) == targets).all())


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        complete(client, model="gpt")
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert [one.id for one in client.models.list()] == ["tiny"]


def test_sigterm_answers_open_requests_first(tiny):
    """The stream that is open gets all its tokens."""
    with serving(tiny) as (process, address):
        stream = complete(client_of(address), PROMPTS[1], max_tokens=80, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert [one.choices[0].finish_reason for one in stream][-1] == "length"
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            process.stderr.readline()
        assert process.wait(5) == 0


def test_echo_without_new_tokens_scores_the_prompt(client, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    answer = complete(client, max_tokens=0, echo=True, logprobs=0)
    assert [one.text for one in answer.choices] == PROMPTS
    assert (answer.usage.completion_tokens, {one.finish_reason for one in answer.choices}) == (0, {"length"})
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        tokens = tokenizer_of(tiny)(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).flatten()
        assert choice.logprobs.token_logprobs == [None, *(pytest.approx(float(one), abs=1e-4) for one in expected)]
    assert (
        "".join(one.choices[0].text for one in complete(client, "Jumps", max_tokens=0, echo=True, stream=True))
        == "Jumps"
    )


def test_killed_rank_ends_open_requests_with_an_error_and_the_next_server_has_its_pages(refused, tiny, tmp_path):
    """Two answers are streamed and four wait when the second rank is killed."""
    words = ["mesh.ring=2", "max_sequences=2", "cache.page=5", f"cache.save={tmp_path}/pages"]
    first_token = threading.Event()

    def read(address: str, i: int) -> None:
        with client_of(address) as client:
            for _ in complete(client, PROMPTS[i % 3], max_tokens=35, stream=True):
                first_token.set()

    def fail(address: str, i: int) -> float:
        with pytest.raises(openai.APIError):
            read(address, i)
        return time.monotonic()

    with serving(tiny, *words) as (process, address), ThreadPoolExecutor(6) as pool:
        expected = complete(client_of(address), PROMPTS[2]).choices[0].text
        assert "pages is in use by process" in refused(serve, serve.task, f"model={tiny}", *words)
        ends = [pool.submit(fail, address, i) for i in range(6)]
        assert first_token.wait(60)
        os.kill(pids_of_ranks(process.pid)[1], signal.SIGKILL)
        killed = time.monotonic()
        assert max(end.result() for end in ends) - killed < 10
        assert "rank 1 of 2 was killed by SIGKILL" in process.stderr.read()
        assert process.wait(60) == 1
    # The next server answers from the pages on disk, except for the end of the prompt.
    with serving(tiny, *words) as (_, address), client_of(address) as client:
        assert complete(client, PROMPTS[2]).choices[0].text == expected
        assert figures_of(client)["prefix_reused_restored_tokens"] >= 5 * (len(PROMPTS[2]) // 5 - 1)


def pids_of_ranks(pid: int) -> list[int]:
    """Return the processes of the ranks that the process ``pid`` started, in rank order: its only grandchildren."""

    def children(pid: int) -> list[int]:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    return [grandchild for child in children(pid) for grandchild in children(child)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["host=0.0.0.0"],
            r"host=0\.0\.0\.0 can be reached from other machines and needs an API key: give api_key_file",
        ),
        (["host=here"], "host=here is not an address: use 127.0.0.1"),
        (["port=70000"], "port=70000 is not a port: use 1 to 65535"),
        (["api_key_file=/nowhere"], "api_key_file=/nowhere cannot be read"),
        (["cache.gb=0", "cache.save=pages"], "cache.save=pages needs memory for pages: use cache.gb above 0"),
        (["cache.page=98"], "cache.page=98 is above the model's 97 positions, .* or cache.gb=0 for no pages"),
        (
            ["cache.gb=0.0000122", "mesh.ring=2"],  # enough for half a page a rank
            "cache.gb=1.22e-05 has no room for a page, which has up to 1.23e-05 GB on a rank with cache.page=64: use",
        ),
        (["mesh.dp=2"], "mesh.dp=2"),
        (["+reduce=int8", "mesh.tp=3"], "not been tested with rounded reductions"),
        (["sampling.logprobs=1"], "each request asks for its own"),
        (["sampling.seed=7"], "sampling.seed=7: a request without a seed gets a random one; leave it out"),
        (["context.strategy=empirical"], "context.strategy=empirical needs a hardware file with fitted constants"),
        (["context.strategy=auto", "hardware=/nowhere"], "hardware=/nowhere cannot be read"),
    ],
)
def test_wrong_settings_are_refused(refused, tiny, words, message):
    assert re.search(message, refused(serve, serve.task, f"model={tiny}", *words))


def test_key_comes_from_a_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(listening.KEY_VARIABLE, "from-the-environment")
    (tmp_path / "key").write_text("from-a-file\n")
    assert listening.read_key(None) == "from-the-environment"
    file = str(tmp_path / "key")
    assert listening.read_key(file) == "from-a-file"
    job = serve.ServeJob(None, Sampling(), serve.ServeSettings(), serve.PrefixSettings(), "from-a-file")
    assert "from-a-file" not in repr(job)
    for wrong in ("one\ntwo\n", "one two", "a\x01b"):
        (tmp_path / "key").write_text(wrong)
        with pytest.raises(ValueError, match=r"has a key that no client can send .*: write one word of printable"):
            listening.read_key(file)
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ValueError, match="has no key of ASCII characters"):
        listening.read_key(file)
