"""Read a `Machine` from YAML: a file of configs/machine/, or the one that recipes.calibrate writes on one node."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from longctx.cost.hardware import Hardware, hardware_of, link_of, refuse_unknown, whole
from longctx.cost.machine import Accuracy, Level, Machine


def machine_of(values: Any, source: str) -> Machine:
    """Return the `Machine` in the parsed YAML ``values`` of configs/machine/ or of recipes.calibrate.

    ``source`` names the file in errors.  Raises ValueError, with the field and the fix, for a missing or unknown field
    or a value of the wrong type or range.
    """
    if not isinstance(values, Mapping) or "levels" not in values:
        return replace(_one_node(hardware_of(values, source), source), errors=errors_of(values, source))
    try:
        # 1. Take the fields of `Machine`; "fitted" lists the names of fitted constants, "measured" says of what dtype.
        names = [one.name for one in fields(Machine) if one.name != "training"]  # only recipes.calibrate measures it
        refuse_unknown(values, ["fitted", "measured", *names], "a machine")
        levels = [_level_of(one) for one in values["levels"]]
        errors = errors_of(values, source)
        # 2. Convert the numbers.
        counts = ("gpus_per_node", "partial_element_bytes", "ranks_at_once")
        others = ("fitted", "measured", "levels", "errors")
        given = {name: value for name, value in values.items() if name not in others and value is not None}
        plain: dict[str, Any] = {name: (whole if name in counts else float)(value) for name, value in given.items()}
        return Machine(levels=levels, errors=errors, **plain)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} does not describe a machine ({error}): copy a file of configs/machine and change its numbers, "
            "or measure this machine with python -m recipes.calibrate out=FILE.yaml"
        ) from error


def errors_of(values: Mapping[str, Any], source: str) -> dict[str, Accuracy]:
    """Return the `Accuracy` by kind of work, from the section ``errors`` in the ``values`` of a machine's YAML file.

    Without the section, the result is empty.  ``source`` names the file in errors.  Raises ValueError if the section
    cannot be read.
    """
    try:
        return {str(work): _accuracy_of(one) for work, one in (values.get("errors") or {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: its section errors cannot be read ({error}): delete the section, then write it again with "
            "python -m recipes.bench times hardware=FILE.yaml record=true only=[prefill,decode,train,four_ranks]"
        ) from error


def _accuracy_of(values: Mapping[str, Any]) -> Accuracy:
    """Return the `Accuracy` that ``values`` of a YAML file describe."""
    refuse_unknown(values, [one.name for one in fields(Accuracy)], "an accuracy")
    element_bytes, share = whole(values.get("element_bytes", Accuracy.element_bytes)), float(values["share"])
    if not 0 <= share < math.inf:
        raise ValueError(f"share={share} is not a number of 0 or more")
    axes, strategies = (tuple(map(str, names)) for names in (values["axes"], values.get("strategies", ())))
    return Accuracy(share, axes, whole(values["ranks"]), element_bytes, strategies)


def _level_of(values: Mapping[str, Any]) -> Level:
    """Return the `Level` that ``values`` of a YAML file describe."""
    refuse_unknown(values, [one.name for one in fields(Level)], "a level of links")
    return Level(
        name=str(values["name"]),
        ranks=whole(values["ranks"]),
        hop=link_of(values["hop"]),
        exchange=link_of(values["exchange"]),
        step_s=None if values.get("step_s") is None else float(values["step_s"]),
        gather=link_of(values["gather"]) if values.get("gather") else None,
        reduce=link_of(values["reduce"]) if values.get("reduce") else None,
    )


def _one_node(measured: Hardware, source: str) -> Machine:
    """Return a machine of one node with the constants ``measured`` on a ring; the ring's links connect all ranks.

    ``source`` names the file in errors.  Raises ValueError if ``measured`` lacks the rates outside attention.
    """
    layer = measured.layer
    if layer is None:
        raise ValueError(
            f"{source} has no field 'layer', which predictions need: measure again with python -m recipes.calibrate "
            "out=FILE.yaml, on a mesh with mesh.tp=1 and with a dense model"
        )
    return Machine(
        levels=[Level("between ranks", 2**31, measured.hop, measured.exchange, None, layer.gather, layer.reduce)],
        gpus_per_node=2**31,
        gemm_flops=layer.gemm_flops,
        attention_flops=measured.flops,
        memory_bytes_per_s=layer.weight_bytes_per_s,
        kv_bytes_per_s=measured.kv_bytes_per_s,
        overlap=measured.overlap,
        block_s=measured.block_s,
        step_s=0.0,
        layer_s=layer.layer_s,
        peak_flops=measured.peak_flops,
        ranks_at_once=measured.ranks_at_once,
        backward=measured.backward,
        causal=measured.causal,
        training=layer.training,
    )
