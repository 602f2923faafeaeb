"""Loading and saving Hugging Face folders: round trips are byte-equal, and folders that do not fit are refused."""

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from longctx.config import Mesh
from longctx.hf.config import shape_of, tokenizer_of
from longctx.megatron.hf_io.init import RandomInit
from longctx.megatron.hf_io.load import Weights, fill
from longctx.megatron.hf_io.names import TensorView, fused_views
from longctx.model_shape import ModelShape
from longctx.parallel.launch import RankFailed, run_ranks
from tests.megatron.kinds import KINDS, random_model
from tests.megatron.ranks import load_and_save


def weights_of(folder: Path, *names: str, dtype: torch.dtype = torch.float32) -> Weights:
    """Return the `Weights` of a Llama whose files have tensors of three numbers under ``names``."""
    LlamaConfig().save_pretrained(folder)
    save_file({name: torch.ones(3).to(dtype) for name in names}, folder / "model.safetensors")
    return Weights(folder)


def test_missing_tensor_is_named_in_the_error(tmp_path):
    weights = weights_of(tmp_path, "model.norm.weight")
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight"):
        weights("lm_head.weight")


def test_random_init_has_the_models_init_std(tmp_path):
    LlamaConfig(hidden_size=60, num_attention_heads=6, num_hidden_layers=8, initializer_range=0.07).save_pretrained(
        tmp_path
    )
    init = RandomInit(shape_of(tmp_path), seed=3)
    assert init("model.layers.0.mlp.gate_proj.weight").std().item() == pytest.approx(0.07, rel=0.02)
    assert init("model.layers.0.mlp.down_proj.weight").std().item() == pytest.approx(0.07 / 4, rel=0.02)


def test_quantised_tensor_is_refused(tmp_path):
    weights = weights_of(tmp_path, "w.weight", dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"w.weight is torch\.float8_e4m3fn: use an unquantised checkpoint"):
        weights("w.weight")


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (torch.nan, torch.bfloat16, "model.norm.weight has values that are NaN or infinite"),
        (-torch.inf, torch.float32, "model.norm.weight has values that are NaN or infinite"),
        (1e5, torch.float16, r"model.norm.weight has values beyond the range of torch.float16: use model.dtype="),
    ],
)
@pytest.mark.parametrize("tp_rank", [0, 2])
def test_weights_that_are_not_finite_are_refused(value, dtype, words, tp_rank):
    """By the rank whose shard has the value: 7 rows over 3 ranks, the last two rows are padding."""
    tensor = torch.zeros(7, 5)
    tensor[2 + 4 * (tp_rank > 0), 3] = value
    view = TensorView("model.norm.weight", torch.empty(1, 3, 5, dtype=dtype), 0, (7, 5))
    with pytest.raises(ValueError, match=words):
        fill([view], lambda _: tensor, tp_rank)
    fill([view], lambda _: tensor, 1)
    fill([view], lambda _: torch.full((7, 5), 6e4), tp_rank)


def test_unread_tensors_are_refused(tmp_path):
    names = ["read.weight", "model.layers.0.self_attn.q_norm.weight", "model.rotary_emb.inv_freq", "lm_head.weight"]
    weights = weights_of(tmp_path, *names)
    weights("read.weight")
    with pytest.raises(ValueError, match=r"no part of the model takes: \['model.layers.0.self_attn.q_norm.weight'\]"):
        weights.refuse_unread(tied=True)
    with pytest.raises(ValueError, match="lm_head"):
        weights.refuse_unread(tied=False)


def test_tensor_read_by_another_stage_is_accepted(tmp_path):
    weights = weights_of(tmp_path, "here.weight", "there.weight")
    weights("here.weight")
    weights.refuse_unread(tied=False, elsewhere={"there.weight"})
    with pytest.raises(ValueError, match="there"):
        weights.refuse_unread(tied=False, elsewhere={"here.weight"})


