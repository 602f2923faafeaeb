"""The command line becomes typed settings; each kind of failure becomes one line and an exit code."""

import errno
import json
import logging
import math
import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.table import Table

from longctx.config import Mesh, ModelSource, PromptSource, Run, Sampling
from longctx.parallel.comm import LostPeer
from longctx.parallel.launch import Rank, RankFailed
from recipes import chat, generate
from recipes.common import cli as recipe_cli
from recipes.common import places, settings
from recipes.common.progress import Progress


@pytest.fixture
def compose(cli):
    """``compose(*argv)``: the configuration that ``python -m recipes.generate argv`` runs with."""

    def run(*argv, recipe=generate):
        configs = []
        assert cli(recipe, configs.append, *argv) == (0, "", "")
        return configs[0]

    return run


def test_settings_have_their_types(compose):
    config = compose("mesh.ring=3", "mesh.tp=5", "sampling.temperature=1", "run.threads=2")
    assert settings.section(config, "mesh", Mesh) == Mesh(tp=5, ring=3)
    assert settings.section(config, "sampling", Sampling) == Sampling(temperature=1.0)
    run, top = settings.section(config, "run", Run), settings.top_level(config, generate.GenerateSettings)
    assert (top.max_new_tokens, top.verify, run.threads, top.out) == (64, None, 2, None)


def test_each_item_of_a_list_is_a_section():
    def meshes(items):
        return settings.sections(OmegaConf.create({"meshes": items}), "meshes", Mesh)

    assert meshes([]) == ()
    assert meshes([{"ring": 3}, {"tp": 5}]) == (Mesh(ring=3), Mesh(tp=5))
    for items in (2, [2], {"ring": 3}):
        with pytest.raises(ValueError, match=r"meshes=.*: give a list .* in braces: meshes=\[\{...\}\]"):
            meshes(items)


@pytest.mark.parametrize(
    "text",
    ["Hello, (world) [1] {2}: a=b, it's #1 ?", 'he said "no"', '"quoted', '\\" ${x} $x \\\\"', "two\nlines C:\\"],
)
def test_free_text_reaches_the_configuration_unchanged(compose, text):
    config = compose(f"prompt.text={text}", f"prompt.question={text}")
    prompt = settings.section(config, "prompt", PromptSource)
    assert prompt.text == prompt.question == text


def test_model_of_the_configuration_is_chosen_by_name(compose):
    model = settings.section(compose("model=smollm2_135m"), "model", ModelSource)
    assert (model.name, model.source, model.gguf) == (
        "smollm2_135m", None, "SmolLM2-135M-Instruct.Q4_1.gguf",
    )  # fmt: skip


def test_model_can_be_changed_field_by_field(compose):
    config = compose("model=tiny", "model.config.num_hidden_layers=3", "+model.config.rms_norm_eps=1e-5")
    model = settings.section(config, "model", ModelSource)
    assert (model.name, model.source, model.tokenizer) == ("tiny", None, "bytes")
    assert (model.config["num_hidden_layers"], model.config["rms_norm_eps"]) == (3, 1e-5)


@pytest.mark.parametrize("recipe", [generate, chat])
def test_model_without_weights_is_refused(refused, tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path))
    line = refused(recipe, recipe.task, "model=tiny", *["prompt.text=hello"] * (recipe is generate))
    assert "this model has no weights yet, train it with recipes.pretrain" in line


@pytest.mark.parametrize("name", ["a = b, [c] {d}", "it's"])
def test_model_can_be_a_folder_of_any_name(compose, tmp_path, name):
    (tmp_path / name).mkdir()
    model = settings.section(compose(f"model={tmp_path / name}"), "model", ModelSource)
    assert (model.name, model.source, model.wheel) == (name, str(tmp_path / name), None)


def test_model_can_be_a_name_on_the_hub(compose):
    model = settings.section(compose("model=some-one/Model-1.5B"), "model", ModelSource)
    assert (model.name, model.source) == ("Model-1.5B", "some-one/Model-1.5B")


