"""Requests are made as lm-eval's own model makes them, whatever the tokenizer puts before a text."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from eval.answers.generate import _answer, _ended
from eval.answers.requests import Continue
from eval.harness.lm import EngineLM, recorder
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["begins texts", "does not"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    if request.param:
        of = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.bos_token_id)])
        made.backend_tokenizer.post_processor = of
    return made


@pytest.mark.parametrize("text", ["a boat", "<s>a boat", " boat"])
def test_texts_begin_as_lm_evals_own_do(tokenizer: Any, text: str) -> None:
    from lm_eval.models.huggingface import HFLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer)))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, prefix_token_id=tokenizer.bos_token_id)
    ours = EngineLM(tokenizer, 64, tokenizer.bos_token_id, recorder([]))
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours._encoded("A man and", text) == theirs._encode_pair("A man and", text)
    assert ours._encoded(" ", "x")[0] == [tokenizer.bos_token_id]
    assert ours._encoded("", text) == ([tokenizer.bos_token_id], [i for i in ours.tok_encode(text) if i < 256])


@pytest.mark.parametrize("answer", ["", "x" * 30])
def test_an_answer_that_cannot_be_scored_whole_is_refused_by_name(tokenizer: Any, answer: str) -> None:
    lm = EngineLM(tokenizer, 16, tokenizer.bos_token_id, recorder([]))
    request: Any = SimpleNamespace(args=("A man", answer), task_name="boats", doc_id=7)
    with pytest.raises(ValueError, match=r"boats 7 has an answer of (0|30|31) tokens.*eval.max_length=16"):
        lm.loglikelihood([request])


def test_texts_that_are_cut_are_counted(tokenizer: Any) -> None:
    asked: list[Any] = []
    lm = EngineLM(tokenizer, 16, tokenizer.bos_token_id, recorder(asked))
    requests: Any = [SimpleNamespace(args=("x" * n, " boat"), task_name="boats", doc_id=n) for n in (5, 40)]
    lm.loglikelihood(requests)
    assert lm.cut == 1 and [len(one.tokens) for one in asked][1] == 17


def test_a_special_token_ends_a_text_where_the_task_says_so(tokenizer: Any) -> None:
    made = [*tokenizer("a boat", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    engine: Any = SimpleNamespace(shape=SimpleNamespace(end_tokens=()))
    request = Continue((1,), ("</s>",), 99)
    assert not _ended(engine, tokenizer, request, made[:-1]) and _ended(engine, tokenizer, request, made)
    assert _answer(engine, tokenizer, request, made) == "a boat"
