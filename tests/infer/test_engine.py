"""A model is loaded with the layers that were asked for, or refused."""

import pytest

from longctx.config import ModelSource, Reduce
from longctx.hf.config import shape_of
from longctx.infer.engine import load_engine
from longctx.spd.plan import SPDPlan
from tests.infer.thread_ranks import single_rank
from tests.tiny import tiny_model


@pytest.mark.parametrize("options", [{"reduce": Reduce("int8", "int8")}, {"plan": SPDPlan(2, 3)}])
def test_transformer_engine_is_not_replaced_silently(tmp_path, options):
    folder = tiny_model(tmp_path / "tiny", max_positions=97)
    model = ModelSource("test", str(folder), layers="te")
    with (
        single_rank(tmp_path) as runtime,
        pytest.raises(ValueError, match=r"model\.layers=te .*use model\.layers=local"),
    ):
        load_engine(runtime, model, shape_of(folder), folder, "auto", **options)
