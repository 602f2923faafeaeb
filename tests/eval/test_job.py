"""Checks before any rank starts: what is refused, what each task is limited to, and that nothing is written."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.job import pinned
from eval.run import files_read
from eval.settings import EvalConfig, EvalSettings
from eval.speed import SpeedSettings
from longctx.spd.plan import SavedPlan, SPDPlan
from recipes.common import cli as recipe_cli
from recipes.common.settings import section


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["eval.tasks=[]"], "eval.tasks is empty"),
        (["eval.tasks=[piqa]"], "piqa.jsonl, which does not exist"),
        (["eval.data=/no/such"], "eval.data=/no/such is not a folder"),
        (["eval.limit=0"], "eval.limit=0"),
        (["eval.max_length=398"], "the model's context is 397"),
        (
            ["eval.tasks=[needle]", "eval.lengths=[307]", "eval.max_length=306"],
            "eval.lengths=307 is over eval.max_length=306: use at",
        ),
        (["eval.limits={hellasawg: 3}"], "eval.limits: there is no task hellasawg: limit some of arc_easy"),
        (["eval.tasks=[needle]", "eval.lengths=[512]"], "eval.lengths=512: the model's context is 397"),
        (["eval.gate=[nobody]"], "eval.gate: there is no variant nobody"),
        (["eval.gate=[baseline]"], "eval.gate lists baseline, which variants are compared with"),
        (["eval.gate=[a]", "eval.tasks=[wikitext]", "variants=[{name: a}]"], "eval.gate judges accuracy"),
        (["eval.until=decided"], "eval.until=decided compares variants: add some"),
        (
            ["eval.until=decided", "eval.tasks=[needle]", "eval.lengths=[307]", "variants=[{name: a}]"],
            "are generated, so set how many at most: eval.limit=1000, or ++eval.limits.needle=1000",
        ),
        (["eval.until=decided", "eval.tasks=[wikitext]", "variants=[{name: a}]"], "eval.until judges accuracy"),
        (["mesh.pp=2"], "eval.run has no use for mesh.pp=2"),
        (["mesh.dp=2", "mesh.ep=2"], "eval.run has no use for mesh.ep=2"),
        (["mesh.tp=2"], "use mesh.tp=3"),
        (["context.chunk=5"], "use context.chunk=null"),
        (["context.strategy=auto"], "context.strategy=auto"),
        (["adapted=/nonexistent"], "adapted=/nonexistent is not a folder that recipes.spd_adapt wrote"),
        (["eval.include=/nonexistent"], "eval.include=/nonexistent has no tasks"),
        (["eval.text=/nonexistent"], "eval.text and eval.lengths are for long texts: add "),
        (["eval.lengths=[307]"], "eval.text and eval.lengths are for long texts: add "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_cannot_run_are_refused_before_any_rank_starts(prepared, monkeypatch, settings, words):
    monkeypatch.setattr(recipe_cli, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(ValueError, match=r"\w") as refused:
        prepared(*settings)
    assert words in str(refused.value)


def test_chat_template_must_have_a_use_and_be_the_same_in_all_variants(prepared, tiny, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jinja").write_text("{% for m in messages %}" + name + "{{ m.content }}{% endfor %}")
    chat = ("eval.chat=true", f"model.chat_template={tmp_path}/a.jinja")
    with pytest.raises(ValueError, match=r"eval\.chat changes nothing in wikitext: use eval\.chat=false"):
        prepared(*chat, "eval.tasks=[wikitext]")
    other = f"variants=[{{name: other, model: {{chat_template: {tmp_path}/b.jinja}}}}]"
    with pytest.raises(ValueError, match="variant other has another chat template than the baseline"):
        prepared(*chat, other)
    assert prepared(*chat, "variants=[{name: ring, mesh: {ring: 2}}]")


def test_folders_that_no_task_or_variant_uses_are_refused(prepared, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    with pytest.raises(ValueError, match=r"eval.include=.* is not used: name some of its tasks in eval.tasks"):
        prepared(f"eval.include={tmp_path}")
    SavedPlan(SPDPlan(2, 3, (0,)), (0, 1), (0,), "of another").write(tmp_path)
    with pytest.raises(ValueError, match=r"adapted=.* is not used, as no variant sets spd"):
        prepared(f"adapted={tmp_path}", "variants=[{name: ring, mesh: {ring: 2}}]")


def test_folder_with_a_report_on_another_model_is_refused(prepared, tmp_path):
    """A second report would replace the first."""
    job = prepared(f"out={tmp_path}")
    job.file(job.variants[0]).parent.mkdir()
    job.file(job.variants[0]).write_text("")
    assert prepared(f"out={tmp_path}", "eval.limit=1")
    with pytest.raises(ValueError, match=r"has answers of another model, mesh or context: give another out="):
        prepared(f"out={tmp_path}", "mesh.ring=2")


def test_checking_writes_nothing(prepared, tmp_path):
    """Not even where an order of blocks will be measured, whose folder is below ``out``."""
    order = "variants=[{name: a, mesh: {tp: 3}, spd: {drop: ranked, budget: 0.5}}]"
    job = prepared(f"out={tmp_path}/deep/run", order)
    assert job.out == Path(tmp_path, "deep", "run") and not list(tmp_path.iterdir())
    assert [variant.target.plan for variant in job.variants] == [None, None], "no block drops before it is measured"


def test_variant_with_too_short_a_context_is_refused(prepared, tmp_path):
    words = (
        f"model.cache={tmp_path}",
        "model.rope_factor=2",
        "eval.tasks=[needle]",
        "eval.lengths=[701]",
        "eval.limit=1",
    )
    plain = "variants=[{name: plain, model: {rope_factor: null}}]"
    with pytest.raises(ValueError, match=r"variant plain: its context is 397, .* up to [4-7]\d\d tokens"):
        prepared(*words, plain)
    longer = prepared(*words, "variants=[{name: theta, model: {rope_theta: 7e4}}]").variants[1]
    assert longer.target.shape.max_positions == 794


def test_variant_of_another_model_needs_an_order_of_its_own(prepared, tmp_path):
    words = (f"model.cache={tmp_path}", "mesh.tp=3", "spd.drop=none")
    with pytest.raises(
        ValueError, match=r"variant a: the missing order .* on the baseline, but .* set its spd.sensitivity"
    ):
        prepared(*words, "variants=[{name: a, model: {rope_factor: 2}, spd: {drop: ranked, budget: 0.5}}]")


def test_launcher_with_another_number_of_ranks_is_refused(prepared, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29999")
    with pytest.raises(ValueError, match=r"the launcher started 2 ranks, but variant a has 3 \(ring=3\)"):
        prepared("mesh.ring=2", "variants=[{name: a, mesh: {ring: 3}}]")


def test_limits_apply_to_each_task(prepared):
    tasks = "eval.tasks=[arc_easy,lambada_openai,wikitext,needle]"
    job = prepared(tasks, "eval.limit=5", "eval.limits={wikitext: 1, needle: 2}", "eval.lengths=[307]")
    assert {name: len({i.doc_id for i in task.instances}) for name, task in job.tasks.items()} == {
        "arc_easy": 5,
        "lambada_openai": 5,
        "wikitext": 1,
        "needle_307": 2,
    }
    assert len(job.requests) == 5 * 4 + 5 + 1 + 2


def test_limit_of_a_group_is_refused(prepared, monkeypatch):
    """The tasks of a group have other names: a limit of the group would limit nothing."""
    task = SimpleNamespace(config=SimpleNamespace(num_fewshot=0), OUTPUT_TYPE="multiple_choice")
    loaded = {"blimp_adjunct_island": task, "blimp_passive_1": task}
    monkeypatch.setattr("eval.harness.tasks.load_tasks", lambda *_: loaded)
    with pytest.raises(ValueError, match=r"eval.limits.blimp is a group of tasks: use eval.limit"):
        prepared("eval.tasks=[blimp]", "eval.data=hub", "eval.limits={blimp: 5}")


def test_all_files_of_data_are_read_for_the_manifest(prepared):
    """Tasks of questions have a file, and their names get a length when they are loaded."""
    job = prepared()
    job = replace(job, eval=replace(job.eval, tasks=("arc_easy", "ruler_qa_squad", "ruler_qa_hotpot", "needle")))
    assert [file.relative_to(job.eval.folder).as_posix() for file in files_read(job)] == [
        "arc/arc_easy.jsonl", "squad/dev-v2.0.json", "hotpotqa/hotpot_dev_distractor_v1.json",
    ]  # fmt: skip
    hub = replace(job, eval=replace(job.eval, data="hub"))
    assert files_read(hub) == []


def test_slurm_job_gets_the_folder_of_data_and_one_number_of_ranks(base_config, sets):
    assert pinned(base_config) == (f"eval.data={sets.resolve()}",)
    (sets.parent / "real,one").mkdir()
    quoted = base_config.copy()
    quoted.eval.data = str(sets.parent / "real,one")
    assert pinned(quoted) == (f'eval.data="{sets.parent}/real,one"',), "no list of two values"
    config = base_config.copy()
    config.mesh.ring, config.variants = 2, [{"name": "a", "mesh": {"ring": 3}}]
    with pytest.raises(ValueError, match="the job starts 2 ranks, but variant a has 3: give all variants 2"):
        pinned(config)


def test_shipped_experiment_can_run(data, smollm2, tmp_path):
    words = ["experiment=evaluate/spd_regression", "eval.limit=1", f"eval.data={data}", f"out={tmp_path}"]
    from eval.run import prepare

    job = prepare(recipe_cli.compose_config("evaluate", words))
    assert len(job.tasks) >= 6 and [variant.name for variant in job.variants][1:] == [
        f"dropped {share}%" for share in (25, 50, 75, 100)
    ]


def test_defaults_are_those_of_the_configuration(base_config, monkeypatch):
    monkeypatch.delenv("LONGCTX_DATA", raising=False)
    config = recipe_cli.compose_config("eval_speed", ["out=x"])
    assert section(config, "eval", EvalConfig) == EvalConfig()
    assert section(config, "speed", SpeedSettings) == SpeedSettings()
    assert recipe_cli.compose_config("evaluate", ["out=x"]).variants == list(EvalSettings("x").variants)
