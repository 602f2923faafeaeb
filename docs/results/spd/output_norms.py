"""Measure the error of Gemma 3's blocks that drop a reduction, for several estimates of the MLP's input.

    python docs/results/spd/output_norms.py MODEL_FOLDER TEXT_FILE [RANKS]

One process splits the heads and neurons of a transformers model over RANKS (default 2); KV heads need not be split.
The text is <bos> and the first 511 tokens of the file.  Each block gets the unchanged model's input.  Its error is the
mean over tokens of |output - unchanged output|^2 / |unchanged output|^2.  Prints JSON: a list of errors, one per block,
for each candidate.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 512


def partial_attention(layer: Any, x: Tensor, known: dict[str, Any], ranks: int) -> list[Tensor]:
    """Return each rank's P_r, the part of attention's output that comes from its heads."""
    heads: list[Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    layer.self_attn(hidden_states=layer.input_layernorm(x), **known)
    hook.remove()
    shares = zip(heads[0].chunk(ranks, -1), layer.self_attn.o_proj.weight.chunk(ranks, 1), strict=True)
    return [own @ weight.T for own, weight in shares]


def mlp_outputs(layer: Any, read: list[Tensor]) -> list[Tensor]:
    """Return each rank's part of the MLP's output; rank r's MLP reads ``read[r]``, an estimated residual stream."""
    mlp, norm, ranks = layer.mlp, layer.pre_feedforward_layernorm, len(read)
    weights = zip(
        mlp.gate_proj.weight.chunk(ranks),
        mlp.up_proj.weight.chunk(ranks),
        mlp.down_proj.weight.chunk(ranks, 1),
        strict=True,
    )
    return [
        (mlp.act_fn(norm(u) @ gate.T) * (norm(u) @ up.T)) @ down.T
        for u, (gate, up, down) in zip(read, weights, strict=True)
    ]


def candidates(layer: Any, x: Tensor, partials: list[Tensor]) -> dict[str, Tensor]:
    """Return the block's output for each candidate."""
    ranks, norm, output_norm = len(partials), layer.post_attention_layernorm, layer.post_feedforward_layernorm
    own, full = [norm(p) for p in partials], norm(sum(partials))
    size = sum(partials).square().mean(-1, keepdim=True)
    precision = 1 / (x + full).square().sum(-1, keepdim=True)
    fitted = [(precision * n * full).sum() / (precision * n * n).sum() for n in own]
    added = {
        "norm of own part": own,
        "divided by sqrt(ranks)": [n / ranks**0.5 for n in own],
        "divided by ranks": [n / ranks for n in own],
        "times a fitted number": [c * n for c, n in zip(fitted, own, strict=True)],
        "own part over the true size": [
            n * (p.square().mean(-1, keepdim=True) / size).sqrt() for n, p in zip(own, partials, strict=True)
        ],
        "nothing": [torch.zeros_like(x)] * ranks,
    }
    outputs = {
        name: x + full + output_norm(sum(mlp_outputs(layer, [x + y for y in each]))) for name, each in added.items()
    }
    # One sum: the parts of both outputs are normalised before the sum, and multiplied by fitted factors.
    parts = [output_norm(z) for z in mlp_outputs(layer, [x + full] * ranks)]
    whole = output_norm(sum(mlp_outputs(layer, [x + full] * ranks)))
    columns = torch.stack([(precision.sqrt() * part).flatten() for part in parts], 1)
    fitted_parts = torch.linalg.lstsq(columns, (precision.sqrt() * whole).flatten()[:, None]).solution[:, 0]
    attention = added["times a fitted number"]
    read = mlp_outputs(layer, [x + y for y in attention])
    mlp = sum(c * output_norm(z) for c, z in zip(fitted_parts, read, strict=True))
    return outputs | {"one sum of normed parts": x + sum(attention) + mlp}


@torch.no_grad()
def main(folder: str, text: str, ranks: int = 2) -> None:
    """Print the errors of all candidates and blocks."""
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(text).read_text()[: 16 * TOKENS], add_special_tokens=False)["input_ids"]
    errors: dict[str, list[float]] = {}

    def measure(layer: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        known = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        for name, y in candidates(layer, x, partial_attention(layer, x, known, ranks)).items():
            error = ((y - out).square().sum(-1) / out.square().sum(-1)).mean()
            errors.setdefault(name, []).append(float(error))

    for layer in net.model.layers:
        layer.register_forward_hook(measure, with_kwargs=True)
    net.model(torch.tensor([[tokenizer.bos_token_id, *ids[: TOKENS - 1]]]), use_cache=False)
    json.dump(errors, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
