"""A family of models: how the config.json and the tensors of one model type map to this project's decoder.

The canonical names of tensors are Llama's; `megatron.hf_io.names` maps them to megatron-core's parameters.  A family
says which tensors have other names in its files, and which are parts of one larger tensor.

| canonical module                   | content                                                     |
|------------------------------------|-------------------------------------------------------------|
| self_attn.{q,k,v,o}_proj           | projections of attention                                    |
| self_attn.{q,k}_norm               | norms of queries and keys                                   |
| self_attn (tensor sinks)           | score of each head's attention sink                         |
| mlp.{gate,up,down}_proj            | feed-forward network; without gate_proj if it is not gated  |
| mlp.router                         | projection to a score for each expert                       |
| mlp.experts.I.{gate,up,down}_proj  | expert I of a mixture, counted from 0                       |
| input_layernorm                    | norm before attention                                       |
| post_attention_layernorm           | norm before the feed-forward network                        |
| attention_output_layernorm         | norm of attention's output                                  |
| mlp_output_layernorm               | norm of the feed-forward network's output                   |
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from longctx.model_shape import Experts, ModelShape, Rotary

Config = Any  # a transformers configuration
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    * ``examples`` names published models.
    * ``options(config)`` returns the fields of `ModelShape` in which the model differs from Llama.
    * ``names`` maps canonical modules of a layer to the modules of the family's files, if these differ.  In both names,
      ``I`` stands for the number of an expert.
    * ``fused`` maps modules of the files to the canonical modules whose rows they concatenate.
    * ``stacked`` maps tensors of the files to canonical tensors of expert ``I``.  The file's tensor stacks these
      tensors of all experts, transposed and with alternating columns (see `megatron.hf_io.stored.join`).
    * ``undeclared``: accepted keys of config.json that transformers' configuration class does not declare.  Either
      transformers' code reads them, or they have no effect in published models.
    * ``partial_rotary``: the rotary embedding may have a partial_rotary_factor.
    * ``rotary_by_layer_type``: each type of layer has a separate rotary embedding.
    * ``longrope_only``: transformers' class accepts no other scaling of the rotary embedding than LongRoPE.
    * ``typical`` has settings of published models that switch on a feature which transformers' defaults leave off.
    """

    model_type: str
    examples: str
    options: Callable[[Config], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    undeclared: tuple[str, ...] = ()
    partial_rotary: bool = False
    rotary_by_layer_type: bool = False
    longrope_only: bool = False
    typical: Mapping[str, Any] = field(default_factory=dict)

    def shape(self, config: Config, end_tokens: tuple[int, ...]) -> ModelShape:
        """Return the shape that ``config`` describes.  Raises ValueError for a feature that is not implemented."""
        llama = {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": head_dim_of(config),
            "ffn": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "max_positions": config.max_position_embeddings,
            "norm_eps": getattr(config, "rms_norm_eps", None),
            "tied": config.tie_word_embeddings,
            "qkv_bias": False,
            "end_tokens": end_tokens,
            "init_std": config.initializer_range,
        }
        fields = llama | self.options(config)
        if "rotaries" not in fields:
            fields["rotaries"] = (rotary_of(config),) * config.num_hidden_layers
        return ModelShape(**fields)

    def stored(self, name: str) -> str:
        """Return the name, in the family's files, of the tensor that holds the canonical tensor ``name``."""
        prefix, module, kind = split_name(name)
        pattern, expert = _EXPERT.sub(".experts.I.", module), _EXPERT.search(module)
        for whole, modules in self.fused.items():
            if module in modules:
                return f"{prefix}{whole}.{kind}"
        for whole, tensors in self.stacked.items():
            if f"{pattern}.{kind}" in tensors:
                return f"{prefix}{whole}"
        stored = self.names.get(pattern, pattern)
        return f"{prefix}{stored.replace('.I.', f'.{expert[1]}.') if expert else stored}.{kind}"

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Group the canonical ``names`` by the tensor of the family's files that contains them, in the same order."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.stored(name), []).append(name)
        return groups

    def interleaved(self, stored: str) -> int:
        """Return how many tensors per expert the file's tensor ``stored`` holds; 0 if it is not a stack of experts."""
        _, module, kind = split_name(stored)
        return len(self.stacked.get(f"{module}.{kind}", ()))


def split_name(name: str) -> tuple[str, str, str]:
    """Split the tensor name ``name`` into the prefix of its layer, the module in it, and the last field.

    Example: ``model.layers.3.mlp.up_proj.weight`` gives ``("model.layers.3.", "mlp.up_proj", "weight")``.  Outside a
    layer, the prefix is empty.
    """
    path, _, kind = name.rpartition(".")
    fields = path.split(".")
    in_layer = fields[:2] == ["model", "layers"]
    prefix = "".join(f"{part}." for part in fields[:3]) if in_layer else ""
    return prefix, path.removeprefix(prefix), kind


def head_dim_of(config: Config) -> int:
    """Return the number of channels of an attention head: head_dim, or hidden_size / num_attention_heads without it."""
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def rotary_of(config: Config, kind: str | None = None, *, interleaved: bool = False) -> Rotary:
    """Return the rotary embedding of ``config``, or of its layers of type ``kind`` if each type has a separate one.

    Frequencies are transformers' own, in float32.  `hf.keys` refuses types that change with the length of the text.
    Raises ValueError for settings from which transformers cannot compute frequencies.
    """
    rope = config.rope_parameters if kind is None else config.rope_parameters[kind]
    channels = _rotated(config, rope)
    if rope["rope_type"] == "longrope":
        _refuse_other_lists(rope, len(range(0, channels, 2)))
    try:
        frequencies, scale = _frequencies(config, rope, channels, kind)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"rope_type={rope['rope_type']} with these settings gives no rotary embedding ({error}): correct "
            "rope_parameters in config.json"
        ) from error
    return Rotary(frequencies, scale, interleaved)


