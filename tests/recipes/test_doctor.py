"""The report on a machine, with GPUs and without: what is found, the settings that recipes accept, what is missing."""

import json
from dataclasses import replace

import pytest
import torch

from recipes import doctor
from recipes.doctor import LocalMachine, choices, links_of, missing_parts, report

CPU = LocalMachine(
    processor="a processor", cores=2, instructions=("avx2",), memory_bytes=8 * 10**9, gpus=(), gpu_memory_bytes=0,
    listed_gpus=(), driver=None, links=None, torch="2.13.0", float32_products="MKL", cuda=None, nccl=None,
    flash_attn_2=None, flash_attn_4=None, transformer_engine=None, te_missing=(), triton=None,
)  # fmt: skip
GPU = replace(
    CPU, gpus=("H100",) * 4, listed_gpus=("H100",) * 4, gpu_memory_bytes=80 * 10**9, driver="580.1", links="3 x NV18",
    cuda="13.0", nccl="2.27.5", flash_attn_2="2.8.3", transformer_engine="2.20.2",
)  # fmt: skip
TOPOLOGY = """
        GPU0    GPU1    GPU2    GPU3    NIC0    CPU Affinity    NUMA Affinity
GPU0     X      NV18    NV18    SYS     PXB     0-55            0
GPU1    NV18     X      NV18    NV18    PXB     0-55            0
NIC0    PXB     PXB     SYS     SYS      X
"""


def test_links_are_counted_by_kind_without_network_cards():
    assert links_of(TOPOLOGY.splitlines()) == "2 x NV18, 1 x SYS"
    assert links_of(TOPOLOGY.strip().splitlines()) == "2 x NV18, 1 x SYS", "the header's first word is GPU0"
    assert links_of(["        GPU0    CPU Affinity", "GPU0     X      0-15"]) is None
    assert links_of([]) is None


@pytest.mark.parametrize(
    ("machine", "parts"),
    [
        (CPU, ["a GPU"]),
        (replace(CPU, listed_gpus=("H100",)), ["a CUDA build of torch", "Transformer Engine", "flash-attn 2"]),
        (GPU, []),
        (replace(GPU, gpus=(), listed_gpus=("H100",)), ["a driver for this CUDA, or GPUs in CUDA_VISIBLE_DEVICES"]),
        (replace(GPU, flash_attn_2=None, flash_attn_4="4.0"), ["flash-attn 2"]),
        (
            replace(GPU, te_missing=("transformer-engine-torch",)),
            ["part of Transformer Engine (transformer-engine-torch)"],
        ),
        (replace(GPU, transformer_engine=None), ["Transformer Engine"]),
    ],
)
def test_missing_parts(machine, parts):
    found = missing_parts(machine)
    assert [part.part for part in found] == parts
    assert all(part.cost and part.install for part in found)


def test_choices_are_what_the_code_takes_here():
    """On a machine without a GPU, the settings are those that `kernel_for` and the defaults choose."""
    from longctx.attention.backends import kernel_for
    from longctx.config import ModelSource, Run

    (choice,) = choices(CPU)
    assert choice.kernel == kernel_for("auto", "cpu", "float32").name
    assert (choice.device, choice.dtype) == (Run().device, ModelSource("a", "b").dtype)


@pytest.mark.parametrize(("changes", "layers"), [({}, "te"), ({"te_missing": ("x",)}, "local")])
def test_layers_on_gpus(changes, layers):
    inference, training, spd = choices(replace(GPU, **changes))
    assert (inference.layers, training.layers, spd.device) == (layers, layers, "cpu")
    assert "flash_attn" in inference.kernel
    assert "flash_attn" not in choices(replace(GPU, flash_attn_2=None))[0].kernel
    assert "triton" not in inference.kernel and "triton" in choices(replace(GPU, triton="3.7.1"))[0].kernel


@pytest.mark.parametrize("machine", [CPU, GPU, replace(CPU, listed_gpus=("H100",) * 2)])
def test_report_has_about_ten_short_lines(machine):
    lines = report(machine)
    assert 9 <= len(lines) <= 12
    assert all(text and "None" not in text for _, text in lines)
    assert ("GPUs", "2 x H100, which torch cannot use") in lines or machine.gpus or not machine.listed_gpus


def test_report_of_this_machine_is_written(cli, tmp_path):
    code, _, err = cli(doctor, doctor.task, f"out={tmp_path}/doctor.json")
    assert code == 0, err
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written["found"]["torch"] == torch.__version__ and written["found"]["cores"] >= 1
    assert len(written["found"]["gpus"]) == torch.cuda.device_count()
    assert written["takes"] and (tmp_path / "doctor.manifest.json").is_file()
    assert torch.__version__ in err