def test_model_cache_is_read_from_the_environment(compose, monkeypatch, tmp_path):
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path))
    assert settings.section(compose(), "model", ModelSource).cache == str(tmp_path)
    monkeypatch.delenv("LONGCTX_CACHE")
    assert settings.section(compose(), "model", ModelSource).cache == "~/.cache/longctx"


def test_experiment_sets_several_settings(compose):
    config = compose("experiment=generate/demo", "mesh.ring=3")
    assert (config.prompt.tokens, config.mesh.ring) == (6000, 3)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model=nonsense", ["model=nonsense", "smollm2_135m", "Hugging Face folder"]),
        ("mesh.rong=2", ["mesh.rong"]),
        ("rounds=2", ["rounds"]),
        ("+mesh.rong=2", ["mesh.rong"]),
        ("+rounds=2", ["rounds"]),
        ("experiment=generate/demmo", ["experiment=generate/demmo", "generate/demo"]),
        ("experiment=pretrain/tiny", ["experiment=pretrain/tiny does not fit generate", "generate/demo"]),
        ("context=pass_k", ["context", "pass_k", "pass_kv", "pass_q"]),
        ("mesh.ring=two", ["mesh.ring=two", "a whole number"]),
        ("mesh.ring=0", ["mesh.ring=0", "at least one rank"]),
        ("context.strategy=pass_the_salt", ["context.strategy=pass_the_salt", "pass_kv, pass_q"]),
        ("sampling.top_p=0", ["sampling.top_p=0", "above 0"]),
        ("max_new_tokens=many", ["max_new_tokens=many", "a whole number"]),
        ("verify=perhaps", ["verify=perhaps", "true or false"]),
        ("run.threads=-1", ["run.threads=-1"]),
        ("run.timeout_minutes=0", ["run.timeout_minutes=0", "use 1 or more"]),
        ("run.device=tpu", ["run.device=tpu", "cpu or cuda"]),
        (
            "context.kernel=flash",
            ["context.kernel=flash", "auto, reference, flash_cpu, flash_cuda, cudnn, flash_attn or triton"],
        ),
        ("sampling.seed=-1", ["sampling.seed=-1", "use 0 to"]),
        ("model.source=null", ["model.source", "model.wheel"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_settings_are_refused_by_name(refused, tiny, setting, words):
    line = refused(generate, generate.task, f"model={tiny}", "prompt.text=hello", setting)
    assert all(word in line for word in words), line


def raising(error):
    """Return a task that raises ``error``."""

    def task(*_):
        raise error

    return task


# Errors after which another try may succeed.
SHORTAGES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH),
)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("use [2] of them"), 2, "error: use [2] of them\n"),
        (RankFailed(3, 5, "raised E: [x]", "Traceback"), 1, "Traceback\nerror: rank 3 of 5 raised E: [x]; the other"),
        (RankFailed(3, 5, "was killed by SIGKILL", ""), 1, "error: rank 3 of 5 was killed by SIGKILL; the other"),
        (KeyboardInterrupt(), 130, "interrupted; all ranks have ended\n"),
        (FileNotFoundError(2, "No such file or directory", "a[0]"), 2, "error: a[0]: No such file or directory\n"),
        (PermissionError(errno.EACCES, "no", "a"), 2, "error: a: no\n"),
        *((OSError(number, "no", "run/x"), 1, "error: run/x: no\n") for number in SHORTAGES),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_kind_of_error_has_an_exit_code(cli, error, code, printed):
    exit_code, out, err = cli(generate, raising(error))
    assert (exit_code, out) == (code, "")
    assert err.startswith(printed)


def test_warning_of_the_library_reaches_the_user(cli, caplog):
    """Hydra's logging, which is switched off, would disable loggers that exist before it is configured."""
    warn = logging.getLogger("longctx.data.documents").warning
    assert cli(generate, lambda _: warn("a line was skipped"))[0] == 0
    assert caplog.messages == ["a line was skipped"]


