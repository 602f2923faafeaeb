"""Requests equal those of lm-eval's own model, with tokenizers that add a first token and those that do not."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from eval.answers.generate import decode_answer, has_ended
from eval.answers.requests import Continue
from eval.harness.lm import EngineLM, make_recorder
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["adds a first token", "adds none"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    if request.param:
        template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.bos_token_id)])
        made.backend_tokenizer.post_processor = template
    return made


@pytest.mark.parametrize("text", ["a boat", "<s>a boat", " boat"])
def test_tokens_equal_those_of_lm_evals_own_model(tokenizer: Any, text: str) -> None:
    from lm_eval.models.huggingface import HFLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer)))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, prefix_token_id=tokenizer.bos_token_id)
    ours = EngineLM(tokenizer, 64, tokenizer.bos_token_id, make_recorder([]))
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours._encode("A man and", text) == theirs._encode_pair("A man and", text)
    assert ours._encode(" ", "x")[0] == [tokenizer.bos_token_id]
    assert ours._encode("", text) == ([tokenizer.bos_token_id], [i for i in ours.tok_encode(text) if i < 256])


def test_rolling_windows_equal_those_of_lm_evals_own_model(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer that adds a first token, both score that token after the prefix."""
    from lm_eval.models.huggingface import HFLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer)))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, prefix_token_id=tokenizer.bos_token_id, max_length=7)
    windows: list[Any] = []

    def record(requests: Any, **_: object) -> list[tuple[float, bool]]:
        windows.extend(requests)
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(theirs, "_loglikelihood_tokens", record)
    theirs.loglikelihood_rolling([SimpleNamespace(args=("a boat floats",))], disable_tqdm=True)  # type: ignore[list-item]
    requests_made: list[Any] = []
    EngineLM(tokenizer, 7, tokenizer.bos_token_id, make_recorder(requests_made)).loglikelihood_rolling(
        [SimpleNamespace(args=("a boat floats",))]  # type: ignore[list-item]
    )
    assert [(list(one.tokens[: one.begin]), list(one.tokens[one.begin :])) for one in requests_made] == [
        (list(before), list(after)) for _, before, after in windows
    ]


@pytest.mark.parametrize("answer", ["", "x" * 30])
def test_answer_that_cannot_be_scored_whole_is_refused_by_name(tokenizer: Any, answer: str) -> None:
    lm = EngineLM(tokenizer, 16, tokenizer.bos_token_id, make_recorder([]))
    request: Any = SimpleNamespace(args=("A man", answer), task_name="boats", doc_id=7)
    words = r"boats 7 has an (empty answer: leave|answer of (30|31) tokens, and only 16 can be scored)"
    with pytest.raises(ValueError, match=words):
        lm.loglikelihood([request])


def test_cut_texts_are_counted(tokenizer: Any) -> None:
    requests_made: list[Any] = []
    lm = EngineLM(tokenizer, 16, tokenizer.bos_token_id, make_recorder(requests_made))
    requests: Any = [SimpleNamespace(args=("x" * n, " boat"), task_name="boats", doc_id=n) for n in (5, 40)]
    lm.loglikelihood(requests)
    assert lm.cut == 1 and [len(one.tokens) for one in requests_made][1] == 17


def test_special_token_of_until_ends_a_text(tokenizer: Any) -> None:
    tokens = [*tokenizer("a boat", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    engine: Any = SimpleNamespace(shape=SimpleNamespace(end_tokens=()))
    request = Continue((1,), ("</s>",), 99)
    assert not has_ended(engine, tokenizer, request, tokens[:-1]) and has_ended(engine, tokenizer, request, tokens)
    assert decode_answer(engine, tokenizer, request, tokens) == "a boat"
