"""What the ranks of test_repair.py run."""

from pathlib import Path
from typing import Any

import torch

from longctx.parallel.launch import Rank
from longctx.pretrained import shape_of
from longctx.schema import Mesh, ModelSource, Repair
from longctx.spd.plan import SPDPlan


def states(rank: Rank, folder: Path, how: Repair | None, grouping: str, dropped: tuple[int, ...]) -> dict[str, Any]:
    """Of a model on the ranks: losses, and block 1's output, as it is, grouped (with the reduction), and repaired."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.blocks import Blocks
    from longctx.megatron.repair import group, repair
    from longctx.megatron.runtime import runtime
    from longctx.spd.text import Text

    shape, tp = shape_of(folder), rank.world
    draw = torch.Generator().manual_seed(31)
    ids = torch.randint(shape.vocabulary, (7, 20), generator=draw)
    text = Text(ids[:, :-1], ids[:, 1:], torch.rand(7, 19, generator=draw) < 0.8)
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
            group(blocks, layer, entering, grouping)
            layer.drop(dropped=False)
            out["grouped"] = blocks.run(layer, entering)
            after = blocks.tensors_of(layer)
            out["moved"] = sum(not torch.equal(before[name], after[name]) for name in before)
        if how:
            with torch.no_grad():
                more = torch.randint(shape.vocabulary, (how.sequences + how.held_out, how.length), generator=draw)
                inputs = blocks.run(layers[0], blocks.embedded(more))
                outputs = blocks.run(layers[1], inputs)
            made = repair(blocks, 1, "ESB", inputs, outputs, how)
            out["errors"] = [made.zero_shot, made.grouped, made.distilled]
            out["norms"] = made.layer.pre_mlp_layernorm.weight.detach().clone()
    return out
