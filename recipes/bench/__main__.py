"""Run a benchmark: ``python -m recipes.bench SUBJECT key=value ...``."""

import sys

from recipes.bench import (
    attention,
    convergence,
    crossover,
    decode,
    drift,
    gpu_check,
    memory,
    million,
    output_norms,
    prefill,
    rivals,
    serve,
    spd_latency,
    spd_quality,
    spd_sweep,
    spd_texts,
    spd_tradeoff,
    times,
    train,
)
from recipes.common.cli import console, main, print_error

SUBJECTS = {
    "attention": (
        attention.task,
        "attention of one layer: our strategies beside Transformer Engine's context parallelism",
    ),
    "convergence": (convergence.task, "loss curves of the same training run on one rank and on a mesh"),
    "crossover": (crossover.task, "time to first token by miss rate, with pass-KV and pass-Q; choice of each rule"),
    "decode": (decode.task, "time to incremental token (TTIT), by decode strategy"),
    "drift": (drift.task, "error of bfloat16 attention by number of ranks, on a real model's activations"),
    "memory": (memory.task, "memory of prefill, decoding and training steps by part, measured and predicted"),
    "gpu_check": (gpu_check.task, "a GPU in minutes: kernels, tiles of a ring, prefill and decoding of a model"),
    "million": (million.task, "attention of one layer: a few new tokens over a million cached ones"),
    "output_norms": (output_norms.task, "Gemma 3 with dropped reductions: error and perplexity by the MLP's input"),
    "prefill": (prefill.task, "parallel efficiency of attention and of the whole model, and its three factors"),
    "rivals": (rivals.task, "speed of prefill and decoding beside transformers, in one run"),
    "serve": (serve.task, "a server's load: throughput, time to first token and hit rate of many clients at once"),
    "spd_latency": (spd_latency.task, "time saved by dropped reductions, over links of a given rate and latency"),
    "spd_quality": (spd_quality.task, "perplexity by the share of blocks that drop a reduction"),
    "spd_sweep": (spd_sweep.task, "seconds of a sensitivity measurement, against a plain loop over perplexities"),
    "spd_texts": (spd_texts.task, "an adapted model by text: first tokens, worst sequence, copying"),
    "spd_tradeoff": (spd_tradeoff.task, "quality against time saved, for dropped and rounded reductions, by link"),
    "times": (times.task, "time of prefill, decoding and training steps, measured and predicted"),
    "train": (train.task, "a training step on one rank and on several; attention compared with other projects' rings"),
}


def run_benchmark(words: list[str]) -> None:
    """Run the benchmark that the first of ``words`` names, with the others as settings.

    Without a subject, or with --help, the subjects are listed.  Exits with code 2 for a missing or unknown subject.
    """
    subject, *settings = words or [""]
    if subject in SUBJECTS:
        sys.argv[1:] = settings
        main(f"bench/{subject}", SUBJECTS[subject][0])
        return
    if subject not in ("", "--help", "-h"):
        print_error(f"{subject} is not a benchmark; use {', '.join(SUBJECTS)}")
        sys.exit(2)
    console.print("python -m recipes.bench SUBJECT key=value ...; SUBJECT --help lists the subject's settings\n")
    for name, (_, description) in SUBJECTS.items():
        console.print(f"  {name:12} {description}")
    sys.exit(0 if subject else 2)


if __name__ == "__main__":
    run_benchmark(sys.argv[1:])
