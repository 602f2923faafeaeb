"""Read generation_config.json: the tokens that end an answer, and the settings that are not applied here."""

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
    """Return, by name, the settings of generation_config.json that change transformers' text but not ours.

    With ``sampled``, settings of random sampling are included.  Without that file the result is empty.
    """
    config = _read(folder)
    neutral = _GREEDY | (_SAMPLED if sampled else {})
    values = {name: getattr(config, name, None) for name in neutral} if config else {}
    return {name: value for name, value in values.items() if value is not None and value not in neutral[name]}


def end_tokens(folder: Path, config: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer; as in transformers, generation_config.json overrides ``config``.

    Raises ValueError if the file cannot be read, and for an eos_token_id that is not a number or a list of numbers.
    """
    generation, ends, file = _read(folder), config.eos_token_id, "config.json"
    if generation and generation.eos_token_id is not None:
        ends, file = generation.eos_token_id, "generation_config.json"
    tokens = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
        raise ValueError(f"{folder}/{file}: eos_token_id={ends} is not a token id or a list of token ids: correct it")
    return tuple(tokens)


def _read(folder: Path) -> Any:
    """Return generation_config.json as transformers reads it, None without one.  Raises ValueError if it is damaged."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a damaged file may raise any class of error, such as TypeError
        raise ValueError(f"{folder}/generation_config.json cannot be read: {error}; correct or remove it") from error
