"""``python -m recipes.bench SUBJECT settings...``: what is measured is the first word."""

import sys

from recipes.bench import (
    convergence,
    crossover,
    decode,
    drift,
    million,
    prefill,
    spd_latency,
    spd_quality,
    spd_sweep,
    train,
)
from recipes.common.cli import console, main

SUBJECTS = {
    "convergence": (convergence.task, "the loss curve of a mesh on top of one rank's"),
    "prefill": (prefill.task, "parallel efficiency, and where the rest goes"),
    "crossover": (crossover.task, "TTFT over the miss rate: pass-KV, pass-Q, and what auto takes"),
    "decode": (decode.task, "time from token to token, by strategy"),
    "drift": (drift.task, "error of bfloat16 attention over the number of ranks, on a real model's activations"),
    "million": (million.task, "one layer, a million cached tokens, a few new ones"),
    "spd_quality": (spd_quality.task, "perplexity over the share of blocks that drop a reduction"),
    "spd_latency": (spd_latency.task, "what dropped reductions save, over links of a given rate and latency"),
    "spd_sweep": (spd_sweep.task, "sensitivity of all blocks, beside a plain loop over perplexities"),
    "train": (train.task, "a training step on one rank and on several; attention beside its peers"),
}


def run(words: list[str]) -> None:
    """Run the subject that ``words`` begin with; exit code 2, naming the subjects, if there is none."""
    subject, *settings = words or [""]
    if subject not in SUBJECTS:
        if subject and subject not in ("--help", "-h"):
            console.print(f"[bold red]error[/]: there is no benchmark {subject}: use {', '.join(SUBJECTS)}")
            sys.exit(2)
        console.print("python -m recipes.bench SUBJECT key=value ...; --help behind a subject tells its settings\n")
        for name, (_, about) in SUBJECTS.items():
            console.print(f"  {name:12} {about}")
        sys.exit(0 if subject else 2)
    sys.argv[1:] = settings
    main(f"bench_{subject}", SUBJECTS[subject][0])


if __name__ == "__main__":
    run(sys.argv[1:])
