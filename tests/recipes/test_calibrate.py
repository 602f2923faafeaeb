"""recipes.calibrate writes a hardware file that is read back as it was measured."""

import pytest
import yaml

from recipes import calibrate


def test_what_is_written_is_read_back(cli, tiny, tmp_path):
    out = tmp_path / "here.yaml"
    code, _, err = cli(calibrate, calibrate.task, f"model={tiny}", f"out={out}")
    assert code == 0 and "GFLOP/s a rank" in err, err
    on, values = calibrate.hardware_from(str(out)), yaml.safe_load(out.read_text())
    assert (on.flops, on.hop.latency_s) == (values["flops"], values["hop"]["latency_s"])
    assert on.flops > 0 and on.hop.bytes_per_s > 0 and on.empirical is None
    assert values["measured"]["mesh"] == "ring=2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2", "cannot be read"),
        ("{}", "does not say 'hop'"),
        ("3", "is no hardware file"),
        ("{hop: {latency_s: x, bytes_per_s: 1}, exchange: {}}", "is no hardware file"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, words):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"recipes\.calibrate") as refusal:
        calibrate.hardware_from(str(file))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [(["mesh.ring=1", "out=a.yaml"], "no links to measure"), (["mesh.dp=2", "out=a.yaml"], "no use for mesh.dp=2")],
)
def test_what_cannot_be_measured_is_refused(refused, tiny, settings, words):
    assert words in refused(calibrate, calibrate.task, f"model={tiny}", *settings)
