"""Responses have the form that OpenAI's own client reads."""

import json
from dataclasses import replace

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from longctx.config import Sampling
from longctx.infer.sample import TokenLogprob
from longctx.serve.request import Ask
from longctx.serve.response import Choice, Form, error, model_list
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
A, B, HALF = (TOKENIZER("ab")["input_ids"]) + [TOKENIZER("ö")["input_ids"][0]]
LOGPROBS = [TokenLogprob(A, -0.5, ((A, -0.5), (B, -1.5))), TokenLogprob(HALF, -2.0, ((B, -1.0), (HALF, -2.0)))]


def form(**fields) -> Form:
    settings = {"sampling": Sampling(logprobs=2), "n": 2, **fields}
    return Form(Ask("tiny", ((1, 2, 3), (4,)), (5, 5), **settings), TOKENIZER)


def choices() -> list[Choice]:
    return [Choice("one", 2, LOGPROBS, (), "stop"), *(Choice("x" * i, i, [], (), "length") for i in range(3))]


def test_completion_has_logprobs_with_offsets():
    whole = form().whole(choices())
    read = Completion.model_validate(whole)
    assert [one.text for one in read.choices] == ["one", "", "x", "xx"]
    assert [one.finish_reason for one in read.choices] == ["stop", "length", "length", "length"]
    logprobs = read.choices[0].logprobs
    assert (logprobs.tokens, logprobs.token_logprobs) == (["a", "bytes:\\xc3"], [-0.5, -2.0])
    assert logprobs.top_logprobs == [{"a": -0.5, "b": -1.5}, {"b": -1.0, "bytes:\\xc3": -2.0}]
    assert logprobs.text_offset == [0, 1]
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.total_tokens) == (4, 5, 9)


def test_logprobs_of_a_completion_with_its_prompt_begin_with_the_prompt_s():
    prompt = (TokenLogprob(B, -3.0, ((A, -0.1),)), TokenLogprob(A, -4.0, ((B, -0.2),)))
    shape = form(echo=True, prompt_texts=("cba", "q"))
    shape = replace(shape, ask=replace(shape.ask, prompts=((A + 2, B, A), (4,))))
    answers = [Choice("one", 2, LOGPROBS, prompt, "stop"), *choices()[1:]]
    listed = shape.whole(answers)["choices"]  # as OpenAI's, with null for the first token, which its types do not allow
    logprobs = Completion.construct(choices=listed).choices[0].logprobs
    assert [one["text"] for one in listed] == ["cbaone", "cba", "qx", "qxx"]
    assert logprobs.tokens == ["c", "b", "a", "a", "bytes:\\xc3"] and logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.token_logprobs == [None, -3.0, -4.0, -0.5, -2.0]
    assert logprobs.top_logprobs[:3] == [None, {"a": -0.1}, {"b": -0.2}]
    assert listed[2]["logprobs"]["token_logprobs"] == [None], "the first token has none"


def test_chat_completion_has_the_bytes_of_each_token():
    read = ChatCompletion.model_validate(form(chat=True).whole(choices()))
    first = read.choices[0]
    assert (first.message.role, first.message.content, read.object) == ("assistant", "one", "chat.completion")
    assert [(one.token, one.bytes) for one in first.logprobs.content] == [("a", [97]), ("\ufffd", [0xC3])]
    assert [one.token for one in first.logprobs.content[1].top_logprobs] == ["b", "\ufffd"]