def _rotated(config: Config, rope: Mapping[str, Any]) -> int:
    """Return the number of channels of each head that the rotary embedding ``rope`` rotates.

    Raises ValueError for a partial_rotary_factor that is not above 0 and at most 1.
    """
    share = rope.get("partial_rotary_factor", 1.0)
    if not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor={share} is not above 0 and at most 1: correct config.json")
    return int(head_dim_of(config) * share)


def _refuse_other_lists(rope: Mapping[str, Any], size: int) -> None:
    """Raise ValueError unless both lists of the LongRoPE embedding ``rope`` have ``size`` positive numbers."""
    for name in ("short_factor", "long_factor"):
        values = rope.get(name)
        if not isinstance(values, list) or len(values) != size:
            given = f"a list of {len(values)}" if isinstance(values, list) else repr(values)
            raise ValueError(
                f"{name} of rope_type=longrope must be a list of {size} numbers, one for each pair of rotated "
                f"channels, and is {given}: correct config.json"
            )
        if not all(type(value) in (int, float) and 0 < value < math.inf for value in values):
            raise ValueError(
                f"{name} of rope_type=longrope has a value that is not a positive number: correct config.json"
            )


def _frequencies(
    config: Config, rope: Mapping[str, Any], channels: int, kind: str | None
) -> tuple[tuple[float, ...], float]:
    """Return the frequencies of ``rope``, which rotates ``channels`` channels, and the scale of its sines."""
    import torch

    if (rope_type := rope["rope_type"]) == "default":
        exponents = torch.arange(0, channels, 2, dtype=torch.float) / channels
        return tuple((1.0 / (rope["rope_theta"] ** exponents)).tolist()), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # longrope has two sets of frequencies.  The longer one is for models whose context exceeds the original one.
    lengths = {"seq_len": config.max_position_embeddings} if rope_type == "longrope" else {}
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](config, None, layer_type=kind, **lengths)
    return tuple(frequencies.tolist()), float(scale)


def by_layer_type(config: Config, of_kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Return a tuple with ``of_kind(kind)`` for each layer, where ``kind`` is the layer's type in ``config``.

    Raises ValueError for a type that is not implemented.
    """
    if unknown := set(config.layer_types) - {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"layer_types has {min(unknown)}, which is not implemented: "
            "use a model whose layers are sliding_attention or full_attention"
        )
    values = {kind: of_kind(kind) for kind in set(config.layer_types)}
    return tuple(values[kind] for kind in config.layer_types)


def windows_of(config: Config) -> tuple[int | None, ...]:
    """Return the attention window of each layer, by its type in ``config``; None for a layer without a window."""
    return by_layer_type(config, lambda kind: config.sliding_window if kind == "sliding_attention" else None)


def experts_of(config: Config, ffn: int, *, renormalised: bool = True) -> Experts:
    """Return the experts of ``config``, each of size ``ffn``.

    Raises ValueError for an impossible number of chosen experts, for one chosen expert with renormalised weights, and
    for a router loss whose coefficient is negative or infinite.
    """
    count, chosen = config.num_local_experts, config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise ValueError(f"num_experts_per_tok={chosen} is not possible with {count} experts: correct config.json")
    if chosen == 1 and renormalised:
        raise ValueError(
            "num_experts_per_tok=1 with renormalised weights gives every chosen expert the weight 1, which is not "
            "implemented: use another model"
        )
    router_loss = config.router_aux_loss_coef if config.output_router_logits else 0.0
    if not 0 <= router_loss < math.inf:
        raise ValueError(f"router_aux_loss_coef={router_loss} is not a number of 0 or more: correct config.json")
    return Experts(count, chosen, ffn, renormalised, router_loss)


def refuse(config: Config, **fields: Any) -> None:
    """Raise ValueError if a field of ``config`` differs from its value in ``fields``, the only implemented one.

    A field that ``config`` lacks is accepted; a null counts as False, as in transformers.
    """
    for name, implemented in fields.items():
        value = getattr(config, name, implemented)
        if value != implemented and not (value is None and implemented is False):
            raise ValueError(
                f"this model has {name}={value}, which is not implemented: use a model with {name}={implemented}"
            )
