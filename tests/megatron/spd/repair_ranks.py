"""Functions that the ranks of test_repair.py run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.config import JointRepair, Mesh, ModelSource, Repair
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan


def run_repair(
    rank: Rank, folder: Path, settings: Repair | None, grouping: str, dropped: tuple[int, ...]
) -> dict[str, Any]:
    """Run a model block by block, and regroup and repair block 1.

    Returns the model's ``loss``; block 1's output ``y``; its output ``grouped``, regrouped but not dropped; the number
    of tensors ``moved`` by regrouping; the ``features`` of its KV groups; with ``settings``, the ``errors`` of the
    repair, the MLP's ``norms``, and ``replicated``, the weights that every rank holds whole.
    """
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.spd.blocks import Blocks
    from longctx.megatron.spd.repair import place_neurons, repair, spread_heads
    from longctx.spd.text import PackedText

    shape, tp = shape_of(folder), rank.world_size
    draw = torch.Generator().manual_seed(31)
    ids = torch.randint(shape.vocab_size, (7, 20), generator=draw)
    text = PackedText(ids[:, :-1], ids[:, 1:], torch.rand(7, 19, generator=draw) < 0.8)
    out: dict[str, Any] = {}
    with open_runtime(rank, Mesh(tp=tp), timeout_minutes=2) as runtime:
        plan = SPDPlan(shape.layers, tp, dropped)
        engine = load_engine(runtime, ModelSource("test", str(folder)), shape, folder, "reference", plan)
        blocks = Blocks(engine.model, shape, engine.kernel, engine.tp)
        layers = engine.model.decoder.layers
        with torch.no_grad():
            x = blocks.embed(text.tokens)
            entering = blocks.run(layers[0], x)
            y = blocks.run(layers[1], entering)
            out["loss"], out["y"] = blocks.loss(y, text), y
            layer = blocks.copy_of(1, own_norms=False)
            before = blocks.tensors_of(layer)
            out["features"] = blocks.group_features(layer, entering)
            spread_heads(blocks, layer, entering)
            place_neurons(blocks, layer, entering, torch.ones(entering.shape[1]), grouping)
            layer.drop(dropped=False)
            out["grouped"] = blocks.run(layer, entering)
            after = blocks.tensors_of(layer)
            out["moved"] = sum(not torch.equal(before[name], after[name]) for name in before)
        if settings:
            with torch.no_grad():
                tokens = torch.randint(
                    shape.vocab_size, (settings.sequences + settings.held_out, settings.length), generator=draw
                )
                inputs = blocks.run(layers[0], blocks.embed(tokens))
                outputs = blocks.run(layers[1], inputs)
            result = repair(blocks, 1, "ESB", inputs, outputs, settings)
            out["errors"] = [result.zero_shot, result.grouped, result.fitted, result.distilled]
            out["norms"] = result.layer.pre_mlp_layernorm.weight.detach().clone()
            out["replicated"] = {
                name: weight.detach().clone()
                for name, weight in result.layer.named_parameters()
                if not getattr(weight, "tensor_model_parallel", False)
            }
    return out


def measure_neuron_errors(rank: Rank, folder: Path) -> dict[str, Any]:
    """Return block 1's linear maps and neuron errors, and all that is needed to compute the errors independently.

    ``normed`` lists the MLP's input with all heads, then with each rank's heads.
    """
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.spd.blocks import Blocks

    shape, tp = shape_of(folder), rank.world_size
    ids = torch.randint(shape.vocab_size, (19, 23), generator=torch.Generator().manual_seed(53))
    with open_runtime(rank, Mesh(tp=tp), timeout_minutes=2) as runtime, torch.no_grad():
        engine = load_engine(
            runtime, ModelSource("test", str(folder)), shape, folder, "reference", SPDPlan(shape.layers, tp)
        )
        blocks = Blocks(engine.model, shape, engine.kernel, engine.tp)
        x = blocks.run(engine.model.decoder.layers[0], blocks.embed(ids))
        layer = blocks.copy_of(1, own_norms=False)
        weights = torch.linspace(0.3, 2.1, x.shape[1])
        partials, maps = blocks.partials(layer, x), blocks.linear_maps(layer, x, weights)
        output_bias, up_bias = layer.self_attention.linear_proj.bias, layer.mlp.linear_fc1.bias
        output_bias = 0.0 if output_bias is None else output_bias
        return {
            "normed": [layer.pre_mlp_layernorm(x + y + output_bias) for y in (sum(partials), *partials)],
            "up": layer.mlp.linear_fc1.weight.clone(),
            "up_bias": 0.0 if up_bias is None else up_bias.clone(),
            "down": layer.mlp.linear_fc2.weight.clone(),
            "output": blocks.run(layer, x),
            "weights": weights,
            "maps": maps,
            "errors": blocks.neuron_errors(layer, x, weights, maps),
        }


def measure_divergence(rank: Rank, folder: Path) -> dict[str, Tensor]:
    """Return two random hidden states' logits, the divergence between their predictions, and its gradient."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.model import logits
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.spd.likelihood import kl_divergence, log_prob_shard

    shape = shape_of(folder)
    draw = torch.Generator().manual_seed(37)
    student, teacher = (torch.randn(13, 1, shape.hidden, generator=draw).requires_grad_() for _ in range(2))
    weights = torch.rand(13, 1, generator=draw)
    with open_runtime(rank, Mesh(tp=rank.world_size), timeout_minutes=2) as runtime:
        model = load_engine(runtime, ModelSource("test", str(folder)), shape, folder, "reference").model
        model.requires_grad_(False)
        shard = log_prob_shard(model, teacher, runtime.tp, shape.vocab_size)
        rows = kl_divergence(model, student, shard, runtime.tp, shape.vocab_size)
        (rows * weights).sum().backward()
        both = [logits(model, x.detach(), runtime.tp, shape.vocab_size) for x in (student, teacher)]
        return {
            "student": both[0], "teacher": both[1], "rows": rows.detach(), "gradient": student.grad, "weights": weights
        }  # fmt: skip