def test_tokens_that_are_bytes_are_told_apart():
    """The bytes of OpenAI's form are those of the token, also in SentencePiece's form; a real U+FFFD has its own."""
    byte_level = [*TOKENIZER("é\ufffd")["input_ids"]]
    pieces = {piece: i for i, piece in enumerate(["<unk>", "a", "\ufffd", *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fallback = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    sampling = Sampling(logprobs=3)
    for tokenizer, tokens, names, contents in (
        (TOKENIZER, byte_level[:2], ["bytes:\\xc3", "bytes:\\xa9"], [[0xC3], [0xA9]]),
        (fallback, [3 + 0xE9, 3 + 0x41, 2], ["bytes:\\xe9", "A", "\ufffd"], [[0xE9], [0x41], [0xEF, 0xBF, 0xBD]]),
    ):
        one = TokenLogprob(tokens[0], -1.0, tuple((token, -1.0) for token in tokens))
        text, chat = (
            Form(Ask("tiny", ((1,),), (5,), sampling, chat=chat), tokenizer).whole([Choice("", 1, [one], (), "stop")])
            for chat in (False, True)
        )
        assert [*text["choices"][0]["logprobs"]["top_logprobs"][0]] == names
        assert [top["bytes"] for top in chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"]] == contents


def test_a_token_is_decoded_once():
    decoded = []

    class Counted:
        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

        def __call__(self, *args, **settings):
            return TOKENIZER(*args, **settings)

        def decode(self, tokens, **settings):
            decoded.append(tokens)
            return TOKENIZER.decode(tokens, **settings)

    shape = Form(Ask("tiny", ((1,),), (500,), Sampling(logprobs=1), chat=True), Counted())
    shape.whole([Choice("x", 500, [TokenLogprob(A, -0.5, ((A, -0.5), (B, -1.5)))] * 250, (), "stop")])
    per_token = 2 * 250  # for the offsets
    assert len(decoded) < per_token + 20


def test_chunks_of_a_chat_begin_with_the_role_and_end_with_usage():
    shape = form(chat=True)
    first, middle = (
        ChatCompletionChunk.model_validate(one) for one in (shape.first(1), shape.chunk(1, "on", LOGPROBS[0], "stop"))
    )
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert middle.choices[0].delta.content == "on" and middle.choices[0].finish_reason == "stop"
    assert middle.choices[0].logprobs.content[0].logprob == -0.5 and first.id == middle.id
    last = ChatCompletionChunk.model_validate(shape.last(choices()))
    assert last.choices == [] and last.usage.total_tokens == 9


def test_chunks_of_a_completion_have_no_logprobs_unless_asked():
    plain = form(sampling=Sampling())
    assert Completion.model_validate(plain.chunk(0, "a", None, "stop")).choices[0].logprobs is None
    read = Completion.model_validate(form().chunk(0, "a", LOGPROBS[0], "length", offset=7))
    assert read.choices[0].logprobs.text_offset == [7] and read.usage is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (413, "invalid_request_error"), (401, "authentication_error"),
     (404, "not_found_error"), (429, "rate_limit_error"), (500, "server_error"), (503, "server_error")],
)  # fmt: skip
def test_errors_name_their_kind(status, kind):
    expected = {"message": "m", "type": kind, "param": "p", "code": None}
    assert error("m", status, "p") == {"error": expected}


def test_list_has_the_model():
    assert [one["id"] for one in model_list("tiny", 7, 97)["data"]] == ["tiny"]


def test_offsets_are_those_of_the_echoed_text_whole_or_streamed():
    """A character of several tokens counts once, for its last token; a special token has no text."""
    text = "é\U0001f642 is"
    tokens = tuple(TOKENIZER(text)["input_ids"])
    prompt, answer = tokens[:5], tokens[5:]
    ask = Ask("tiny", (prompt,), (5,), Sampling(logprobs=0), echo=True, prompt_texts=(text[:1],))
    shape = Form(ask, TOKENIZER)
    scored, later = ([TokenLogprob(token, -1.0) for token in some] for some in (prompt[1:], answer))
    whole = shape.whole([Choice(text[1:], len(answer), later, tuple(scored), "stop")])
    assert whole["choices"][0]["logprobs"]["text_offset"][:5] == [0, 0, 1, 1, 1]
    in_answer = whole["choices"][0]["logprobs"]["text_offset"][5:]
    offsets = shape.offsets(0)
    assert in_answer == [offsets.add(one.token) for one in later] == [1, 2, 3, 4]


def test_offsets_of_an_echoed_prompt_count_its_special_tokens():
    """A first token that the tokenizer added, and the text does not have, takes no place in it."""
    tokenizer = tiny_tokenizer(bos_token="<begin>", eos_token="<end>")
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text, tokens, places in (
        ("a<end>b", (A, end, B), [0, 1, 6]),
        ("<begin>ab", (begin, A, B), [0, 7, 8]),
        ("ab", (begin, A, B), [0, 0, 1]),
        ("a<end>", (begin, A, end), [0, 0, 1]),
    ):
        ask = Ask("tiny", (tokens,), (5,), Sampling(logprobs=0), echo=True, prompt_texts=(text,))
        scores = tuple(TokenLogprob(token, -1.0, ()) for token in tokens[1:])
        whole = Form(ask, tokenizer).whole([Choice("b", 1, [TokenLogprob(B, -1.0, ())], scores, "stop")])
        assert whole["choices"][0]["logprobs"]["text_offset"] == [*places, len(text)]


def test_half_of_a_surrogate_pair_in_an_error_is_written_as_its_number():
    assert error("no \ud800", 400, "a\udc00")["error"]["message"] == "no \\ud800"
    assert json.dumps(error("no \ud800", 400, "a\udc00"), ensure_ascii=False).encode()
