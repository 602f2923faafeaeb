"""Predictions of the published rows in tests/cost/published, and the fit of a machine's constants to them."""

import copy
import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import least_squares

from longctx.config import Mesh
from longctx.cost.attention import COSTS, block_seconds, ulysses_seconds
from longctx.cost.forward import Numbers, decode_cost, prefill_cost, ring_works
from longctx.cost.machine import Machine
from longctx.cost.machine_file import machine_of
from longctx.cost.step import StepWork, step_cost
from longctx.cost.training import train_flops
from longctx.model_shape import ModelShape

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent / "published"
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
# Shapes that configs/model lacks: Llama 3 8B with the vocabulary that fits the tables of arXiv 2405.07719, and the
# heads of its attention benchmarks.
OTHER_SHAPES = {
    "llama3_8b_32k": ModelShape(32, 4096, 32, 8, 128, 14336, 32000, 8192, 1e-5, False, False),
    "usp_bench": ModelShape(1, 4096, 32, 8, 128, 1, 1, 2**20, 1e-5, False, False),
    "usp_bench_8x128": ModelShape(1, 1024, 8, 8, 128, 1, 1, 2**20, 1e-5, False, False),
}


@dataclass(frozen=True)
class Row:
    """A published figure: its table, the run that it belongs to, and its value."""

    table: str
    hardware: str
    model: str
    quantity: str
    mesh: Mesh
    batch: int
    new: int
    cached: int
    strategy: str
    value: float
    unit: str
    source: str

    @property
    def published(self) -> float:
        """The published value: seconds, or a share for ``spd_saving``."""
        if self.unit == "%":
            return self.value / 100
        if self.unit == "it/s":
            return 1 / self.value
        if self.unit == "TFLOPS":  # per GPU, without causal halving (version 1 of the paper)
            flops = train_flops(shape_named(self.model), [self.new] * self.batch, causal=False)
            return flops / (self.mesh.ranks * self.value * 1e12)
        return self.value * UNITS[self.unit]


@cache
def rows_of(table: str) -> tuple[Row, ...]:
    """Return the rows of ``table``, a file of tests/cost/published."""
    with (TABLES / f"{table}.csv").open() as file:
        return tuple(_row(table, values) for values in csv.DictReader(file))


def _row(table: str, values: Mapping[str, str]) -> Row:
    axes = {axis: int(values[axis]) for axis in ("tp", "ulysses", "ring", "dp")}
    return Row(
        table,
        *(values[name] for name in ("hardware", "model", "quantity")),
        Mesh(**axes),
        *(int(values[name]) for name in ("batch", "new", "cached")),
        values["strategy"],
        float(values["value"]),
        *(values[name] for name in ("unit", "source")),
    )


def tables() -> list[str]:
    return sorted(file.stem for file in TABLES.glob("*.csv"))


@cache
def values_of(hardware: str) -> Any:
    return yaml.safe_load((ROOT / "configs" / "machine" / f"{hardware}.yaml").read_text())


def machine(hardware: str) -> Machine:
    return machine_of(values_of(hardware), hardware)


@cache
def shape_named(model: str) -> ModelShape:
    """Return the shape of a file of configs/model, or of `OTHER_SHAPES`."""
    if model in OTHER_SHAPES:
        return OTHER_SHAPES[model]
    config = yaml.safe_load((ROOT / "configs" / "model" / f"{model}.yaml").read_text())["config"]
    heads = config["num_attention_heads"]
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim", config["hidden_size"] // heads),
        ffn=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=1e-5,
        tied=False,
        qkv_bias=False,
    )