@pytest.mark.parametrize("tp", [1, 3])
def test_fused_qkv_alternates_by_kv_group(tp):
    """3 KV groups of 2 query heads with head_dim 5: per group 10 rows of queries, 5 of the key, 5 of the value."""
    shape = ModelShape(1, 30, 6, 3, 5, 7, 11, 13, 1e-5, True, True, ())
    fused = torch.arange(3 // tp * 4 * 5 * 30.0).view(-1, 30)
    q, k, v = (view.flatten(0, 1) for view in fused_views(fused, 3, shape, tp))
    for group in range(3 // tp):
        first = 20 * group
        assert torch.equal(q[10 * group : 10 * group + 10], fused[first : first + 10])
        assert torch.equal(k[5 * group : 5 * group + 5], fused[first + 10 : first + 15])
        assert torch.equal(v[5 * group : 5 * group + 5], fused[first + 15 : first + 20])


SIZES = {"num_hidden_layers": 4, "num_key_value_heads": 3, "intermediate_size": 87, "vocab_size": 211}
TOKENIZER = {"tokenizer.json": "{}", "generation_config.json": '{"eos_token_id": 7}', "merges.txt": "a b"}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the folder's files by name; no tensor is in two files."""
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    tensors = {name: x for file in files for name, x in file.items()}
    assert len(tensors) == sum(map(len, files))
    return tensors


def assert_same_model(saved: Path, source: Path) -> None:
    """Assert byte-equal tensors and equal configurations, and that transformers loads every tensor of ``saved``."""
    ours, theirs = read_tensors(saved), read_tensors(source)
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and ours[name].shape == x.shape, name
        assert torch.equal(ours[name].view(torch.uint8), x.view(torch.uint8)), name
    assert json.loads((saved / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    model, loading_info = AutoModelForCausalLM.from_pretrained(saved, dtype="auto", output_loading_info=True)
    assert not any(loading_info.values()), loading_info
    assert model.dtype == next(iter(theirs.values())).dtype


@pytest.fixture(scope="module")
def every_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], list[Path]]:
    """``every_model(kv_heads, mlp_rows)``: folders of every kind of model in two dtypes, made once; only read them."""

    @cache
    def make(kv_heads: int, mlp_rows: int) -> list[Path]:
        parent, folders = tmp_path_factory.mktemp("models"), []
        sizes = SIZES | {"num_key_value_heads": kv_heads, "intermediate_size": mlp_rows}
        for kind, dtype in itertools.product(KINDS, ("float32", "bfloat16")):
            folders.append(random_model(kind, parent / f"{kind} {dtype}", getattr(torch, dtype), **sizes))
            for name, text in TOKENIZER.items():
                (folders[-1] / name).write_text(text)
        return folders

    return make


@pytest.mark.parametrize(
    ("mesh", "kv_heads"),
    [(Mesh(), 2), (Mesh(tp=2), 2), (Mesh(tp=3), 3), (Mesh(pp=2), 2), (Mesh(tp=3, pp=2), 3), (Mesh(dp=2, ring=2), 2)],
    ids=str,
)
def test_saved_folder_equals_loaded_folder(every_model, tmp_path, mesh, kv_heads):
    """Every kind of model in two dtypes, with a vocabulary that neither tp=2 nor tp=3 divides."""
    sources = every_model(kv_heads, 87 if mesh.tp == 3 else 86)
    folders = [(source, tmp_path / "saved" / source.name, source.name.rpartition(" ")[2]) for source in sources]
    run_ranks(mesh.ranks, load_and_save, mesh, folders)
    for source, saved, _ in folders:
        assert_same_model(saved, source)
        assert {name: (saved / name).read_text() for name in TOKENIZER} == TOKENIZER
        files = list(saved.glob("model-*-of-*.safetensors"))
        assert len(files) > 2
        assert all(file.stat().st_size < 80_000 or len(load_file(file)) == 1 for file in files)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {source.name for source, _, _ in folders}


def test_smollm2_round_trip_in_one_file(tmp_path, smollm2):
    source, saved = smollm2[1], tmp_path / "saved"
    run_ranks(3, load_and_save, Mesh(tp=3), [(source, saved, "float32")], None, None, "5GB")
    assert {file.name for file in saved.iterdir()} == {file.name for file in source.iterdir()}
    assert_same_model(saved, source)
    ours, theirs = tokenizer_of(saved), tokenizer_of(source)
    assert ours("Größe, 3.14\n").input_ids == theirs("Größe, 3.14\n").input_ids
    assert ours.chat_template == theirs.chat_template
    (saved / "model.safetensors").unlink()  # pytest would keep half a gigabyte


LONGER = {"max_position_embeddings": 4099, "rope_parameters": {"rope_type": "default", "rope_theta": 3e6}}


@pytest.fixture
def old_llama(tmp_path):
    """A folder whose config.json has the fields of older transformers: top-level rope_theta and torch_dtype."""
    source = random_model("tied llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    old = config | {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float16", "_name_or_path": "kept"}
    (source / "config.json").write_text(json.dumps(old))
    return source


def test_longer_context_is_saved_in_config(tmp_path, old_llama):
    trained = tmp_path / "trained"
    AutoConfig.from_pretrained(old_llama, **LONGER).save_pretrained(trained)
    shape, saved = shape_of(trained), tmp_path / "saved"
    run_ranks(1, load_and_save, Mesh(), [(old_llama, saved, "bfloat16")], shape, LONGER)
    config = json.loads((saved / "config.json").read_text())
    assert (config["dtype"], config["_name_or_path"]) == ("bfloat16", "kept") and "torch_dtype" not in config
    model = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    assert (model.dtype, model.config.max_position_embeddings) == (torch.bfloat16, 4099)
    assert model.config.rope_parameters["rope_theta"] == 3e6
    assert shape_of(saved) == shape != shape_of(old_llama)


@pytest.mark.parametrize("changed", [{"max_position_embeddings": 4099}, {"max_position_embedding": 4099}])
def test_config_that_does_not_match_the_model_is_not_saved(tmp_path, old_llama, changed):
    """A changed field that is left out or misspelt would describe another model, which would run and be wrong."""
    trained = tmp_path / "trained"
    AutoConfig.from_pretrained(old_llama, **LONGER).save_pretrained(trained)
    arguments = ([(old_llama, tmp_path / "saved", "float32")], shape_of(trained), changed)
    with pytest.raises(
        RankFailed,
        match=r"does not describe the model to be saved: rotaries differ|max_position_embedding=4099 is",
    ):
        run_ranks(1, load_and_save, Mesh(), *arguments)
    assert not (tmp_path / "saved").exists()


def test_existing_folder_is_not_overwritten(tmp_path, old_llama):
    before = {file.name: file.read_bytes() for file in old_llama.iterdir()}
    with pytest.raises(RankFailed, match="already exists; choose another folder"):
        run_ranks(1, load_and_save, Mesh(), [(old_llama, old_llama, "float32")])
    assert {file.name: file.read_bytes() for file in old_llama.iterdir()} == before


def test_tensor_that_no_stage_reads_is_refused(tmp_path, old_llama):
    save_file({"model.layers.2.mlp.up_proj.weight": torch.ones(3)}, old_llama / "model-more.safetensors")
    index = json.loads((old_llama / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.2.mlp.up_proj.weight"] = "model-more.safetensors"
    (old_llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RankFailed, match=r"no part of the model takes: \['model.layers.2.mlp.up_proj.weight'\]"):
        run_ranks(2, load_and_save, Mesh(pp=2), [(old_llama, tmp_path / "saved", "float32")])
