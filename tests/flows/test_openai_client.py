"""The official OpenAI client against the whole stack."""

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

CAPITAL: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time, in a village by the sea, there lived"


def complete(client: openai.OpenAI, model: str, max_tokens: int = 24, prompt: str = STORY, **options: object) -> str:
    """The text of a greedy completion."""
    answer = client.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=max_tokens, extra_body=options
    )
    return answer.choices[0].text


def test_models_are_listed(client: openai.OpenAI, model: str) -> None:
    assert [entry.id for entry in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def test_the_capital_of_france(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=CAPITAL, temperature=0, max_tokens=32)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_says_the_same(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=CAPITAL, temperature=0, max_tokens=32)
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=CAPITAL,
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *deltas, last = chunks
    assert deltas[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in deltas if chunk.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert whole.usage is not None and last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_streamed_completion_says_the_same(client: openai.OpenAI, model: str) -> None:
    chunks = list(client.completions.create(model=model, prompt=STORY, temperature=0, max_tokens=24, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == complete(client, model)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_a_greedy_answers_tokens_are_the_likeliest(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=CAPITAL, temperature=0, max_tokens=32, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == answer.usage.completion_tokens
    spelled = bytes(byte for token in content for byte in token.bytes or []).decode()
    assert spelled == (answer.choices[0].message.content or "") + "<|im_end|>"
    for token in content:
        likeliest, second = token.top_logprobs
        assert (likeliest.token, likeliest.logprob) == (token.token, token.logprob)
        assert second.logprob <= likeliest.logprob < 0


def test_a_bias_forbids_a_token(client: openai.OpenAI, http: httpx.Client, model: str) -> None:
    first = http.post("/tokenize", json={"model": model, "prompt": complete(client, model, 1)}).json()
    assert complete(client, model, 1, logit_bias={str(first["tokens"][0]): -100}) != complete(client, model, 1)


def test_usage_counts_tokens(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=[100, 200, 300], max_tokens=7, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 7)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, model: str, stream: bool) -> None:
    text = complete(client, model)
    stop = text[9:16]  # begins and ends within tokens
    options = {"model": model, "prompt": STORY, "temperature": 0, "max_tokens": 24, "stop": [stop, "never there"]}
    if stream:
        chunks = list(client.completions.create(**options, stream=True))  # type: ignore[call-overload]
        ended, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(**options).choices[0]  # type: ignore[call-overload]
        ended, reason = choice.text, choice.finish_reason
    assert ended == text[: text.index(stop)]
    assert reason == "stop"


def test_a_seed_repeats_its_draws(client: openai.OpenAI, model: str) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(
            model=model, prompt=STORY, temperature=1.0, max_tokens=16, seed=seed, n=2, extra_body={"ignore_eos": True}
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        return [choice.text for choice in answer.choices]

    first = draw(7)
    assert first == draw(7)
    assert first[0] != first[1], "choices draw apart"
    assert first != draw(8)


def test_streamed_choices_are_told_apart_by_index(client: openai.OpenAI, model: str) -> None:
    texts = {0: "", 1: ""}
    reasons: dict[int, str] = {}
    for chunk in client.chat.completions.create(
        model=model, messages=CAPITAL, temperature=1, seed=3, n=2, max_tokens=12, stream=True
    ):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    whole: ChatCompletion = client.chat.completions.create(
        model=model, messages=CAPITAL, temperature=1, seed=3, n=2, max_tokens=12
    )
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


def test_several_prompts_in_one_request(client: openai.OpenAI, model: str) -> None:
    prompts = ["The sun is", "Water boils at", "My name is"]
    answer = client.completions.create(model=model, prompt=prompts, temperature=0, max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [complete(client, model, 8, prompt) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == alone


def test_a_message_may_come_in_parts(client: openai.OpenAI, model: str) -> None:
    parts: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}
    ]
    answers = [
        client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
        for messages in (parts, CAPITAL)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize("priority", ["high", "normal", "low"])
def test_every_priority_is_served(client: openai.OpenAI, model: str, priority: str) -> None:
    assert complete(client, model, 4, priority=priority) == complete(client, model, 4)


def test_an_unknown_model_is_the_clients_error_type(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.chat.completions.create(model="no-such-model", messages=CAPITAL)
