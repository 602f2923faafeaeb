"""Run all checks of Transformer Engine's layers in one process and its ranks; write their results to a file.

This runs in a separate process, since the stand-in must be installed before megatron-core is imported:
``LONGCTX_TE=WHEEL python -m tests.megatron.te.checks FOLDER``.  FOLDER has the models; results.pt appears in it.
"""

import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from longctx.config import Mesh
from longctx.parallel.launch import RankFailed, run_ranks, warm_up
from tests.megatron.te.capabilities import MODEL_DTYPES, dtypes_of, kernels_here
from tests.megatron.te.ranks import (
    Training,
    compare_logits,
    compare_training,
    noticed,
    round_trip,
    run_kernels,
    run_large,
    run_layers,
)

# Kind, biases, sequence parallelism, norms per rank.
LAYER_CASES = [*product(["dropped"], [False, True], [False, True], [False]), ("dropped", True, False, True)]
FP8 = ("current", "block")
PROMPT = 8191  # tokens of the large model's prompt


def main(folder: Path) -> None:
    """Write FOLDER/results.pt: by check, what each rank returned, or the traceback of the rank that failed."""
    models = {place.name: place for place in sorted((folder / "models").iterdir())}
    llama, biased, gemma = (models[kind] for kind in ("tied llama", "llama with all biases", "gemma3"))
    wide = {place.name: place for place in sorted((folder / "wide").iterdir())}
    in_8_bits = [Training(place, fp8=fp8) for place in wide.values() for fp8 in FP8]
    fp8_options = [
        Training(wide["llama with all biases"], fp8=fp8, **option)
        for option in ({"recompute": "selective"}, {"recompute": "full"}, {"sequence_parallel": False})
        for fp8 in FP8
    ]
    every = [Training(place) for place in models.values()]
    tp2 = [
        *every,
        *(Training(place, sequence_parallel=False) for place in (biased, gemma)),
        *(Training(biased, recompute=recompute, mlp_rows=5) for recompute in ("selective", "full")),
        *(Training(place, dropped=(1,), recompute="selective") for place in (biased, gemma)),
        Training(biased, dropped=(0, 1), sequence_parallel=False, mlp_rows=5),
    ]
    single = [Training(llama, dtype="float32", zero1=zero1) for zero1 in (False, True)]
    stages, saved = [*single, Training(gemma, recompute="full")], Training(biased, zero1=True, dtype="float32")
    some = {kind: models[kind] for kind in ("llama with all biases", "gemma3")}
    kernels = {name: [each for each in dtypes_of(name) if each in MODEL_DTYPES] for name in kernels_here()}
    checks: dict[str, tuple[Any, ...]] = {
        "logits tp=1": (1, compare_logits, Mesh(), models, "float32", (), folder / "1"),
        "logits tp=2": (2, compare_logits, Mesh(tp=2), models, "float64", (), folder / "2"),
        "logits tp=3": (3, compare_logits, Mesh(tp=3), some, "float64", (), folder / "3"),
        "logits dropped": (3, compare_logits, Mesh(tp=3), some, "float64", (0,), folder / "4"),
        "training tp=1": (1, compare_training, Mesh(), every),
        "training tp=2": (2, compare_training, Mesh(tp=2), tp2),
        "training tp=3": (3, compare_training, Mesh(tp=3), [Training(biased), Training(gemma, dropped=(0,))]),
        "training tp=2 pp=2": (4, compare_training, Mesh(tp=2, pp=2), stages),
        "training ring=2 dp=2": (4, compare_training, Mesh(ring=2, dp=2), stages),
        "checkpoint": (2, round_trip, Mesh(tp=2), saved, folder / "checkpoints"),
        "layer tp=2": (2, run_layers, 2, LAYER_CASES),
        "layer tp=3": (3, run_layers, 3, LAYER_CASES),
        **{f"logits fp8={x}": (1, compare_logits, Mesh(), wide, "float64", (), folder / x, x) for x in FP8},
        "training fp8 tp=1": (1, compare_training, Mesh(), in_8_bits),
        "training fp8 tp=2": (2, compare_training, Mesh(tp=2), [*in_8_bits, *fp8_options]),
        "training fp8 ring=2 pp=2": (4, compare_training, Mesh(ring=2, pp=2), in_8_bits[:2]),
        "kernels": (1, run_kernels, folder / "small", kernels),
        "meta": (1, run_large, folder / "large", PROMPT),
        "mutations": (2, noticed, Mesh(tp=2), {**models, "wide llama": wide["tied llama"]}),
    }
    torch.save({name: _outcome(*check) for name, check in checks.items()}, folder / "results.pt")


def _outcome(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any] | str:
    try:
        return run_ranks(ranks, function, *args)
    except RankFailed as error:
        return f"{error}\n{error.details}"


if __name__ == "__main__":
    # As in pyproject.toml: warnings are errors, except for megatron-core's about its own calls, and torch's about its.
    warnings.simplefilter("error")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None", "`torch.jit.script"):
        warnings.filterwarnings("ignore", message)
    warm_up(["tests.megatron.te.warm"])
    main(Path(sys.argv[1]))
