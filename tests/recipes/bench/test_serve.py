"""recipes.bench serve: every request is answered as it is alone, and what cannot be measured is refused."""

import json
from functools import partial

import pytest

from longctx.config import Context, Sampling
from longctx.infer.continuous import ContinuousSession
from longctx.parallel.launch import Rank, run_ranks
from longctx.serve.service import Failure, Token
from recipes.bench import serve
from recipes.bench.serve_load import LoadFigures, make_load


def test_load_has_common_beginnings_and_all_lengths():
    settings = serve.ServeBenchSettings(requests=101, min_length=7, max_length=300, prefixes=2)
    load = make_load(settings, range(1_000))
    lengths = [len(one.prompt) for one in load]
    assert 7 <= min(lengths) < 12 and 200 < max(lengths) <= 300
    assert len({one.prompt[:3] for one in load}) == 2
    assert load == make_load(settings, range(1_000))


def test_all_variants_are_measured_and_written(cli, tiny, tmp_path):
    out = tmp_path / "serve.json"
    argv = (f"model={tiny}", "requests=9", "clients=3", "min_length=3", "max_length=71", "short=30", "prefixes=1",
            "new_tokens=4", "page=2", "context.chunk=11", f"out={out}")  # fmt: skip
    code, _, err = cli(serve, serve.task, *argv)
    assert code == 0, err
    alone, sharing, no_sharing, no_chunking = json.loads(out.read_text())["rows"]
    for one in (alone, sharing, no_sharing, no_chunking):
        assert (one["equal_answers"], one["failures"]) == (9, [])
        assert 0 < one["short_ttft_p50_s"] <= one["short_ttft_p95_s"] <= one["seconds"]
    assert alone["hit_rate"] == no_sharing["hit_rate"] == sum(no_sharing["page_bytes_by_rank"]) == 0
    assert sharing["hit_rate"] > 0 and no_chunking["hit_rate"] > 0
    assert all(size > 0 for size in sharing["page_bytes_by_rank"])


def change_an_answer(rank: Rank, job: serve.ServeBenchJob) -> dict[int, float] | None:
    """Change the third token of request 2's answer in a variant; return the first rank's margins of this variant."""
    load = make_load(job.settings, job.text)
    with job.target.runtime(rank) as runtime:
        session = partial(ContinuousSession, job.target.load_engine(runtime), Context(), Sampling())
        alone, other = (serve.run_variant(session, runtime, job, serve.ALONE, load, lambda: None) for _ in range(2))
        if rank.rank == 0:
            other.answers[2][2] += 1
        serve.add_margins(session, runtime, job, load, [alone, other])
    return other.margins if rank.rank == 0 else None


def test_another_answer_has_the_margin_of_its_first_other_token(config_of, tiny):
    """The two most likely tokens of a random model are a little apart."""
    words = ("requests=4", "clients=1", "min_length=3", "max_length=31", "new_tokens=4", "run.threads=1")
    job = serve.prepare(config_of("bench/serve", f"model={tiny}", *words))
    margins, _ = run_ranks(2, change_an_answer, job)
    assert list(margins) == [2] and 0 < margins[2] < 9


def test_request_that_fails_is_no_equal_answer():
    """Request 2 fails alone before its first token, 3 alone after it, 4 in the other variant, and 5 in both."""
    alone, other = LoadFigures("alone"), LoadFigures("other")
    for figures, failing, started in ((alone, (2, 3, 5), (3,)), (other, (4, 5), ())):
        for number in (1, 2, 3, 4, 5):
            if number not in failing or number in started:
                assert not figures.record(Token(number, 7, ""), 0.5)
            event = Failure(number, "no room") if number in failing else Token(number, 8, "", finish="length")
            assert figures.record(event, 9.0)
    assert (alone.count_equal(alone), other.count_equal(alone), other.other_than(alone)) == (2, 1, {})
    assert alone.first_token_s == {1: 0.5, 3: 0.5, 4: 0.5}
    other.answers[1][1] += 1
    assert (other.count_equal(alone), other.other_than(alone)) == (0, {1: 1})


def test_failed_requests_are_shown_and_are_not_served(cli, tiny, tmp_path, monkeypatch):
    """One of four requests is answered, in a second; alone, all four were, in 8 seconds."""
    alone = LoadFigures(serve.ALONE, 8.0, answers={number: [1] for number in range(4)})
    other = LoadFigures("sharing", 1.0, answers={2: [1]}, failures=["no room"] * 3)
    monkeypatch.setattr(serve, "on_ranks", lambda *_: [alone, other])
    words = (f"model={tiny}", "requests=4", "max_length=71", "variants=[sharing]", f"out={tmp_path}/serve.json")
    code, out, err = cli(serve, serve.task, *words)
    assert code == 1 and "sharing: 3 of 4 requests failed: no room" in out + err
    _, row = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert (row["requests_per_s"], row["speedup"], row["equal_answers"]) == (1, 2, 1)
    alone.answers.clear()
    assert cli(serve, serve.task, *words)[0] == 1
    assert json.loads((tmp_path / "serve.json").read_text())["rows"][1]["speedup"] is None


def list_loads(rank: Rank, job: serve.ServeBenchJob) -> list[tuple[str, int]]:
    """Return the variant and the number of requests of each load that a rank of the benchmark runs."""
    loads, run_variant = [], serve.run_variant

    def run(new_session, runtime, job, variant, load, done):
        loads.append((variant, len(load)))
        return run_variant(new_session, runtime, job, variant, load, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "run_variant", run)
        figures = serve.run_rank(rank, job)
    assert [one.variant for one in figures] == [serve.ALONE, "sharing"]
    return loads


def test_a_request_that_warms_up_has_no_figures(config_of, tiny):
    words = ("requests=3", "min_length=3", "max_length=31", "new_tokens=2", "variants=[sharing]", "run.threads=1")
    job = serve.prepare(config_of("bench/serve", f"model={tiny}", *words))
    loads, _ = run_ranks(2, list_loads, job)
    assert loads[:3] == [(serve.ALONE, 1), (serve.ALONE, 3), ("sharing", 3)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["min_length=9", "max_length=8"], "min_length=9 is over max_length=8"),
        (["max_length=90", "new_tokens=9"], "max_length=90 and new_tokens=9"),
        (["variants=[]"], "variants="),
        (["context.strategy=auto"], "context.strategy=auto"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(serve, serve.task, "max_length=71", *settings, f"model={tiny}")
