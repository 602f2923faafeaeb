"""recipes.calibrate writes a hardware file that is read back as it was measured."""

import pytest
import yaml

from longctx.config import Mesh
from recipes import calibrate, chat, extend, pretrain
from recipes.bench import crossover
from recipes.common import cli as recipe_cli
from recipes.common import hardware_file

LINK = {"latency_s": 1e-6, "bytes_per_s": 1e9}
VALUES = {"flops": 1e9, "kv_bytes_per_s": 1e9, "block_s": 0, "overlap": 1, "hop": LINK, "exchange": LINK}


def test_what_is_written_is_read_back(cli, tiny, tmp_path):
    out = tmp_path / "here.yaml"
    code, _, err = cli(calibrate, calibrate.task, f"model={tiny}", f"out={out}")
    assert code == 0 and "GFLOP/s a rank" in err, err
    on, values = hardware_file.read_hardware(str(out)), yaml.safe_load(out.read_text())
    assert (on.flops, on.hop.latency_s) == (values["flops"], values["hop"]["latency_s"])
    assert on.flops > 0 and on.hop.bytes_per_s > 0 and on.empirical is None
    about = values["measured"]
    assert (about["mesh"], about["dtype"]) == ("ring=2", "float32")
    assert about["threads"] == recipe_cli.threads_here(None, Mesh(ring=2)), "as many as other recipes have"


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))


@pytest.fixture
def measured(tmp_path):
    """``measured(about)``: a hardware file that says so of how it was measured."""

    def measured(about):
        file = tmp_path / "hardware.yaml"
        file.write_text(yaml.safe_dump({"measured": about, **VALUES}))
        return str(file)

    return measured


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("about", "asked", "refused"),
    [({"threads": 1}, None, True), ({"threads": 4}, 2, True), ({"threads": 4}, None, False), ({"threads": 1}, 1, False),
     ({"threads": None}, None, False), ({"mesh": "ring=2"}, None, False), (None, None, False), ("by hand", 3, False)],
)  # fmt: skip
def test_a_file_of_other_threads_is_refused(measured, about, asked, refused):
    """Two ranks on eight cores have four threads each; of a GPU, or by hand, nobody says how many."""
    file, threads = measured(about), asked or 4
    assert hardware_file.read_hardware(file).flops == 1e9
    if not refused:
        hardware_file.refuse_other_threads(file, asked, Mesh(ring=2))
        return
    words = f"run.threads={about['threads']} per rank, .* run.threads={threads}: .*calibrate run.threads={threads} out="
    with pytest.raises(ValueError, match=words):
        hardware_file.refuse_other_threads(file, asked, Mesh(ring=2))


@pytest.mark.usefixtures("eight_cores")
def test_ranks_that_would_take_each_others_cores_are_not_measured(refused, tiny, tmp_path):
    says = refused(calibrate, calibrate.task, f"model={tiny}", "run.threads=5", f"out={tmp_path / 'laptop.yaml'}")
    assert "run.threads=5: each rank has 4 of this machine's cores" in says and "use run.threads=4" in says


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (chat, ["turns={folder}/turns.jsonl", "mesh.ring=2", "context.strategy=auto"]),
        (crossover, ["total=31", "mesh.ring=2"]),
        (pretrain, ["experiment=pretrain/tiny", "data.length=61", "out={folder}/run"]),
        (extend, ["data.length=61", "data.batch=2", "data.end_token=false", "out={folder}/run"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_whoever_reads_a_file_of_other_threads_refuses_it(refused, tiny, measured, tmp_path, recipe, settings):
    (tmp_path / "turns.jsonl").write_text('{"text": "Hello"}')
    model = [] if recipe is pretrain else [f"model={tiny}"]
    words = [*model, *(setting.format(folder=tmp_path) for setting in settings)]
    says = refused(recipe, recipe.task, f"hardware={measured({'threads': 97})}", *words)
    assert "was measured with run.threads=97 per rank" in says
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2", "cannot be read"),
        ("{}", "has no field 'hop'"),
        ("3", "is not a hardware file"),
        ("{hop: {latency_s: x, bytes_per_s: 1}, exchange: {}}", "is not a hardware file"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, words):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"recipes\.calibrate") as refusal:
        hardware_file.read_hardware(str(file))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [(["mesh.ring=1", "out=a.yaml"], "no links to measure"), (["mesh.dp=2", "out=a.yaml"], "no use for mesh.dp=2")],
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(calibrate, calibrate.task, f"model={tiny}", *settings)
