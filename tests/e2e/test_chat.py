"""The platform as its users and their programs see it: through the gateway, with the official client."""

import openai
import pytest

from .conftest import Lab

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client: openai.OpenAI, **more):
    return client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, **more)


def test_answers(platform: Lab) -> None:
    answer = ask(platform.openai())
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streams_what_it_answers(platform: Lab) -> None:
    client = platform.openai()
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = ask(client)
    assert text == whole.choices[0].message.content
    # What was cached may differ: the second request finds the first one's beginning, or another replica.
    counts = [(u.prompt_tokens, u.completion_tokens, u.total_tokens) for u in (chunks[-1].usage, whole.usage)]
    assert counts[0] == counts[1]
    assert len(chunks) > whole.usage.completion_tokens // 2


def test_says_when_an_answer_was_cut(platform: Lab) -> None:
    answer = ask(platform.openai(), max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_lists_the_model(platform: Lab) -> None:
    assert [model.id for model in platform.openai().models.list()] == [MODEL]


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (openai.NotFoundError, {"model": "gpt-none"}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"max_tokens": 0}),
        (openai.BadRequestError, {"max_tokens": 1_000_000}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "word " * 20_000}]}),
        (openai.BadRequestError, {"temperature": 9}),
    ],
)
def test_refuses_in_words(platform: Lab, error: type[openai.APIStatusError], change: dict) -> None:
    with pytest.raises(error) as refused:
        platform.openai().chat.completions.create(**({"model": MODEL, "messages": QUESTION} | change))
    assert refused.value.body["message"]


def test_refuses_a_wrong_key(platform: Lab) -> None:
    client = platform.openai().with_options(api_key=platform.key[:-1] + "!")
    with pytest.raises(openai.AuthenticationError):
        ask(client)


def test_serves_the_chat_page(platform: Lab) -> None:
    page = platform.http().get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src" in page.headers["content-security-policy"]
    assert page.headers["strict-transport-security"]


def test_a_request_id_comes_back(platform: Lab) -> None:
    assert len(platform.http().get("/v1/models").headers["x-request-id"]) >= 16