def predict(row: Row, one: Machine) -> float:
    """Return the cost model's value of ``row`` on the machine ``one``."""
    shape, new, cached = shape_named(row.model), [row.new] * row.batch, [row.cached] * row.batch
    numbers = Numbers(2, one.ffn_element_bytes or 2)
    if row.quantity in ("ttft", "turn"):
        in_session = row.quantity == "turn"
        return prefill_cost(shape, row.mesh, one, new, cached, row.strategy, numbers, in_session=in_session).seconds
    if row.quantity == "ttit":
        return decode_cost(shape, row.mesh, one, cached, row.strategy, numbers).seconds
    if row.quantity == "step":
        work = StepWork(row.new, row.batch, row.batch // row.mesh.dp, zero1=True)
        return step_cost(shape, row.mesh, one, work, row.strategy, numbers).seconds
    if row.quantity == "spd_saving":
        dropped, whole = (
            prefill_cost(shape, row.mesh, one, new, cached, row.strategy, Numbers(2, 2, share)).seconds
            for share in (0.7, 0)
        )
        return 1 - dropped / whole
    return predict_kernel(row, one)


def predict_kernel(row: Row, one: Machine) -> float:
    """Return the predicted seconds of ``row.quantity``: one layer's attention, or its hop, block or exchange."""
    shape, new, cached = shape_named(row.model), [row.new] * row.batch, [row.cached] * row.batch
    ((work, _),) = ring_works(shape, row.mesh, new, cached, Numbers(), one.partial_element_bytes)
    decodes = row.quantity.startswith("decode")
    hardware = one.kernel(row.mesh.ring, row.mesh.tp * row.mesh.ulysses, decodes=decodes)
    hop = work.kv_block_bytes if row.strategy == "pass_kv" else work.q_block_bytes
    exchange = one.level(row.mesh.ulysses, row.mesh.tp).exchange
    parts = {
        "hop": hardware.hop.seconds(hop),
        "block": block_seconds(work, hardware),
        "exchange": hardware.exchange.seconds(work.partial_bytes),
    }
    parts |= {
        "decode_block": parts["block"],
        "decode_ring": work.ranks * parts["block"],
        "decode_hops": (work.ranks - 1) * parts["hop"],
        "decode_exchange": parts["exchange"],
        "decode_attention": COSTS[row.strategy](work, hardware).seconds,
    }
    parts["attention"] = (
        parts["decode_attention"] + ulysses_seconds(work, row.mesh.ulysses, exchange) + work.ranks * one.step_s
    )
    return parts[row.quantity]


def errors_of(rows: Sequence[Row], one: Machine) -> list[float]:
    """Return predicted / published - 1 for each row."""
    return [predict(row, one) / row.published - 1 for row in rows]


def mean_error(rows: Sequence[Row], one: Machine) -> float:
    return float(np.mean(np.abs(errors_of(rows, one))))


def fit(hardware: str, without: str | None = None) -> Any:
    """Return the values of ``hardware``, with constants fitted to all of its tables but ``without``.

    It minimises the squares of log(predicted / published), each weighted by 1 / sqrt(rows of its table).  If a table
    has both pass-KV and pass-Q, their ratio counts as one more figure.  A weak term pulls constants towards the values
    of the file, and thereby determines constants on which no row depends.
    """
    values = copy.deepcopy(values_of(hardware))
    rows = [row for table in tables() if table != without for row in rows_of(table) if row.hardware == hardware]
    weight = {table: len(rows_of(table)) ** -0.5 for table in tables()}
    pairs = [(one, other) for one, other in itertools.pairwise(rows) if one.quantity == "turn" and one.new == other.new]
    paths = values["fitted"]
    start = np.array([math.log(get(values, path)) for path in paths])

    def residuals(x: Any) -> Any:
        for path, one in zip(paths, x, strict=True):
            assign(values, path, min(1.0, math.exp(one)) if path.endswith("overlap") else math.exp(one))
        model = machine_of(values, hardware)
        errors = {row: math.log(max(1e-9, predict(row, model)) / row.published) for row in rows}
        apart = [weight[one.table] * (errors[one] - errors[other]) for one, other in pairs]
        return np.array([*(weight[row.table] * error for row, error in errors.items()), *apart, *(0.01 * (x - start))])

    residuals(least_squares(residuals, start, loss="soft_l1", f_scale=0.05).x)
    return values


def get(values: Any, path: str) -> float:
    for key in path.split("."):
        values = values[int(key) if key.isdigit() else key]
    return float(values)


def assign(values: Any, path: str, number: float) -> None:
    *parents, last = path.split(".")
    for key in parents:
        values = values[int(key) if key.isdigit() else key]
    values[last] = number


def count_winners(one: Machine) -> int:
    """Count the rows of Table 4 for which the model predicts the faster strategy."""
    rows = rows_of("cp_table4")
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    return sum((predict(kv, one) < predict(q, one)) == (kv.published < q.published) for kv, q in pairs)