def train_jointly(rank: Rank, folder: Path, mesh: Mesh, at_once: bool, place: Path) -> dict[str, Any]:
    """Train all blocks jointly for 5 steps, with a save and a resume after step 2 unless ``at_once``."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.spd.blocks import Blocks
    from longctx.megatron.spd.joint import JointDistillation

    shape, settings = shape_of(folder), JointRepair(steps=5, batch=4, lr=1e-3, save_every=2)
    tokens = torch.randint(shape.vocab_size, (4, 17), generator=torch.Generator().manual_seed(41))
    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        plan = SPDPlan(shape.layers, mesh.tp)
        engine = load_engine(runtime, ModelSource("test", str(folder)), shape, folder, "reference", plan)
        blocks = Blocks(engine.model, shape, engine.kernel, engine.tp)

        def begin() -> JointDistillation:
            layers = {block: blocks.copy_of(block, own_norms=False) for block in range(shape.layers)}
            return JointDistillation(blocks, layers, range(shape.layers), settings, runtime.groups.dp)

        joint = begin()
        before = joint.divergence(tokens)
        local_tokens = tokens[runtime.groups.dp.rank() :: mesh.dp]
        while joint.steps < settings.steps:
            joint.step(local_tokens)
            if joint.steps == 1:
                gradients = {f"{block} {name}": weight.grad.clone() for block, layer in joint.layers.items()
                             for name, weight in layer.named_parameters() if weight.grad is not None}  # fmt: skip
            if joint.steps == 2 and not at_once:
                joint.save(place, {"note": 43})
                joint = begin()
                joint.resume(place)
        tensors = {
            name: tensor
            for block in range(shape.layers)
            for name, tensor in blocks.tensors_of(joint.layers[block]).items()
        }
        return {
            "losses": joint.losses,
            "tensors": tensors,
            "gradients": gradients,
            "before": before,
            "after": joint.divergence(tokens),
            "alone": joint.divergences_alone(tokens, lambda: None),
            "only": {
                block: JointDistillation(blocks, joint.layers, (block,), settings, runtime.groups.dp).divergence(tokens)
                for block in joint.layers
            },
        }


def measure_guards_on_rank(rank: Rank, folder: Path) -> tuple[Any, Tensor]:
    """Return the guards' figures of a model that drops nothing, and the repeated tokens."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import open_runtime
    from longctx.megatron.spd.blocks import Blocks
    from longctx.megatron.spd.guards import measure_guards, repeated_tokens
    from longctx.spd.text import PackedText

    shape, tp = shape_of(folder), rank.world_size
    draw = torch.Generator().manual_seed(31)
    ids = torch.randint(shape.vocab_size, (5, 24), generator=draw)
    text = PackedText(ids[:, :-1], ids[:, 1:], torch.rand(5, 23, generator=draw) < 0.8)
    with open_runtime(rank, Mesh(tp=tp), timeout_minutes=2) as runtime:
        plan = SPDPlan(shape.layers, tp)
        engine = load_engine(runtime, ModelSource("test", str(folder)), shape, folder, "reference", plan)
        blocks = Blocks(engine.model, shape, engine.kernel, engine.tp)
        return measure_guards(blocks, engine.model.decoder.layers, text), repeated_tokens(text.tokens)
