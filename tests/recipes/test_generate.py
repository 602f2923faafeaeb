"""recipes.generate: wrong settings are refused before any rank starts; every launcher gives the same tokens."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longctx.parallel.launch import Rank
from recipes import generate
from recipes.common.prompts import refuse_too_long

ROOT = Path(__file__).parents[2]
PROMPT = "prompt.text=The quick brown fox, as ever."  # 29 tokens, of a byte each


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("mesh.tp=2", r"mesh\.tp=2 .*9 query heads.*3 KV heads.*use mesh\.tp=[13] \(possible: 1, 3\)"),
        (
            "mesh.ulysses=2",
            r"mesh\.ulysses=2 .*9 query heads.*3 KV heads.*use mesh\.ulysses=[13] \(possible: 1, 3, 9\)",
        ),
        ("mesh.tp=3 mesh.ulysses=9", r"mesh\.tp=3.*each rank has 3 query heads.*1 KV heads.*use mesh\.ulysses=3"),
        ("context.strategy=auto", r"context\.strategy=auto .* recipes\.generate takes one of pass_kv.*recipes\.chat"),
        ("context.chunk=0", r"context\.chunk=0: use 1 token or more"),
        ("mesh.dp=2", r"mesh\.dp=2.*use mesh\.dp=1.*mesh\.ring"),
        ("mesh.pp=2", r"mesh\.pp=2.*use mesh\.pp=1.*mesh\.ring"),
        ("mesh.ring=30", "30 ranks are more than the 29 prompt tokens: use at most 29 ranks"),
        ("mesh.ring=11 mesh.ulysses=3", "33 ranks are more than the 29 prompt tokens"),
        ("max_new_tokens=0", "max_new_tokens=0: give a number greater than 0"),
        ("max_new_tokens=97", "max_new_tokens=97 fills the model's context of 97: use fewer"),
        ("max_new_tokens=69", r"29 tokens, and with max_new_tokens=69 .*context of 97: .*prompt\.tokens=28"),
        ("max_new_tokens=96", r"29 tokens, and with max_new_tokens=96 .*context of 97: .*prompt\.tokens=1"),
        ("prompt.tokens=0", r"prompt\.tokens=0: use 1 or more"),
        ("prompt.question=Who?", r"prompt\.question needs a chat template: set model"),
        ("prompt.pydoc=assert", "one source, not text and pydoc"),
        ("out=/dev/null/result.json", "out=/dev/null/result.json cannot be written"),
        ("out=/dev", "out=/dev is a folder: give the name of a file"),
    ],
    ids=lambda value: value.replace(" ", ",") if value.count(" ") < 2 else "",
)
def test_wrong_settings_are_refused(refusal, settings, words):
    assert re.search(words, refusal(PROMPT, "max_new_tokens=5", *settings.split()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"", "the prompt is empty"),
        (b"x" * 93, r"93 tokens, and with max_new_tokens=5 .*context of 97: .*prompt\.tokens=92$"),
    ],
    ids=["missing", "not text", "empty", "too long"],
)
def test_unusable_prompt_is_refused(refusal, tmp_path, content, words):
    file = tmp_path / "book.txt"
    if content is not None:
        file.write_bytes(content)
    assert re.search(words, refusal(f"prompt.file={file}", "max_new_tokens=5"))


def test_missing_prompt_is_refused(refusal):
    assert "give prompt.file=FILE, prompt.text='...' or prompt.pydoc=all" in refusal()


def test_folder_without_a_model_is_refused(refused, tmp_path):
    line = refused(generate, generate.task, f"model={tmp_path}", PROMPT)
    assert f"model={tmp_path}: no config.json in this folder" in line


def link_files(model: Path, folder: Path, without: str = "") -> None:
    """Link the files of ``model``, except the one called ``without``, into ``folder``."""
    for file in model.iterdir():
        if file.name != without:
            (folder / file.name).symlink_to(file)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_model_without_weights_or_tokenizer_is_refused(refused, tiny, tmp_path, missing):
    link_files(tiny, tmp_path, without=missing)
    line = refused(generate, generate.task, f"model={tmp_path}", PROMPT)
    assert str(tmp_path) in line and missing.split(".")[0] in line


def test_mesh_of_another_size_than_the_launcher_s_is_refused(refused, tiny, monkeypatch, under_torchrun):
    monkeypatch.setattr(generate, "run_rank", lambda *_: pytest.fail("this rank began"))

    def task(config):
        under_torchrun(1, 5)
        generate.task(config)

    line = refused(generate, task, f"model={tiny}", PROMPT, "mesh.ring=3", "max_new_tokens=5")
    assert "the launcher started 5 ranks, but the mesh has 3 (ring=3): set mesh axes whose product is 5" in line


def test_longest_prompt_and_answer_that_fit_are_accepted(prepared):
    job = prepared(PROMPT, "max_new_tokens=68", "mesh.ring=29", "mesh.tp=3")
    assert (job.target.mesh.ranks, job.prompt_tokens, job.target.shape.max_positions) == (3 * 29, 29, 97)


def test_advised_prompt_length_fills_the_context(refusal, prepared, tiny, tmp_path):
    link_files(tiny, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}-->")
    settings = (f"model.source={tmp_path}", f"prompt.text={'x' * 101}", "prompt.question=Why?", "max_new_tokens=11")
    advice = re.search(r"prompt\.tokens=\d+", refusal(*settings))[0]
    assert len(prepared(*settings, advice).prompts[0].tokens) == 97 - 11


KEYS = {
    "text", "tokens", "ranks", "strategy", "ttft_s", "tokens_per_s", "max_logit_diff", "token_ids",
    "kv_cache_bytes_per_rank", "prefill_bytes_sent_per_rank", "decode_bytes_sent_per_rank",
}  # fmt: skip


def run_python(*command):
    """Run ``python command...`` and return the finished process; fail unless its exit code is 0."""
    process = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process


def test_tokens_are_the_same_with_and_without_torchrun(tiny, tmp_path):
    settings = [f"model={tiny}", PROMPT, "mesh.ring=2", "max_new_tokens=5"]
    plain, launched = tmp_path / "plain.json", tmp_path / "launched.json"
    process = run_python("-m", "recipes.generate", *settings, f"out={plain}")
    result = json.loads(plain.read_text())
    assert result.keys() >= KEYS
    assert (result["tokens"], result["ranks"], result["strategy"]) == (29, 2, "pass_kv")
    assert len(result["token_ids"]) == 5
    assert process.stdout == result["text"] + "\n"
    assert "Warning" not in process.stderr and "Traceback" not in process.stderr
    assert 0 <= result["max_logit_diff"] < 1e-5
    assert result["ttft_s"] > 0 and result["tokens_per_s"] > 0
    row = 2 * 2 * 3 * 4 * 4  # layers; keys and values; heads; width; bytes
    # Zigzag gives the ranks 15 and 14 of 29 tokens. Tokens 29 to 32 alternate from rank 29 % 2 on. The last token is
    # not run.
    assert result["prefill_bytes_sent_per_rank"] == [15 * row, 14 * row]
    assert result["kv_cache_bytes_per_rank"] == [17 * row, 16 * row]
    assert all(sent > 0 for sent in result["decode_bytes_sent_per_rank"])

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = run_python(*torchrun, "-m", "recipes.generate", *settings, f"out={launched}")
    assert process.stdout == result["text"] + "\n", "only one rank prints"
    again = json.loads(launched.read_text())
    assert 0 <= again["max_logit_diff"] < 1e-5
    assert (again["token_ids"], again["text"]) == (result["token_ids"], result["text"])


def run_and_kill(phase: str, rank: Rank, job: generate.GenerateJob):
    """Run `generate.run_rank`; kill rank 1 in layer 1 of the prefill or of a decoded token, while the others wait."""
    from longctx.infer import prefill

    Path(job.target.folder, f"pid{rank.rank}").write_text(str(os.getpid()))
    name = "over_heads" if phase == "prefill" else "gather_merge"
    calls, original = count(), getattr(prefill, name)

    def run_until_killed(*args, **kwargs):
        if rank.rank == 1 and next(calls) == (1 if phase == "prefill" else 3):
            Path(job.target.folder, "killed_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(prefill, name, run_until_killed)  # in this rank's process only
    return generate.run_rank(rank, job)


@pytest.mark.parametrize(
    ("phase", "observed"),
    [
        # In a ring of three both other ranks lose a peer; which of them reports it first differs from run to run.
        ("prefill", r"rank [02] raised LostPeer: lost rank \d or \d, hop \d of 2 of the ring, layer 1, prefill"),
        ("decode", r"rank [02] raised LostPeer: lost rank \d or \d, merging partial results, layer 1, decode, step 2"),
    ],
)
def test_command_ends_and_names_the_killed_rank(cli, tiny, tmp_path, monkeypatch, phase, observed):
    link_files(tiny, tmp_path)
    monkeypatch.setattr(generate, "run_rank", partial(run_and_kill, phase))
    settings = (PROMPT, "mesh.ring=3", "max_new_tokens=7", "verify=false", "context.decode=gather_merge")
    code, out, err = cli(generate, generate.task, f"model={tmp_path}", *settings)
    assert time.time() - float((tmp_path / "killed_at").read_text()) < 20
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: rank 1 of 3 was killed by SIGKILL \({observed}\); the other ranks were ended\n", err)
    pids = [file.read_text() for file in tmp_path.glob("pid*")]
    assert len(pids) == 3 and not [pid for pid in pids if Path("/proc", pid).exists()]


def test_comparison_borrows_the_threads_of_all_ranks_and_returns_them(prepared, monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr("longctx.infer.engine.load_alone", lambda *_: None)
    monkeypatch.setattr(
        "longctx.infer.generate.logit_difference", lambda *_, **__: seen.append(torch.get_num_threads())
    )
    job, rank = prepared(PROMPT, "run.threads=1"), Rank(0, before + 1, 0, before + 1, "")
    progress = SimpleNamespace(start=lambda *_: None, step=lambda: None)
    generate._verify(rank, SimpleNamespace(world=None), SimpleNamespace(rank=0), job, None, progress)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_prompt_whose_question_alone_is_too_long_is_refused():
    """To cut the text cannot help if the question and the answer fill the context."""
    with pytest.raises(ValueError, match="13 more than the model's context of 97: use fewer max_new_tokens, or a sh"):
        refuse_too_long("", 90, 20, 97, "use prompt.tokens={} or fewer", 5)