def rank_main(*args):
    """Return the arguments."""
    return args


def test_without_a_launcher_local_ranks_are_started(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(recipe_cli, "run_ranks", lambda *args: [args, "the second rank's"])
    assert recipe_cli.on_ranks(Mesh(ring=2), rank_main, "job") == (2, rank_main, "job")


def test_under_a_launcher_this_process_is_a_rank(under_torchrun, no_ranks_start):
    """The first rank returns its result, the others return None."""
    calls = []
    for rank, answer in ((0, "answer"), (1, None)):
        under_torchrun(rank, 6)
        assert recipe_cli.on_ranks(Mesh(ring=3, tp=2), lambda *args: calls.append(args) or "answer", "job") == answer
    assert calls == [(Rank(rank, 6, 0, 1, "env://"), "job") for rank in range(2)]
    with pytest.raises(
        ValueError, match=r"started 6 ranks, but the mesh has 5 \(ring=5\): set mesh axes whose product is 6"
    ):
        recipe_cli.on_ranks(Mesh(ring=5), rank_main, "job")


def test_only_the_first_of_a_launcher_s_ranks_prints(under_torchrun, capsys):
    for rank in (1, 0):
        under_torchrun(rank, 2)
        recipe_cli.say(f"from rank {rank}")
    assert capsys.readouterr().err == "from rank 0\n"


def test_failing_rank_of_a_launcher_raises(under_torchrun):
    """The launcher gets a traceback, and not the one line of a refused command line."""
    under_torchrun(0, 2)
    with pytest.raises(RuntimeError, match="rank 0 of 2 failed"):
        recipe_cli.on_ranks(Mesh(ring=2), lambda *_: raising(ValueError("of a rank"))(None))


@pytest.mark.parametrize(("setting", "threads"), [(None, 2), (3, 3)])
def test_ranks_share_the_cores_of_their_machine(monkeypatch, setting, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(7))
    assert recipe_cli.threads_for(setting, Rank(4, 6, 1, 3, "env://")) == threads
    assert recipe_cli.threads_for(None, Rank(4, 60, 1, 30, "env://")) == 1, "more ranks than cores"


def test_result_is_written_with_one_line_per_key(tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "result.json"
    places.refuse_unwritable(str(out))
    recipe_cli.write_result(str(out), {"text": 'a "b"\n', "tokens": [2, 3]})
    assert json.loads(out.read_text()) == {"text": 'a "b"\n', "tokens": [2, 3]}
    assert len(out.read_text().splitlines()) == 4
    assert str(out) in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_text_in_a_result(tmp_path):
    places.write_json(str(tmp_path / "x.json"), {"guards": [{"change": math.nan}, (math.inf, -math.inf, 0.5, 3, None)]})
    text = (tmp_path / "x.json").read_text()
    saved = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert saved == {"guards": [{"change": "nan"}, ["inf", "-inf", 0.5, 3, None]]}


@pytest.mark.parametrize(
    ("name", "out", "fix"),
    [("out", "answers", "out=answers.json"), ("out", "a/x.txt", "out=a/x.json"), ("picture", "x.json", "picture=x.svg"),
     ("fitted", "x", "fitted=x.yaml"), ("json", "x.yaml", "json=x.json")],
)  # fmt: skip
def test_file_of_another_kind_is_refused_before_the_work(tmp_path, monkeypatch, name, out, fix):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}={out} is not the name of a .* file: use {fix}"):
        places.refuse_unwritable(out, name)
    places.refuse_unwritable(fix.partition("=")[2], name)


def test_full_disk_is_refused_before_the_work(monkeypatch):
    full = Path("/dev/full")
    monkeypatch.setattr(places.tempfile, "TemporaryFile", lambda **_: full.open("wb"))
    for refuse, out in ((places.refuse_unwritable, "a/x.json"), (places.refuse_unwritable_folder, "a")):
        with pytest.raises(ValueError, match=rf"out={out} cannot be written \(No space left on device\)"):
            refuse(out)


def test_more_threads_than_cores_are_refused(refused):
    assert "run.threads=100000: this machine has" in refused(generate, generate.task, "run.threads=100000")


@pytest.mark.parametrize("text", ["out=a[/b].json", "pydoc:train: [bold]x[/]", "[red"])
def test_text_is_printed_without_markup_and_emoji(capsys, text):
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    recipe_cli.say(text)
    recipe_cli.console.print(table)
    recipe_cli.console.rule(text)
    with pytest.raises(SystemExit):
        recipe_cli.exit_on_error(lambda: (_ for _ in ()).throw(ValueError(text)))
    err = capsys.readouterr().err
    assert err.count(text) == 6 and f"\nerror: {text}\n" in err


def test_progress_names_a_phase_without_markup(capsys, monkeypatch):
    monkeypatch.setattr("recipes.common.progress._EVERY_S", 0.0)
    with Progress(shown=True) as progress:
        progress.step("a[/b] :train:", 2)
    assert capsys.readouterr().err == "a[/b] :train:: 1 of 2\n"


def test_refused_sweep_leaves_no_records(cli, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    words = ("--multirun", "sampling.seed=3,5")
    assert cli(generate, raising(ValueError("no")), *words)[0] == 2
    assert not list((tmp_path / "mine").iterdir()) and (tmp_path / "mine").is_dir()
    assert cli(generate, lambda _: None, *words)[0] == 0
    assert list((tmp_path / "mine").rglob("multirun.yaml"))


def test_sweep_whose_records_cannot_be_written_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    words = ("--multirun", "sampling.seed=3,5")
    assert "hydra.sweep.dir=outputs/multirun/" in (line := refused(generate, generate.task, *words))
    assert "cannot be written (Not a directory): give a writable folder" in line
    assert "hydra.sweep.dir=outputs/x cannot" in refused(generate, generate.task, *words, "hydra.sweep.dir=outputs/x")


def test_runs_of_a_sweep_write_to_different_places(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = []
    words = ("--multirun", "max_new_tokens=3,5", "session.save=talk", "out=t.json")
    code, _, err = cli(chat, lambda config: places.append((config.out, config.session.save)), *words)
    assert code == 0, err
    assert places == [("0/t.json", "talk/0"), ("1/t.json", "talk/1")]


def print_to_nobody(_: Rank) -> None:
    reads, writes = os.pipe()
    os.dup2(writes, sys.stdout.fileno())
    os.close(reads)
    print("a", flush=True)


def break_another_pipe(_: Rank) -> None:
    raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(("rank_main", "code"), [(print_to_nobody, 141), (break_another_pipe, 1)])
def test_reader_of_the_output_that_is_gone_is_no_failed_rank(rank_main, code):
    with pytest.raises(SystemExit) as leaving:
        recipe_cli.exit_on_error(lambda: recipe_cli.on_ranks(Mesh(ring=2), rank_main))
    assert leaving.value.code == code


def test_error_of_the_disk_on_a_launcher_s_rank_is_a_failure_in_one_line(under_torchrun):
    """Exit code 2 would mean wrong settings, after which Slurm does not start the job again."""
    under_torchrun(1, 2)
    with pytest.raises(RankFailed, match=r"rank 1 of 2 raised FileNotFoundError: .*gone") as failed:
        recipe_cli.on_ranks(Mesh(ring=2), raising(FileNotFoundError(2, "gone", "a")))
    assert failed.value.details == ""


def test_lost_peer_is_one_line(capsys):
    def lose():
        raise LostPeer("lost rank 3 of 4")

    with pytest.raises(SystemExit) as leaving:
        recipe_cli.exit_on_error(lose)
    assert (leaving.value.code, capsys.readouterr().err) == (1, "error: lost rank 3 of 4\n")
