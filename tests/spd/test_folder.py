"""An adapted folder holds the source's unchanged weights and the weights for dropped blocks, for every family."""

from pathlib import Path

import pytest
import torch

from longctx.hf.config import shape_of
from longctx.hf.tensors import refuse_other_tensors
from longctx.megatron.hf_io.load import Weights
from longctx.models.tensors import tensor_shapes
from longctx.spd.folder import assemble, write_block
from longctx.spd.plan import SavedPlan, SPDPlan
from tests.megatron.kinds import random_model

BLOCK = 1


@pytest.mark.parametrize("own_norms", [False, True])
@pytest.mark.parametrize("kind", ["phi3", "qwen3", "llama with all biases"])
def test_nothing_dropped_reads_the_source_and_a_dropped_block_its_own_weights(
    tmp_path: Path, kind: str, own_norms: bool
) -> None:
    source, adapted = random_model(kind, tmp_path / "source"), tmp_path / "adapted"
    shape, adapted_tensors = shape_of(source), {}
    for name in tensor_shapes(shape):
        if name.startswith(f"model.layers.{BLOCK}."):
            tensor = Weights(source)(name) + 1
            copies = 2 if own_norms and name.endswith("layernorm.weight") else 1
            adapted_tensors[name] = torch.cat([tensor] * copies)
    write_block(tmp_path / "blocks" / "001.safetensors", adapted_tensors, {})
    adapted.mkdir()
    saved = SavedPlan(SPDPlan(shape.layers, 2, (BLOCK,), own_norms), (BLOCK, 0), (BLOCK,), "fingerprint")
    template = Path("additional_chat_templates", "tool_use.jinja")
    (source / template).parent.mkdir()
    earlier = [source / "tekken.json", source / template.with_name("rag.jinja")]
    for file in earlier:
        file.write_text("{}")
    for text in ("first", "second"):  # the second model replaces the first
        (source / template).write_text(text)
        assemble(source, [tmp_path / "blocks" / "001.safetensors"], saved, adapted)
        assert (adapted / template).read_text() == text
        assert [(adapted / file.relative_to(source)).exists() for file in earlier] == [text == "first"] * 2
        for file in earlier:
            file.unlink(missing_ok=True)

    refuse_other_tensors(adapted, shape, norm_copies=2 if own_norms else 1)
    for dropped in ((), (BLOCK,)):
        original, weights = Weights(source), Weights(adapted, dropped)
        for name in tensor_shapes(shape):
            expected = adapted_tensors[name] if dropped and name in adapted_tensors else original(name)
            assert torch.equal(weights(name), expected), name
        weights.refuse_unread(shape.tied)
