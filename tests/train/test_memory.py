"""Predicted memory of a training step against the counted bytes of real steps, for a model of each family."""

from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from longctx.config import Mesh, Recompute
from longctx.cost.forward import Numbers
from longctx.cost.memory import step_bytes
from longctx.cost.step import StepWork
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank, run_ranks
from tests.megatron.kinds import EVEN_EXPERTS, KINDS

LENGTH = 487
MIXTURES = ("mixtral", "qwen3_moe, and a layer without experts", "gpt_oss")
# Wide networks, so that the peak is in the backward of one, as in large models.
WIDE = {"num_hidden_layers": 4, "intermediate_size": 602}


@dataclass(frozen=True)
class Case:
    """A step of one sequence, or of ``sequences`` for each data-parallel rank, on a mesh."""

    mesh: Mesh
    dtype: str = "float32"
    recompute: Recompute = "none"
    mlp_rows: int | None = None
    sequences: int = 1
    kinds: tuple[str, ...] = tuple(KINDS)

    def __str__(self) -> str:
        changed = {name: value for name, value in asdict(self).items() if name not in ("mesh", "kinds")}
        plain = asdict(Case(self.mesh))
        return " ".join([str(self.mesh), *(f"{name}={x}" for name, x in changed.items() if x != plain[name])])


CASES = [
    Case(Mesh()),
    Case(Mesh(tp=2)),
    Case(Mesh(), dtype="bfloat16", kinds=("untied llama", "qwen3", "olmo2", "gemma3", "starcoder2", "mixtral")),
    Case(Mesh(), recompute="selective", kinds=("gemma3", *MIXTURES)),
    Case(Mesh(), recompute="full", kinds=("untied llama", "qwen3", "olmo2", "gemma3", "starcoder2", *MIXTURES)),
    Case(Mesh(), mlp_rows=256, kinds=("olmo2", "gemma3", *MIXTURES)),
    Case(Mesh(ulysses=2), kinds=("qwen3", "olmo2", "gemma3")),
    Case(Mesh(ring=2, ep=2), kinds=MIXTURES),
    Case(Mesh(pp=2), sequences=17, recompute="full", kinds=("untied llama", "gemma3")),
    Case(Mesh(tp=2), sequences=17, recompute="full", kinds=("untied llama",)),
]


def peaks(rank: Rank, case: Case, folders: dict[str, Path]) -> dict[str, dict[str, int]]:
    """Return, for each model of ``folders``, the bytes by part at the peak of a second training step."""
    import torch
    from megatron.core.parallel_state import get_global_memory_buffer

    from longctx.attention.flash_cpu import flash_cpu
    from longctx.config import Optim
    from longctx.data.batches import Batch
    from longctx.megatron.hf_io.init import RandomInit
    from longctx.megatron.hf_io.load import load
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.training.state import build_train_state
    from longctx.parallel.strategy import STRATEGIES
    from longctx.train.memory import memory_meter
    from longctx.train.step import ContextParallel, train_step

    result, dtype = {}, getattr(torch, case.dtype)
    parallelism = ContextParallel(
        LENGTH, "zigzag", flash_cpu, STRATEGIES["pass_kv"], keep_partials=case.recompute != "none"
    )
    with open_runtime(rank, case.mesh, timeout_minutes=2, training=True) as runtime:
        for kind, folder in folders.items():
            shape = shape_of(folder)
            state = build_train_state(
                runtime, shape, Optim(), lambda net, shape=shape: load(net, RandomInit(shape, 3), shape), dtype=dtype,
                layers="local", steps=2, recompute=case.recompute, loss_rows=64, mlp_rows=case.mlp_rows,
            )  # fmt: skip
            get_global_memory_buffer().buffer.clear()  # the previous model's
            tokens = torch.arange(case.sequences * (LENGTH + 1)).mul(7919).remainder(211).view(-1, LENGTH + 1)
            counts = torch.ones(case.sequences, LENGTH, dtype=torch.bool)
            counted = counts.sum().item() * case.mesh.dp
            batch = Batch(tokens[:, :-1], tokens[:, 1:], counts, ((LENGTH,),) * case.sequences, counted)
            train_step(state, batch, runtime, parallelism)
            with memory_meter(state) as meter:
                train_step(state, batch, runtime, parallelism)
            result[kind] = meter.largest_peak(runtime.world, runtime.device)
    return result


@pytest.mark.filterwarnings("ignore:The explicitly set RoPE scaling factor")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sum_and_parts_are_predicted(tmp_path, case):
    folders = {kind: tmp_path / kind for kind in case.kinds}
    for kind, folder in folders.items():
        even = EVEN_EXPERTS.get(kind, {}) if case.mesh.ep > 1 else {}
        fields = KINDS[kind].to_dict() | WIDE | even | ({"moe_intermediate_size": 302} if "qwen3_moe" in kind else {})
        for name in ("layer_types", "no_rope_layers"):
            fields.pop(name, None)  # then derived from the number of layers
        type(KINDS[kind])(**fields).save_pretrained(folder)
    element, batch = {"float32": 4, "bfloat16": 2}[case.dtype], case.sequences * case.mesh.dp
    work = StepWork(LENGTH, batch, recompute=case.recompute, loss_rows=64, mlp_rows=case.mlp_rows, operations="cpu")
    wrong = []
    for kind, measured in run_ranks(case.mesh.ranks, peaks, case, folders)[0].items():
        predicted = step_bytes(shape_of(folders[kind]), case.mesh, work, "pass_kv", Numbers(element, element))
        total = sum(measured.values())
        errors = {"sum": (sum(predicted.values()) / total - 1) * 2}
        errors |= {part: predicted[part] / max(1, measured[part]) - 1 for part in predicted
                   if max(measured[part], predicted[part]) > total / 100}  # fmt: skip
        if max(map(abs, errors.values())) > 0.1:
            wrong.append((kind, errors, measured, predicted))
    assert not wrong
