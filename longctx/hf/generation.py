"""Read the settings of generation: the tokens that end an answer, and the settings that are not applied here.

As in transformers, they are those of generation_config.json, or those of config.json if there is no such file.
"""

import json
from pathlib import Path
from typing import Any

# Settings that change transformers' text, with the values that change nothing. transformers applies the first group in
# greedy decoding, and both groups in sampling.  Our settings of `sampling` replace do_sample, temperature and top_p.
_GREEDY = {
    "repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": (), "min_length": (0,), "min_new_tokens": (0,),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": (), "guidance_scale": (1.0,),
    "watermarking_config": (), "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,), "dola_layers": (), "constraints": (), "force_words_ids": (), "token_healing": (False,),
    "stop_strings": (), "max_time": (),
}  # fmt: skip
_SAMPLED = {
    "top_k": (0,), "min_p": (0.0,), "top_h": (), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
}  # fmt: skip


def unapplied_settings(folder: Path, *, sampled: bool) -> dict[str, object]:
    """Return, by name, the settings in `generation_file` that change transformers' text but not ours.

    With ``sampled``, settings of random sampling are included.  Raises ValueError if the file cannot be read.
    """
    config = _read(folder)
    neutral = _GREEDY | (_SAMPLED if sampled else {})
    values = {name: getattr(config, name, None) for name in neutral}
    return {name: value for name, value in values.items() if value is not None and value not in neutral[name]}


def generation_file(folder: Path) -> Path:
    """Return the file of ``folder`` with the settings of generation: generation_config.json, or else config.json."""
    file = folder / "generation_config.json"
    return file if file.is_file() else folder / "config.json"


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end an answer: eos_token_id in `generation_file`, without a default.

    Raises ValueError if the file cannot be read, and for an eos_token_id that is not a number or a list of numbers.
    """
    ends = _read(folder).eos_token_id
    tokens = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
        raise ValueError(
            f"{generation_file(folder)}: eos_token_id={ends} is not a token id or a list of token ids: correct it"
        )
    return tuple(tokens)


def unread_end_tokens(folder: Path) -> object:
    """Return eos_token_id of config.json if generation_config.json has none and hides it, else None."""
    if generation_file(folder).name == "config.json" or end_tokens(folder):
        return None
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")


def _read(folder: Path) -> Any:
    """Return the settings in `generation_file` as transformers reads them.  Raises ValueError if they are damaged."""
    from transformers import GenerationConfig

    file = generation_file(folder)
    try:
        return GenerationConfig.from_pretrained(
            folder, config_file_name=file.name, _from_model_config=file.name == "config.json"
        )
    except Exception as error:  # a damaged file may raise any class of error, such as TypeError
        what = "its settings of generation" if file.name == "config.json" else "the file"
        raise ValueError(f"{file} cannot be read: {error}; correct or remove {what}") from error
