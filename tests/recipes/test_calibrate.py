"""recipes.calibrate writes a hardware file; recipes read it, and refuse one measured with other threads."""

import pytest
import yaml

from longctx.config import Mesh
from recipes import calibrate, chat, extend, pretrain, serve
from recipes.bench import crossover
from recipes.common import cli as recipe_cli
from recipes.common import hardware_file

LINK = {"latency_s": 1e-6, "bytes_per_s": 1e9}
VALUES = {"flops": 1e9, "kv_bytes_per_s": 1e9, "block_s": 0, "overlap": 1, "hop": LINK, "exchange": LINK}


def test_written_file_is_read_back(cli, tiny, tmp_path):
    out = tmp_path / "laptop.yaml"
    code, _, err = cli(calibrate, calibrate.task, f"model={tiny}", f"out={out}")
    assert code == 0 and "GFLOP/s a rank" in err, err
    constants, values = hardware_file.read_hardware(str(out)), yaml.safe_load(out.read_text())
    assert (constants.flops, constants.hop.latency_s) == (values["flops"], values["hop"]["latency_s"])
    assert constants.flops > 0 and constants.hop.bytes_per_s > 0 and constants.empirical is None
    layer = hardware_file.read_machine(str(out))
    assert layer.gemm_flops > 0 and layer.memory_bytes_per_s > 0 and layer.layer_s >= 0
    assert layer.levels[0].gather_link != layer.levels[0].exchange
    assert layer.backward > 0 and layer.ranks_at_once >= 1 and layer.levels[0].reduce.bytes_per_s > 0
    metadata = values["measured"]
    assert (metadata["mesh"], metadata["dtype"]) == ("ring=2", "float32")
    assert metadata["threads"] == recipe_cli.threads_here(None, Mesh(ring=2)), "as many as in other recipes"


@pytest.fixture
def eight_cores(monkeypatch):
    """A machine with eight cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))


@pytest.fixture
def write_file(tmp_path):
    """``write_file(metadata)``: a hardware file with that ``measured`` section."""

    def write_file(metadata):
        file = tmp_path / "hardware.yaml"
        file.write_text(yaml.safe_dump({"measured": metadata, **VALUES}))
        return str(file)

    return write_file


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("metadata", "setting", "is_refused"),
    [({"threads": 1}, None, True), ({"threads": 4}, 2, True), ({"threads": 4}, None, False), ({"threads": 1}, 1, False),
     ({"threads": None}, None, False), ({"mesh": "ring=2"}, None, False), (None, None, False), ("by hand", 3, False)],
)  # fmt: skip
def test_file_of_other_threads_is_refused(write_file, metadata, setting, is_refused):
    """Two ranks on eight cores have four threads each; a GPU's file, and one written by hand, state no threads."""
    file, threads = write_file(metadata), setting or 4
    assert hardware_file.read_hardware(file).flops == 1e9
    if not is_refused:
        hardware_file.refuse_other_threads(file, setting, Mesh(ring=2))
        return
    was = metadata["threads"]
    words = f"run.threads={was} per rank, .* run.threads={threads}: .*calibrate run.threads={threads} out="
    with pytest.raises(ValueError, match=words):
        hardware_file.refuse_other_threads(file, setting, Mesh(ring=2))


@pytest.mark.usefixtures("eight_cores")
def test_only_what_can_be_done_is_advised(write_file, tmp_path):
    """recipes.calibrate runs two ranks, so it cannot measure one rank that has all cores."""
    file = write_file({"threads": 4})
    with pytest.raises(ValueError, match=r"this run uses run\.threads=8: use run\.threads=4$"):
        hardware_file.refuse_other_threads(file, None, Mesh())
    with pytest.raises(ValueError, match=r"this run uses run\.threads=1: measure again with .* run\.threads=1 out=F"):
        hardware_file.refuse_other_threads(file, 1, Mesh(ring=2), fixed=True)
    fitted = tmp_path / "fitted.yaml"
    fitted.write_text(yaml.safe_dump({"measured": {"threads": 1}, **VALUES, "empirical": [1.0, 2.0, 3.0]}))
    with pytest.raises(ValueError, match=r"run\.threads=4: use run\.threads=1$"):
        hardware_file.refuse_other_threads(str(fitted), None, Mesh(ring=2))


@pytest.mark.usefixtures("eight_cores")
def test_more_threads_than_cores_are_refused(refused, tiny, tmp_path):
    line = refused(calibrate, calibrate.task, f"model={tiny}", "run.threads=5", f"out={tmp_path / 'laptop.yaml'}")
    assert "run.threads=5: each rank has 4 of this machine's cores" in line and "use run.threads=4" in line


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (chat, ["turns={folder}/turns.jsonl", "mesh.ring=2", "context.strategy=auto"]),
        (serve, ["mesh.ring=2", "context.strategy=auto"]),
        (crossover, ["total=31", "mesh.ring=2"]),
        (pretrain, ["experiment=pretrain/tiny", "data.length=61", "out={folder}/run"]),
        (extend, ["data.length=61", "data.batch=2", "data.end_token=false", "out={folder}/run"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_reader_refuses_a_file_of_other_threads(refused, tiny, write_file, tmp_path, recipe, settings):
    (tmp_path / "turns.jsonl").write_text('{"text": "Hello"}')
    model = [] if recipe is pretrain else [f"model={tiny}"]
    words = [*model, *(setting.format(folder=tmp_path) for setting in settings)]
    line = refused(recipe, recipe.task, f"hardware={write_file({'threads': 97})}", *words)
    assert "was measured with run.threads=97 per rank" in line
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
def test_file_that_calibrate_did_not_write_is_refused(tmp_path, text, words):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"recipes\.calibrate") as refusal:
        hardware_file.read_hardware(str(file))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [(["mesh.ring=1", "out=a.yaml"], "no links to measure"), (["mesh.dp=2", "out=a.yaml"], "no use for mesh.dp=2")],
)
def test_mesh_without_links_or_with_unused_axes_is_refused(refused, tiny, settings, words):
    assert words in refused(calibrate, calibrate.task, f"model={tiny}", *settings)
