"""What the ranks of test_repair.py run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.config import JointRepair, Mesh, ModelSource, Repair
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan


def states(rank: Rank, folder: Path, how: Repair | None, grouping: str, dropped: tuple[int, ...]) -> dict[str, Any]:
    """Of a model on the ranks: losses, and block 1's output, as it is, grouped (with the reduction), and repaired."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime
    from longctx.megatron.spd.blocks import Blocks
    from longctx.megatron.spd.repair import place_neurons, repair, spread_heads
    from longctx.spd.text import PackedText

    shape, tp = shape_of(folder), rank.world_size
    draw = torch.Generator().manual_seed(31)
    ids = torch.randint(shape.vocab_size, (7, 20), generator=draw)
    text = PackedText(ids[:, :-1], ids[:, 1:], torch.rand(7, 19, generator=draw) < 0.8)
    out: dict[str, Any] = {}
    with runtime(rank, Mesh(tp=tp), timeout_minutes=2) as here:
        plan = SPDPlan(shape.layers, tp, dropped)
        engine = load_engine(here, ModelSource("test", str(folder)), shape, folder, "reference", plan)
        blocks = Blocks(engine.model, shape, engine.kernel, engine.tp)
        layers = engine.model.decoder.layers
        with torch.no_grad():
            x = blocks.embedded(text.tokens)
            entering = blocks.run(layers[0], x)
            y = blocks.run(layers[1], entering)
            out["loss"], out["y"] = blocks.loss(y, text), y
            layer = blocks.copy_of(1, own_norms=False)
            before = blocks.tensors_of(layer)
            spread_heads(blocks, layer, entering)
            place_neurons(blocks, layer, entering, grouping)
            layer.drop(dropped=False)
            out["grouped"] = blocks.run(layer, entering)
            after = blocks.tensors_of(layer)
            out["moved"] = sum(not torch.equal(before[name], after[name]) for name in before)
        if how:
            with torch.no_grad():
                more = torch.randint(shape.vocab_size, (how.sequences + how.held_out, how.length), generator=draw)
                inputs = blocks.run(layers[0], blocks.embedded(more))
                outputs = blocks.run(layers[1], inputs)
            made = repair(blocks, 1, "ESB", inputs, outputs, how)
            out["errors"] = [made.zero_shot, made.grouped, made.fitted, made.distilled]
            out["norms"] = made.layer.pre_mlp_layernorm.weight.detach().clone()
    return out


def guessed(rank: Rank, folder: Path) -> dict[str, Any]:
    """Of block 1: what enters the MLP with all heads and with each rank's, weights, guesses, errors of its neurons."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime
    from longctx.megatron.spd.blocks import Blocks

    shape, tp = shape_of(folder), rank.world_size
    ids = torch.randint(shape.vocab_size, (19, 23), generator=torch.Generator().manual_seed(53))
    with runtime(rank, Mesh(tp=tp), timeout_minutes=2) as here, torch.no_grad():
        engine = load_engine(
            here, ModelSource("test", str(folder)), shape, folder, "reference", SPDPlan(shape.layers, tp)
        )
        blocks = Blocks(engine.model, shape, engine.kernel, engine.tp)
        x = blocks.run(engine.model.decoder.layers[0], blocks.embedded(ids))
        layer = blocks.copy_of(1, own_norms=False)
        partials, guesses = blocks.partials(layer, x), blocks.guesses(layer, x)
        return {
            "normed": [layer.pre_mlp_layernorm(x + y) for y in (sum(partials), *partials)],
            "up": layer.mlp.linear_fc1.weight.clone(),
            "down": layer.mlp.linear_fc2.weight.clone(),
            "leaving": blocks.run(layer, x),
            "guesses": guesses,
            "errors": blocks.neuron_errors(layer, x, guesses),
        }


def predictions(rank: Rank, folder: Path) -> dict[str, Tensor]:
    """Of random hidden states: all logits, the divergence from another's predictions, and its gradient."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.model import logits
    from longctx.megatron.runtime import runtime
    from longctx.megatron.spd.likelihood import divergence, log_shares

    shape = shape_of(folder)
    draw = torch.Generator().manual_seed(37)
    got, wanted = (torch.randn(13, 1, shape.hidden, generator=draw).requires_grad_() for _ in range(2))
    weights = torch.rand(13, 1, generator=draw)
    with runtime(rank, Mesh(tp=rank.world_size), timeout_minutes=2) as here:
        model = load_engine(here, ModelSource("test", str(folder)), shape, folder, "reference").model
        model.requires_grad_(False)
        shares = log_shares(model, wanted, here.tp, shape.vocab_size)
        rows = divergence(model, got, shares, here.tp, shape.vocab_size)
        (rows * weights).sum().backward()
        both = [logits(model, x.detach(), here.tp, shape.vocab_size) for x in (got, wanted)]
        return {
            "got": both[0], "wanted": both[1], "rows": rows.detach(), "gradient": got.grad, "weights": weights
        }  # fmt: skip


def learned(rank: Rank, folder: Path, mesh: Mesh, at_once: bool, place: Path) -> dict[str, Any]:
    """Losses, first gradients, tensors of blocks that learn together, saved and resumed between unless ``at_once``."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime
    from longctx.megatron.spd.blocks import Blocks
    from longctx.megatron.spd.joint import JointDistillation

    shape, how = shape_of(folder), JointRepair(steps=5, batch=4, lr=1e-3, save_every=2)
    tokens = torch.randint(shape.vocab_size, (4, 17), generator=torch.Generator().manual_seed(41))
    with runtime(rank, mesh, timeout_minutes=2) as here:
        plan = SPDPlan(shape.layers, mesh.tp)
        engine = load_engine(here, ModelSource("test", str(folder)), shape, folder, "reference", plan)
        blocks = Blocks(engine.model, shape, engine.kernel, engine.tp)

        def begun() -> JointDistillation:
            layers = {block: blocks.copy_of(block, own_norms=False) for block in range(shape.layers)}
            return JointDistillation(blocks, layers, range(shape.layers), how, here.groups.dp)

        together = begun()
        before = together.divergence(tokens)
        mine = tokens[here.groups.dp.rank() :: mesh.dp]
        while together.steps < how.steps:
            together.step(mine)
            if together.steps == 1:
                gradients = {f"{block} {name}": weight.grad.clone() for block, layer in together.layers.items()
                             for name, weight in layer.named_parameters() if weight.grad is not None}  # fmt: skip
            if together.steps == 2 and not at_once:
                together.save(place, {"told": 43})
                together = begun()
                together.resume(place)
        tensors = {
            name: tensor
            for block in range(shape.layers)
            for name, tensor in blocks.tensors_of(together.layers[block]).items()
        }
        return {
            "losses": together.losses,
            "tensors": tensors,
            "gradients": gradients,
            "before": before,
            "after": together.divergence(tokens),
            "alone": together.divergences_alone(tokens, lambda: None),
            "only": {
                block: JointDistillation(blocks, together.layers, (block,), how, here.groups.dp).divergence(tokens)
                for block in together.layers
            },
        }
