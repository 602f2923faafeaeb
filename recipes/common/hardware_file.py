"""Hardware files: constants of a machine, written by recipes.calibrate or in configs/machine, read by other recipes."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml

from longctx.config import Mesh
from longctx.cost.hardware import Hardware, hardware_of
from longctx.cost.machine import Accuracy, Machine
from longctx.cost.machine_file import machine_of
from longctx.text_file import write_text
from recipes.common.cli import threads_here
from recipes.common.overrides import CONFIGS, choices


def read_hardware(name: str) -> Hardware:
    """Return the constants in the file ``name``.  Raises ValueError if recipes.calibrate did not write it."""
    return hardware_of(_values(name), f"hardware={name}")


def read_machine(name: str) -> Machine:
    """Return the machine ``name`` of configs/machine, or the machine that the file ``name`` describes.

    Raises ValueError, with the names in configs/machine, if there is neither, and for a file that describes no machine.
    """
    refuse_unknown_machine(name)
    file = str(CONFIGS / "machine" / f"{name}.yaml") if name in choices("machine") else name
    return machine_of(_values(file), f"hardware={name}")


def refuse_unknown_machine(name: str) -> None:
    """Raise ValueError, with the names in configs/machine, unless ``name`` is one of them or a file."""
    known = choices("machine")
    if name not in known and not Path(name).expanduser().is_file():
        raise ValueError(
            f"hardware={name} is neither a machine of configs/machine nor a file: use {', '.join(known)}, or a file "
            "that python -m recipes.calibrate out=FILE.yaml wrote"
        )


def read_rates(name: str) -> tuple[float | None, Machine | None]:
    """Return a rank's peak FLOP/s and the machine of ``hardware=name``; each is None if the file lacks its constants.

    Raises ValueError for a name that is neither a file nor in configs/machine.
    """
    if name not in choices("machine"):
        values = _values(name)
        if not (isinstance(values, Mapping) and "levels" in values) and (measured := read_hardware(name)).layer is None:
            return measured.peak_flops, None
    machine = read_machine(name)
    return machine.peak_flops, machine


def refuse_more_ranks(hardware: str | None, machine: Machine | None, ranks: int, instead: str) -> None:
    """Raise ValueError if ``machine``, named by ``hardware``, describes the links of fewer GPUs than ``ranks``.

    ``instead`` is the first remedy that the message names.
    """
    if machine and ranks > machine.gpus:
        raise ValueError(
            f"hardware={hardware} describes the links of {machine.gpus} GPUs, not of {ranks:,}: use {instead}, or a "
            "copy of its file with one more level: the links between nodes"
        )


def refuse_other_threads(hardware: str | None, threads: int | None, mesh: Mesh, *, fixed: bool = False) -> None:
    """Raise ValueError if the file ``hardware`` was measured with other threads per rank than a run on ``mesh`` uses.

    Call it on the machine of the run, since a login node has other cores.  A file that states no threads is accepted,
    and so is a name of configs/machine.  ``fixed`` says that the recipe has no setting run.threads.
    """
    values = _values(hardware) if hardware and hardware not in choices("machine") else None
    fields = values if isinstance(values, Mapping) else {}
    metadata = fields.get("measured")
    measured = metadata.get("threads") if isinstance(metadata, Mapping) else None
    used = threads_here(threads, mesh)
    if measured not in (None, used):
        too_many = isinstance(measured, int) and measured > threads_here(None, Mesh())
        advice = [] if fixed or too_many else [f"use run.threads={measured}"]
        if used <= threads_here(None, Mesh(ring=2)) and not fields.get("empirical"):  # calibrate needs two ranks
            advice.append(f"measure again with python -m recipes.calibrate run.threads={used} out=FILE.yaml")
        raise ValueError(
            f"hardware={hardware} was measured with run.threads={measured} per rank, but this run uses "
            f"run.threads={used}: {', or '.join(advice) or 'leave it out'}"
        )


def refuse_other_rates(hardware: str, dtype: str, instead: str = "model.dtype=bfloat16") -> None:
    """Raise ValueError unless the rates of ``hardware`` are those of ``dtype``.

    The rates of configs/machine, and of files like these, are for 16-bit numbers unless they have ``measured.dtype``.
    A file of recipes.calibrate says for which dtype its rates are; those of version 0.1 do not.

    ``instead`` is the first remedy that the message names.
    """
    refuse_unknown_machine(hardware)
    values = {"levels": ()} if hardware in choices("machine") else _values(hardware)
    if not isinstance(values, dict):
        return  # refused when it is read
    measured = _measured(values).get("dtype")
    if measured is None and "levels" in values and dtype == "float32":
        raise ValueError(
            f"hardware={hardware} has the rates of 16-bit numbers, and model.dtype=float32 is slower: use {instead}, "
            "or a file that recipes.calibrate wrote on the machine, or add measured: {dtype: float32} to your own file"
        )
    measured = measured or dtype
    if measured != dtype:
        raise ValueError(
            f"hardware={hardware} was measured with model.dtype={measured}, not {dtype}: use a file that "
            f"python -m recipes.calibrate model.dtype={dtype} out=FILE.yaml wrote, or {instead}"
        )


def is_measured_on_cpus(hardware: str) -> bool:
    """Return True if ``hardware`` is a file that recipes.calibrate wrote on a machine without GPUs."""
    if hardware in choices("machine"):
        return False
    values = _values(hardware)
    # A GPU's file has no number of threads.
    return isinstance(values, dict) and "levels" not in values and _measured(values).get("threads", 1) is not None


def measured_threads(hardware: str) -> int | None:
    """Return the threads per rank with which the file ``hardware`` was measured; None if it states none."""
    values = None if hardware in choices("machine") else _values(hardware)
    threads = _measured(values).get("threads") if isinstance(values, dict) else None
    return threads if isinstance(threads, int) else None


def measured_mesh(hardware: str) -> str | None:
    """Return the mesh on which recipes.calibrate measured the links of ``hardware``; None for machines with levels."""
    values = None if hardware in choices("machine") else _values(hardware)
    if not isinstance(values, dict) or "levels" in values:
        return None
    return str(_measured(values).get("mesh", "one pair of ranks"))


def _measured(values: Mapping[str, object]) -> Mapping[str, object]:
    measured = values.get("measured")
    return measured if isinstance(measured, dict) else {}


def record_errors(name: str, accuracies: Mapping[str, Accuracy]) -> None:
    """Write ``accuracies``, by kind of work, to the section ``errors`` of the hardware file ``name``.

    Kinds of work that are not in ``accuracies`` keep their values.  The file loses its comments.
    """
    values = _values(name)
    assert isinstance(values, dict)
    lists = ("axes", "strategies")
    written = {
        work: {**asdict(one), **{name: list(getattr(one, name)) for name in lists}} for work, one in accuracies.items()
    }
    values["errors"] = {**(values.get("errors") or {}), **written}
    write_text(Path(name).expanduser(), yaml.safe_dump(values, sort_keys=False))


def _values(name: str) -> object:
    try:
        return yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"hardware={name} cannot be read ({error}): write it with python -m recipes.calibrate out=FILE.yaml"
        ) from error
