"""A Python gRPC client against the public Inference service."""

from collections.abc import Iterable

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from headrace.v1.inference_pb2 import (
    Chat,
    ChatMessage,
    GenerateDelta,
    GenerateRequest,
    ListModelsRequest,
    TokenIds,
    TokenizeRequest,
)
from headrace.v1.inference_pb2_grpc import InferenceStub
from headrace.v1.sampling_pb2 import FinishReason, Sampling, Stopping

GREEDY = Sampling(temperature=0)
SIXTEEN = Stopping(max_tokens=16, ignore_eos=True)
CAPITAL = Chat(messages=[ChatMessage(role="user", content="What is the capital of France?")])
STORY = "Once upon a time"
NAN = float("nan")


def text_of(deltas: Iterable[GenerateDelta], choice: int = 0) -> str:
    """The text of one choice; checks on the way that nothing is skipped, repeated or reordered."""
    text = ""
    seq = 0
    for delta in deltas:
        if delta.choice != choice or (delta.HasField("usage") and not (delta.text or delta.token_ids)):
            continue
        assert delta.seq == seq
        assert delta.text_offset == len(text)
        text += delta.text
        seq += 1
    return text


def test_chat(inference: InferenceStub, model: str) -> None:
    request = GenerateRequest(model=model, chat=CAPITAL, sampling=GREEDY, stopping=Stopping(max_tokens=32))
    deltas = list(inference.Generate(request, timeout=120))
    assert "Paris" in text_of(deltas)
    reasons = [delta.finish_reason for delta in deltas if delta.finish_reason]
    assert reasons == [FinishReason.FINISH_REASON_STOP]
    assert len({delta.request_id for delta in deltas}) == 1


def test_text_and_its_token_ids_give_the_same(inference: InferenceStub, model: str) -> None:
    ids = inference.Tokenize(TokenizeRequest(model=model, text=STORY)).token_ids
    prompts: list[dict[str, Message | str]] = [{"text": STORY}, {"token_ids": TokenIds(ids=ids)}]
    answers = []
    for prompt in prompts:
        request = GenerateRequest(model=model, sampling=GREEDY, stopping=SIXTEEN, **prompt)  # type: ignore[arg-type]
        deltas = list(inference.Generate(request, timeout=120))
        answers.append((text_of(deltas), [token for delta in deltas for token in delta.token_ids]))
        usage = deltas[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 16)
        assert [delta for delta in deltas[:-1] if delta.HasField("usage")] == []
    assert answers[0] == answers[1]
    assert len(answers[0][1]) == 16


def test_two_choices(inference: InferenceStub, model: str) -> None:
    sampling = Sampling(temperature=1.0, seed=11)
    request = GenerateRequest(model=model, text=STORY, sampling=sampling, stopping=SIXTEEN, n=2)
    deltas = list(inference.Generate(request, timeout=120))
    assert text_of(deltas, 0) != text_of(deltas, 1)
    assert deltas[-1].usage.completion_tokens == 32


def test_models_and_tokens(inference: InferenceStub, model: str) -> None:
    (card,) = inference.ListModels(ListModelsRequest()).models
    assert card.name == model
    assert card.max_context_tokens > 0
    ids = inference.Tokenize(TokenizeRequest(model=model, chat=CAPITAL)).token_ids
    assert 0 < len(ids) < 100
    assert max(ids) < card.vocabulary_size


def test_a_request_id_comes_back(inference: InferenceStub, model: str) -> None:
    request = GenerateRequest(model=model, text=STORY, stopping=Stopping(max_tokens=1))
    deltas = inference.Generate(request, metadata=(("x-request-id", "my-own-id"),), timeout=120)
    assert {delta.request_id for delta in deltas} == {"my-own-id"}


def test_a_cancelled_call_is_over(inference: InferenceStub, model: str) -> None:
    request = GenerateRequest(model=model, text=STORY, stopping=Stopping(max_tokens=4000, ignore_eos=True))
    call = inference.Generate(request, timeout=120)
    next(iter(call))
    call.cancel()
    with pytest.raises(grpc.RpcError) as ended:
        list(call)
    assert ended.value.code() is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize(
    ("request_fields", "code", "words"),
    [
        ({"model": "nobody", "text": "x"}, grpc.StatusCode.NOT_FOUND, "nobody"),
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"text": "x", "n": 0}, grpc.StatusCode.INVALID_ARGUMENT, "n "),
        ({"text": "x", "stopping": Stopping(max_tokens=0)}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (
            {"text": "x", "sampling": Sampling(temperature=float("nan"))},
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature",
        ),
        ({"token_ids": TokenIds(ids=[2**31])}, grpc.StatusCode.INVALID_ARGUMENT, "token"),
    ],
)
def test_mistakes_are_named(
    inference: InferenceStub, model: str, request_fields: dict[str, object], code: grpc.StatusCode, words: str
) -> None:
    request = GenerateRequest(**{"model": model, **request_fields})  # type: ignore[arg-type]
    with pytest.raises(grpc.RpcError) as refused:
        list(inference.Generate(request, timeout=60))
    assert refused.value.code() is code
    assert words in refused.value.details()


def test_reflection_and_health(channel: grpc.Channel) -> None:
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (reply,) = stub.ServerReflectionInfo(iter([asked]))  # type: ignore[attr-defined]
    names = {service.name for service in reply.list_services_response.service}
    assert {"headrace.v1.Inference", "grpc.health.v1.Health"} <= names
    for name in ("", "headrace.v1.Inference"):
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        assert check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
