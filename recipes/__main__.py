"""The command ``longctx VERB key=value ...``: the same as ``python -m`` of the verb's module, from any folder."""

import runpy
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from recipes.common.startup import announce, loaded, print_page

# Verb -> module and what it does.
VERBS = {
    "generate": ("recipes.generate", "answer a long prompt that is sharded over ranks"),
    "chat": ("recipes.chat", "hold a conversation; its keys and values stay on the ranks"),
    "serve": ("recipes.serve", "answer many clients through OpenAI's API"),
    "pretrain": ("recipes.pretrain", "train a model from scratch, or resume a run"),
    "extend": ("recipes.extend", "train a pretrained model on longer sequences"),
    "finetune": ("recipes.finetune", "train a model further on conversations"),
    "models": ("recipes.models", "list the model types that run, and their features"),
    "doctor": ("recipes.doctor", "show this machine's hardware and libraries, settings for them, what is missing"),
    "export": ("recipes.export", "write a run's model as a folder that transformers loads"),
    "plan": ("recipes.plan", "predict the time and memory of a run on every mesh, before it starts"),
    "calibrate": ("recipes.calibrate", "measure this machine's kernel and links"),
    "spd_sensitivity": ("recipes.spd_sensitivity", "measure which blocks can drop a reduction"),
    "spd_adapt": ("recipes.spd_adapt", "repair a model whose blocks drop a reduction"),
    "eval": ("eval.run", "score a model, or compare variants of it"),
    "eval_speed": ("eval.speed", "measure examples per second, compared with lm-eval's own model"),
    "bench": ("recipes.bench", "run a benchmark: longctx bench lists them"),
    "compare": ("recipes.compare", "list how runs differ: longctx compare DIR DIR"),
    "reproduce": ("recipes.reproduce", "run a run again and compare: longctx reproduce DIR"),
    "submit": ("slurm.submit", "submit a recipe (generate, pretrain, eval, ...) as a job of a Slurm cluster"),
}


def main() -> None:
    """Run the verb that the first word of the command line names, with the other words as its settings.

    Without a verb, or with --help, the verbs are listed.  Exits with code 2 for a missing or unknown verb.
    """
    verb, *words = sys.argv[1:] or [""]
    if verb in VERBS:
        run_verb(verb, words)
        return
    if verb not in ("", "-h", "--help"):
        near = get_close_matches(verb, VERBS, n=1)
        advice = f"did you mean {near[0]}?" if near else "longctx --help lists the verbs"
        print(f"error: there is no verb {verb}: {advice}", file=sys.stderr)
        sys.exit(2)
    lines = [f"  {name:16} {description}" for name, (_, description) in VERBS.items()]
    print_page("\n".join(["longctx VERB key=value ...; longctx VERB --help lists the verb's settings", "", *lines]))
    sys.exit(0 if verb else 2)


def run_verb(verb: str, words: Sequence[str]) -> None:
    """Run the module of ``verb`` as ``python -m`` would, with the command line ``words``."""
    sys.argv[1:] = words
    announce(VERBS[verb][0])
    try:
        runpy.run_module(VERBS[verb][0], run_name="__main__", alter_sys=True)
    finally:
        loaded()  # a verb that imports little ends before its line is due


if __name__ == "__main__":
    main()
